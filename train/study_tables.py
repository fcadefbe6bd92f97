"""What the rows of a study mean, and how tables show them: verdicts, means over seeds, times of steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from train.sweep_table import COLLAPSE, SHARE_OF_COPIES

COPIES, QUALITY = SHARE_OF_COPIES, 1.5
"""What counts as working: copies at most a tenth of before, as in a sweep, Frechet distance at most 1.5 times that of before.
A keep loss of 1.5 times that of before counts as a collapse, as in :class:`jaxunlearn.forgetting.StopRule`."""


def verdict(row: Mapping[str, Any]) -> str:
    """``works``, or why not, from the numbers of one row; ``no copies before`` where there was nothing to forget.

    >>> row = {"copies": 3, "copies_before": 80, "broken_step": None, "broken": 0, "fd_ratio": 1.2, "keep_ratio": 1.01}
    >>> verdict(row), verdict({**row, "copies": 30}), verdict({**row, "fd_ratio": 4.0, "keep_ratio": 1.8})
    ('works', 'too weak', 'collapsed')
    """
    if not row["copies_before"]:
        return "no copies before"
    finite = row["fd_ratio"] is not None and row["keep_ratio"] is not None
    if row["broken_step"] is not None or row["broken"] or not finite or row["keep_ratio"] >= COLLAPSE:
        return "collapsed"
    weak = row["copies"] > COPIES * row["copies_before"]
    poor = row["fd_ratio"] > QUALITY
    return {(0, 0): "works", (1, 0): "too weak", (0, 1): "poor samples", (1, 1): "too weak, poor samples"}[weak, poor]


def joint_verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """The verdict over seeds; where they differ, how often each was given."""
    found = [verdict(row) for row in rows]
    counts = {name: found.count(name) for name in dict.fromkeys(found)}
    if len(counts) == 1:
        return found[0]
    return "; ".join(f"{name} ({count} of {len(found)})" for name, count in counts.items())


def mean_sd(values: Sequence[float | None], digits: int = 2) -> str:
    """``mean ± sd`` (n - 1) over seeds; a dash where a value is missing.

    >>> mean_sd([1.0, 2.0, 3.0]), mean_sd([1.0]), mean_sd([None, 1.0])
    ('2.00 ± 1.00', '1.00', '-')
    """
    if not values or any(value is None for value in values):
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# Time of steps.


def timed_in_turns(steps: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each step, all of them measured round by round, so that what disturbs one disturbs all.

    Args:
      steps: name -> a function that does one step and waits for its result. Each is called twice before, to compile.
      rounds: how often.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step(), step()
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return {name: float(np.median(values)) for name, values in seconds.items()}
