"""Many unlearning runs from one starting model, each judged in this process and kept as a row: what study scripts share.

A row is a dictionary of plain numbers (:meth:`SeedStudy.row`). It is written as JSON as soon as it is known, with the hash
of everything it depends on: a study that was stopped goes on where it was, and a row with other settings is made anew.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxunlearn import forgetting
from jaxunlearn.classifier_training import train_classifier
from jaxunlearn.io.manifest import write_json
from jaxunlearn.objectives.probes import level_table
from jaxunlearn.quick_evaluation import ProbedLosses, QuickEvaluation
from jaxunlearn.types import PyTree
from train import prepare, selections
from train.configs.defaults import defaults
from train.log import say
from train.study_models import StudyModels
from train.trials import Trial, measured_start, run_trial


@dataclasses.dataclass(frozen=True)
class Judging:
    """How models are judged.

    Attributes:
      num_samples: samples of each model.
      sampling_steps: DDIM steps.
      batch_size: samples at a time.
      classifier_steps: training steps of the classifier whose features judge the quality; 0 takes pixels instead.
    """

    num_samples: int = 1000
    sampling_steps: int = 25
    batch_size: int = 250
    classifier_steps: int = 600


class SeedStudy:
    """The runs of one seed.

    Attributes:
      models: the models that runs start from and are compared with.
      judging: how models are judged.
    """

    def __init__(self, models: StudyModels, rows: pathlib.Path, judging: Judging):
        """Args:
        models: of this seed.
        rows: folder in which rows are kept.
        judging: how models are judged.
        """
        self.models, self.judging = models, judging
        self._rows = rows
        self._starts: dict[str, prepare.Start] = {}

    @functools.cached_property
    def evaluation(self) -> QuickEvaluation:
        """Judges parameters; the classifier is trained on first use."""
        split, judging, model = self.models.split, self.judging, self.models.base
        options: dict[str, Any] = {}
        if judging.classifier_steps and split.labels is not None:
            held_out = (split.images[split.held_out], split.labels[split.held_out]) if len(split.held_out) else None
            keep = split.images[split.keep], split.labels[split.keep]
            trained = train_classifier(*keep, held_out, steps=judging.classifier_steps, batch_size=128, seed=0)
            options = {"features": lambda images: trained.apply(images)[1], "fd_name": "fd_classifier"}
        return QuickEvaluation.of_split(
            model,
            split,
            num_samples=judging.num_samples,
            sampling_steps=judging.sampling_steps,
            batch_size=judging.batch_size,
            copy_threshold=self.models.config.eval.copy_threshold,
            **options,
        )

    @functools.cached_property
    def base_losses(self) -> ProbedLosses:
        """Probes of the starting model."""
        return self.evaluation.probe(self.models.base.params)

    @functools.cached_property
    def retrained_losses(self) -> ProbedLosses:
        """Probes of the retrained model: the target of the forget level."""
        return self.evaluation.probe(self.models.retrained.params)

    @functools.cached_property
    def before(self) -> dict[str, Any]:
        """The row of the starting model, whose forget level is 0 by definition: it asks for no retrained model."""
        return self._kept("before", {}, lambda: {**self._figures(self.models.base.params, False), "forget_level": 0.0})

    @functools.cached_property
    def retrained(self) -> dict[str, Any]:
        """The row of the retrained model."""
        return self.compared(self._kept("retrained", {}, lambda: self._figures(self.models.retrained.params)))

    def row(
        self,
        name: str,
        config: ConfigDict,
        *,
        level: bool = True,
        unlearn: Callable[[ConfigDict], Any] | None = None,
    ) -> dict[str, Any]:
        """Unlearns with a configuration, judges the result, and keeps the row.

        Args:
          name: of the row's file.
          config: a whole configuration; its seed is replaced by this one's.
          level: also measure the forget level, which needs the retrained model.
          unlearn: configuration -> something with ``params`` and ``broken_step``, such as
            :meth:`train.sweep_program.SweepProgram.run`; :meth:`trial` if None.

        Returns:
          The fields of :class:`jaxunlearn.quick_evaluation.QuickFigures`; ``forget_level`` (None without one);
          ``steps`` that were done, ``broken_step``; and, relative to the starting model, ``copies_ratio``, ``fd_ratio``,
          ``keep_ratio``. Numbers that are not finite are None.

        Raises:
          ValueError: a configuration that the method refuses, or that needs what this study has not.
        """
        seeded = config.copy_and_resolve_references()
        with seeded.unlocked():
            seeded.seed = self.models.config.seed
        depends = {"unlearn": seeded.unlearn.to_dict(), "level": level}

        def make() -> dict[str, Any]:
            ended = (unlearn or self.trial)(seeded)
            steps = seeded.unlearn.num_steps if ended.broken_step is None else ended.broken_step
            return {**self._figures(ended.params, level), "steps": steps, "broken_step": ended.broken_step}

        return self.compared(self._kept(name, depends, make))

    def trial(self, config: ConfigDict) -> Trial:
        """Unlearns; see :func:`train.trials.run_trial`."""
        return run_trial(config, self.models.base, self.models.examples, self.models.mesh, self.start(config))

    def start(self, config: ConfigDict) -> prepare.Start:
        """What the run measures before its first step. ``clamped`` without a cap gets that of the retrained model."""
        key = _hash(config.unlearn.to_dict())
        if key not in self._starts:
            measured = config
            if config.unlearn.method == "clamped" and config.unlearn.cap is None:
                measured = config.copy_and_resolve_references()
                with measured.unlocked():
                    measured.unlearn.cap = 1e9  # a stand-in that nothing exceeds: the table takes its place
            found = measured_start(measured, self.models.base, self.models.examples)
            if measured is not config:
                found = dataclasses.replace(found, cap=self.cap(config.unlearn))
            self._starts[key] = found
        return self._starts[key]

    def cap(self, unlearn: ConfigDict) -> np.ndarray:
        """float64 [T]: the retrained model's loss on the forget images at every t, in the unit of the forget error.

        Raises:
          ValueError: a filter, or errors summed over pixels, in whose unit the probes are not.
        """
        if unlearn.select.filter != "none" or unlearn.error == "sum_squares":
            raise ValueError("a measured cap is for mean_squares without a filter; set unlearn.cap")
        schedule = self.models.base.schedule
        levels, start = (x.forget.mean(axis=(0, 2)) for x in (self.retrained_losses, self.base_losses))
        table = level_table(levels, schedule.num_steps, start=start)
        weight = selections.time_weight(unlearn, schedule)
        if weight is None:
            return table
        # Outside of the window the error is zero; caps must be positive.
        return np.maximum(table * np.asarray(weight(np.arange(schedule.num_steps))), 1e-6)

    def compared(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with its ratios to the starting model."""
        before = self.before

        def ratio(name: str) -> float | None:
            if row[name] is None or not before[name]:
                return None
            return row[name] / before[name]

        names = {"copies": "copies_ratio", "fd": "fd_ratio", "keep_loss": "keep_ratio"}
        return {**row, "copies_before": before["copies"], **{new: ratio(old) for old, new in names.items()}}

    def _figures(self, params: PyTree, level: bool = True) -> dict[str, Any]:
        figures = self.evaluation(params)._asdict()
        if level:
            current = self.evaluation.probe(params).forget
            losses = self.base_losses.forget, self.retrained_losses.forget
            figures["forget_level"] = forgetting.forget_level(current, *losses, paired=True).level
        else:
            figures["forget_level"] = None
        return {name: _plain(value) for name, value in figures.items()}

    def _kept(self, name: str, depends: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row from its file, or made and written there."""
        config = self.models.config
        sections = {key: config[key].to_dict() for key in ("data", "model", "scheduler", "base")}
        everything = {**depends, **sections, "judging": dataclasses.asdict(self.judging), "seed": config.seed}
        everything["source"] = str(self.models.source)
        # What rows have always had at its usual value stands in the hash only where it differs.
        if config.compute.to_dict() != defaults().compute.to_dict():
            everything["compute"] = config.compute.to_dict()
        if config.eval.copy_threshold is not None:
            everything["copy_threshold"] = config.eval.copy_threshold
        if self.models.split_seed != (config.seed if config.base.path is None else 0):
            everything["split_seed"] = self.models.split_seed
        key = _hash(everything)
        path = self._rows / f"seed{config.seed}_{name}.json"
        if path.exists():
            kept = json.loads(path.read_text())
            if kept.get("key") == key:
                return kept["row"]
        row = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, "row": row})
        say(f"seed {config.seed}, {name}: {short(row)}")
        return row


def short(row: Mapping[str, Any]) -> str:
    """One line about a row, for people who wait."""
    fd = "not finite" if row["fd"] is None else f"{row['fd']:.3g}"
    return f"{row['copies']} copies of {row['samples']}, {row['fd_name']} {fd}"


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
