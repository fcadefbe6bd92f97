"""WHEN: how a step's timesteps are drawn, and how terms are weighted by them.

Two estimators of the same selective objective: *draw* t inside a window (``t_min``, ``t_max`` of a draw function), or draw
t everywhere and *weight* (:func:`window` with ``num_steps``). SISS shares one t between the keep and the forget image of a
row, so a window on the forget term alone needs the second.

Windows are half-open: ``t1 <= t < t2``.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.schedule import Schedule
from jaxunlearn.types import Array, Batch, Draw, DrawFn, TimeWeight

ExtraDraws = Mapping[str, Callable[[Array, tuple[int, ...]], Array]]
"""Name -> ``(key, shape [B,H,W,C]) -> array``: further randomness that an objective asks for (``draw_extra``)."""

NO_EXTRA: ExtraDraws = types.MappingProxyType({})


# Weights of t.


def window(t1: int, t2: int, num_steps: int | None = None) -> TimeWeight:
    """``1[t1 <= t < t2]``, times ``num_steps / (t2 - t1)`` where ``num_steps`` is given.

    With ``num_steps = T`` and t uniform on 0..T-1 the weighted mean equals the mean over the window.

    Raises:
      ValueError: an empty window, or one that leaves 0..num_steps.
    """
    if not 0 <= t1 < t2 or (num_steps is not None and t2 > num_steps):
        raise ValueError(f"window needs 0 <= t1 < t2 <= {num_steps or 'T'}, got ({t1}, {t2})")
    scale = 1.0 if num_steps is None else num_steps / (t2 - t1)
    return lambda t: jnp.where((t >= t1) & (t < t2), jnp.asarray(scale, jnp.result_type(float)), 0.0)


def window_from_log_snr(schedule: Schedule, *, high: float, low: float) -> tuple[int, int]:
    """The window (t1, t2) in which ``low < log_snr(t) <= high``. Noise level, not t, transfers between schedules.

    ``high = log_snr(t1), low = log_snr(t2)`` is an exact round trip; ``low = -inf`` gives t2 = T.

    Raises:
      ValueError: ``high < low``, or no step lies in between.
    """
    if high < low:
        raise ValueError(f"window_from_log_snr needs low <= high, got low={low}, high={high}")
    # All in float32, so that bounds taken from `schedule.log_snr` and bounds computed in float64 count the same steps.
    log_snr = np.asarray(schedule.log_snr(np.arange(schedule.num_steps)), np.float32)
    high, low = np.float32(high), np.float32(low)
    t1, t2 = int(np.sum(log_snr > high)), int(np.sum(log_snr > low))
    if t1 >= t2:
        raise ValueError(f"no timestep has log_snr in ({low}, {high}]; the schedule covers {log_snr[-1]}..{log_snr[0]}")
    return t1, t2


def min_snr(schedule: Schedule, gamma: float = 5.0) -> TimeWeight:
    """``min(snr, gamma) / snr`` for eps-prediction (Hang et al. 2023, arXiv 2303.09556): in (0, 1], small at small t."""
    if gamma <= 0:
        raise ValueError(f"min_snr needs gamma > 0, got {gamma}")
    return lambda t: jnp.minimum(1.0, gamma * jnp.exp(-schedule.log_snr(t)))


# Draws.


def _draw(key: Array, batch: Batch, choose_t, stratify_lam: float | None, extra: ExtraDraws) -> Draw:
    key_t, key_eps, key_u, key_extra = jax.random.split(key, 4)
    shape = batch.keep.x0.shape
    # The images may still be bytes: noise has the default floating type.
    dtype = batch.keep.x0.dtype if jnp.issubdtype(batch.keep.x0.dtype, jnp.floating) else jnp.result_type(float)
    dtype = jnp.promote_types(dtype, jnp.float32)
    t, t_weight = choose_t(key_t, shape[0])
    u = jax.random.uniform(key_u, (shape[0],), dtype)
    if stratify_lam is not None:
        u = stratified_uniform(key_u, shape[0], stratify_lam, dtype)
    extras = {
        name: make(jax.random.fold_in(key_extra, i), shape) for i, (name, make) in enumerate(sorted(extra.items()))
    }
    return Draw(t=t, t_weight=t_weight.astype(dtype), eps=jax.random.normal(key_eps, shape, dtype), u=u, extra=extras)


def stratified_uniform(key: Array, count: int, lam: float, dtype=jnp.float32) -> Array:
    """[count] in [0, 1) of which exactly ``round(lam * count)`` lie below lam, in random order.

    With it every SISS batch holds the same number of forget rows; means are unchanged where ``lam * count`` is whole.
    """
    below = round(lam * count)
    key_value, key_order = jax.random.split(key)
    value = jax.random.uniform(key_value, (count,), dtype)
    in_forget = jnp.arange(count) < below
    # Just below 1 stays below 1, and lam itself belongs to keep, as `u < lam` chooses forget.
    u = jnp.where(in_forget, value * lam, lam + value * (1 - lam))
    below_one = 1 - jnp.finfo(dtype).epsneg
    u = jnp.where(in_forget, jnp.minimum(u, np.nextafter(np.float32(lam), np.float32(0))), jnp.clip(u, lam, below_one))
    return jax.random.permutation(key_order, u.astype(dtype))


def _check_range(num_steps: int, t_min: int, t_max: int | None) -> tuple[int, int]:
    t_max = num_steps if t_max is None else t_max
    if not 0 <= t_min < t_max <= num_steps:
        raise ValueError(f"draws need 0 <= t_min < t_max <= {num_steps}, got t_min={t_min}, t_max={t_max}")
    return t_min, t_max


def uniform(
    num_steps: int,
    *,
    t_min: int = 0,
    t_max: int | None = None,
    stratify_lam: float | None = None,
    extra: ExtraDraws = NO_EXTRA,
) -> DrawFn:
    """t uniform on ``t_min <= t < t_max`` (the whole table by default), independent between examples.

    Args:
      num_steps: T.
      t_min: first timestep that is drawn.
      t_max: one past the last (T if None).
      stratify_lam: if given, exactly ``round(lam * B)`` of the ``u`` lie below it (:func:`stratified_uniform`).
      extra: the objective's ``draw_extra``.
    """
    t_min, t_max = _check_range(num_steps, t_min, t_max)

    def choose_t(key, count):
        return jax.random.randint(key, (count,), t_min, t_max, jnp.int32), jnp.ones((count,))

    return lambda key, batch: _draw(key, batch, choose_t, stratify_lam, extra)


def antithetic(
    num_steps: int,
    *,
    t_min: int = 0,
    t_max: int | None = None,
    stratify_lam: float | None = None,
    extra: ExtraDraws = NO_EXTRA,
) -> DrawFn:
    """As :func:`uniform`, but in pairs ``(t, t_min + t_max - 1 - t)``: the mean of t over a batch is exact.

    Each t alone is still uniform. With an odd number of examples the last one has no partner.
    """
    t_min, t_max = _check_range(num_steps, t_min, t_max)

    def choose_t(key, count):
        half = jax.random.randint(key, ((count + 1) // 2,), t_min, t_max, jnp.int32)
        pairs = jnp.stack([half, t_min + t_max - 1 - half], axis=1)
        return pairs.reshape(-1)[:count], jnp.ones((count,))

    return lambda key, batch: _draw(key, batch, choose_t, stratify_lam, extra)


def importance(probabilities: np.ndarray, *, stratify_lam: float | None = None, extra: ExtraDraws = NO_EXTRA) -> DrawFn:
    """t drawn with the given probabilities [T], reweighted exactly: ``t_weight = 1 / (T p(t))``.

    The weighted mean equals that of :func:`uniform` over the timesteps with positive probability. Give every timestep a
    positive probability, or the estimate leaves the others out.

    Raises:
      ValueError: negative, non-finite or all-zero probabilities.
    """
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 1 or not np.all(np.isfinite(p)) or np.any(p < 0) or p.sum() <= 0:
        raise ValueError("importance needs a vector of non-negative finite probabilities with a positive sum")
    p = p / p.sum()
    cumulative = np.cumsum(p)
    # The last positive entry must catch u = 1 - epsilon although the float32 sum may fall short of 1.
    cumulative[np.flatnonzero(p)[-1] :] = 1.0
    with np.errstate(divide="ignore"):
        weight = np.where(p > 0, 1.0 / (np.count_nonzero(p) * p), 0.0)

    def choose_t(key, count):
        t = jnp.searchsorted(jnp.asarray(cumulative), jax.random.uniform(key, (count,)), side="right").astype(jnp.int32)
        return t, jnp.asarray(weight)[t]

    return lambda key, batch: _draw(key, batch, choose_t, stratify_lam, extra)


DRAWS = {"uniform": uniform, "antithetic": antithetic}
"""The ways of drawing t that need only a range: name -> factory(num_steps, t_min=, t_max=, ...)."""
