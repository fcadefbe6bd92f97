"""How photographs look, without any network: sharpness, total variation, high-frequency share and noise.

None has a good direction of its own: a blurred picture and a noisy one are both wrong. The yardstick is the value of the
keep images, or of a retrained model. Every function takes pictures [N,H,W,C], uint8 or floating in [0, 1], and gives one
number per picture, float32 [N]; channels are treated one by one and averaged.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxunlearn.frequency import half_plane_weights, radius
from jaxunlearn.types import Array

HIGH_BAND = 0.5
"""In Nyquist units: the radius above which a frequency counts as high."""

MIN_PHOTOGRAPH = 64
"""Pixels of the shorter side below which judges of photographs say nothing."""

_NOISE_MASK = ((1.0, -2.0, 1.0), (-2.0, 4.0, -2.0), (1.0, -2.0, 1.0))


def too_small(height: int, width: int) -> str | None:
    """Why networks that were trained on photographs do not judge pictures of this size; None if they do.

    >>> too_small(28, 28)
    'judges photographs, and pictures of 28x28 are none: at least 64 pixels; eval.photographs.force measures them anyway'
    """
    if min(height, width) >= MIN_PHOTOGRAPH:
        return None
    return (
        f"judges photographs, and pictures of {height}x{width} are none: at least {MIN_PHOTOGRAPH} pixels; "
        "eval.photographs.force measures them anyway"
    )


def sharpness(images: Array) -> Array:
    """Variance over the pixels of the discrete Laplacian (sum of the four neighbours minus four times the pixel).

    Raises:
      ValueError: another rank, or a side below 3.
    """
    x = _unit(images)
    inner = x[:, 1:-1, 1:-1]
    laplacian = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:] - 4 * inner
    return laplacian.var(axis=(1, 2)).mean(axis=-1)


def total_variation(images: Array) -> Array:
    """Mean absolute difference of neighbours, down plus across.

    Raises:
      ValueError: another rank, or a side below 3.
    """
    x = _unit(images)
    down, across = jnp.abs(jnp.diff(x, axis=1)), jnp.abs(jnp.diff(x, axis=2))
    return down.mean(axis=(1, 2, 3)) + across.mean(axis=(1, 2, 3))


def high_band_energy(images: Array) -> Array:
    """Share of the spectrum's energy, its mean left out, at radii above :data:`HIGH_BAND`; 0 for a constant picture.

    Raises:
      ValueError: another rank, or a side below 3.
    """
    x = _unit(images)
    height, width = x.shape[1:3]
    x = x - x.mean(axis=(1, 2), keepdims=True)
    spectrum = jnp.fft.rfft2(x, axes=(1, 2))
    power = (spectrum.real**2 + spectrum.imag**2) * half_plane_weights(width)[:, None]
    high = jnp.asarray(radius(height, width) > HIGH_BAND)[:, :, None]
    # A constant picture has the rounding errors of its mean only.
    total, tiny = power.sum(axis=(1, 2, 3)), 1e-10 * height * width
    return jnp.where(total > tiny, (power * high).sum(axis=(1, 2, 3)) / jnp.maximum(total, tiny), 0.0)


def noise_sigma(images: Array) -> Array:
    """Standard deviation of white noise in the picture, by the mask that a plane and most edges leave at zero.

    ``sqrt(pi/2) / (6 (W-2) (H-2)) * sum |I * [[1,-2,1],[-2,4,-2],[1,-2,1]]|``. The mask has the norm 6, and a Gaussian the
    mean magnitude ``sqrt(2/pi)`` of its standard deviation. Fine texture counts as noise.

    Source: Immerkaer 1996, "Fast Noise Variance Estimation".

    Raises:
      ValueError: another rank, or a side below 3.
    """
    x = _unit(images)
    height, width = x.shape[1:3]
    rows, columns = height - 2, width - 2
    response = sum(
        weight * x[:, i : i + rows, j : j + columns]
        for i, row in enumerate(_NOISE_MASK)
        for j, weight in enumerate(row)
    )
    return np.sqrt(np.pi / 2) / 6 * jnp.abs(response).mean(axis=(1, 2, 3))


MEASURES = {
    "sharpness": sharpness,
    "total_variation": total_variation,
    "high_band_energy": high_band_energy,
    "noise_sigma": noise_sigma,
}
"""Name in METRICS -> function."""


def _unit(images: Array) -> Array:
    if images.ndim != 4 or min(images.shape[1:3]) < 3:
        raise ValueError(f"pictures must be [N,H,W,C] with sides of at least 3, got shape {images.shape}")
    x = jnp.asarray(images)
    if x.dtype == jnp.uint8:
        return x.astype(jnp.float32) / 255
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"pictures must be uint8 or floating in [0, 1], got {x.dtype}")
    return x
