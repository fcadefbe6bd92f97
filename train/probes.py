"""What is measured again and again while a model unlearns: its losses on fixed images with fixed noises.

Every model sees the same images, timesteps and noises, so the difference between two models is known far better than either
loss. All timesteps count, whatever is drawn or selected in training: a collapse shows wherever it happens. The error is the
mean square per pixel, without selections; the selected one is the term ``loss/forget`` of the log.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxunlearn.errors import mean_squares
from jaxunlearn.forgetting import make_probe_losses
from jaxunlearn.images import to_model
from jaxunlearn.io.batches import batch_indices, stream_id
from jaxunlearn.io.diffusers import DiffusersModel
from jaxunlearn.objectives.denoise import denoising_error
from jaxunlearn.objectives.probes import strata
from jaxunlearn.types import Draw, Example, PyTree
from train.examples import Examples

MOST_ROWS = 256
"""Rows of the keep probe that are computed at once, at most."""


class Probes:
    """The losses of models on fixed images; every program is compiled once, when it is first needed.

    Every process computes on its first device: parameters of which each device holds a whole copy need no communication.

    Attributes:
      forget: positions of the different forget images that are probed, at most ``watch.forget_images``.
    """

    def __init__(self, config: ConfigDict, model: DiffusersModel, examples: Examples, mesh: Mesh):
        """Chooses the images; nothing is computed.

        Args:
          config: the whole configuration; ``unlearn.watch`` says how many images, timesteps and noises.
          model: the model whose losses are measured; its parameters are not used.
          examples: the images as it takes them.
          mesh: the devices of the run.
        """
        watch, unlearn, split = config.unlearn.watch, config.unlearn, examples.split
        self._config, self._examples, self._device = config, examples, mesh.local_devices[0]
        self.forget = different_images(config.seed, split.digests, split.forget, watch.forget_images)
        key = jax.random.fold_in(jax.random.key(config.seed), stream_id("watch"))
        count = min(watch.strata, model.schedule.num_steps)
        self._losses = make_probe_losses(model.predict, model.schedule, key, count=count, noises=watch.noises)
        positions = batch_indices(
            config.seed, "watch/keep", 0, len(split.keep), min(watch.keep_images, len(split.keep))
        )
        self._keep = self._example(split.keep[positions], "watch/keep")
        # Every image has other timesteps, and every timestep equally many rows, as far as they divide.
        rows = len(positions) * watch.noises
        self._image = np.arange(rows) // watch.noises
        self._t = np.tile(strata(model.schedule.num_steps, count), -(-rows // count))[:rows]
        self._rows_at_once = min(rows, MOST_ROWS, max(1, unlearn.batch_size // (unlearn.micro_batches * mesh.size)))

        @jax.jit
        def row_losses(params: PyTree, example: Example, t: jax.Array, index: jax.Array) -> jax.Array:
            shape = example.x0.shape[1:]
            eps = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(index)
            draw = Draw(t, jnp.ones(t.shape), eps, jnp.zeros(t.shape))
            return denoising_error(model.predict, params, example, draw, model.schedule, mean_squares)

        self._row_losses = row_losses

    def local(self, params: PyTree) -> PyTree:
        """The parameters on this process's first device: numpy arrays are moved, replicated ones are there already."""

        def one(x):
            return x.addressable_data(0) if isinstance(x, jax.Array) and x.is_fully_replicated else x

        return jax.device_put(jax.tree.map(one, params), self._device)

    def keep_loss(self, params: PyTree, each: Callable[[], None] = lambda: None) -> float:
        """The mean over the keep probe of parameters that :meth:`local` gave; ``each`` is called between batches of rows."""
        rows, size, parts = len(self._t), self._rows_at_once, []
        for first in range(0, rows, size):
            # The last batch is filled up, so that one program serves all.
            at = np.arange(first, first + size) % rows
            example = jax.tree.map(lambda x, at=at: x[self._image[at]], self._keep)
            losses = self._row_losses(params, example, self._t[at], at.astype(np.int32))
            parts.append(np.asarray(losses, np.float64)[: rows - first])
            each()
        return float(np.concatenate(parts).mean())

    def losses(self, params: PyTree, images: np.ndarray, each: Callable[[], None] = lambda: None) -> np.ndarray:
        """The losses on images of the split with the noises of the forget probe: float64 [N, strata, noises].

        Args:
          params: that :meth:`local` gave.
          images: positions in the split.
          each: called after every image but the last.
        """
        parts = []
        example = self._example(images, "watch/images")
        for i in range(len(images)):
            parts.append(self._losses(params, jax.tree.map(lambda x, i=i: x[i : i + 1], example)))
            if i + 1 < len(images):
                each()
        return np.concatenate(parts)

    def _example(self, images: np.ndarray, stream: str) -> Example:
        taken = self._examples.take(images, seed=self._config.seed, stream=stream, step=0, whole=True)
        return taken._replace(x0=np.asarray(to_model(taken.x0)))


def different_images(seed: int, digests: np.ndarray, images: np.ndarray, most: int) -> np.ndarray:
    """Positions of images of which no two have the same pixels, at most ``most``, chosen by the seed and sorted.

    Args:
      seed: of the run.
      digests: [N, 32], hashes of the pixels of all images.
      images: positions among them.
      most: how many at most.
    """
    _, first = np.unique(digests[images], axis=0, return_index=True)
    different = images[np.sort(first)]
    if len(different) <= most:
        return different
    return np.sort(different[batch_indices(seed, "watch/forget", 0, len(different), most)])
