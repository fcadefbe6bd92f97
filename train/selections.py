"""From ``config.unlearn`` to what is selected: which t, which frequencies, and how t is drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxunlearn import errors, frequency, timesteps
from jaxunlearn.schedule import Schedule
from jaxunlearn.types import DrawFn, Error, Filter, Objective, TimeWeight
from train import step_schedules

ERRORS: dict[str, Error] = {"sum_squares": errors.sum_squares, "mean_squares": errors.mean_squares}
FILTER_KINDS = ("ideal", "gaussian", "butterworth")
DRAWS = (*timesteps.DRAWS, "importance")


def selects(unlearn: ConfigDict) -> bool:
    """Whether anything is selected in the forget term."""
    return unlearn.select.filter != "none" or tuple(unlearn.select.window) != (0, 0)


def is_table(cutoff: Any) -> bool:
    """Whether a cutoff is a table over t: a tuple of more than the two radii of a band."""
    return isinstance(cutoff, tuple) and len(cutoff) > 2


def time_weight(unlearn: ConfigDict, schedule: Schedule) -> TimeWeight | None:
    """The weight of t in the forget term, of mean 1; None where every t counts alike.

    Raises:
      ValueError: an empty window, bounds outside of the schedule, flanks that meet.
    """
    select = unlearn.select
    if tuple(select.window) == (0, 0):
        return None
    t1, t2 = timesteps.resolve_window(schedule, tuple(select.window), select.window_unit)
    return timesteps.smooth_window(t1, t2, select.edge, schedule.num_steps)


def frequency_filter(unlearn: ConfigDict) -> Filter | None:
    """The filter of the forget term's residual, or None.

    Raises:
      ValueError: unknown names; a cutoff that is not positive, or not of the form that the filter takes. A table over t must
        have a radius for every t, which is not checked here.
    """
    select = unlearn.select
    if select.filter == "none":
        return None
    make, options = frequency.FILTERS[select.filter], {name: select[name] for name in ("order", "unit", "backend")}
    if is_table(select.cutoff) and select.filter != "band":
        return make(np.asarray(select.cutoff, np.float64), select.kind, **options)
    cutoffs = select.cutoff if isinstance(select.cutoff, tuple) else (select.cutoff,)
    wanted = 2 if select.filter == "band" else 1
    if len(cutoffs) != wanted:
        form = "two radii (low, high), such as (0.2,0.5)" if wanted == 2 else "one radius, such as 0.5"
        raise ValueError(f"cutoff of filter {select.filter!r} must be {form}, got {select.cutoff!r}")
    return make(*cutoffs, select.kind, **options)


def forget_error(unlearn: ConfigDict, schedule: Schedule, error: Error) -> Error:
    """The error of the forget term: ``error`` with its selections, or itself where nothing is selected."""
    chosen, weight = frequency_filter(unlearn), time_weight(unlearn, schedule)
    if chosen is not None:
        error = errors.filtered(error, chosen)
    return error if weight is None else errors.weighted(error, weight)


def probed_range(unlearn: ConfigDict, schedule: Schedule) -> tuple[int, int, float]:
    """Where the forget error is not zero by selection: ``(t1, t2, share of the drawn t that lies there)``.

    Raises:
      ValueError: no t that is drawn lies in the window.
    """
    t_min, t_max = unlearn.t_min, unlearn.t_max or schedule.num_steps
    weight = time_weight(unlearn, schedule)
    if weight is None:
        return t_min, t_max, 1.0
    inside = np.flatnonzero(np.asarray(weight(np.arange(schedule.num_steps))) > 0)
    inside = inside[(inside >= t_min) & (inside < t_max)]
    if not len(inside):
        raise ValueError(f"no t of the range ({t_min}, {t_max}) that is drawn lies in select.window")
    t1, t2 = int(inside[0]), int(inside[-1]) + 1
    return t1, t2, (t2 - t1) / (t_max - t_min)


def make_draw(unlearn: ConfigDict, objective: Objective, schedule: Schedule) -> DrawFn:
    """How the randomness of an unlearning step is drawn.

    Raises:
      ValueError: importance without a window, stratified draws with a scheduled lam.
    """
    num_steps = schedule.num_steps
    if unlearn.stratify and step_schedules.is_scheduled(unlearn.lam):
        raise ValueError(f"stratify needs one number for lam, got the schedule {unlearn.lam!r}; set stratify=False")
    t_min, t_max = unlearn.t_min, unlearn.t_max or num_steps
    options = {"stratify_lam": unlearn.lam if unlearn.stratify else None, "extra": objective.draw_extra}
    if unlearn.draw != "importance":
        return timesteps.DRAWS[unlearn.draw](num_steps, t_min=t_min, t_max=t_max, **options)
    weight = time_weight(unlearn, schedule)
    if weight is None:
        raise ValueError(
            "draw='importance' follows the window of the forget term; set select.window, or draw='uniform'"
        )
    # Over the drawn range alone, so that the uniform share bounds the weights whatever the range is.
    inside = timesteps.weighted_probabilities(
        lambda t: weight(t + t_min), t_max - t_min, unlearn.importance.uniform_share
    )
    probabilities = np.zeros(num_steps)
    probabilities[t_min:t_max] = inside
    return timesteps.importance(probabilities, antithetic=unlearn.importance.antithetic, **options)
