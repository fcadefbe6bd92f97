"""Negative log-likelihood in bits per value: what the probability-flow ODE of a model says about given images.

``nll_bpd = -log p / (D ln 2) + 8 - log2(range)`` for images of 256 levels on a range of that length: the offset is 7 for
[-1, 1]. Equal to a retrained model is the target; "higher is better" would crown a broken model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.likelihood import EXACT_LIMIT, LogLikelihood, Prior, log_likelihood, rademacher_probes
from jaxunlearn.schedule import Schedule
from jaxunlearn.types import Array, Predict, PyTree

Solver = Callable[[PyTree, Array, Array, PyTree], LogLikelihood]
"""``(params, x [B,H,W,C], keys [B], cond) -> LogLikelihood``: row i draws its probes from ``keys[i]`` alone."""


class Nll(NamedTuple):
    """Negative log-likelihoods of N images.

    Attributes:
      values: float64 [N, draws] in bits per value (nats for latents); NaN where the solver failed.
      steps: int64 [N, draws], steps of the solver.
    """

    values: np.ndarray
    steps: np.ndarray

    @property
    def failed(self) -> int:
        """How many of the values are missing."""
        return int(np.sum(~np.isfinite(self.values)))

    @property
    def per_image(self) -> np.ndarray:
        """float64 [N], mean over the draws; NaN where one of them failed."""
        return self.values.mean(axis=1)


def default_probes(size: int) -> int:
    """Probes for images of ``size`` values: 16 up to 1,000, 4 up to 5,000, 1 above; their error falls with the size."""
    return 16 if size <= 1000 else 4 if size <= 5000 else 1


def make_solver(
    predict: Predict,
    schedule: Schedule,
    *,
    probes: int = 16,
    exact: bool = False,
    tolerance: float = 1e-4,
    max_steps: int = 4096,
    chunk: int = 64,
    prior: str | Prior = "standard",
    mode: str = "forward",
) -> Solver:
    """A compiled solver, to be made once and used for all models.

    Args:
      predict: the model, which takes floating times, see :mod:`jaxunlearn.likelihood`.
      schedule: its noise schedule.
      probes: number of random signs per value and row; not used with ``exact``.
      exact: the exact divergence.
      tolerance: relative and absolute tolerance of a step.
      max_steps, chunk, prior, mode: as :func:`jaxunlearn.likelihood.log_likelihood`.

    Raises:
      ValueError: fewer than one probe. When called: as :func:`jaxunlearn.likelihood.log_likelihood`.
    """
    if not exact and probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}; or ask for the exact divergence")

    @jax.jit
    def solve(params, x, keys, cond=None):
        signs = None
        if not exact:
            signs = jax.vmap(lambda key: rademacher_probes(key, 1, probes, x.shape[1:])[0])(keys)
        options = {
            "rtol": tolerance,
            "atol": tolerance,
            "max_steps": max_steps,
            "chunk": chunk,
            "prior": prior,
            "mode": mode,
        }
        return log_likelihood(predict, params, x, schedule, probes=signs, exact=exact, cond=cond, **options)

    return solve


def offset(data_range: float = 2.0, levels: int = 256) -> float:
    """What turns a density into the probability of a level: ``log2(levels) - log2(data_range)``; 7 for [-1, 1].

    >>> offset()
    7.0
    """
    return math.log2(levels) - math.log2(data_range)


def nll_bpd(log_p: Array, size: int, data_range: float = 2.0) -> np.ndarray:
    """Nats per image -> bits per value, float64 of the same shape; ``size`` values an image.

    >>> round(float(nll_bpd(np.log(128.0) * 10, 10)), 6)
    0.0
    """
    return -np.asarray(log_p, np.float64) / (size * math.log(2)) + offset(data_range)


def dequantised(images: np.ndarray, u: Array) -> Array:
    """``2 (v + u) / 256 - 1``: bytes v and u in [0, 1) -> a point of the cell in [-1, 1] that the level stands for."""
    return 2 * (jnp.asarray(images, jnp.float32) + u) / 256 - 1


def nll_bpd_uniform_deq(
    solve: Solver,
    params: PyTree,
    images: np.ndarray,
    key: Array,
    *,
    draws: int = 5,
    batch_size: int = 32,
    each: Callable[[], None] = lambda: None,
    cond: np.ndarray | None = None,
) -> Nll:
    """NLL of byte images under uniform dequantisation, ``draws`` draws an image: a bound of the discrete likelihood.

    Draws and probes of an image come from the key and its position: the same for all models, whatever the batches.

    Args:
      solve: from :func:`make_solver`.
      params: parameters of the model.
      images: uint8 [N,H,W,C].
      key: JAX key, the same for all models.
      draws: dequantisations per image.
      batch_size: rows per call; the last batch is filled up with repeated rows that are then dropped.
      each: called after every batch.
      cond: the condition of each image [N, ...], for models that have one.

    Raises:
      ValueError: images that are not bytes, or none; no draws.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"dequantisation needs bytes, uint8 [N,H,W,C], got {images.dtype} {images.shape}")

    def prepare(rows, keys):
        u = jax.vmap(lambda k: jax.random.uniform(k, images.shape[1:]))(keys)
        return dequantised(images[rows], u)

    found = _solve_rows(solve, params, len(images), prepare, key, draws, batch_size, each, cond)
    return found._replace(values=nll_bpd(found.values, images[0].size))


def nll_bpd_raw(solve: Solver, params: PyTree, images: np.ndarray, key: Array, **options) -> Nll:
    """NLL of the exact pixels ``v / 127.5 - 1``, one value an image. No likelihood of images: use differences only.

    Options are those of :func:`nll_bpd_uniform_deq` without ``draws``.

    Raises:
      ValueError: images that are not bytes, or none.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"raw pixels must be bytes, uint8 [N,H,W,C], got {images.dtype} {images.shape}")
    found = _solve_rows(
        solve, params, len(images), lambda rows, _: images[rows] / np.float32(127.5) - 1, key, 1, **_all(options)
    )
    return found._replace(values=nll_bpd(found.values, images[0].size))


def nll_latent(solve: Solver, params: PyTree, latents: np.ndarray, key: Array, **options) -> Nll:
    """Nats per value of latents [N,...], without any offset: latents have no levels. One value each.

    Options are those of :func:`nll_bpd_uniform_deq` without ``draws``.

    Raises:
      ValueError: no latents.
    """
    latents = np.asarray(latents, np.float32)
    found = _solve_rows(solve, params, len(latents), lambda rows, _: latents[rows], key, 1, **_all(options))
    return found._replace(values=-found.values / latents[0].size)


def _all(options):
    return {"batch_size": 32, "each": lambda: None, "cond": None, **options}


def _solve_rows(solve, params, count, prepare, key, draws, batch_size, each, cond) -> Nll:
    """Log-likelihoods of all (image, draw) in batches of one size; an entry is NaN where the solver failed."""
    if count < 1 or draws < 1:
        raise ValueError(f"a likelihood needs images and draws, got {count} images, {draws} draws")
    image, draw = (part.reshape(-1) for part in np.meshgrid(np.arange(count), np.arange(draws), indexing="ij"))
    row_keys = jax.jit(jax.vmap(lambda i, j: jax.random.split(jax.random.fold_in(jax.random.fold_in(key, i), j))))
    keys = row_keys(image, draw)
    batch_size = min(batch_size, len(image))
    values, steps = np.empty(len(image)), np.empty(len(image), np.int64)
    for start in range(0, len(image), batch_size):
        take = np.minimum(np.arange(start, start + batch_size), len(image) - 1)
        given = None if cond is None else cond[image[take]]
        out = solve(params, prepare(image[take], keys[take, 0]), keys[take, 1], given)
        stop = min(start + batch_size, len(image))
        values[start:stop] = np.asarray(out.log_p)[: stop - start]
        steps[start:stop] = np.asarray(out.steps)[: stop - start]
        each()
    return Nll(values.reshape(count, draws), steps.reshape(count, draws))


__all__ = [
    "EXACT_LIMIT",
    "Nll",
    "Solver",
    "default_probes",
    "dequantised",
    "make_solver",
    "nll_bpd",
    "nll_bpd_raw",
    "nll_bpd_uniform_deq",
    "nll_latent",
    "offset",
]
