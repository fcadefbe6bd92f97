"""Membership scores: one number per image and model, low where the model treats the image like one it was trained on.

The denoising loss itself is in :mod:`jaxunlearn.metrics.denoising_loss`; the scores here draw no noise. A score says
little about one image alone: images differ in how easy they are. Compare with held-out images, and with the score under
a retrained model.

The makers return pure functions of ``(params, arrays with one row per image)``, to be jitted once and used for all
models of a shape; :func:`score_images` runs them in batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.metrics.roc import auc
from jaxunlearn.schedule import Schedule, per_example
from jaxunlearn.types import Array, PyTree

Rows = Callable[..., Array]
"""``(params, x0 [B,H,W,C], ...) -> [B]``."""


def make_secmi(predict: Callable[..., Array], schedule: Schedule, t: int = 100, step: int = 10) -> Rows:
    """``(params, x0, *cond) -> [B]``: how far one step up and one back miss each other (SecMI, Duan et al. 2023).

    Deterministic DDIM steps lead from x0 at 0 over ``step, 2 step, ...`` to z at ``t - step``, then up to t and back to
    z' at ``t - step``. The score is ``sum (z - z')^2``, with ``t / step + 1`` calls of the model.

    Args:
      predict: ``(params, x_t, t, *cond) -> eps_hat``.
      schedule: the model's noise schedule.
      t: the upper timestep, a multiple of ``step``.
      step: distance of the timesteps.

    Raises:
      ValueError: a t that is no multiple of the step, not above it, or outside the schedule.
    """
    if step < 1 or t % step or not step < t < schedule.num_steps:
        raise ValueError(
            f"secmi: t = {t}, step = {step}; allowed: t a multiple of the step, above it and below {schedule.num_steps}"
        )
    path = np.append(np.arange(0, t + 1, step), t - step).astype(np.int32)

    def rows(params: PyTree, x0: Array, *cond) -> Array:
        def move(x, pair):
            now, then = pair
            e = predict(params, x, jnp.full(len(x), now), *cond)
            clean = (x - schedule.sigma(now) * e) / schedule.alpha(now)
            x = (schedule.alpha(then) * clean + schedule.sigma(then) * e).astype(x.dtype)
            return x, x

        _, states = jax.lax.scan(move, x0, (path[:-1], path[1:]))
        return _sum((states[-3] - states[-1]) ** 2)

    return rows


def make_pia(
    predict: Callable[..., Array], schedule: Schedule, t: int = 200, power: float = 4.0, normalised: bool = False
) -> Rows:
    """``(params, x0, *cond) -> [B]``: how well the model finds its own noise again (PIA and PIAN, Kong et al. 2023).

    With ``e0 = eps_hat(x0, 0)`` of the image without noise: ``sum |e0 - eps_hat(alpha x0 + sigma e0, t)|^power``.
    ``normalised`` (PIAN) first gives e0 the mean absolute value of standard normal noise, ``sqrt(2 / pi)``.

    Raises:
      ValueError: a t outside the schedule, a power that is not positive.
    """
    _check_t("pia", t, schedule)
    _check_power("pia", power)

    def rows(params: PyTree, x0: Array, *cond) -> Array:
        e0 = predict(params, x0, jnp.zeros(len(x0), jnp.int32), *cond)
        if normalised:
            e0 = e0 * (math.sqrt(2 / math.pi) / per_example(jnp.mean(jnp.abs(e0), axis=(1, 2, 3)), e0))
        times = jnp.full(len(x0), t)
        again = predict(params, schedule.add_noise(x0, e0, times), times, *cond)
        return _sum(jnp.abs(e0 - again) ** power)

    return rows


def make_sima(predict: Callable[..., Array], power: float = 4.0) -> Rows:
    """``(params, x0, t [B], *cond) -> [B]``: ``sum |eps_hat(x0, t)|^power`` of the image without noise (SimA, Rao et al.).

    One call of the model. Which t tells members apart depends on the model: see :func:`best_t`.

    Raises:
      ValueError: a power that is not positive.
    """
    _check_power("sima", power)

    def rows(params: PyTree, x0: Array, t: Array, *cond) -> Array:
        return _sum(jnp.abs(predict(params, x0, t, *cond)) ** power)

    return rows


def score_images(
    rows: Rows, params: PyTree, *arrays, batch_size: int = 500, each: Callable[[], None] = lambda: None
) -> np.ndarray:
    """The score of every image, in batches: float64 [N].

    Args:
      rows: from one of the makers, jitted by the caller.
      params: parameters of the model.
      arrays: x0 [N,H,W,C], and what else the score takes (t, conditions), each with N rows.
      batch_size: rows per call; the last batch is filled up with repeated rows that are then dropped.
      each: called after every batch (progress, signals).

    Raises:
      ValueError: no rows, or arrays of different length.
    """
    lengths = [len(array) for array in arrays]
    if not lengths or len(set(lengths)) > 1 or not lengths[0]:
        raise ValueError(f"scores need images, and one row of every other array for each; got {lengths} rows")
    n = lengths[0]
    values = np.empty(n)
    for start in range(0, n, batch_size):
        take = np.minimum(np.arange(start, start + batch_size), n - 1)
        stop = min(start + batch_size, n)
        values[start:stop] = np.asarray(rows(params, *(array[take] for array in arrays)))[: stop - start]
        each()
    return values


def sima_sweep(
    rows: Rows,
    params: PyTree,
    x0,
    t: Sequence[int],
    cond=None,
    batch_size: int = 500,
    each: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """The scores of :func:`make_sima` at several t: x0 [N,H,W,C] -> float64 [N, len(t)]; ``cond`` [N,...] or None.

    Raises:
      ValueError: no images or no t.
    """
    x0, t = np.asarray(x0), np.asarray(t, np.int32)
    image, place = (part.reshape(-1) for part in np.meshgrid(np.arange(len(x0)), np.arange(len(t)), indexing="ij"))
    more = () if cond is None else (cond[image],)
    scores = score_images(rows, params, x0[image], t[place], *more, batch_size=batch_size, each=each)
    return scores.reshape(len(x0), len(t))


def best_t(members, others) -> int:
    """Which column tells members [n, T] from others [m, T] best: the place with the largest AUC, the first of equals.

    Give it a calibration split only: images whose scores are reported later must not choose t.

    Raises:
      ValueError: sets with different numbers of columns.
    """
    members, others = np.asarray(members), np.asarray(others)
    if members.ndim != 2 or members.shape[1:] != others.shape[1:]:
        raise ValueError(f"scores must be [n, T] and [m, T] of the same T, got {members.shape} and {others.shape}")
    return int(np.argmax([auc(members[:, i], others[:, i]) for i in range(members.shape[1])]))


def clid(with_condition, without) -> np.ndarray:
    """Denoising loss with an image's own condition minus the loss with none, mean over t: [N, T] twice -> float64 [N].

    Low where the text explains the image better than it should, as it does for a memorised pair. A reconstruction from
    the idea of CLiD (Zhai et al. 2024), whose score has the opposite sign; the paper's own code was not compared.

    >>> clid([[1.0, 3.0]], [[2.0, 3.0]]).tolist()
    [-0.5]

    Raises:
      ValueError: losses of different shapes.
    """
    first, second = np.asarray(with_condition, np.float64), np.asarray(without, np.float64)
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(f"losses must be [N, T] twice, got {first.shape} and {second.shape}")
    return (first - second).mean(axis=1)


def _sum(values: Array) -> Array:
    return jnp.sum(values, axis=(1, 2, 3))


def _check_t(name: str, t: int, schedule: Schedule) -> None:
    if not 0 <= t < schedule.num_steps:
        raise ValueError(f"{name}: t = {t}; allowed: 0..{schedule.num_steps - 1}")


def _check_power(name: str, power: float) -> None:
    if not power > 0:
        raise ValueError(f"{name}: power = {power}; allowed: a positive number")
