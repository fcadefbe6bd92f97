"""The two ways between stored images (uint8) and what the model sees (float32 in [-1, 1])."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxunlearn.types import Array


def to_model(images: Array) -> Array:
    """uint8 in 0..255 -> float32 in [-1, 1] (on the device: hosts ship bytes). Floating input is returned as it is.

    Raises:
      TypeError: another integer type, whose range is not known.
    """
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    if images.dtype != jnp.uint8:
        raise TypeError(f"images must be uint8 in 0..255 or floating in [-1, 1], got {images.dtype}")
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_unit(images: Array) -> Array:
    """[-1, 1] -> [0, 1], clipped, any floating type."""
    return jnp.clip(images / 2 + 0.5, 0.0, 1.0)


def to_uint8(images) -> np.ndarray:
    """[-1, 1] -> uint8 in 0..255, rounded and clipped, on the host."""
    return np.asarray(jnp.round(to_unit(images) * 255.0)).astype(np.uint8)
