"""Filters over ``jnp.fft``: WHAT is selected in the spectrum of a residual.

Frequencies are measured in Nyquist units: radius 1 is half a cycle per pixel along an axis, the corner of the spectrum is
sqrt(2), and ``cutoff * min(H, W) / 2`` is the same radius in DFT bins. Masks live on the ``rfft2`` grid [H, W//2+1]; they
depend on the radius alone, hence are Hermitian for every H and W, odd ones too.

All transforms use ``norm="ortho"``: white noise of variance 1 then has power 1 in every bin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxunlearn.types import Array, Filter

Cutoff = float | np.ndarray | Callable[[Array], Array]
"""A radius in Nyquist units; a table [T] over t; or a function ``t [B] -> [B]``."""

CORNER = float(np.sqrt(2.0))
"""Radius of the highest frequency; a cutoff at or above it keeps everything."""


def radius(height: int, width: int) -> np.ndarray:
    """Radius of each bin of the rfft2 grid in Nyquist units: float64 [H, W//2+1]."""
    fy = np.fft.fftfreq(height)[:, None] / 0.5
    fx = np.fft.rfftfreq(width)[None, :] / 0.5
    return np.sqrt(fy**2 + fx**2)


def half_plane_weights(width: int) -> np.ndarray:
    """How often each column of the rfft2 grid occurs in the full spectrum: float64 [W//2+1], 1 or 2."""
    weights = np.full(width // 2 + 1, 2.0)
    weights[0] = 1.0
    if width % 2 == 0:
        weights[-1] = 1.0
    return weights


def _ideal(rho, cutoff):
    # A hair of tolerance, so that a cutoff meant to lie on a grid radius includes it in float32 and float64 alike.
    return (rho <= cutoff * (1 + 1e-6)).astype(jnp.result_type(float))


def _gaussian(rho, cutoff):
    return jnp.exp(-(rho**2) / (2 * cutoff**2))


def _butterworth(order):
    return lambda rho, cutoff: (1 + (rho / cutoff) ** (2 * order)) ** -0.5


def _profile(kind: str, order: int):
    profiles = {"ideal": _ideal, "gaussian": _gaussian, "butterworth": _butterworth(order)}
    if kind not in profiles:
        raise ValueError(f"unknown filter kind {kind!r}; known: {', '.join(profiles)}")
    return profiles[kind]


def _cutoff_at(cutoff: Cutoff, t: Array) -> Array:
    """The cutoff as [1, 1] (constant) or [B, 1, 1] (a function of t), to meet a radius grid [H, W//2+1]."""
    if callable(cutoff):
        return jnp.asarray(cutoff(t))[:, None, None]
    if np.ndim(cutoff) == 0:
        return jnp.asarray(float(cutoff), jnp.result_type(float))
    return jnp.asarray(np.asarray(cutoff, np.float64))[t][:, None, None]


def _check_cutoff(cutoff: Cutoff) -> None:
    if not callable(cutoff) and not (np.all(np.isfinite(cutoff)) and np.all(np.asarray(cutoff) > 0)):
        raise ValueError(
            f"cutoff must be positive and finite (Nyquist units, 1 = half a cycle per pixel), got {cutoff}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class RadialFilter:
    """A filter whose transfer function depends on the radius (and on t where the cutoff does).

    Attributes:
      transfer: ``(rho [H,W//2+1], t [B]) -> [H,W//2+1] or [B,H,W//2+1]``.
      passband: divide the energy by the mean of the squared mask, so that white noise keeps its mean square.
    """

    transfer: Callable[[Array, Array], Array]
    passband: bool = False

    def mask(self, height: int, width: int, t: Array) -> Array:
        """Transfer function on the rfft2 grid: [H, W//2+1], or [B, H, W//2+1] where the cutoff depends on t."""
        mask = self.transfer(jnp.asarray(radius(height, width)), t)
        if self.passband:
            share = jnp.sum(mask**2 * half_plane_weights(width), axis=(-2, -1), keepdims=True) / (height * width)
            # A band between two grid radii of a small image is empty; it stays zero.
            mask = mask / jnp.sqrt(jnp.where(share > 0, share, 1))
        return mask

    def __call__(self, x: Array, t: Array) -> Array:
        """The filtered images, [B,H,W,C] in the dtype of x (halves pass through float32: rfft2 has no other)."""
        height, width = x.shape[1:3]
        spectrum = jnp.fft.rfft2(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axes=(1, 2), norm="ortho")
        spectrum = spectrum * _with_channels(self.mask(height, width, t))
        return jnp.fft.irfft2(spectrum, s=(height, width), axes=(1, 2), norm="ortho").astype(x.dtype)


def _with_channels(mask: Array) -> Array:
    return mask[..., None] if mask.ndim == 3 else mask[None, ..., None]


def _normalise(normalise: str | None) -> bool:
    if normalise not in (None, "passband"):
        raise ValueError(f"normalise must be None or 'passband', got {normalise!r}")
    return normalise == "passband"


def low_pass(cutoff: Cutoff, kind: str = "ideal", *, order: int = 2, normalise: str | None = None) -> RadialFilter:
    """Keeps radii up to ``cutoff``.

    Args:
      cutoff: radius in Nyquist units; a table over t; or a function of t. An ideal filter with a cutoff of sqrt(2) or
        more is the identity.
      kind: ``ideal`` 1[rho <= cutoff]; ``gaussian`` exp(-rho^2 / (2 cutoff^2)); ``butterworth``
        (1 + (rho/cutoff)^(2 order))^(-1/2).
      order: of the Butterworth filter.
      normalise: ``"passband"`` divides the energy by the mean squared mask.

    Raises:
      ValueError: unknown kind, cutoff not positive.
    """
    _check_cutoff(cutoff)
    profile = _profile(kind, order)
    return RadialFilter(lambda rho, t: profile(rho, _cutoff_at(cutoff, t)), _normalise(normalise))


def high_pass(cutoff: Cutoff, kind: str = "ideal", *, order: int = 2, normalise: str | None = None) -> RadialFilter:
    """``1 - low_pass``: keeps radii above ``cutoff``. The signals of both add to the input; the arguments are the same."""
    _check_cutoff(cutoff)
    profile = _profile(kind, order)
    return RadialFilter(lambda rho, t: 1 - profile(rho, _cutoff_at(cutoff, t)), _normalise(normalise))


def band(
    low: Cutoff, high: Cutoff, kind: str = "ideal", *, order: int = 2, normalise: str | None = None
) -> RadialFilter:
    """``low_pass(high) - low_pass(low)``: keeps radii in (low, high]. ``low < high`` where both are numbers."""
    _check_cutoff(low)
    _check_cutoff(high)
    if np.ndim(low) == np.ndim(high) == 0 and not callable(low) and not callable(high) and not low < high:
        raise ValueError(f"band needs low < high, got {low} and {high}")
    profile = _profile(kind, order)
    return RadialFilter(
        lambda rho, t: profile(rho, _cutoff_at(high, t)) - profile(rho, _cutoff_at(low, t)), _normalise(normalise)
    )


def masked_energy(x: Array, t: Array, filter: Filter) -> Array:
    """``sum_hwc (filter x)^2`` from one rfft2 (Parseval): [B,H,W,C] -> [B], float32 or float64."""
    height, width = x.shape[1:3]
    spectrum = jnp.fft.rfft2(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axes=(1, 2), norm="ortho")
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    weights = filter.mask(height, width, t) ** 2 * half_plane_weights(width)
    return jnp.sum(_with_channels(weights.astype(power.dtype)) * power, axis=(1, 2, 3))


class RadialSpectrum(NamedTuple):
    """Mean power per shell of equal radius.

    Attributes:
      bins: [K] = 1..K, radius of the shell in DFT bins of the shorter side.
      power: float64 [K], mean of abs(fft2)^2 over shell, images and channels (white noise of variance v: v).
      dc: float64 scalar, the same for the zero frequency.
      count: float64 [K], number of bins of the full spectrum in the shell.
    """

    bins: np.ndarray
    power: np.ndarray
    dc: float
    count: np.ndarray


def radial_spectrum(images: np.ndarray) -> RadialSpectrum:
    """Power of images [N,H,W,C] (in the model's own range) by shells ``round(radius in bins)``, on the host in float64."""
    images = np.asarray(images, np.float64)
    height, width = images.shape[1:3]
    power = np.abs(np.fft.rfft2(images, axes=(1, 2), norm="ortho")) ** 2
    power = power.mean(axis=(0, 3))
    shell = np.rint(radius(height, width) * min(height, width) / 2).astype(int)
    weights = np.broadcast_to(half_plane_weights(width), shell.shape)
    count = np.bincount(shell.ravel(), weights.ravel())
    total = np.bincount(shell.ravel(), (weights * power).ravel())
    mean = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
    return RadialSpectrum(np.arange(1, len(count)), mean[1:], float(mean[0]), count[1:])
