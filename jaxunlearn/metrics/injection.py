"""Denoising injection: noise a forget image to t, denoise it with the model, and see how much of it comes back.

A model that memorised the image pulls the noised image back to it. Only small t discriminates on small images; at large
t every model draws something new. Target: the value of a model retrained without the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.schedule import Schedule
from jaxunlearn.types import Array

SampleFrom = Callable[[Array, int, Array], Array]
"""``(x_t [B,H,W,C], t, keys [B]) -> x0 [B,H,W,C]``: every step from t to 0; row i uses only ``keys[i]``."""


def row_keys(key: Array, images: int, t: int, copies: int) -> Array:
    """One key per (image, t, copy), by ``fold_in``: [images, copies]. None depends on the number of the others."""

    def one(image, copy):
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, image), t), copy)

    return jax.vmap(lambda image: jax.vmap(lambda copy: one(image, copy))(jnp.arange(copies)))(jnp.arange(images))


def noised(a0: Array, schedule: Schedule, key: Array, t: int, copies: int) -> tuple[Array, Array]:
    """Every copy of every image noised to t: a0 [F,H,W,C] -> x_t [F * copies,H,W,C], and its keys [F * copies] left."""
    pairs = jax.vmap(jax.random.split)(row_keys(key, len(a0), t, copies).reshape(-1))
    eps = jax.vmap(lambda k: jax.random.normal(k, a0.shape[1:]))(pairs[:, 0])
    return schedule.alpha(t) * jnp.repeat(a0, copies, axis=0) + schedule.sigma(t) * eps, pairs[:, 1]


def denoise_injection(
    sample_from: SampleFrom,
    a0: Array,
    schedule: Schedule,
    key: Array,
    t: Sequence[int] = (50, 100, 250, 500),
    copies: int = 16,
) -> np.ndarray:
    """What the model makes of noised forget images.

    Args:
      sample_from: the model's ancestral sampler, see :data:`SampleFrom`; it gets all rows of one t at once.
      a0: forget images [F,H,W,C], float32 in [-1, 1].
      schedule: the model's noise schedule.
      key: one key; every (image, t, copy) gets its own from it, equal for all models.
      t: timesteps to start from.
      copies: noises per image and t.

    Returns:
      float32 [F, len(t), copies, H, W, C].

    Raises:
      ValueError: a t outside the schedule, no t, or fewer than one copy.
    """
    a0 = jnp.asarray(a0)
    if any(not 0 <= step < schedule.num_steps for step in t) or copies < 1 or not len(t):
        raise ValueError(
            f"injection needs at least one copy and one t, all in 0..{schedule.num_steps - 1}; "
            f"got t = {tuple(t)}, copies = {copies}"
        )
    out = np.empty((len(a0), len(t), copies, *a0.shape[1:]), np.float32)
    for place, step in enumerate(t):
        x_t, keys = noised(a0, schedule, key, step, copies)
        out[:, place] = np.asarray(sample_from(x_t, step, keys)).reshape(len(a0), copies, *a0.shape[1:])
    return out


def injection_distance(a0, denoised) -> np.ndarray:
    """rms distance in [0, 1] pixels: a0 [F,H,W,C] and denoised [F,T,K,H,W,C], both in [-1, 1] -> float64 [F,T,K]."""
    first = np.clip(np.asarray(a0, np.float64) / 2 + 0.5, 0, 1)[:, None, None]
    second = np.clip(np.asarray(denoised, np.float64) / 2 + 0.5, 0, 1)
    return np.sqrt(np.mean((second - first) ** 2, axis=(-3, -2, -1)))


def injection_similarity(a0, denoised) -> np.ndarray:
    """Cosine similarity of the pixels in [-1, 1] after taking off each image's mean: [F,T,K], 1 = the same picture.

    It ignores brightness and contrast, which the rms distance does not. A constant image has no direction: NaN.
    """
    first = np.clip(np.asarray(a0, np.float64), -1, 1).reshape(len(a0), 1, 1, -1)
    second = np.clip(np.asarray(denoised, np.float64), -1, 1).reshape(*np.shape(denoised)[:3], -1)
    first, second = (x - x.mean(axis=-1, keepdims=True) for x in (first, second))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sum(first * second, axis=-1) / (np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1))
