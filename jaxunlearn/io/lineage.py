"""Which copies of a model, and of what it was trained on, a work directory holds: an erasure is only as good as these."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from jaxunlearn.io.workdir import Workdir

Copy = dict[str, str]

_CHECKPOINTS = {
    "base": ("kept", "parameters, moving average and optimizer states from before the unlearning"),
    "unlearn": ("kept", "of the unlearning run; they also hold the original parameters and optimizer states"),
    "retrain": ("updated", "of a model that never saw the forget set"),
}


def lineage(workdir: Workdir, config: Mapping[str, Any], base_path: str) -> list[Copy]:
    """One line for each copy that is found; nothing is changed or deleted. Never empty.

    The report is made before the evaluation's samples are written and before the launcher exports the model, so these two
    are listed always.

    Args:
      workdir: the work directory.
      config: the run's configuration, for caches that lie elsewhere.
      base_path: where the original model is, as the report names it.

    Returns:
      Dicts of ``copy`` (its kind), ``path`` (relative to the work directory where it lies there), ``action`` ("updated",
      "kept": it still holds what was to be forgotten) and ``reason``.
    """
    found = [_copy("model", base_path, "kept", "the model before unlearning: it still holds what was forgotten")]
    root = workdir.root
    if workdir.model("unlearned").is_dir():
        found.append(_copy("model", "models/unlearned", "updated", "the unlearned model"))
    for name, reason in (
        ("best", "another step of the same unlearning run"),
        ("restored", "the last sound step of an unlearning run that collapsed"),
    ):
        if workdir.model(name).is_dir():
            found.append(_copy("model", f"models/{name}", "kept", reason))
    for folder in workdir.retrained():
        found.append(_copy("model", f"models/{folder.name}", "updated", "trained without the forget set"))
    found += _checkpoints(workdir)
    there = "" if workdir.export.is_dir() else "; the launcher writes it after the evaluation"
    found.append(_copy("export", "export", "updated", f"the unlearned model in the format it came in{there}"))
    for path, reason in (
        (workdir.cache, "encoded images and texts, the forget set among them; may be deleted"),
        (_elsewhere(config), "encoded images and texts, the forget set among them; may be deleted"),
    ):
        if path is not None and path.is_dir():
            found.append(_copy("feature_cache", _shown(path, root), "kept", reason))
    if workdir.samples.exists():
        reason = "pictures made during training; those of the original model may show what was forgotten"
        found.append(_copy("samples", "samples", "kept", reason))
    reason = "samples of all models, those of the original among them"
    found.append(_copy("samples", workdir.arrays.name, "kept", reason))
    if (root / "forget_manifest.json").is_file():
        reason = "names and plain hashes of the forget images; belongs to this work directory only"
        found.append(_copy("manifest", "forget_manifest.json", "kept", reason))
    return found


def _checkpoints(workdir: Workdir) -> list[Copy]:
    parent = workdir.checkpoints("base").parent
    found = []
    for folder in sorted(parent.iterdir()) if parent.is_dir() else []:
        steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []
        if not steps:
            continue
        kind = next((name for name in _CHECKPOINTS if folder.name.startswith(name)), None)
        action, reason = _CHECKPOINTS.get(kind, ("kept", "of another stage"))
        listed = f"steps {', '.join(map(str, steps))}: {reason}"
        copies = ("checkpoint", "optimizer") if kind != "base" else ("checkpoint", "optimizer", "ema")
        found += [_copy(copy, f"checkpoints/{folder.name}", action, listed) for copy in copies]
    return found


def _elsewhere(config: Mapping[str, Any]) -> pathlib.Path | None:
    """The folder of encoded images, where the configuration names one."""
    path = (config.get("latents") or {}).get("cache")
    return pathlib.Path(path).expanduser() if path else None


def _shown(path: pathlib.Path, root: pathlib.Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _copy(kind: str, path: str, action: str, reason: str) -> Copy:
    return {"copy": kind, "path": path, "action": action, "reason": reason}
