"""Variants of the copy similarity of injected forget images. All are reconstructions, none is a published "SSCD norm".

``embed_fn`` maps images in [0, 1] [N,H,W,C] to descriptors [N, d] of length 1 (SSCD, or any other copy descriptor).
``forget`` are the forget images, ``before`` and ``after`` what the original and the unlearned model make of the same
noised forget images. Always report the plain similarity beside a variant.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.types import Array

EmbedFn = Callable[[Array], Array]
"""``images [N,H,W,C] in [0, 1] -> descriptors [N, d]`` of length 1."""


def sscd_projected(embed_fn: EmbedFn, forget: Array, after: Array, radius: float | Array) -> Array:
    """Similarity of the forget image and a point at a fixed distance from it towards the new output: [N]; lower is better.

    ``<phi(x_f), phi(clip(x_f + radius (x_u - x_f) / |x_u - x_f|))>``. It asks for the direction of the change and not for
    its size: before clipping it does not depend on ``|x_u - x_f|``. A reconstruction from a description in words; the
    radius of the original is not known (:func:`median_radius` is one choice). An output equal to the image gives 1.

    Args:
      embed_fn: the descriptor.
      forget: x_f [N,H,W,C] in [0, 1].
      after: x_u [N,H,W,C] in [0, 1].
      radius: L2 distance on [0, 1] pixels, one number or [N].

    Raises:
      ValueError: shapes that do not fit, or a radius that is not positive (where it is not traced).
    """
    forget, after = _same(forget, after)
    if not isinstance(radius, jax.core.Tracer) and np.any(np.asarray(radius) <= 0):
        raise ValueError(f"radius {radius}: must be positive, an L2 distance on [0, 1] pixels")
    length = _length(after - forget)
    step = jnp.asarray(radius, forget.dtype) / jnp.where(length > 0, length, 1.0)
    moved = jnp.clip(forget + step[:, None, None, None] * (after - forget), 0.0, 1.0)
    return _dot(embed_fn(forget), embed_fn(moved))


def median_radius(forget: Array, before: Array) -> float:
    """The median L2 distance of the original model's outputs [N,H,W,C] from the forget images [N,H,W,C].

    Raises:
      ValueError: shapes that do not fit.
    """
    forget, before = _same(forget, before)
    return float(jnp.median(_length(before - forget)))


def sscd_dissimilarity_rate(embed_fn: EmbedFn, forget: Array, after: Array) -> Array:
    """``(1 - <phi(x_f), phi(x_u)>) / |x_u - x_f|``: how much less alike per distance moved, [N]; higher is better.

    0 for an output equal to the image. A reconstruction.

    Raises:
      ValueError: shapes that do not fit.
    """
    forget, after = _same(forget, after)
    length = _length(after - forget)
    apart = 1.0 - _dot(embed_fn(forget), embed_fn(after))
    return jnp.where(length > 0, apart / jnp.where(length > 0, length, 1.0), 0.0)


def sscd_direction(embed_fn: EmbedFn, forget: Array, before: Array, after: Array) -> Array:
    """``cos(phi(x_u) - phi(x_o), phi(x_f) - phi(x_o))``: whether the descriptor moved to the image (1) or away (-1): [N].

    0 where two of the images are equal. A reconstruction.

    Raises:
      ValueError: shapes that do not fit.
    """
    forget, before = _same(forget, before)
    forget, after = _same(forget, after)
    origin = embed_fn(before)
    moved, wanted = embed_fn(after) - origin, embed_fn(forget) - origin
    lengths = jnp.linalg.norm(moved, axis=1) * jnp.linalg.norm(wanted, axis=1)
    # Equal images need not have bitwise equal descriptors under jit, and rounding has a direction as well.
    differ = (_length(after - before) > 0) & (_length(forget - before) > 0) & (lengths > 0)
    return jnp.where(differ, _dot(moved, wanted) / jnp.where(lengths > 0, lengths, 1.0), 0.0)


def sscd_calibrated(after: float, before: float, reference: float) -> float:
    """``(S_u - S_ref) / (S_before - S_ref)`` of mean similarities: 1 nothing forgotten, 0 as never seen, < 0 beyond.

    This library's own. ``reference`` comes from a retrained model, or from the injection of at least 64 held-out images.

    >>> sscd_calibrated(0.5, 0.9, 0.1)
    0.5

    Raises:
      ValueError: similarities outside [-1, 1], or no difference between before and reference.
    """
    if not all(-1.0 <= value <= 1.0 for value in (after, before, reference)):
        raise ValueError(f"similarities must lie in [-1, 1], got {after}, {before} and {reference}")
    if before == reference:
        raise ValueError(f"the similarity before equals the reference, {before}: there is nothing to calibrate with")
    return (after - reference) / (before - reference)


def _same(first: Array, second: Array) -> tuple[Array, Array]:
    first, second = jnp.asarray(first), jnp.asarray(second)
    if first.ndim != 4 or first.shape != second.shape:
        raise ValueError(f"images must be [N,H,W,C] of one shape, got {first.shape} and {second.shape}")
    return first, second


def _length(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(x**2, axis=(1, 2, 3)))


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, axis=1)
