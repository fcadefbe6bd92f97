"""The two-dimensional discrete Fourier transform of real images as matrix products, for any height and width.

An optional replacement of ``jnp.fft`` in :mod:`jaxunlearn.frequency` (``backend="matmul"``). It compiles faster on some
accelerators, is never gathered over devices by automatic sharding, and computes only the rows and columns that it is asked
for: a low-pass filter needs few. All transforms use the orthonormal scaling.

With ``x`` real, ``C`` and ``S`` the cosine and sine matrices of a side, and ``A = x C_w``, ``B = x S_w``:

    X = (C_h - i S_h) (A - i B) = (C_h A - S_h B) - i (S_h A + C_h B)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.types import Array

# Accelerators multiply float32 matrices in fewer bits unless they are told not to.
PRECISION = jax.lax.Precision.HIGHEST


def _angles(size: int, frequencies: np.ndarray) -> np.ndarray:
    # The product modulo the size keeps the angles exact for large sides.
    return 2 * np.pi * (np.outer(np.arange(size), frequencies) % size) / size


def _matrices(size: int, frequencies: np.ndarray, dtype) -> tuple[Array, Array]:
    """Cosine and sine matrices [size, K], orthonormal scaling, in the given type."""
    angles, scale = _angles(size, frequencies), 1 / np.sqrt(size)
    return jnp.asarray(np.cos(angles) * scale, dtype), jnp.asarray(np.sin(angles) * scale, dtype)


def _over_width(x: Array, matrix: Array) -> Array:
    return jnp.einsum("bhwc,wk->bhkc", x, matrix, precision=PRECISION)


def _over_height(x: Array, matrix: Array) -> Array:
    return jnp.einsum("bhkc,hj->bjkc", x, matrix, precision=PRECISION)


def rows_and_columns(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row and column frequencies of a transfer function [H, W//2+1] in which it is anywhere different from 0."""
    used = np.asarray(mask) != 0
    return np.flatnonzero(used.any(axis=1)), np.flatnonzero(used.any(axis=0))


def transform(x: Array, rows: np.ndarray, columns: np.ndarray) -> tuple[Array, Array]:
    """Real and imaginary part of ``rfft2(x, norm="ortho")`` at the given frequencies.

    Args:
      x: [B,H,W,C], float32 or float64.
      rows: frequencies [J] along the height, in 0..H-1.
      columns: frequencies [K] along the width, in 0..W//2.

    Returns:
      Two arrays [B,J,K,C].
    """
    cos_w, sin_w = _matrices(x.shape[2], columns, x.dtype)
    cos_h, sin_h = _matrices(x.shape[1], rows, x.dtype)
    a, b = _over_width(x, cos_w), _over_width(x, sin_w)
    real = _over_height(a, cos_h) - _over_height(b, sin_h)
    imaginary = -(_over_height(a, sin_h) + _over_height(b, cos_h))
    return real, imaginary


def inverse(
    real: Array, imaginary: Array, rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int], weights: np.ndarray
) -> Array:
    """The real images of which :func:`transform` gives this half spectrum; frequencies left out count as 0.

    Args:
      real: [B,J,K,C].
      imaginary: [B,J,K,C].
      rows: frequencies [J].
      columns: frequencies [K].
      shape: (H, W).
      weights: how often each column occurs in the full spectrum [K], 1 or 2.

    Returns:
      [B,H,W,C].
    """
    height, width = shape
    cos_h, sin_h = (m.T for m in _matrices(height, rows, real.dtype))
    cos_w, sin_w = (m.T * jnp.asarray(weights, real.dtype)[:, None] for m in _matrices(width, columns, real.dtype))
    a = _over_height(real, cos_h) - _over_height(imaginary, sin_h)
    b = _over_height(real, sin_h) + _over_height(imaginary, cos_h)
    return _over_width(a, cos_w) - _over_width(b, sin_w)
