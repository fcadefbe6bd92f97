"""WHEN: how a step's timesteps are drawn, and how terms are weighted by them.

Two estimators of the same selective objective: *draw* t inside a window (``t_min``, ``t_max`` of a draw function), or draw
t everywhere and *weight* (:func:`window` with ``num_steps``). SISS shares one t between the keep and the forget image of a
row, so a window on the forget term alone needs the second. :func:`importance` with :func:`weighted_probabilities` joins
both: most draws fall inside, the rest is reweighted exactly, and every term keeps its mean.

Windows are half-open: ``t1 <= t < t2``. They may be given in t, as fractions of T, or by noise level (log-SNR):
:func:`resolve_window`. Hard windows and smooth weights are both a :data:`~jaxunlearn.types.TimeWeight`.

Selecting a window of t follows the abstract and the public reviews of arXiv 2510.17917. It is a reconstruction: windows
and weighting may differ from the authors' code.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.registry import look_up
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

    ``high = log_snr(t1), low = log_snr(t2)`` is an exact round trip where both are finite; ``low = -inf`` gives t2 = T, also
    at zero terminal SNR, where the last step itself lies at -inf.

    Raises:
      ValueError: ``high < low``, or no step lies in between.
    """
    if high < low:
        raise ValueError(f"window_from_log_snr needs low <= high, got low={low}, high={high}")
    # All in float32, so that bounds taken from `schedule.log_snr` and bounds computed in float64 count the same steps.
    log_snr = np.asarray(schedule.log_snr(np.arange(schedule.num_steps)), np.float32)
    high, low = np.float32(high), np.float32(low)
    t1 = int(np.sum(log_snr > high))
    t2 = schedule.num_steps if low == -np.inf else int(np.sum(log_snr > low))
    if t1 >= t2:
        raise ValueError(f"no timestep has log_snr in ({low}, {high}]; the schedule covers {log_snr[-1]}..{log_snr[0]}")
    return t1, t2


def window_from_fraction(num_steps: int, start: float, stop: float) -> tuple[int, int]:
    """The window (t1, t2) of the fractions ``start <= t / T < stop``, rounded to whole steps.

    Raises:
      ValueError: fractions outside 0 <= start < stop <= 1, or no step in between.

    >>> window_from_fraction(1000, 0.25, 0.75)
    (250, 750)
    """
    if not 0 <= start < stop <= 1:
        raise ValueError(f"a window in fractions of T needs 0 <= start < stop <= 1, got ({start}, {stop})")
    t1, t2 = round(start * num_steps), round(stop * num_steps)
    if t1 >= t2:
        raise ValueError(f"no timestep of {num_steps} lies in the fractions ({start}, {stop})")
    return t1, t2


def _window_in_t(schedule: Schedule, t1: float, t2: float) -> tuple[int, int]:
    if t1 != int(t1) or t2 != int(t2):
        raise ValueError(f"a window in t needs whole steps, got ({t1}, {t2}); fractions of T have the unit 'fraction'")
    window(t1, t2, schedule.num_steps)
    return int(t1), int(t2)


WINDOW_UNITS = {
    "t": _window_in_t,
    "fraction": lambda schedule, start, stop: window_from_fraction(schedule.num_steps, start, stop),
    "log_snr": lambda schedule, high, low: window_from_log_snr(schedule, high=high, low=low),
}
"""Units of a window: name -> ``(schedule, first bound, second bound) -> (t1, t2)``; the first is the cleaner one."""


def resolve_window(schedule: Schedule, bounds: tuple[float, float], unit: str = "t") -> tuple[int, int]:
    """The window in whole timesteps.

    Args:
      schedule: the noise schedule.
      bounds: in t ``(t1, t2)``; fractions of T ``(start, stop)``; or log-SNR ``(high, low)``. The cleaner bound is first.
      unit: ``t``, ``fraction`` or ``log_snr``.

    Raises:
      ValueError: unknown unit, an empty window, or bounds outside of the schedule.

    >>> from jaxunlearn.schedule import linear
    >>> resolve_window(linear(), (0.0859, -5.71), "log_snr")
    (250, 750)
    """
    return look_up("unit of a window", unit, WINDOW_UNITS)(schedule, *bounds)


def table_weight(values: np.ndarray, *, normalise: bool = False) -> TimeWeight:
    """The weight ``values[t]``.

    Args:
      values: [T], finite and not negative; one that is traced is not looked at, so one program serves all tables.
      normalise: divide by the mean, so that with t uniform on 0..T-1 the weight has mean 1.

    Raises:
      ValueError: another shape, negative or non-finite values, or nothing but zeros.
    """
    if isinstance(values, jax.core.Tracer):
        table = values / values.mean() if normalise else values
        return lambda t: table[t]
    table = np.asarray(values, np.float64)
    if table.ndim != 1 or not np.all(np.isfinite(table)) or np.any(table < 0) or not np.any(table > 0):
        raise ValueError("a table of weights must be a vector of finite values >= 0 of which one is positive")
    table = table / table.mean() if normalise else table
    return lambda t: jnp.asarray(table)[t]


def smooth_window(t1: int, t2: int, edge: int, num_steps: int, *, normalise: bool = True) -> TimeWeight:
    """A window with flanks of half a cosine, ``edge`` steps wide and centred on its ends.

    Exactly 0 below ``t1 - edge / 2`` and above ``t2 + edge / 2``, exactly 1 between the flanks (before normalising). With
    ``edge = 0`` it is :func:`window`. A flank that would leave 0..T is cut off there.

    Args:
      t1: first timestep of the window.
      t2: one past its last.
      edge: width of each flank in steps, at most ``t2 - t1``.
      num_steps: T.
      normalise: scale to mean 1 over 0..T-1, as ``window(..., num_steps=T)`` does.

    Raises:
      ValueError: a bad window, or flanks that meet.

    >>> weight = smooth_window(2, 6, 2, 8, normalise=False)
    >>> np.round(np.float64(weight(jnp.arange(8))), 2).tolist()
    [0.0, 0.15, 0.85, 1.0, 1.0, 0.85, 0.15, 0.0]
    """
    window(t1, t2, num_steps)
    if not 0 <= edge <= t2 - t1:
        raise ValueError(f"smooth_window needs 0 <= edge <= t2 - t1 = {t2 - t1}, got {edge}")
    if edge == 0:
        return window(t1, t2, num_steps if normalise else None)
    middle = np.arange(num_steps) + 0.5

    def flank(distance):
        """0 outside, 1 inside; ``distance`` from the end of the window, in steps, positive inside."""
        return 0.5 - 0.5 * np.cos(np.pi * np.clip(distance / edge + 0.5, 0, 1))

    table = flank(middle - t1) * flank(t2 - middle)
    return table_weight(table, normalise=normalise)


def log_snr_bump(schedule: Schedule, center: float, width: float, *, normalise: bool = True) -> TimeWeight:
    """``exp(-(log_snr(t) - center)^2 / (2 width^2))``: a smooth weight around a noise level. It transfers between schedules.

    Raises:
      ValueError: width not positive, or a centre so far from the schedule that every weight underflows.
    """
    if not width > 0:
        raise ValueError(f"log_snr_bump needs width > 0 (in units of log-SNR), got {width}")
    log_snr = np.asarray(schedule.log_snr(np.arange(schedule.num_steps)), np.float64)
    table = np.exp(-(((log_snr - center) / width) ** 2) / 2)
    if not np.any(table > 0):
        raise ValueError(f"log_snr {center} lies far outside of the schedule's {log_snr[-1]:.1f}..{log_snr[0]:.1f}")
    return table_weight(table, normalise=normalise)


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


def importance(
    probabilities: np.ndarray,
    *,
    antithetic: bool = False,
    stratify_lam: float | None = None,
    extra: ExtraDraws = NO_EXTRA,
) -> DrawFn:
    """t drawn with the given probabilities [T], reweighted exactly: ``t_weight = 1 / (n p(t))``.

    n is the number of timesteps with positive probability. The weighted mean equals that of a uniform draw over them. Give
    every timestep a positive probability, or the estimate leaves the others out.

    Args:
      probabilities: [T]; they need not sum to 1.
      antithetic: draw in pairs (u, 1 - u) of the quantile: each t alone keeps its probability, and pairs lie on opposite
        sides of the median.
      stratify_lam: as in :func:`uniform`.
      extra: the objective's ``draw_extra``.

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
    # The largest u below 1: the partner of u = 0.
    below_one = 1 - np.finfo(np.float32).epsneg

    def choose_t(key, count):
        u = jax.random.uniform(key, ((count + 1) // 2 if antithetic else count,))
        if antithetic:
            u = jnp.stack([u, jnp.minimum(1 - u, below_one)], axis=1).reshape(-1)[:count]
        t = jnp.searchsorted(jnp.asarray(cumulative), u, side="right").astype(jnp.int32)
        return t, jnp.asarray(weight)[t]

    return lambda key, batch: _draw(key, batch, choose_t, stratify_lam, extra)


def weighted_probabilities(time_weight: TimeWeight, num_steps: int, uniform_share: float = 0.25) -> np.ndarray:
    """Probabilities [T] for :func:`importance` that follow a weight of t: ``(1 - s) w(t) / sum w + s / T``.

    For an objective whose forget term has the weight w and whose keep term needs every t: a share ``s`` of the draws stays
    uniform, so that no ``t_weight`` exceeds ``1 / s``. Both terms keep their means.

    Args:
      time_weight: the weight of the forget term.
      num_steps: T.
      uniform_share: s in (0, 1].

    Raises:
      ValueError: share outside (0, 1]; a weight that is negative, not finite, or zero everywhere.
    """
    if not 0 < uniform_share <= 1:
        raise ValueError(f"uniform_share must lie in (0, 1], got {uniform_share}; 0 would never draw some timesteps")
    weight = np.asarray(time_weight(jnp.arange(num_steps)), np.float64)
    if not np.all(np.isfinite(weight)) or np.any(weight < 0) or weight.sum() <= 0:
        raise ValueError("the weight of t must be finite and >= 0 everywhere, and positive somewhere")
    return (1 - uniform_share) * weight / weight.sum() + uniform_share / num_steps


DRAWS = {"uniform": uniform, "antithetic": antithetic}
"""The ways of drawing t that need only a range: name -> factory(num_steps, t_min=, t_max=, ...)."""
