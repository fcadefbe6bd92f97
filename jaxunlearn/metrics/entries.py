"""Reading the entries of a report: plain dicts with ``metric``, ``value``, ``protocol``, ``status`` and more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Entry = dict[str, Any]
Columns = Mapping[str, Sequence[Entry]]
"""Column ("before", "after", "retrained", "retrained_2", ..., "control") -> entries."""


def find(entries: Sequence[Entry], metric: str, **protocol: Any) -> Entry | None:
    """The first entry of ``metric`` whose protocol holds the given values."""
    for item in entries:
        if item["metric"] == metric and all(item["protocol"].get(key) == value for key, value in protocol.items()):
            return item
    return None


def value(entries: Sequence[Entry], metric: str, **protocol: Any) -> float | None:
    """The value of :func:`find`; None if there is no such entry or it has no value."""
    found = find(entries, metric, **protocol)
    return None if found is None else found["value"]


def mean_value(entries: Sequence[Entry], metric: str) -> float | None:
    """Mean of a metric over its entries (over t); None if there is none or one has no value."""
    values = [item["value"] for item in entries if item["metric"] == metric]
    return None if not values or any(v is None for v in values) else float(np.mean(values))


def references(columns: Iterable[str]) -> list[str]:
    """Those of the columns' names that are of retrained models, in order."""
    return [name for name in columns if name not in ("before", "after", "control")]


def columns_of(report: Mapping[str, Any]) -> dict[str, list[Entry]]:
    """The columns of a report: before, after, then one for each retrained model, control last.

    In a report the entries of all retrained models stand in one list; ``model`` says whose an entry is.
    """
    evaluation = report["evaluation"]
    columns = {"before": evaluation["before"], "after": evaluation["after"]}
    for item in evaluation["reference"]:
        columns.setdefault(item["model"], []).append(item)
    return {**columns, "control": evaluation["control"]}
