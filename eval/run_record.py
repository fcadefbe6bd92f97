"""What a run left behind about itself: method, steps, stop rule, selection, revision. All of it may be missing."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from eval.inputs import Inputs
from eval.prompts import without_texts
from jaxunlearn.io.report import canonical_sha256
from jaxunlearn.methods import METHODS


def method_record(inputs: Inputs, key: bytes | None) -> dict[str, Any]:
    """How it was unlearned.

    Args:
      inputs: the opened work directory.
      key: hides the prompt by a keyed hash; None shows it.
    """
    config, root = inputs.config, inputs.workdir.root
    unlearn = dict(config.get("unlearn") or {})
    name, best = unlearn.get("method"), read_json(inputs.workdir.best)
    known = METHODS.get(name)
    shown = unlearn if key is None else without_texts(unlearn, ("prompt",), key)
    steps, wall = _steps(root / "metrics.jsonl")
    combiner = (unlearn.get("combine") or {}).get("name") or (known.combiner if known else None)
    collapsed = best is not None and best.get("status") == "collapsed"
    return {
        "name": name,
        "objective": None if known is None else getattr(known.objective, "__name__", name),
        "combiner": combiner,
        "config": shown,
        "config_sha256": canonical_sha256(shown),
        "steps": steps,
        "stop_rule": _stop_rule(best, unlearn),
        "collapse": str(best.get("reason")) if collapsed else None,
        "seed": config.get("seed"),
        "precision": f"{(config.get('compute') or {}).get('dtype', 'float32')} forward, float32 parameters and losses",
        "wall_s": wall,
    }


def selection_record(root: pathlib.Path) -> dict[str, Any] | None:
    """What an automatic rule chose (``selection.json``), without its curves; None where everything was set by hand."""
    found = read_json(root / "selection.json")
    if found is None:
        return None
    return {key: found.get(key) for key in ("rule", "summary", "select", "reasons", "num_steps")}


def git_revision(root: pathlib.Path) -> str | None:
    """The revision that the run was made with, as it noted itself."""
    found = read_json(root / "environment.json") or {}
    revision = found.get("git_revision")
    return revision if isinstance(revision, str) else None


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """The object in a file of the run; None where there is no such file or it holds no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def read_log(path: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
    """Lines of metrics.jsonl, and how many are not JSON objects (a run that was killed may leave half a line)."""
    rows, broken = [], 0
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            elif line.strip():
                broken += 1
    return rows, broken


def _steps(path: pathlib.Path) -> tuple[int | None, float | None]:
    """Steps that the unlearning made, and its seconds on the clock, from the log."""
    rows = [row for row in read_log(path)[0] if row.get("stage") == "unlearn" and isinstance(row.get("step"), int)]
    walls = [row["wall_seconds"] for row in rows if isinstance(row.get("wall_seconds"), int | float)]
    return max((row["step"] for row in rows), default=None), max(walls, default=None)


def _stop_rule(best: Mapping[str, Any] | None, unlearn: Mapping[str, Any]) -> str:
    if best is not None and best.get("rule"):
        ending = f": {best['reason']}" if best.get("reason") else ""
        return (
            f"step {best.get('returned_step')} of {unlearn.get('num_steps')} was returned; best: {best['rule']}{ending}"
        )
    return "a fixed number of steps"
