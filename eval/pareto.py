"""Forgetting against quality: one point a model. Further left and further down is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxunlearn.metrics.entries import columns_of, find, mean_value, references, value

LEVEL, COPIES = "forget_level", "copy_rate"
X_LABELS = {
    LEVEL: "distance to the retrained level: |forget level - 1|",
    COPIES: "share of samples that are copies",
}
Y_LABELS = {
    "fd_classifier": "Frechet distance to keep images, classifier features (lower is better)",
    "fd_pixel": "Frechet distance to keep images, pixel components (lower is better)",
}


class Point(NamedTuple):
    """A model in the plane.

    Attributes:
      name: what it is called.
      kind: "before", "after" or "retrained".
      x: distance to the level of retrained models, or share of copies.
      y: Frechet distance.
      low, high: interval of x, or None.
    """

    name: str
    kind: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


def x_axis(reports: Sequence[Mapping[str, Any]]) -> str:
    """The x axis that all reports can be shown on: the forget level where all have one, else the share of copies."""
    return LEVEL if all(value(report["evaluation"]["after"], LEVEL) is not None for report in reports) else COPIES


def y_axis(reports: Sequence[Mapping[str, Any]]) -> str:
    """The y axis that all reports can be shown on."""
    sound = all(
        value(columns_of(report)[name], "fd_classifier") is not None
        for report in reports
        for name in ("before", "after")
    )
    return "fd_classifier" if sound else "fd_pixel"


def points(report: Mapping[str, Any], x: str, y: str) -> list[Point]:
    """The models of one report; those without a number on one of the axes are left out."""
    columns, found = columns_of(report), []
    for name, entries in columns.items():
        if name == "control":
            continue
        kind = name if name in ("before", "after") else "retrained"
        height = value(entries, y)
        low = high = None
        if x == COPIES:
            item = find(entries, COPIES)
            place = None if item is None else item["value"]
            if place is not None and item["ci"] is not None:
                low, high = item["ci"]["low"], item["ci"]["high"]
        else:
            place = _distance(columns, name)
        if place is not None and height is not None:
            found.append(Point(name.replace("_", " "), kind, place, height, low, high))
    return found


def front(xy: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other one dominates: none is as good on both axes and better on one; lower is better.

    >>> front([(0.0, 3.0), (1.0, 1.0), (1.0, 2.0), (2.0, 0.5)])
    [True, True, False, True]
    """
    return [not any(a <= x and b <= y and (a, b) != (x, y) for a, b in xy) for x, y in xy]


def _distance(columns: Mapping[str, list], name: str) -> float | None:
    """``|forget level - 1|`` of a column; that of the unlearned model is as reported."""
    if name == "after":
        level = value(columns["after"], LEVEL)
        return None if level is None else abs(level - 1.0)
    losses = {key: mean_value(entries, "loss_forget") for key, entries in columns.items() if key != "control"}
    names = references(columns)
    if not names or None in losses.values():
        return None
    target = sum(losses[key] for key in names) / len(names)
    gap = target - losses["before"]
    return abs((losses[name] - losses["before"]) / gap - 1.0) if gap else None
