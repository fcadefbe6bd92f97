"""Filters over ``jnp.fft``: WHAT is selected in the spectrum of a residual.

Frequencies are measured in Nyquist units: radius 1 is half a cycle per pixel along an axis, the corner of the spectrum is
sqrt(2). ``unit="bins"`` measures in DFT bins of the shorter side instead, ``bins = nyquist * min(H, W) / 2``: whole cycles
per image, which stay the same when the image is resized. Masks live on the ``rfft2`` grid [H, W//2+1]; they depend on the
radius alone, hence are Hermitian for every H and W, odd ones too.

All transforms use ``norm="ortho"``: white noise of variance 1 then has power 1 in every bin.

Low-pass selection of the forget term follows the abstract and the public reviews of arXiv 2510.17917. It is a
reconstruction: filters, cut-offs and the tensor they act on may differ from the authors' code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn import dft
from jaxunlearn.registry import look_up
from jaxunlearn.types import Array, Filter

Cutoff = float | np.ndarray | Callable[[Array], Array]
"""A radius in the filter's unit; a table [T] over t; or a function ``t [B] -> [B]``."""

UNITS = ("nyquist", "bins")
"""Units of a cutoff: half a cycle per pixel, or DFT bins of the shorter side."""

BACKENDS = ("fft", "matmul")
"""How the transform is computed: ``jnp.fft``, or products with cosine and sine matrices (:mod:`jaxunlearn.dft`)."""

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
    return look_up("filter kind", kind, {"ideal": _ideal, "gaussian": _gaussian, "butterworth": _butterworth(order)})


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
            "cutoff must be positive and finite (Nyquist units, 1 = half a cycle per pixel; "
            f"or bins with unit='bins'), got {cutoff}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class RadialFilter:
    """A filter whose transfer function depends on the radius (and on t where the cutoff does).

    Attributes:
      transfer: ``(rho [H,W//2+1], t [B]) -> [H,W//2+1] or [B,H,W//2+1]``, rho in ``unit``.
      passband: divide the energy by the mean of the squared mask, so that white noise keeps its mean square.
      unit: ``nyquist`` or ``bins``, see :data:`UNITS`.
      backend: ``fft`` or ``matmul``, see :data:`BACKENDS`.

    Raises:
      ValueError: unknown unit or backend.
    """

    transfer: Callable[[Array, Array], Array]
    passband: bool = False
    unit: str = "nyquist"
    backend: str = "fft"

    def __post_init__(self):
        look_up("unit of a cutoff", self.unit, dict.fromkeys(UNITS))
        look_up("filter backend", self.backend, dict.fromkeys(BACKENDS))

    def mask(self, height: int, width: int, t: Array) -> Array:
        """Transfer function on the rfft2 grid: [H, W//2+1], or [B, H, W//2+1] where the cutoff depends on t."""
        rho = radius(height, width) * (min(height, width) / 2 if self.unit == "bins" else 1)
        mask = self.transfer(jnp.asarray(rho), t)
        if self.passband:
            share = jnp.sum(mask**2 * half_plane_weights(width), axis=(-2, -1), keepdims=True) / (height * width)
            # A band between two grid radii of a small image is empty; it stays zero.
            mask = mask / jnp.sqrt(jnp.where(share > 0, share, 1))
        return mask

    def __call__(self, x: Array, t: Array) -> Array:
        """The filtered images, [B,H,W,C] in the dtype of x (halves pass through float32: rfft2 has no other)."""
        height, width = x.shape[1:3]
        wide = _wide(x)
        if self.backend == "matmul":
            mask, rows, columns = _used_part(self, height, width, t)
            mask = _with_channels(mask).astype(wide.dtype)
            real, imaginary = (part * mask for part in dft.transform(wide, rows, columns))
            weights = half_plane_weights(width)[columns]
            return dft.inverse(real, imaginary, rows, columns, (height, width), weights).astype(x.dtype)
        spectrum = jnp.fft.rfft2(wide, axes=(1, 2), norm="ortho") * _with_channels(self.mask(height, width, t))
        return jnp.fft.irfft2(spectrum, s=(height, width), axes=(1, 2), norm="ortho").astype(x.dtype)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _with_channels(mask: Array) -> Array:
    return mask[..., None] if mask.ndim == 3 else mask[None, ..., None]


def _used_part(filter: Filter, height: int, width: int, t: Array) -> tuple[Array, np.ndarray, np.ndarray]:
    """``(mask, rows, columns)``: where the mask does not depend on t, only the part of it that is not zero."""
    rows, columns = np.arange(height), np.arange(width // 2 + 1)
    # A mask that does not touch t is a number here already, even inside of jit.
    with jax.ensure_compile_time_eval():
        mask = filter.mask(height, width, t)
    if isinstance(mask, jax.core.Tracer) or mask.ndim == 3:
        return mask, rows, columns
    rows, columns = dft.rows_and_columns(np.asarray(mask))
    return mask[np.ix_(rows, columns)], rows, columns


def masked_energy(x: Array, t: Array, filter: Filter) -> Array:
    """``sum_hwc (filter x)^2`` from one transform (Parseval, no way back): [B,H,W,C] -> [B], float32 or float64."""
    height, width = x.shape[1:3]
    wide = _wide(x)
    weights = half_plane_weights(width)
    if getattr(filter, "backend", "fft") == "matmul":
        mask, rows, columns = _used_part(filter, height, width, t)
        real, imaginary = dft.transform(wide, rows, columns)
        weights = mask**2 * weights[columns]
    else:
        spectrum = jnp.fft.rfft2(wide, axes=(1, 2), norm="ortho")
        real, imaginary = spectrum.real, spectrum.imag
        weights = filter.mask(height, width, t) ** 2 * weights
    power = jnp.square(real) + jnp.square(imaginary)
    return jnp.sum(_with_channels(weights.astype(power.dtype)) * power, axis=(1, 2, 3))


def _normalise(normalise: str | None) -> bool:
    if normalise not in (None, "passband"):
        raise ValueError(f"normalise must be None or 'passband', got {normalise!r}")
    return normalise == "passband"


def low_pass(
    cutoff: Cutoff,
    kind: str = "ideal",
    *,
    order: int = 2,
    normalise: str | None = None,
    unit: str = "nyquist",
    backend: str = "fft",
) -> RadialFilter:
    """Keeps radii up to ``cutoff``.

    Args:
      cutoff: radius; a number, a table over t, or a function of t. An ideal filter with a cutoff of sqrt(2) Nyquist
        units or more is the identity.
      kind: ``ideal`` 1[rho <= cutoff]; ``gaussian`` exp(-rho^2 / (2 cutoff^2)); ``butterworth``
        (1 + (rho/cutoff)^(2 order))^(-1/2).
      order: of the Butterworth filter.
      normalise: ``"passband"`` divides the energy by the mean squared mask.
      unit: of the cutoff, ``"nyquist"`` (1 = half a cycle per pixel) or ``"bins"`` (cycles along the shorter side).
      backend: ``"fft"``, or ``"matmul"``, which for a constant cutoff computes only the frequencies that pass.

    Raises:
      ValueError: unknown kind, unit or backend; cutoff not positive.

    >>> bool(jnp.all(low_pass(8, unit="bins").mask(32, 32, None) == low_pass(0.5).mask(32, 32, None)))
    True
    """
    _check_cutoff(cutoff)
    profile = _profile(kind, order)
    return RadialFilter(lambda rho, t: profile(rho, _cutoff_at(cutoff, t)), _normalise(normalise), unit, backend)


def high_pass(
    cutoff: Cutoff,
    kind: str = "ideal",
    *,
    order: int = 2,
    normalise: str | None = None,
    unit: str = "nyquist",
    backend: str = "fft",
) -> RadialFilter:
    """``1 - low_pass``: keeps radii above ``cutoff``. The signals of both add to the input; the arguments are the same."""
    _check_cutoff(cutoff)
    profile = _profile(kind, order)
    return RadialFilter(lambda rho, t: 1 - profile(rho, _cutoff_at(cutoff, t)), _normalise(normalise), unit, backend)


def band(
    low: Cutoff,
    high: Cutoff,
    kind: str = "ideal",
    *,
    order: int = 2,
    normalise: str | None = None,
    unit: str = "nyquist",
    backend: str = "fft",
) -> RadialFilter:
    """``low_pass(high) - low_pass(low)``: keeps radii in (low, high]. ``low < high`` where both are numbers."""
    _check_cutoff(low)
    _check_cutoff(high)
    if np.ndim(low) == np.ndim(high) == 0 and not callable(low) and not callable(high) and not low < high:
        raise ValueError(f"band needs low < high, got {low} and {high}")
    profile = _profile(kind, order)

    def transfer(rho, t):
        return profile(rho, _cutoff_at(high, t)) - profile(rho, _cutoff_at(low, t))

    return RadialFilter(transfer, _normalise(normalise), unit, backend)


FILTERS = {"low_pass": low_pass, "high_pass": high_pass, "band": band}
"""The one registry of filters: name -> factory; ``band`` takes two cut-offs, the others one."""


def from_mask(mask: Array) -> RadialFilter:
    """A filter with the given transfer function, which may be an argument of a compiled program: one serves all cut-offs.

    Args:
      mask: [H, W//2+1] on the rfft2 grid, such as ``low_pass(0.5).mask(H, W, None)``. Rows y and H - y of its first column
        must be equal (and of the last one where W is even), as those of every mask of a radius are.

    Returns:
      The filter, for images of H x W alone.

    >>> x = jnp.arange(64.0).reshape(1, 8, 8, 1)
    >>> bool(jnp.all(from_mask(low_pass(0.5).mask(8, 8, None))(x, None) == low_pass(0.5)(x, None)))
    True
    """

    def transfer(rho, t):
        if mask.shape != rho.shape:
            raise ValueError(f"the mask must be {list(rho.shape)} for these images, got {list(mask.shape)}")
        return mask

    return RadialFilter(transfer)


class RadialSpectrum(NamedTuple):
    """Mean power per shell of equal radius.

    Attributes:
      bins: [K] = 1..K, radius of the shell in DFT bins of the shorter side. Empty for images of one pixel.
      power: float64 [K], mean of abs(fft2)^2 over shell, images and channels (white noise of variance v: v).
      dc: float64 scalar, the same for the zero frequency.
      count: float64 [K], number of bins of the full spectrum in the shell.
      size: length of the shorter side in pixels; ``2 * bins / size`` is the radius in Nyquist units.
      planes: number of images times channels that were averaged.
    """

    bins: np.ndarray
    power: np.ndarray
    dc: float
    count: np.ndarray
    size: int
    planes: int


def hann(height: int, width: int) -> np.ndarray:
    """A Hann window [H, W] whose mean square is 1, so that it keeps the energy of noise."""
    window = np.outer(*(np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in (height, width)))
    return window / np.sqrt(np.mean(window**2))


class Shells(NamedTuple):
    """Power of each image in shells of equal radius.

    Attributes:
      power: float64 [N, K+1], mean over channels and the bins of a shell; shell 0 is the zero frequency.
      count: float64 [K+1], number of bins of the full spectrum in the shell.
    """

    power: np.ndarray
    count: np.ndarray


def shell_power(images: np.ndarray, *, reference: np.ndarray | None = None, taper: str | None = None) -> Shells:
    """``abs(fft2)^2`` of images by shells ``round(radius in bins)``, on the host in float64.

    Args:
      images: [N,H,W,C] in the model's own range.
      reference: [H,W,C], for example the mean keep image; it is subtracted first.
      taper: ``"hann"`` removes each plane's mean and multiplies by a Hann window, against the leakage of images whose
        opposite edges differ; the power of the zero frequency is then that of the tapered rest.

    Raises:
      ValueError: no images, another rank, unknown taper.
    """
    images = np.asarray(images, np.float64)
    if images.ndim != 4 or not images.size:
        raise ValueError(f"a spectrum needs images [N,H,W,C] with N >= 1, got shape {images.shape}")
    if taper not in (None, "hann"):
        raise ValueError(f"taper must be None or 'hann', got {taper!r}")
    height, width = images.shape[1:3]
    if reference is not None:
        images = images - np.asarray(reference, np.float64)
    if taper == "hann":
        images = (images - images.mean(axis=(1, 2), keepdims=True)) * hann(height, width)[None, :, :, None]
    power = np.mean(np.abs(np.fft.rfft2(images, axes=(1, 2), norm="ortho")) ** 2, axis=-1)
    shell = np.rint(radius(height, width) * min(height, width) / 2).astype(int)
    weights = np.broadcast_to(half_plane_weights(width), shell.shape)
    count = np.bincount(shell.ravel(), weights.ravel())
    member = (shell.ravel()[:, None] == np.arange(len(count))) * weights.ravel()[:, None]
    total = power.reshape(len(images), -1) @ member
    # Small images that are not square may have a shell without bins.
    return Shells(np.divide(total, count, out=np.zeros_like(total), where=count > 0), count)


def radial_spectrum(
    images: np.ndarray, *, reference: np.ndarray | None = None, taper: str | None = None
) -> RadialSpectrum:
    """The mean over images of :func:`shell_power`; the arguments are the same."""
    power, count = shell_power(images, reference=reference, taper=taper)
    mean = power.mean(axis=0)
    shape = np.shape(images)
    return RadialSpectrum(
        np.arange(1, len(count)), mean[1:], float(mean[0]), count[1:], min(shape[1:3]), shape[0] * shape[3]
    )
