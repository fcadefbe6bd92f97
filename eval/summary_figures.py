"""Figures that sum a run up: forgetting against quality, gaps over their floor, and what happened over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.figure_parts import COLOURS, INK, finite, legend, logarithmic, new_axes, svg
from eval.pareto import COPIES, X_LABELS, Point, points, x_axis, y_axis
from jaxunlearn.metrics.verdicts import THRESHOLDS

MARKERS = {"before": ("X", 110), "after": ("o", 110), "retrained": ("*", 260)}
TRAJECTORIES = {
    "eval/forget_level": ("forget level", "forget level (1: as retrained)", COLOURS["before"]),
    "eval/keep_ratio": ("keep loss over that of the start", "keep loss / start", COLOURS["after"]),
    "eval/copies": ("copies among samples", "number of copies", COLOURS["before"]),
    "eval/fd": ("Frechet distance", "Frechet distance", COLOURS["retrained"]),
}
"""Key of metrics.jsonl -> title, y axis, colour."""


def pareto(report: Mapping[str, Any]) -> str | None:
    """The models of a report: cross = before, dot = after, star = retrained; an SVG data URI."""
    x, y = x_axis([report]), y_axis([report])
    found = points(report, x, y)
    return scatter(found, x) if {"before", "after"} <= {point.kind for point in found} else None


def scatter(found: Sequence[Point], x: str, *, names: bool = True, front: Sequence[bool] | None = None) -> str:
    """Points in the plane of forgetting and quality.

    Args:
      found: the points.
      x: metric of the x axis.
      names: whether names stand beside the points.
      front: for points of kind "after", in their order, whether they are on the front; joined by a line.
    """
    figure, axes = new_axes(X_LABELS[x], "Frechet distance (lower is better)", (5.8, 4.0))
    runs = [point for point in found if point.kind == "after"]
    for point in found:
        marker, size = MARKERS[point.kind]
        dimmed = front is not None and point.kind == "after" and not front[runs.index(point)]
        error = None if point.low is None else [[point.x - point.low], [point.high - point.x]]
        axes.errorbar(point.x, point.y, xerr=error, color=COLOURS[point.kind], linewidth=1.2, capsize=3, alpha=0.6)
        face = "white" if dimmed else COLOURS[point.kind]
        axes.scatter(point.x, point.y, s=size, marker=marker, color=face, edgecolors=COLOURS[point.kind], zorder=3)
    if front is not None and sum(front) > 1:
        line = sorted((point.x, point.y) for point, keep in zip(runs, front) if keep)
        axes.plot(*zip(*line), color=COLOURS["after"], linewidth=1, linestyle="--", zorder=1)
    axes.margins(0.16)
    left, right = axes.get_xlim()
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=min(0.0, left) if x != COPIES else -0.04 * max(right, 1e-9))
    if names:
        _name_points(axes, found)
    return svg(figure)


def _name_points(axes, found: Sequence[Point]) -> None:
    """Names beside points; where points lie together their names stand below each other, and all stars share one name."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    named: list[tuple[float, float]] = []
    for place, point in enumerate(found):
        if point.kind == "retrained" and any(other.kind == "retrained" for other in found[:place]):
            continue
        at = ((point.x - left) / (right - left), (point.y - bottom) / (top - bottom))
        near = sum(abs(at[0] - x) < 0.12 and abs(at[1] - y) < 0.05 for x, y in named)
        named.append(at)
        shift, side = (10, "left") if at[0] < 0.5 else (-10, "right")
        offset = {"xytext": (shift, 5 - 11 * near), "textcoords": "offset points", "ha": side}
        axes.annotate(point.name, (point.x, point.y), fontsize=9, color=INK, **offset)


def gap_bars(report: Mapping[str, Any]) -> str | None:
    """Gaps of the unlearned model over their floor, the gap between retrained models; None without a floor."""
    titles = {"gap_kl_forget": "near the forget images", "gap_kl_samples": "at its own samples"}
    names, ratios, low, high = [], [], [], []
    for item in report["evaluation"]["after"]:
        if item["metric"] in ("gap_kl_forget", "gap_kl_samples") and item["value"] is not None and item["floor"]:
            names.append(titles[item["metric"]])
            ratios.append(item["value"] / item["floor"])
            low.append(ratios[-1] - item["protocol"].get("ratio_low", ratios[-1]))
            high.append(item["protocol"].get("ratio_high", ratios[-1]) - ratios[-1])
    if not names:
        return None
    figure, axes = new_axes("", "gap / gap between retrained models", (5.4, 3.5))
    error = np.clip([low, high], 0, None)
    axes.bar(names, ratios, yerr=error, width=0.5, color=COLOURS["after"], alpha=0.75, capsize=4, ecolor=INK)
    axes.axhline(1.0, color=COLOURS["retrained"], linewidth=1.6, label="floor: a retrained model with another seed")
    limit = THRESHOLDS["gap_ratio_fail"]
    axes.axhline(limit, color=COLOURS["before"], linewidth=1.2, linestyle="--", label=f"{limit:g}: fails")
    axes.margins(x=0.25)
    top = max(r + h for r, h in zip(ratios, high))
    if top > 20:  # a broken or untouched model must not flatten the floor
        axes.set_yscale("log")
        axes.set_ylim(0.5, 8 * top)  # room for the legend
    else:
        axes.set_ylim(0, max(2.6, 1.3 * top))
    legend(axes)
    return svg(figure)


def training(log: Sequence[Mapping[str, Any]]) -> str | None:
    """Loss parts of the unlearning stage over its steps."""
    series = _series(log, lambda key: key.startswith("loss/"))
    if not series:
        return None
    figure, axes = new_axes("unlearning step", "loss per term")
    colours = {"loss/forget": COLOURS["before"], "loss/keep": COLOURS["after"]}
    for part, values in series.items():
        line = axes.plot(*values.T, color=colours.get(part), alpha=0.3, linewidth=1.0)[0]
        window = max(1, len(values) // 25)
        smooth = np.convolve(values[:, 1], np.ones(window) / window, mode="valid")
        at = values[window - 1 :, 0]
        axes.plot(at, smooth, color=line.get_color(), linewidth=2, label=part.removeprefix("loss/"))
    if all(np.all(values[:, 1] > 0) for values in series.values()):
        logarithmic(axes)
    legend(axes)
    return svg(figure)


def trajectories(log: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """What was probed while the run went on: key of the log -> (title, SVG data URI)."""
    found = {}
    for key, values in _series(log, lambda key: key in TRAJECTORIES).items():
        title, label, colour = TRAJECTORIES[key]
        figure, axes = new_axes("unlearning step", label)
        axes.plot(*values.T, "o-", color=colour, markersize=4)
        if key == "eval/forget_level":
            for level, text in ((0.0, "original"), (1.0, "retrained")):
                axes.axhline(level, color=COLOURS["held-out"], linewidth=1, linestyle="--")
                axes.annotate(
                    text, (values[-1, 0], level), fontsize=8, color=COLOURS["held-out"], ha="right", va="bottom"
                )
        if key == "eval/keep_ratio":
            axes.axhline(1.0, color=COLOURS["held-out"], linewidth=1, linestyle="--")
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, 0.9), max(high, 1.1))
        if key in ("eval/copies", "eval/fd"):
            axes.set_ylim(0, max(1.1 * values[:, 1].max(), 0.01))
        found[key] = (title, svg(figure))
    return found


def _series(log: Sequence[Mapping[str, Any]], wanted) -> dict[str, np.ndarray]:
    """Key -> [n, 2] of step and value in the unlearning stage, where there are at least two points."""
    rows = [row for row in log if row.get("stage") == "unlearn" and finite(row.get("step"))]
    keys = sorted({key for row in rows for key in row if wanted(key)})
    series = {key: [(row["step"], row[key]) for row in rows if finite(row.get(key))] for key in keys}
    return {key: np.array(values, np.float64) for key, values in series.items() if len(values) > 1}
