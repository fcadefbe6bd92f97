"""Moments of a network's features of many pictures: batch by batch, on one device or many.

Each batch leaves the devices as its number of pictures, the mean of their features and the sum of squares around it, in
float32; batches are added up in float64 on the host. Centring each batch keeps the sums small, so that float32 costs no
more than its rounding. The last batch is filled up with pictures of weight 0. So neither the size of the batches nor
their order nor the number of devices changes more than the last digits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxunlearn.metrics.frechet import Moments, MomentSum
from jaxunlearn.types import Array, PyTree

FeatureFn = Callable[[PyTree, Array], Array]
"""``(params, pictures [B,H,W,C]) -> features [B,d]``, pure; each row depends on its own picture only."""


class BatchSums(NamedTuple):
    """Sums of one batch, float32.

    Attributes:
      n: number of rows that count.
      centre: [d], their mean, rounded to float32.
      rest: [d], the mean of ``x - centre``: what the rounding lost.
      scatter: [d, d], ``sum (x - centre) (x - centre)'``.
    """

    n: Array
    centre: Array
    rest: Array
    scatter: Array

    def exact(self) -> tuple[int, np.ndarray, np.ndarray]:
        """Number, mean and scatter around the mean in float64, on the host."""
        n, centre, rest, scatter = (np.asarray(x, np.float64) for x in self)
        return int(n), centre + rest, scatter - n * np.outer(rest, rest)


def batch_sums(features: Array, weight: Array) -> BatchSums:
    """Sums over features [B,d] with weight 1, those with weight 0 left out; under jit the batch may lie on many devices."""
    features = jnp.where(weight[:, None] > 0, features.astype(jnp.float32), 0.0)
    n = weight.sum()
    centre = features.sum(0) / jnp.maximum(n, 1.0)
    centred = (features - centre) * weight[:, None]
    rest = centred.sum(0) / jnp.maximum(n, 1.0)
    return BatchSums(n, centre, rest, jnp.matmul(centred.T, centred, precision=jax.lax.Precision.HIGHEST))


class FeatureStream:
    """Collects moments of the features of pictures that arrive in parts of any size, and the first rows themselves."""

    def __init__(
        self, feature_fn: FeatureFn, params: PyTree, batch_size: int, *, mesh: Mesh | None = None, keep_rows: int = 0
    ):
        """Args:
          feature_fn: the network, see :data:`FeatureFn`; streams of the same function share one compiled program.
          params: its parameters.
          batch_size: pictures in one call; rounded up to a multiple of the number of devices.
          mesh: of one axis, over whose devices a batch is split; None: jax's default device.
          keep_rows: how many features to keep, the first ones that arrive.

        Raises:
          ValueError: no pictures in a batch, or a mesh of several axes.
        """
        if batch_size < 1 or (mesh is not None and len(mesh.axis_names) != 1):
            raise ValueError(f"needs batches of at least 1 and a mesh of one axis, got {batch_size} and {mesh}")
        self._batch = batch_size if mesh is None else -(-batch_size // mesh.size) * mesh.size
        self._rows = None if mesh is None else NamedSharding(mesh, P(mesh.axis_names[0]))
        self._params = params if mesh is None else jax.device_put(params, NamedSharding(mesh, P()))
        self._program = _compiled(feature_fn)
        self._total: MomentSum | None = None
        self._kept: list[np.ndarray] = []
        self._missing = keep_rows

    def add(self, pictures: np.ndarray) -> None:
        """Adds pictures [N,H,W,C], of the same shape each time.

        Raises:
          ValueError: features that are not finite.
        """
        for start in range(0, len(pictures), self._batch):
            part = pictures[start : start + self._batch]
            take = np.minimum(np.arange(self._batch), len(part) - 1)
            weight = (np.arange(self._batch) < len(part)).astype(np.float32)
            features, sums = self._program(self._params, self._place(part[take]), self._place(weight))
            if self._total is None:
                self._total = MomentSum(features.shape[1])
            self._total.add_sums(*sums.exact())
            if self._missing > 0:
                rows = np.asarray(features)[: min(len(part), self._missing)]
                self._kept.append(rows)
                self._missing -= len(rows)

    def moments(self) -> Moments:
        """The moments so far, float64.

        Raises:
          ValueError: fewer than two pictures.
        """
        if self._total is None:
            raise ValueError("a covariance needs at least two feature rows, got 0")
        return self._total.moments()

    def rows(self) -> np.ndarray:
        """The features that were kept, float32 [n,d], in the order in which their pictures came.

        Raises:
          ValueError: none were kept.
        """
        if not self._kept:
            raise ValueError("no features were kept; give keep_rows and add pictures")
        return np.concatenate(self._kept)

    def _place(self, rows: np.ndarray) -> Array:
        return jnp.asarray(rows) if self._rows is None else jax.device_put(rows, self._rows)


@functools.lru_cache(maxsize=8)
def _compiled(feature_fn: FeatureFn):
    def program(params: PyTree, pictures: Array, weight: Array) -> tuple[Array, BatchSums]:
        features = feature_fn(params, pictures)
        return features, batch_sums(features, weight)

    return jax.jit(program)
