"""What a family of metrics is given, and where it puts what it found."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from eval.prompts import Prompts
from eval.records import Entry
from eval.references import References
from eval.runner import Runner
from jaxunlearn.io.diffusers import DiffusersModel
from jaxunlearn.io.forget import Split
from jaxunlearn.types import PyTree

Tick = Callable[[str, float], None]
"""Called with the name of the stage and its finished share."""


@dataclasses.dataclass
class Column:
    """One column of the report: entries, and arrays for its figures.

    Attributes:
      entries: records, in the order of the report.
      samples: uint8 [N,H,W,C], those in which copies are counted, or None.
      flags: bool [N], which samples are copies.
      keep_samples: uint8 [N,H,W,C], samples of the keep prompts, or None where ``samples`` serve for quality too.
      keep_flags: bool [N], which of them are copies.
      injected: uint8 [T,K,H,W,C], the first forget image's injections (at most 8 of each t), or None.
      injections: uint8 [F,T,K,H,W,C], all injections, for metrics that look at pictures; None where none of these is on,
        or where an injection is broken.
      arrays: name -> array (distances, losses), stored in ``evaluation.npz``.
      failed: why the column as a whole could not be measured, or None.
    """

    entries: list[Entry]
    samples: np.ndarray | None = None
    flags: np.ndarray | None = None
    keep_samples: np.ndarray | None = None
    keep_flags: np.ndarray | None = None
    injected: np.ndarray | None = None
    injections: np.ndarray | None = None
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    failed: str | None = None

    @property
    def quality_samples(self) -> np.ndarray | None:
        """The samples whose quality is measured, uint8 [N,H,W,C], or None where they are broken."""
        return self.samples if self.keep_samples is None else self.keep_samples

    @property
    def quality_flags(self) -> np.ndarray | None:
        """Which of :attr:`quality_samples` are copies, bool [N]."""
        return self.flags if self.keep_samples is None else self.keep_flags


@dataclasses.dataclass(frozen=True)
class Context:
    """One model with everything that all models are measured against.

    Attributes:
      name: of the column: "before", "after", "retrained", "retrained_2", ...
      params: the model's parameters, on the device; finite.
      model: the model (configuration, schedule, prediction type); its own ``params`` are on the host.
      runner: its compiled programs: ``sample``, ``inject``, ``loss``, ``predict`` (a pure function
        ``(params, x_t, t [B], cond) -> eps_hat``), ``schedule``, ``space`` and ``conditions``.
      refs: arrays and functions made from the data.
      prompts: the text of each sample; None for a model without text.
      settings: the evaluation's settings.
      tick: called with progress.
      key: the family's jax key, the same for all columns, so that all models see the same noises.
      split: the data.
      cache: folder for what is costly to compute again, or None.
    """

    name: str
    params: PyTree
    model: DiffusersModel
    runner: Runner
    refs: References
    prompts: Prompts | None
    settings: Mapping[str, Any]
    tick: Tick
    key: jax.Array
    split: Split
    cache: pathlib.Path | None = None
