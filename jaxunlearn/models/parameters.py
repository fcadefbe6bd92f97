"""Parameter trees of all architectures: their shapes, and newly drawn values."""

from __future__ import annotations

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.models.architectures import architecture_of
from jaxunlearn.types import PyTree


@functools.lru_cache(maxsize=32)
def _abstract(config: Any) -> PyTree:
    architecture = architecture_of(config)
    key = jax.eval_shape(lambda: jax.random.key(0))
    module = architecture.module(config, fast=False)
    return jax.eval_shape(module.init, key, *architecture.example_inputs(config))["params"]


def abstract_params(config: Any) -> PyTree:
    """The parameter tree as ``jax.ShapeDtypeStruct`` (float32): nested dicts, nothing is computed or allocated.

    Args:
      config: of any of :data:`jaxunlearn.models.architectures.ARCHITECTURES`.
    """
    return jax.tree.map(lambda leaf: leaf, _abstract(config))


def init_params(config: Any, seed: int) -> PyTree:
    """New parameters with the distributions of a newly constructed diffusers model, without compiling anything.

    Kernels and biases are U(-1/sqrt(fan_in), 1/sqrt(fan_in)), normalisations start as the identity, embeddings
    are N(0, 1). The values depend on ``seed`` and on the name of each parameter only; they are not torch's values.

    Args:
      config: of any of :data:`jaxunlearn.models.architectures.ARCHITECTURES`.
      seed: a non-negative integer.

    Returns:
      Nested dicts of float32 arrays.

    Raises:
      ValueError: ``seed`` is not a non-negative integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be a non-negative integer, got {seed!r}")

    def draw(tree: PyTree, prefix: str) -> PyTree:
        out = {}
        for name, leaf in tree.items():
            path = f"{prefix}/{name}"
            if isinstance(leaf, dict):
                out[name] = draw(leaf, path)
                continue
            rng = np.random.default_rng([int(seed), zlib.crc32(path.encode())])
            if "scale" in tree:
                values = np.full(leaf.shape, 1.0 if name == "scale" else 0.0)
            elif name == "embedding":
                values = rng.standard_normal(leaf.shape)
            else:
                bound = 1 / np.sqrt(np.prod(tree["kernel"].shape[:-1]))
                values = rng.uniform(-bound, bound, leaf.shape)
            out[name] = jnp.asarray(values, leaf.dtype)
        return out

    return draw(_abstract(config), "")
