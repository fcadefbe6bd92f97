"""Combiners: the gradients of the terms become one direction. Signs, norms and projections live here, never in a loss.

Every combiner is a :class:`~jaxunlearn.types.Combine` and sees gradients that are already means over examples,
micro-batches and devices: combining is not linear, so it must come last. Norms are over the whole tree. The direction is
a gradient to *descend*.

With ``s = forget_sign`` (-1: the forget loss is ascended):

=================  ==========================================================================
``weighted_sum``   sum of weight * gradient
``fixed_norm``     g_keep + s c / |g_forget| g_forget
``relative_norm``  fixed_norm with c = rho |g_keep|
``erasediff``      g_keep + max(eta - <g_keep, g_forget> / |g_forget|^2, 0) g_forget
``pcgrad``         weighted sum after each gradient has lost its part against the other
=================  ==========================================================================

Every number of a combiner may be a function of the optimiser step (any optax schedule); the sign of the forget part may not
change: where c, rho or a weight of ``pcgrad`` must not be negative, negative values of a function count as zero.

``relative_norm`` is the safe default: it needs no tuning to the scale of the model, its ratio of the two parts is known at
every step, and for rho < 1 the keep loss falls to first order.

A forget gradient of norm zero gives a zero forget part, never NaN: a batch may hold no example inside a time window.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxunlearn.types import Array, Combine, PyTree

Scalar = float | Callable[[Array], Array]
"""A number, or a function of the optimiser step (any optax schedule)."""

TINY = 1e-20
"""Norms up to this count as zero; float32 squares underflow near it."""


def _at(value: Scalar, step: Array) -> Array:
    return value(step) if callable(value) else value


def _not_negative_at(value: Scalar, step: Array) -> Array:
    """The number at a step; a function's negative value would turn the forget part round and counts as zero."""
    return jnp.maximum(value(step), 0) if callable(value) else value


def _no_state(params: PyTree) -> tuple:
    return ()


def _need(grads: dict[str, PyTree], names: tuple[str, ...], who: str) -> list[PyTree]:
    if set(grads) != set(names):
        raise ValueError(f"{who} combines the terms {sorted(names)}, but the objective has {sorted(grads)}")
    return [grads[name] for name in names]


def tree_dot(a: PyTree, b: PyTree) -> Array:
    """Inner product of two trees of equal structure, in float32 or wider."""

    # A sum of products, not a matrix product: accelerators multiply float32 matrices in fewer bits.
    def inner(x, y):
        wide = jnp.promote_types(jnp.promote_types(x.dtype, y.dtype), jnp.float32)
        return jnp.sum(x.astype(wide) * y.astype(wide))

    return sum(jax.tree.leaves(jax.tree.map(inner, a, b)), start=jnp.zeros(()))


def tree_norm(tree: PyTree) -> Array:
    """Euclidean norm over all leaves, in float32 or wider."""
    return jnp.sqrt(tree_dot(tree, tree))


def _add_scaled(a: PyTree, scale: Array, b: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: x + (scale * y).astype(x.dtype), a, b)


def _reciprocal(x: Array) -> Array:
    """1/x, and 0 where x counts as zero."""
    return jnp.where(x > TINY, 1 / jnp.where(x > TINY, x, 1), 0)


def _scaled_forget(name: str, wanted_norm, forget_sign: int, max_scale: float) -> Combine:
    if forget_sign not in (-1, 1):
        raise ValueError(f"forget_sign must be -1 (ascend) or +1 (descend), got {forget_sign}")
    if not max_scale > 0:
        raise ValueError(f"max_scale must be positive, got {max_scale}")

    def apply(grads, state, step):
        keep, forget = _need(grads, ("keep", "forget"), name)
        keep_norm, forget_norm = tree_norm(keep), tree_norm(forget)
        scale = jnp.minimum(wanted_norm(keep_norm, step) * _reciprocal(forget_norm), max_scale)
        cosine = tree_dot(keep, forget) * _reciprocal(keep_norm) * _reciprocal(forget_norm)
        metrics = {
            "grad_norm/keep": keep_norm,
            "grad_norm/forget": forget_norm,
            "forget_scale": scale,
            "grad_cosine": cosine,
        }
        return _add_scaled(keep, forget_sign * scale, forget), state, metrics

    return Combine(_no_state, apply, forget_sign)


def weighted_sum(*, forget_sign: int | None = None, **weights: Scalar) -> Combine:
    """``sum_k weights[k] * g_k`` over exactly the named terms.

    Args:
      forget_sign: only where the forget weight is a function of the step, whose sign cannot be seen: -1 if it is negative
        (ascends the forget loss), +1 if it is positive. Values of the other sign then count as zero.
      **weights: term name -> number or function of the step. A negative forget weight ascends the forget loss.

    Raises:
      ValueError: no weight; a weight that is not finite; a missing or wrong ``forget_sign``; terms of the objective that
        differ from the names.

    >>> combine = weighted_sum(keep=1.0, forget=-0.5)
    >>> direction, _, _ = combine.apply({"keep": jnp.ones(2), "forget": jnp.ones(2)}, (), 0)
    >>> direction
    Array([0.5, 0.5], dtype=float32)
    """
    if not weights:
        raise ValueError("weighted_sum needs at least one weight, such as keep=1.0")
    for name, weight in weights.items():
        if not callable(weight) and not math.isfinite(weight):
            raise ValueError(f"the weight of {name!r} must be finite, got {weight}")
    sign = _weight_sign(weights["forget"], forget_sign) if "forget" in weights else 0
    if callable(weights.get("forget")):
        scheduled = weights["forget"]
        weights["forget"] = lambda step: sign * jnp.maximum(sign * scheduled(step), 0)

    def apply(grads, state, step):
        trees = _need(grads, tuple(weights), "weighted_sum")
        direction = jax.tree.map(jnp.zeros_like, trees[0])
        metrics = {}
        for name, tree in zip(weights, trees):
            metrics[f"grad_norm/{name}"] = tree_norm(tree)
            direction = _add_scaled(direction, _at(weights[name], step), tree)
        return direction, state, metrics

    return Combine(_no_state, apply, sign)


def _weight_sign(forget: Scalar, forget_sign: int | None) -> int:
    """The sign of a forget weight, which a function cannot tell by itself."""
    if forget_sign not in (None, -1, 0, 1):
        raise ValueError(f"forget_sign must be -1 (ascend) or +1 (descend), got {forget_sign}")
    if callable(forget):
        if not forget_sign:
            raise ValueError(
                "the forget weight of weighted_sum is a function of the step, so its sign must be a number: "
                "give forget_sign=-1 (it ascends the forget loss) or forget_sign=+1"
            )
        return forget_sign
    sign = (forget > 0) - (forget < 0)
    if forget_sign is not None and sign not in (0, forget_sign):
        raise ValueError(f"the forget weight {forget} of weighted_sum has not the sign forget_sign={forget_sign}")
    return sign if forget_sign is None else forget_sign


def fixed_norm(c: Scalar, *, forget_sign: int = -1, max_scale: float = math.inf) -> Combine:
    """The forget gradient is rescaled, up or down, to norm c (the ``scaling_norm`` of SISS).

    Args:
      c: wanted norm of the forget part, not negative (negative values of a function count as zero). The published values
        assume errors summed over pixels.
      forget_sign: -1 to ascend the forget loss (SISS), +1 to descend it.
      max_scale: upper bound of ``c / |g_forget|``.

    Raises:
      ValueError: negative c, bad sign or bound.
    """
    if not callable(c) and not (math.isfinite(c) and c >= 0):
        raise ValueError(f"fixed_norm needs a finite c >= 0, got {c}")
    return _scaled_forget("fixed_norm", lambda keep_norm, step: _not_negative_at(c, step), forget_sign, max_scale)


def relative_norm(rho: Scalar, *, forget_sign: int = -1, max_scale: float = math.inf) -> Combine:
    """The forget part has exactly rho times the norm of the keep gradient: the recommended default, rho = 0.1.

    For rho < 1 the keep loss falls to first order: ``<g_keep, direction> >= (1 - rho) |g_keep|^2``. Where rho is a function
    of the step, its negative values count as zero.

    Raises:
      ValueError: negative rho, bad sign or bound.
    """
    if not callable(rho) and not (math.isfinite(rho) and rho >= 0):
        raise ValueError(f"relative_norm needs a finite rho >= 0, got {rho}")

    def wanted_norm(keep_norm, step):
        return _not_negative_at(rho, step) * keep_norm

    return _scaled_forget("relative_norm", wanted_norm, forget_sign, max_scale)


def erasediff(eta: Scalar) -> Combine:
    """EraseDiff's bi-level step: ``g_keep + max(eta - <g_keep, g_forget> / |g_forget|^2, 0) g_forget``.

    The direction's inner product with g_forget is then at least ``eta |g_forget|^2``, so the (descended) forget loss
    falls. eta is the weight of the constraint, not a learning rate.

    Raises:
      ValueError: negative eta.
    """
    if not callable(eta) and not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"erasediff needs a finite eta >= 0, got {eta}")

    def apply(grads, state, step):
        keep, forget = _need(grads, ("keep", "forget"), "erasediff")
        keep_norm, forget_norm = tree_norm(keep), tree_norm(forget)
        inner = tree_dot(keep, forget)
        inverse = _reciprocal(forget_norm)
        scale = jnp.where(forget_norm > TINY, jnp.maximum(_at(eta, step) - inner * inverse * inverse, 0), 0)
        metrics = {
            "grad_norm/keep": keep_norm,
            "grad_norm/forget": forget_norm,
            "forget_scale": scale,
            "grad_cosine": inner * inverse * _reciprocal(keep_norm),
        }
        return _add_scaled(keep, scale, forget), state, metrics

    return Combine(_no_state, apply, +1)


def pcgrad(*, keep: Scalar = 1.0, forget: Scalar = 1.0, forget_sign: int = -1, two_sided: bool = True) -> Combine:
    """Gradient surgery: each gradient loses its component against the other, then both are added.

    With ``s = forget_sign``, the *original* gradients of the whole tree in both projections:

        h  = s g_forget                       what the forget part would descend
        q  = min(<h, g_keep>, 0)              negative where the two conflict
        h' = h - q / |g_keep|^2 g_keep        so <h', g_keep> >= 0
        k' = g_keep - q / |h|^2 h             so <k', h> >= 0
        direction = forget h' + keep k'

    Without a conflict it is the weighted sum. Exactly opposed gradients give zero: training stalls, which
    ``grad_cosine`` shows.
    Read in the code of restricted-gradient diversity unlearning (RGD), which takes keep = 5, forget = 1.

    Args:
      keep: weight of the keep part, a number >= 0 or a function of the step, whose negative values count as zero.
      forget: weight of the forget part, likewise; its direction is ``forget_sign``'s.
      forget_sign: -1 to ascend the forget loss, +1 to descend it.
      two_sided: False projects the forget gradient alone: ``direction = forget h' + keep g_keep``, in which the keep
        gradient is never weakened.

    Raises:
      ValueError: weights that are negative or not finite, a bad sign.
    """
    for name, weight in (("keep", keep), ("forget", forget)):
        if not callable(weight) and not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"pcgrad needs a finite {name} >= 0 (forget_sign says the direction), got {weight}")
    if forget_sign not in (-1, 1):
        raise ValueError(f"forget_sign must be -1 (ascend) or +1 (descend), got {forget_sign}")

    def apply(grads, state, step):
        g_keep, g_forget = _need(grads, ("keep", "forget"), "pcgrad")
        keep_norm, forget_norm = tree_norm(g_keep), tree_norm(g_forget)
        per_keep, per_forget = _reciprocal(keep_norm), _reciprocal(forget_norm)
        cosine = tree_dot(g_keep, g_forget) * per_keep * per_forget
        opposed = jnp.minimum(forget_sign * cosine, 0)  # q / (|g_keep| |h|)
        w_keep, w_forget = _not_negative_at(keep, step), _not_negative_at(forget, step)
        from_forget = -opposed * forget_norm * per_keep
        from_keep = -opposed * keep_norm * per_forget if two_sided else 0.0
        scale = jnp.where(forget_norm <= TINY, 0, w_forget + w_keep * from_keep)
        direction = jax.tree.map(lambda g: ((w_keep + w_forget * from_forget) * g).astype(g.dtype), g_keep)
        metrics = {
            "grad_norm/keep": keep_norm,
            "grad_norm/forget": forget_norm,
            "forget_scale": scale,
            "grad_cosine": cosine,
            "conflict": (opposed < 0).astype(cosine.dtype),
        }
        return _add_scaled(direction, forget_sign * scale, g_forget), state, metrics

    return Combine(_no_state, apply, forget_sign)


COMBINERS = {
    "weighted_sum": weighted_sum,
    "fixed_norm": fixed_norm,
    "relative_norm": relative_norm,
    "erasediff": erasediff,
    "pcgrad": pcgrad,
}
"""The one registry of combiners: name -> factory."""
