"""Watching a run of unlearning: how much is forgotten, what it costs, when to end, and which step is the best.

Every few steps the model is probed. The **collapse guard** ends the run when the loss on keep images has grown by half, and
gives back the last sound parameters. The **stop rule**, where it is on, ends the run when the forget level is reached. Both
rules are those of :class:`jaxunlearn.forgetting.StopRule`; here are the measurements and the parameters of the steps that the
rule may still return. They travel in the checkpoints, so a resumed run decides the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxunlearn.forgetting import Decision, Measurement, StopRule
from jaxunlearn.io.diffusers import DiffusersModel
from jaxunlearn.io.workdir import Workdir
from jaxunlearn.quick_evaluation import QuickEvaluation
from jaxunlearn.types import PyTree
from train import yardstick
from train.distributed import from_first
from train.examples import Examples
from train.log import say
from train.probes import Probes
from train.yardstick import Yardstick

TARGET = StopRule.target
"""The level that the best step is measured against where the stop rule is off."""
NEVER = 10**9
CURES = (
    "Try a smaller unlearn.optimizer.learning_rate or forget part (unlearn.combine: rho, c, eta or forget), a guard "
    "(--config.unlearn.guards.reserve.capacity=0.05), or the stop rule (unlearn.stop)"
)


class Seen(NamedTuple):
    """What a probe found.

    Attributes:
      measurement: what the rule decides on.
      figures: name -> number, for the log.
      params: numpy copies of the parameters.
    """

    measurement: Measurement
    figures: dict[str, float]
    params: PyTree


class Watch:
    """The measurements of a run so far, what they decide, and the parameters that may be returned.

    Attributes:
      measurements: oldest first; the first one is the start, step 0.
      rule: what decides.
      returns: ``best`` or ``last``: which step a run returns that went to its end.
    """

    def __init__(
        self,
        watch: ConfigDict,
        stop: ConfigDict,
        num_steps: int,
        start: PyTree,
        probe: Callable[[PyTree], tuple[float, float | None]],
        *,
        has_level: bool,
        sample: Callable[[PyTree], dict[str, float]] | None = None,
    ):
        """Nothing is computed.

        Args:
          watch: ``config.unlearn.watch``.
          stop: ``config.unlearn.stop``.
          num_steps: of the run.
          start: the starting parameters, numpy.
          probe: parameters of the run -> (keep ratio, level or None), the same in every process.
          has_level: whether it gives levels.
          sample: parameters of the run -> figures of samples, the same in every process.
        """
        self._every, self._samples_every, self._num_steps = watch.every, watch.samples_every, num_steps
        self._probe, self._sample = probe, sample
        self.rule = StopRule(
            target=TARGET if stop.target is None else stop.target,
            collapse=watch.collapse,
            warn=watch.warn,
            patience=NEVER if stop.target is None else stop.patience,
        )
        self.returns = watch.returns or ("last" if stop.target is None else "best")
        self.measurements = [Measurement(0, 1.0, 0.0 if has_level else None)]
        self._params: dict[int, PyTree] = {0: start}

    @property
    def decision(self) -> Decision:
        """What the measurements so far decide."""
        return self.rule.decide(self.measurements)

    def due(self, step: int) -> bool:
        """Whether the model is probed after this step."""
        return step % self._every == 0 or step == self._num_steps

    def first(self, params: PyTree) -> dict[str, float]:
        """The figures of the start."""
        return self._figures(self.measurements[0]) | self._samples(0, params)

    def look(self, step: int, params: PyTree) -> Seen:
        """Probes the parameters of a step, and copies them; :meth:`take` makes the result count."""
        copy = jax.tree.map(lambda x: np.array(jax.device_get(x)), params)
        ratio, level = self._probe(params)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(copy)):
            ratio = math.inf
        found = Measurement(step, ratio, level)
        return Seen(found, self._figures(found) | self._samples(step, params), copy)

    def take(self, seen: Seen) -> Decision:
        """Adds a measurement; forgets the parameters that no decision can return any more."""
        step = seen.measurement.step
        self.measurements.append(seen.measurement)
        self._params[step] = seen.params
        wanted = self._wanted()
        self._params = {s: params for s, params in self._params.items() if s in wanted}
        decision = self.decision
        if decision.warning and decision.reason != "collapsed":
            say(f"warning: unlearn, {decision.text}: above {self.rule.warn:g}; the run ends at {self.rule.collapse:g}")
        return decision

    def _wanted(self) -> set[int]:
        """The steps that this decision or a later one may return."""
        decision, row = self.decision, []
        for m in self.measurements:
            row = [*row, m] if m.level is not None and m.level >= self.rule.target else []
        return {0, decision.best_step, decision.last_sound_step, *(m.step for m in row[:1])}

    def _figures(self, m: Measurement) -> dict[str, float]:
        figures = {"eval/keep_ratio": m.keep_ratio, "eval/forget_level": m.level}
        return {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}

    def _samples(self, step: int, params: PyTree) -> dict[str, float]:
        if self._sample is None or not (step % self._samples_every == 0 or step == self._num_steps):
            return {}
        return self._sample(params)

    # What is returned.

    def returned_step(self) -> int:
        """The step whose parameters a run returns that did not collapse."""
        decision = self.decision
        last = self.measurements[-1].step
        if decision.reason == "reached" or self.returns == "best":
            return last if decision.best_step is None else decision.best_step
        return last

    def params_of(self, step: int) -> PyTree:
        """The parameters of a step that the rule names."""
        return self._params[step]

    def summary(self) -> dict[str, Any]:
        """What ``best.json`` says: the best step, the rule, the figures, and what became of the run."""
        decision = self.decision
        # A collapse found between two probes leaves measurements that know nothing of it: the caller says so.
        best = next((m for m in self.measurements if m.step == decision.best_step), None)
        return {
            "step": decision.best_step,
            "keep_ratio": None if best is None else best.keep_ratio,
            "forget_level": None if best is None else best.level,
            "rule": self.rule_text(),
            "returned_step": self.returned_step(),
            "status": {"": "finished"}.get(decision.reason, decision.reason),
            "reason": decision.text,
            # JSON has no NaN: a broken one is told by the reason.
            "measurements": [
                m._asdict() for m in self.measurements if all(map(math.isfinite, (m.keep_ratio, m.level or 0)))
            ],
        }

    def rule_text(self) -> str:
        """How the best step is chosen."""
        sound = f"among the probed steps with a keep loss below {self.rule.warn:g} times that of the start"
        if self.measurements[0].level is None:
            return f"the last {sound}; there is no forget level without unlearn.stop.source"
        row = f"the first of {self.rule.patience} probes in a row at the level {self.rule.target:g}; otherwise "
        return f"{row if self.rule.patience != NEVER else ''}the one nearest to the level {self.rule.target:g}, {sound}"

    # Across kills.

    def meta(self) -> list[list[float | None]]:
        """The measurements as plain JSON."""
        return [list(m) for m in self.measurements]

    def kept(self) -> dict[str, PyTree]:
        """The parameters that a checkpoint must hold beside the state."""
        return {str(step): params for step, params in self._params.items() if step}

    def restore(self, meta: list[list[float | None]], kept: Mapping[str, PyTree]) -> None:
        """Goes on from what :meth:`meta` and :meth:`kept` gave."""
        self.measurements = [Measurement(int(step), ratio, level) for step, ratio, level in meta]
        self._params = {0: self._params[0], **{int(step): params for step, params in kept.items()}}


def make_watch(
    config: ConfigDict,
    workdir: Workdir,
    model: DiffusersModel,
    examples: Examples,
    mesh: Mesh,
    poll: Callable[[], None],
) -> Watch | None:
    """The watch of an unlearning run, with its yardstick measured; None where ``watch.every`` is 0.

    Args:
      config: the whole configuration, checked.
      workdir: where the yardstick is kept.
      model: the starting model.
      examples: the images as it takes them.
      mesh: the devices of the run.
      poll: called now and then; what it raises ends the measuring.

    Raises:
      ValueError: see :func:`train.yardstick.measure`.
    """
    unlearn = config.unlearn
    if not unlearn.watch.every:
        return None
    probes = Probes(config, model, examples, mesh)
    say(
        f"unlearn: probed every {unlearn.watch.every} steps; the run ends where the loss on keep images has grown to "
        f"{unlearn.watch.collapse:g} times that of the start"
    )
    found = yardstick.measure(config, workdir, model, examples, probes, poll)
    return Watch(
        unlearn.watch,
        unlearn.stop,
        unlearn.num_steps,
        model.params,
        _probe(probes, found),
        has_level=found.has_level,
        sample=_sampler(config, model, examples, probes) if unlearn.watch.samples else None,
    )


def _probe(probes: Probes, found: Yardstick) -> Callable[[PyTree], tuple[float, float | None]]:
    def probe(params: PyTree) -> tuple[float, float | None]:
        params = probes.local(params)
        level = 0.0
        if found.has_level:
            level = found.level(float(probes.losses(params, probes.forget).mean()))
        # One answer for all processes, so that they decide alike.
        ratio, level = (
            float(v) for v in from_first(np.array([probes.keep_loss(params) / found.keep, level], np.float32))
        )
        return ratio, level if found.has_level else None

    return probe


def _sampler(
    config: ConfigDict, model: DiffusersModel, examples: Examples, probes: Probes
) -> Callable[[PyTree], dict[str, float]]:
    judge = QuickEvaluation.of_split(
        model,
        examples.split,
        num_samples=config.unlearn.watch.samples,
        sampling_steps=config.log.sample_steps,
        batch_size=config.eval.batch_size,
        seed=config.eval.seed,
        copy_threshold=config.eval.copy_threshold,
    )

    def sample(params: PyTree) -> dict[str, float]:
        figures = judge(probes.local(params))
        copies, fd = (float(v) for v in from_first(np.array([figures.copies, figures.fd], np.float32)))
        return {"eval/copies": copies, **({"eval/fd": fd} if math.isfinite(fd) else {})}

    return sample
