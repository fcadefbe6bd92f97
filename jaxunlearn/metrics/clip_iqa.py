"""CLIP-IQA: how much more a picture resembles the words "Good photo." than "Bad photo.".

The vectors come from CLIP RN50 without the position embedding of its attention pooling, of pictures in their own size,
never resized (:mod:`jaxunlearn.models.features.clip_resnet`, ``embed(..., position=False)``).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.metrics.resize import three_channels
from jaxunlearn.types import Array

PROMPTS = ("Good photo.", "Bad photo.")
"""Texts of the two rows of ``prompts``."""

SCALE = 100.0
"""Of the cosines before the softmax: the temperature that CLIP was trained to."""


def clip_iqa(vectors: Array, prompts: Array) -> Array:
    """``softmax(100 cos(vector, prompt))`` over the two prompts, its first entry.

    Args:
      vectors: image vectors [N,d], of any norm but 0.
      prompts: text vectors [2,d] of :data:`PROMPTS`, of any norm but 0.

    Returns:
      [N] in [0, 1]; the value of a set of pictures is the mean.

    Raises:
      ValueError: shapes that do not fit.

    Source: Wang, Chan and Loy 2023, "Exploring CLIP for Assessing the Look and Feel of Images", Section 3.

    >>> print(float(clip_iqa(np.array([[1.0, 1.0]]), np.eye(2))[0]))
    0.5
    """
    if vectors.ndim != 2 or prompts.shape != (len(PROMPTS), vectors.shape[-1]):
        raise ValueError(
            f"vectors must be [N,d] and prompts [{len(PROMPTS)},d], got shapes {vectors.shape} and {prompts.shape}"
        )
    cosines = jnp.matmul(unit_rows(vectors), unit_rows(prompts).T, precision=jax.lax.Precision.HIGHEST)
    return jax.nn.softmax(SCALE * cosines, axis=-1)[:, 0]


def unit_rows(vectors: Array) -> Array:
    """Vectors [N,d] over their norms."""
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def clip_iqa_inputs(images: np.ndarray) -> np.ndarray:
    """Pictures uint8 [N,H,W,1 or 3] -> inputs of the network, float32 [N,H,W,3] in [0, 1]; nothing is resized.

    Raises:
      ValueError: another shape.
      TypeError: not uint8.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8:
        raise TypeError(
            f"pictures must be uint8 in 0..255, got {images.dtype}; use jaxunlearn.images.to_uint8 on model images"
        )
    return three_channels(images).astype(np.float32) / np.float32(255)
