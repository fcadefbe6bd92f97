"""Where a run keeps what: the paths of a work directory."""

from __future__ import annotations

import dataclasses
import pathlib

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
    def report(self) -> pathlib.Path:
        """The evaluation, for machines."""
        return self.root / "report.json"

    @property
    def report_html(self) -> pathlib.Path:
        """The evaluation, for people."""
        return self.root / "report.html"

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
        """The diffusers folder of a finished stage, one of :data:`STAGES`."""
        return self.root / "models" / name

    def checkpoints(self, name: str) -> pathlib.Path:
        """The checkpoints of a stage."""
        return self.root / "checkpoints" / name

    def marker(self, name: str) -> pathlib.Path:
        """``DONE``, ``FAILED`` or ``PREEMPTED``; holds the reason."""
        return self.root / name
