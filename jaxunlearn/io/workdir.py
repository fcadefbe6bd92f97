"""Where a run keeps what: the paths of a work directory."""

from __future__ import annotations

import dataclasses
import pathlib
import re

_REFERENCE = re.compile(r"retrained(?:_([2-9]|[1-9][0-9]+))?")

STAGES = ("base", "unlearned", "retrained")
"""The models of a run: before, after, and retrained without the forget set."""


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The layout of a work directory; nothing is created by naming it."""

    root: pathlib.Path

    @property
    def config(self) -> pathlib.Path:
        """The resolved configuration, JSON."""
        return self.root / "config.json"

    @property
    def metrics(self) -> pathlib.Path:
        """One JSON object a logged step; append-only."""
        return self.root / "metrics.jsonl"

    @property
    def best(self) -> pathlib.Path:
        """Which step of the unlearning is the best one, by what rule, and what became of the run."""
        return self.root / "best.json"

    @property
    def report(self) -> pathlib.Path:
        """The evaluation, for machines."""
        return self.root / "unlearning_report.json"

    @property
    def report_html(self) -> pathlib.Path:
        """The evaluation, for people."""
        return self.root / "report.html"

    @property
    def arrays(self) -> pathlib.Path:
        """Distances, losses and the first samples of every model of the evaluation, for other plots."""
        return self.root / "evaluation.npz"

    @property
    def export(self) -> pathlib.Path:
        """The unlearned model as a diffusers folder with its model card and report."""
        return self.root / "export"

    @property
    def samples(self) -> pathlib.Path:
        """Sample grids with fixed noise."""
        return self.root / "samples"

    @property
    def cache(self) -> pathlib.Path:
        """Encoded images and texts, see :mod:`jaxunlearn.io.latent_cache`; may be deleted."""
        return self.root / "cache"

    @property
    def tensorboard(self) -> pathlib.Path:
        """Event files."""
        return self.root / "tensorboard"

    def model(self, name: str) -> pathlib.Path:
        """The diffusers folder of a model: one of :data:`STAGES`, ``retrained_2`` and so on for further retrained ones,
        ``best`` (the best step, where another one was returned) or ``restored`` (what is left of a collapsed run)."""
        return self.root / "models" / name

    def retrained(self) -> list[pathlib.Path]:
        """The folders of the models retrained without the forget set, in order: retrained, retrained_2, ..."""
        parent = self.model("retrained").parent
        found = [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
        return sorted(filter(lambda path: is_reference(path.name), found), key=lambda path: _number(path.name))

    def checkpoints(self, name: str) -> pathlib.Path:
        """The checkpoints of a stage."""
        return self.root / "checkpoints" / name

    def marker(self, name: str) -> pathlib.Path:
        """``DONE``, ``FAILED`` or ``PREEMPTED``; holds the reason."""
        return self.root / name


def retrained_names(count: int) -> list[str]:
    """The names of retrained models: retrained, retrained_2, ...

    >>> retrained_names(3)
    ['retrained', 'retrained_2', 'retrained_3']
    """
    return ["retrained", *(f"retrained_{i}" for i in range(2, count + 1))]


def is_reference(name: str) -> bool:
    """Whether a model's name is that of one retrained without the forget set.

    >>> [is_reference(name) for name in ("retrained", "retrained_2", "retrained_1", "unlearned")]
    [True, True, False, False]
    """
    return _REFERENCE.fullmatch(name) is not None


def _number(name: str) -> int:
    return int(_REFERENCE.fullmatch(name)[1] or 1)
