"""How fast a model learns the forget images again: what a change of its outputs has only hidden comes back quickly.

Every model is trained on the forget images alone, with the same keys and the same optimiser. ``relearn_steps`` is the first
step, interpolated in the logarithm of the loss, at which the loss on fixed probes is back at the level of the model before
unlearning; it is censored at a budget. ``relearn_ratio = steps(unlearned) / mean steps(retrained)``: 1 is as slow as a model
that never saw them, 0 is the model before. Resurgence of unlearned images: Suriyakumar et al. 2024, arXiv 2410.08074.

The ``benign`` mode trains on keep images alone; what is measured then (copies, losses) belongs to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import stats

from jaxunlearn.metrics.statistics import Interval
from jaxunlearn.types import Array

StepFn = Callable[[Any, Array], Any]
"""``(state, key) -> state``: one optimiser step, all of its randomness from the key. The state is the caller's."""

ProbeFn = Callable[[Any], float]
"""``state -> loss`` on fixed probes of the forget images, positive."""


class Relearned(NamedTuple):
    """One run of relearning.

    Attributes:
      steps: interpolated step at which the loss was back; the budget where ``censored``; NaN where ``failed``.
      censored: the budget was not enough: ``steps`` is a lower bound.
      failed: the loss became NaN or infinite.
      at: the steps at which the loss was measured, from 0.
      losses: the losses there.
    """

    steps: float
    censored: bool
    failed: bool
    at: tuple[int, ...]
    losses: tuple[float, ...]


class RelearnRatio(NamedTuple):
    """``relearn_ratio`` over keys.

    Attributes:
      value: mean steps of the model / mean steps of the references; NaN where it is unknown.
      ci: its interval over keys (linearised, Student t); None where ``bound`` is not "exact" or there are too few keys.
      bound: "exact"; "lower" (the model was censored: the ratio is at least the value); "upper" (a reference was censored);
        "unknown" (both were, a run failed, or the references needed no step at all).
      steps: mean steps of the model.
      reference_steps: mean steps of each reference.
    """

    value: float
    ci: Interval | None
    bound: str
    steps: float
    reference_steps: tuple[float, ...]


def relearn_steps(
    step_fn: StepFn,
    state: Any,
    probe_fn: ProbeFn,
    key: Array,
    *,
    target: float,
    budget: int = 200,
    every: int = 1,
    each: Callable[[], None] = lambda: None,
) -> Relearned:
    """Trains until the probe loss is at most ``target``.

    Args:
      step_fn: one step; step k gets ``fold_in(key, k)``, so that all models see the same noises.
      state: where to start: a model with a fresh optimiser.
      probe_fn: the loss.
      key: JAX key.
      target: the loss of the model before unlearning, positive.
      budget: most steps.
      every: steps between two measurements; the crossing is interpolated between them.
      each: called after every measurement.

    Raises:
      ValueError: a target that is not positive and finite, or a budget or spacing below 1.
    """
    if not (math.isfinite(target) and target > 0) or budget < 1 or every < 1:
        raise ValueError(
            f"relearning needs a positive target, budget and spacing, got target = {target}, budget = {budget}, "
            f"every = {every}"
        )
    at, losses = [0], [float(probe_fn(state))]
    while math.isfinite(losses[-1]) and losses[-1] > target and at[-1] < budget:
        stop = min(at[-1] + every, budget)
        for step in range(at[-1], stop):
            state = step_fn(state, jax.random.fold_in(key, step))
        at.append(stop)
        losses.append(float(probe_fn(state)))
        each()
    record = (tuple(at), tuple(losses))
    if not math.isfinite(losses[-1]):
        return Relearned(math.nan, False, True, *record)
    if losses[-1] > target:
        return Relearned(float(budget), True, False, *record)
    return Relearned(_crossing(at, losses, target), False, False, *record)


def _crossing(at: Sequence[int], losses: Sequence[float], target: float) -> float:
    """Where the last two losses pass the target, on a line in the logarithm."""
    if len(at) == 1:
        return 0.0
    before, after = (math.log(max(loss, 1e-30)) for loss in losses[-2:])
    share = (before - math.log(target)) / (before - after)
    return at[-2] + share * (at[-1] - at[-2])


def relearn_ratio(
    model: Sequence[Relearned], references: Sequence[Sequence[Relearned]], confidence: float = 0.95
) -> RelearnRatio:
    """The model's steps against those of the reference models; entry k of every sequence belongs to key k.

    Args:
      model: runs of the unlearned model, one for each key.
      references: for each reference model its runs with the same keys.
      confidence: of the interval.

    Raises:
      ValueError: no reference, fewer than 3 keys, or not the same number of runs for all models.
    """
    if not references or len(model) < 3 or any(len(runs) != len(model) for runs in references):
        counts = [len(runs) for runs in references]
        raise ValueError(
            f"relearn_ratio needs references and the same 3 or more keys for all, got {len(model)} runs and {counts}"
        )
    a = np.array([run.steps for run in model])
    b = np.array([[run.steps for run in runs] for runs in references])
    mean_a, mean_b = float(a.mean()), tuple(float(x) for x in b.mean(axis=1))
    everything = [*model, *(run for runs in references for run in runs)]
    late, late_reference = any(run.censored for run in model), any(run.censored for runs in references for run in runs)
    if any(run.failed for run in everything) or (late and late_reference) or not b.mean() > 0:
        return RelearnRatio(math.nan, None, "unknown", mean_a, mean_b)
    value = float(a.mean() / b.mean())
    if late or late_reference:
        return RelearnRatio(value, None, "lower" if late else "upper", mean_a, mean_b)
    rest = a - value * b.mean(axis=0)
    half = stats.t.ppf(0.5 + confidence / 2, len(a) - 1) * rest.std(ddof=1) / (b.mean() * math.sqrt(len(a)))
    interval = Interval(value - float(half), value + float(half), confidence, "Student t over keys, linearised ratio")
    return RelearnRatio(value, interval, "exact", mean_a, mean_b)


def train(step_fn: StepFn, state: Any, key: Array, steps: int) -> Any:
    """The benign mode: ``steps`` steps (of keep images, for example) with the keys of :func:`relearn_steps`.

    Raises:
      ValueError: a negative number of steps.
    """
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, got {steps}")
    for step in range(steps):
        state = step_fn(state, jax.random.fold_in(key, step))
    return state
