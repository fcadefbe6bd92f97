"""The denoising loss per t: how well a model removes known noise from given images.

Low on training images and higher on held-out ones, most of all at small t. The noises are the same for all images and
all models, so differences between models are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.schedule import Schedule
from jaxunlearn.types import Array

ERRORS = {
    "mean_squares": lambda residual: jnp.mean(residual**2, axis=(1, 2, 3)),
    "sum_squares": lambda residual: jnp.sum(residual**2, axis=(1, 2, 3)),
}
"""Error of a residual [B,H,W,C] -> [B]. With mean_squares a model that always answers zero has the loss 1."""


def noise(key: Array, t: Array, index: Array, shape: tuple[int, ...]) -> Array:
    """The ``index``-th noise of timestep t [H,W,C], by ``fold_in``: equal for all images and models."""
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, t), index), shape)


def make_loss_rows(
    predict: Callable[..., Array], schedule: Schedule, error: str = "mean_squares"
) -> Callable[..., Array]:
    """A function ``(params, x0 [B,H,W,C], t [B], index [B], key) -> [B]`` to be jitted once and used for all models.

    With a condition as sixth argument, which the model then gets as its fourth.

    Args:
      predict: ``(params, x_t, t) -> eps_hat``, or ``(params, x_t, t, cond) -> eps_hat``.
      schedule: the model's noise schedule.
      error: a name of :data:`ERRORS`.

    Raises:
      ValueError: an unknown error.
    """
    if error not in ERRORS:
        raise ValueError(f"unknown error {error!r}; known: {', '.join(ERRORS)}")

    def loss_rows(params, x0, t, index, key, *cond):
        eps = jax.vmap(lambda step, i: noise(key, step, i, x0.shape[1:]))(t, index)
        return ERRORS[error](predict(params, schedule.add_noise(x0, eps, t), t, *cond) - eps)

    return loss_rows


def denoising_loss(
    loss_rows: Callable[..., Array],
    params,
    x0,
    key: Array,
    t: Sequence[int],
    noises: int = 16,
    batch_size: int = 500,
    each: Callable[[], None] = lambda: None,
    cond: np.ndarray | None = None,
) -> np.ndarray:
    """Loss of each image at each t, averaged over common noises.

    Args:
      loss_rows: from :func:`make_loss_rows`, jitted by the caller.
      params: parameters of the model.
      x0: images [N,H,W,C], float32 in [-1, 1].
      key: the key of the noises, equal for all models.
      t: timesteps.
      noises: number of noises per t.
      batch_size: rows per call; the last batch is filled up with repeated rows that are then dropped.
      each: called after every batch (progress, signals).
      cond: the condition of each image [N, ...], for models that have one.

    Returns:
      float64 [N, len(t)].

    Raises:
      ValueError: no images, no t or no noises, or not one condition for each image.
    """
    x0, t = np.asarray(x0, np.float32), np.asarray(t, np.int32)
    if not (len(x0) and len(t) and noises > 0):
        raise ValueError(f"the loss needs images, t and noises; got {len(x0)} images, {len(t)} t, {noises} noises")
    if cond is not None and len(cond) != len(x0):
        raise ValueError(f"{len(cond)} conditions for {len(x0)} images; allowed: one for each image")
    grid = np.stack(np.meshgrid(np.arange(len(x0)), np.arange(len(t)), np.arange(noises), indexing="ij"))
    image, place, index = grid.reshape(3, -1)
    values = np.empty(len(image))
    for start in range(0, len(image), batch_size):
        take = np.minimum(np.arange(start, start + batch_size), len(image) - 1)
        rows = () if cond is None else (cond[image[take]],)
        result = loss_rows(params, x0[image[take]], t[place[take]], index[take].astype(np.int32), key, *rows)
        stop = min(start + batch_size, len(image))
        values[start:stop] = np.asarray(result)[: stop - start]
        each()
    return values.reshape(len(x0), len(t), noises).mean(axis=2)
