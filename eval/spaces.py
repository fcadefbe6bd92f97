"""Where a model works: on pixels, or on an autoencoder's latents. Metrics of pictures always run on pixels."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxunlearn.images import to_model, to_unit
from jaxunlearn.io.diffusers import DiffusersModel


class Pixels:
    """The space of a model that works on images themselves."""

    latent = False
    loss_unit = None  # that of the metric

    def shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(H, W, C) of images -> shape of what the model works on."""
        return tuple(image_shape)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N,H,W,C] -> float32 [N,H,W,C] in [-1, 1]."""
        return np.asarray(to_model(images))

    def decode(self, x: np.ndarray) -> np.ndarray:
        """What the model made -> images [N,H,W,C], about [-1, 1]."""
        return np.asarray(x)


class Latents:
    """The space of a latent model: means of the autoencoder's posterior times its scaling factor."""

    latent = True
    loss_unit = "mean square per latent number"

    def __init__(self, space: Any):
        """Args:
        space: a :class:`jaxunlearn.models.latent_space.LatentSpace`.
        """
        self._space = space

    def shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(H, W, C) of images -> (h, w, z) of their latents."""
        return tuple(self._space.latent_shape(tuple(image_shape)))

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N,H,W,C] -> float32 [N,h,w,z], without the posterior's noise."""
        return self._space.encode(images)[0]

    def decode(self, x: np.ndarray) -> np.ndarray:
        """Latents [N,h,w,z] -> images [N,H,W,C], about [-1, 1]."""
        return self._space.decode(np.asarray(x))


Space = Pixels | Latents


def space_of(model: DiffusersModel, batch_size: int) -> Space:
    """The space of a model; ``batch_size`` images go through the autoencoder at once."""
    return Latents(model.latent_space(batch_size)) if model.is_latent else Pixels()


def round_trip_rms(images: np.ndarray, reconstruction: np.ndarray) -> np.ndarray:
    """rms distance float64 [N] on [0, 1] pixels between uint8 images and what the autoencoder makes of them."""
    difference = np.asarray(to_unit(reconstruction), np.float64) - images / 255.0
    return np.sqrt(np.mean(difference**2, axis=(1, 2, 3)))
