"""How a row of a sweep is judged: in process, by the same samples and probes for every row."""

from __future__ import annotations

import math
from typing import Any

from ml_collections import ConfigDict

from jaxunlearn.forgetting import forget_level
from jaxunlearn.io.diffusers import DiffusersModel
from jaxunlearn.io.forget import Split
from jaxunlearn.io.workdir import Workdir
from jaxunlearn.quick_evaluation import ProbedLosses, QuickEvaluation
from jaxunlearn.types import PyTree
from train import prepare


class Judge:
    """Judges parameters beside the starting model and, where it is there, the retrained one.

    Args:
      config: of the sweep.
      model: the starting model, of pixels.
      split: the images.
      workdir: where a retrained model may be.
      num_samples: by which a row is judged.
      sampling_steps: of the samples.

    Attributes:
      before: figures of the starting model, plain JSON.
      retrained: of the retrained model, or None.

    Raises:
      ValueError: as :class:`jaxunlearn.quick_evaluation.QuickEvaluation`; a retrained model of another form.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: DiffusersModel,
        split: Split,
        workdir: Workdir,
        num_samples: int,
        sampling_steps: int,
    ):
        params = None
        if workdir.model("retrained").is_dir():
            params = prepare.other_parameters(config, str(workdir.model("retrained")), model, "retrain")
        self._quick = QuickEvaluation.of_split(
            model,
            split,
            num_samples=num_samples,
            sampling_steps=sampling_steps,
            batch_size=min(num_samples, config.eval.batch_size),
            seed=config.eval.seed,
            copy_threshold=config.eval.copy_threshold,
        )
        self._start: ProbedLosses = self._quick.probe(model.params)
        self._target: ProbedLosses | None = None
        self.before: dict[str, Any] = _plain(self._quick(model.params))
        self.retrained: dict[str, Any] | None = None
        if params is not None:
            self._target, self.retrained = self._quick.probe(params), _plain(self._quick(params))

    def __call__(self, params: PyTree) -> dict[str, Any]:
        """``figures``, ``keep_ratio`` (keep loss over that of the starting model) and ``forget_level``, plain JSON."""
        probed, level = self._quick.probe(params), None
        if self._target is not None:
            found = forget_level(probed.forget, self._start.forget, self._target.forget, paired=True)
            level = {name: _number(getattr(found, name)) for name in ("level", "low", "high")} | {
                "status": found.status
            }
        ratio = float(probed.keep.mean() / self._start.keep.mean())
        return {"figures": _plain(self._quick(params)), "keep_ratio": _number(ratio), "forget_level": level}


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _plain(figures) -> dict[str, Any]:
    """JSON has no NaN: None."""
    return {k: _number(v) if isinstance(v, float) else v for k, v in figures._asdict().items()}
