"""The aesthetic score of LAION: one affine map of a picture's unit vector of CLIP ViT-L/14, about 1 to 10.

The published predictor has five linear layers with nothing between them at inference; the conversion multiplies them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.metrics.clip_iqa import unit_rows
from jaxunlearn.metrics.resize import pil_bicubic, three_channels
from jaxunlearn.types import Array

SIZE = 224
"""Pixels of a side of CLIP's input."""


def aesthetic(vectors: Array, weight: Array, bias: Array) -> Array:
    """``weight . vector / norm(vector) + bias``.

    Args:
      vectors: image vectors [N,d] of CLIP ViT-L/14, of any norm but 0.
      weight: [d].
      bias: [1].

    Returns:
      [N]; the value of a set of pictures is the mean.

    Raises:
      ValueError: shapes that do not fit.
    """
    if vectors.ndim != 2 or weight.shape != vectors.shape[-1:] or bias.shape != (1,):
        raise ValueError(
            f"vectors must be [N,d], weight [d] and bias [1], got {vectors.shape}, {weight.shape} and {bias.shape}"
        )
    return jnp.matmul(unit_rows(vectors), weight, precision=jax.lax.Precision.HIGHEST) + bias[0]


def clip_inputs(images: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Pictures uint8 [N,H,W,1 or 3] -> inputs of CLIP, float32 [N,size,size,3] in [0, 1].

    The shorter side is resized to ``size`` as PIL's BICUBIC does it for 8-bit pictures, then the centre is cut out.

    Raises:
      ValueError: another shape.
      TypeError: not uint8.
    """
    images = three_channels(np.asarray(images))
    height, width = images.shape[1:3]
    short = min(height, width)
    new_height, new_width = size * height // short, size * width // short
    resized = pil_bicubic(images, new_height, new_width)
    top, left = (round((n - size) / 2) for n in (new_height, new_width))
    return resized[:, top : top + size, left : left + size].astype(np.float32) / np.float32(255)
