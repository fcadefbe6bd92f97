"""Resizing as the tools behind published numbers do it: one matrix per axis and convention.

Every tool resizes in another way, and every way gives another FID: at 512 pixels two of them differ by 10 of 255 on
average. So a number carries the name of its convention, and numbers of different conventions are never compared.

FID, to 299x299 without keeping the aspect (:data:`CONVENTIONS`):

========== ============================================================ ================================ ============
name       filter                                                       as in                            scaling
========== ============================================================ ================================ ============
clean      bicubic over the width of a new pixel, clipped, not rounded  clean-fid (the default here)     (x - 128)/128
tf1        bilinear, output i reads at i * in/out (no half pixel)       torch-fidelity, torchmetrics<1.8 (x - 128)/128
half_pixel bilinear, output i reads at (i + 1/2) in/out - 1/2           pytorch-fid                      x/127.5 - 1
antialias  triangle over the width of a new pixel                       torchmetrics 1.8 and later       (x - 128)/128
========== ============================================================ ================================ ============

SSCD: ``short288`` (short edge 288, aspect kept) and ``square320``, both with the triangle filter and rounded to whole
numbers after each axis, exactly as PIL resizes 8-bit pictures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxunlearn.registry import look_up, unknown_name
from jaxunlearn.types import Array

FID_SIZE, SHORT_EDGE, SQUARE = 299, 288, 320
_FIXED_BITS = 22
"""Fixed point of PIL's weights for 8-bit pictures."""


class Convention(NamedTuple):
    """How pictures become the inputs of the FID's network.

    Attributes:
      matrix: (in, out) -> weights float64 [out, in] of one axis.
      scale: maps resized values in 0..255 to the network's range.
      description: in words, for the report.
    """

    matrix: Callable[[int, int], np.ndarray]
    scale: Callable[[Array], Array]
    description: str


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -1/2 (Keys 1981, Eq. 15), support 2."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _filtered(size: int, out: int, kernel: Callable[[np.ndarray], np.ndarray], support: float) -> np.ndarray:
    """The kernel around the centre of each new pixel, as wide as that pixel where it is larger than an old one."""
    ratio = size / out
    width = max(ratio, 1.0)
    centre = (np.arange(out)[:, None] + 0.5) * ratio
    pixel = np.arange(size)
    weights = kernel((pixel + 0.5 - centre) / width)
    low = np.maximum(np.floor(centre - support * width + 0.5), 0)
    high = np.minimum(np.floor(centre + support * width + 0.5), size)
    weights = np.where((pixel >= low) & (pixel < high), weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def _linear(size: int, position: np.ndarray) -> np.ndarray:
    """Interpolates between the two pixels around each position, which is clipped to the first and the last."""
    position = np.clip(position, 0, size - 1)
    low = np.floor(position).astype(int)
    weights = np.zeros((len(position), size))
    rows = np.arange(len(position))
    np.add.at(weights, (rows, low), 1 - (position - low))
    np.add.at(weights, (rows, np.minimum(low + 1, size - 1)), position - low)
    return weights


@functools.lru_cache(maxsize=64)
def _bicubic_matrix(size: int, out: int) -> np.ndarray:
    return _filtered(size, out, _cubic, 2.0)


@functools.lru_cache(maxsize=64)
def _triangle_matrix(size: int, out: int) -> np.ndarray:
    return _filtered(size, out, _triangle, 1.0)


@functools.lru_cache(maxsize=64)
def _tf1_matrix(size: int, out: int) -> np.ndarray:
    return _linear(size, np.arange(out) * (size / out))


@functools.lru_cache(maxsize=64)
def _half_pixel_matrix(size: int, out: int) -> np.ndarray:
    return _linear(size, (np.arange(out) + 0.5) * (size / out) - 0.5)


def _around_128(x: Array) -> Array:
    return (x - 128.0) / 128.0


def _around_middle(x: Array) -> Array:
    return x / 127.5 - 1.0


CONVENTIONS = {
    "clean": Convention(_bicubic_matrix, _around_128, "bicubic, antialiased, clipped, not rounded (as clean-fid)"),
    "tf1": Convention(_tf1_matrix, _around_128, "bilinear without half pixels (as TensorFlow 1 and torch-fidelity)"),
    "half_pixel": Convention(_half_pixel_matrix, _around_middle, "bilinear, not antialiased (as pytorch-fid)"),
    "antialias": Convention(_triangle_matrix, _around_128, "bilinear, antialiased (as torchmetrics from 1.8)"),
}
"""Name -> convention of the FID."""


SSCD_CONVENTIONS = ("short288", "square320")
"""How pictures become inputs of SSCD: short edge 288 with the aspect kept, or 320x320."""


def three_channels(images: Array) -> Array:
    """Pictures [N,H,W,1] or [N,H,W,3] -> [N,H,W,3]; a grey channel stands three times.

    Raises:
      ValueError: another rank or number of channels.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"pictures must be [N,H,W,1] or [N,H,W,3], got shape {images.shape}")
    return images if images.shape[-1] == 3 else images.repeat(3, axis=-1)


def resize(images: Array, convention: str, size: int = FID_SIZE) -> Array:
    """Pictures in 0..255 resized to ``size`` x ``size``, still in 0..255.

    Args:
      images: uint8 or floating [N,H,W,C] in 0..255; numpy, or jax inside or outside of jit.
      convention: a name in :data:`CONVENTIONS`.
      size: of both sides of the result.

    Returns:
      float32 [N,size,size,C] of the same kind of array.

    Raises:
      ValueError: an unknown convention.
    """
    matrix = look_up("resize convention", convention, CONVENTIONS).matrix
    xp = images.__array_namespace__()
    more = {} if xp is np else {"precision": "highest"}
    rows, columns = (matrix(n, size).astype(np.float32) for n in images.shape[1:3])
    out = xp.tensordot(images.astype(np.float32), columns, ([2], [1]), **more)  # [N,H,C,size]
    out = xp.tensordot(out, rows, ([1], [1]), **more)  # [N,C,size (x),size (y)]
    return out.transpose(0, 3, 2, 1).clip(0.0, 255.0)


def fid_inputs(images: Array, convention: str = "clean") -> Array:
    """Pictures uint8 [N,H,W,1 or 3] -> inputs of the FID's network, float32 [N,299,299,3] in about [-1, 1].

    Works on numpy and jax arrays; inside jit the resized pictures never leave the device.

    Raises:
      ValueError: an unknown convention, or another shape.
      TypeError: not uint8.
    """
    _check_bytes(images)
    return three_channels(CONVENTIONS[convention].scale(resize(images, convention)).astype(np.float32))


def pil_bilinear(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """8-bit pictures resized as PIL's BILINEAR does it, to the bit: uint8 [N,H,W,C] -> uint8 [N,height,width,C].

    Weights are whole multiples of 2^-22, and the sums of each axis are rounded to whole numbers; in float64 both are
    exact. The width comes first, as in all versions of PIL up to 11; later ones take some tall pictures the other way
    round, and then bytes differ by 1.

    Raises:
      TypeError: not uint8.
    """
    return _pil(images, height, width, _triangle_matrix)


def pil_bicubic(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """As :func:`pil_bilinear`, for PIL's BICUBIC.

    Raises:
      TypeError: not uint8.
    """
    return _pil(images, height, width, _bicubic_matrix)


def _pil(images: np.ndarray, height: int, width: int, matrix: Callable[[int, int], np.ndarray]) -> np.ndarray:
    _check_bytes(images)
    out = np.asarray(images)
    for axis, size in ((2, width), (1, height)):
        if out.shape[axis] == size:
            continue
        weights = matrix(out.shape[axis], size) * 2**_FIXED_BITS
        fixed = np.trunc(weights + np.copysign(0.5, weights))  # halves away from zero
        total = np.moveaxis(np.tensordot(out.astype(np.float64), fixed, ([axis], [1])), -1, axis)
        out = np.clip(np.floor((total + 2 ** (_FIXED_BITS - 1)) / 2**_FIXED_BITS), 0, 255).astype(np.uint8)
    return out


def sscd_size(height: int, width: int, convention: str) -> tuple[int, int]:
    """Height and width to which SSCD's input is resized.

    >>> sscd_size(512, 768, "short288")
    (288, 432)

    Raises:
      ValueError: an unknown convention.
    """
    if convention not in SSCD_CONVENTIONS:
        raise ValueError(unknown_name("SSCD input convention", convention, SSCD_CONVENTIONS))
    if convention == "square320":
        return SQUARE, SQUARE
    if height <= width:
        return SHORT_EDGE, SHORT_EDGE * width // height
    return SHORT_EDGE * height // width, SHORT_EDGE


def sscd_inputs(images: np.ndarray, convention: str = "short288") -> np.ndarray:
    """Pictures uint8 [N,H,W,1 or 3] -> inputs of SSCD, float32 [N,H',W',3] in [0, 1].

    Raises:
      ValueError: an unknown convention, or another shape.
      TypeError: not uint8.
    """
    images = np.asarray(images)
    resized = pil_bilinear(images, *sscd_size(*images.shape[1:3], convention))
    return three_channels(resized).astype(np.float32) / np.float32(255)


def _check_bytes(images: Array) -> None:
    if images.dtype != np.uint8:
        raise TypeError(
            f"pictures must be uint8 in 0..255, got {images.dtype}; use jaxunlearn.images.to_uint8 on model images"
        )
