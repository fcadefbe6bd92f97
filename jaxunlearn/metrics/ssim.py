"""Structural similarity of two images (SSIM, Wang et al. 2004): 1 for equal ones, about 0 for unrelated ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.types import Array

WINDOW, WIDTH = 11, 1.5
K1, K2 = 0.01, 0.03


def window_size(height: int, width: int) -> int:
    """Side of the window: 11, or the largest odd number that fits into a smaller image.

    >>> window_size(28, 28), window_size(8, 8)
    (11, 7)
    """
    return min(WINDOW, (min(height, width) - 1) // 2 * 2 + 1)


def ssim(first: Array, second: Array) -> Array:
    """Mean over all full windows and channels: images [B,H,W,C] in [0, 1] -> [B].

    With Gaussian weights of width 1.5 in a window of 11 x 11 and population moments (Eq. 13 and section III.C of the
    paper): ``(2 m1 m2 + c1)(2 s12 + c2) / ((m1^2 + m2^2 + c1)(s1^2 + s2^2 + c2))``, ``c1 = 0.01^2``, ``c2 = 0.03^2``.

    Raises:
      ValueError: images of different shapes.
    """
    if first.shape != second.shape or first.ndim != 4:
        raise ValueError(f"images must be [B,H,W,C] of one shape, got {first.shape} and {second.shape}")
    height, width = first.shape[1:3]
    size = window_size(height, width)
    down, across = (_windows(length, size, first.dtype) for length in (height, width))

    def mean(x):
        return jnp.einsum("ih,bhwc,jw->bijc", down, x, across, precision=jax.lax.Precision.HIGHEST)

    m1, m2 = mean(first), mean(second)
    # Centred on the images' common mean, so that the differences of squares do not cancel.
    centre = jnp.mean(first + second, axis=(1, 2), keepdims=True) / 2
    a, b = first - centre, second - centre
    n1, n2 = m1 - centre, m2 - centre
    s1, s2, s12 = mean(a * a) - n1 * n1, mean(b * b) - n2 * n2, mean(a * b) - n1 * n2
    c1, c2 = K1**2, K2**2
    return jnp.mean((2 * m1 * m2 + c1) * (2 * s12 + c2) / ((m1**2 + m2**2 + c1) * (s1 + s2 + c2)), axis=(1, 2, 3))


def _windows(length: int, size: int, dtype) -> Array:
    """The Gaussian window at each place where it fits: [length - size + 1, length]."""
    weights = np.exp(-0.5 * ((np.arange(size) - size // 2) / WIDTH) ** 2)
    out = np.zeros((length - size + 1, length))
    for place in range(len(out)):
        out[place, place : place + size] = weights / weights.sum()
    return jnp.asarray(out, dtype)
