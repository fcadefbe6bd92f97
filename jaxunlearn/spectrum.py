"""What of an image survives the noise at each t, and the windows and cut-offs that follow from it.

With the orthonormal transform white noise has power 1 in every bin, so an image with radial power S(k) has
``SNR(k, t) = alpha^2 S(k) / sigma^2``, and

    bin k is resolved at t  where  log_snr(t) >= -log S(k)

(at SNR 1 the optimal linear denoiser passes one half). Hence a cutoff for every t, and a window for a range of bins. Our own
design, from no paper.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxunlearn.frequency import CORNER, RadialFilter, RadialSpectrum
from jaxunlearn.schedule import Schedule
from jaxunlearn.timesteps import window_from_log_snr
from jaxunlearn.types import Array

TINY_POWER = 1e-12
"""Power that counts as none: images in 8 bits have about 1e-5."""


def monotone_power(spectrum: RadialSpectrum) -> np.ndarray:
    """The power [K] as its running maximum from the high end, so that it falls with the radius: single images are noisy."""
    return np.maximum.accumulate(np.maximum(spectrum.power, TINY_POWER)[::-1])[::-1]


def _check_shells(spectrum: RadialSpectrum) -> None:
    if not len(spectrum.bins) or not np.any(spectrum.power > TINY_POWER):
        raise ValueError("the images have no structure (one pixel, or constant): there is no spectrum to choose from")


def log_power_at(spectrum: RadialSpectrum, bins: np.ndarray) -> np.ndarray:
    """Log of the monotone power at radii in bins, linear in log k between shells, constant beyond them."""
    at = np.log(np.maximum(np.asarray(bins, np.float64), 1e-9))
    return np.interp(at, np.log(spectrum.bins), np.log(monotone_power(spectrum)))


def resolved_bins(schedule: Schedule, spectrum: RadialSpectrum, *, snr: float = 1.0) -> np.ndarray:
    """The largest radius with ``alpha^2 S >= snr sigma^2`` at each t: float64 [T] in bins, falling with t.

    0 where not even the first shell is resolved, the last shell where all are.

    Raises:
      ValueError: snr not positive, images without structure.
    """
    if not snr > 0:
        raise ValueError(f"snr must be positive, got {snr}")
    _check_shells(spectrum)
    with np.errstate(divide="ignore"):
        log_snr = np.log(schedule.alphas_cumprod) - np.log1p(-schedule.alphas_cumprod)
    needed = np.log(snr) - log_snr  # log S must be at least this
    log_power = np.log(monotone_power(spectrum))
    # Where the power is flat the largest radius counts: a hair of slope makes the inverse unique.
    rising = -log_power + 1e-12 * np.arange(len(log_power))
    radius = np.exp(np.interp(-needed, rising, np.log(spectrum.bins)))
    radius = np.where(needed <= log_power[-1], float(spectrum.bins[-1]), radius)
    return np.where(needed > log_power[0], 0.0, radius)


def cutoff_from_spectrum(
    schedule: Schedule, spectrum: RadialSpectrum, *, snr: float = 1.0, floor_bins: float = 2.0
) -> np.ndarray:
    """The cutoff at each t: what is resolved there. Float64 [T] in Nyquist units, falling with t, for ``low_pass(table)``.

    Args:
      schedule: the noise schedule.
      spectrum: of the forget images in the model's own range.
      snr: signal-to-noise ratio that counts as resolved.
      floor_bins: the least cutoff; at large t only a handful of bins is left.

    Returns:
      The table; the identity (sqrt(2)) where even the corner is resolved.

    Raises:
      ValueError: snr or floor not positive, images without structure.
    """
    if not floor_bins > 0:
        raise ValueError(f"floor_bins must be positive, got {floor_bins}")
    bins = resolved_bins(schedule, spectrum, snr=snr)
    cutoff = np.minimum(2 * np.maximum(bins, floor_bins) / spectrum.size, CORNER)
    return np.where(bins >= spectrum.bins[-1], CORNER, cutoff)


def window_from_spectrum(
    schedule: Schedule, spectrum: RadialSpectrum, *, finest_bins: float | None = None, coarsest_bins: float = 1.0
) -> tuple[int, int]:
    """The window in which the bins from ``coarsest`` to ``finest`` come into being: (t1, t2).

    Args:
      schedule: the noise schedule.
      spectrum: of the forget images in the model's own range.
      finest_bins: resolved at the clean end; an eighth of the shorter side if None, but at least twice ``coarsest_bins``
        (tiny images).
      coarsest_bins: resolved at the noisy end.

    Raises:
      ValueError: finest < coarsest, images without structure, or no timestep in between.
    """
    _check_shells(spectrum)
    finest_bins = max(spectrum.size / 8, 2 * coarsest_bins) if finest_bins is None else finest_bins
    if not 0 < coarsest_bins <= finest_bins:
        raise ValueError(f"need 0 < coarsest_bins <= finest_bins, got {coarsest_bins} and {finest_bins}")
    high, low = (-float(log_power_at(spectrum, bins)) for bins in (finest_bins, coarsest_bins))
    return window_from_log_snr(schedule, high=high, low=low)


def wiener(schedule: Schedule, spectrum: RadialSpectrum, *, backend: str = "fft") -> RadialFilter:
    """The soft version without a cutoff: ``alpha^2 S / (alpha^2 S + sigma^2)``, the optimal linear denoiser's gain.

    Raises:
      ValueError: images without structure.
    """
    _check_shells(spectrum)
    bins, log_power = np.log(spectrum.bins), np.log(monotone_power(spectrum))
    log_dc = float(np.log(max(spectrum.dc, TINY_POWER)))

    def transfer(rho: Array, t: Array) -> Array:
        power = jnp.interp(jnp.log(jnp.maximum(rho, 1e-9)), jnp.asarray(bins), jnp.asarray(log_power))
        logit = jnp.where(rho > 0, power, log_dc) + schedule.log_snr(t)[:, None, None]
        return 1 / (1 + jnp.exp(-logit))

    return RadialFilter(transfer, unit="bins", backend=backend)
