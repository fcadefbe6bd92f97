"""``sweep.png``: windows by cut-offs as heat maps, forgetting beside quality; automatic choice and best row are marked."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from train.selection_figure import save_figure
from train.sweep_table import best_of, ordered

INK, BEST, AUTO = "#1e293b", "#dc2626", "#2563eb"
MOST_PANELS = 4
"""Combinations of lam and scale that get panels of their own; of more the best row of each cell is shown."""


class Measure(NamedTuple):
    """What a panel shows.

    Attributes:
      title: figures of the starting model -> heading.
      of_row: judged row -> value, or None.
    """

    title: Callable[[Mapping[str, Any]], str]
    of_row: Callable[[Mapping[str, Any]], float | None]


COPIES = Measure(
    lambda before: f"copies among {before['samples']} samples (before: {before['copies']})",
    lambda row: row["figures"]["copies"],
)
FRECHET = Measure(
    lambda before: f"{before['fd_name']}, lower is better (before: {_figure(before['fd'])})",
    lambda row: row["figures"]["fd"],
)
LEVEL = Measure(
    lambda before: "forget level: 0 untouched, 1 as retrained",
    lambda row: (row["forget_level"] or {}).get("level"),
)


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


def _label(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"({value[0]:g}, {value[1]:g})"
    return "as configured" if value is None else value if isinstance(value, str) else f"{value:g}"


def _window_label(row: Mapping[str, Any]) -> str:
    window = tuple(row["window"])
    name = "every t" if window == (0, 0) else f"[{window[0]}, {window[1]})"
    return f"auto {name}" if row["auto"] else name


def panels(result: Mapping[str, Any]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """``(title, rows)`` of each line of panels: one for each (lam, scale), or one with the best of each cell."""
    groups: dict[tuple, list] = {}
    for row in result["rows"]:
        groups.setdefault((row["lam"], row["scale"]), []).append(row)

    def title(key):
        lam = [f"lam {_label(key[0])}"] if result["has_lam"] else []
        return ", ".join([*lam, f"{result['scale_name']} {_label(key[1])}"])

    if len(groups) <= MOST_PANELS:
        return [(title(key), rows) for key, rows in sorted(groups.items(), key=lambda item: str(item[0]))]
    cells: dict[tuple, Mapping] = {}
    for row in ordered(result["rows"], result["before"]):
        cells.setdefault((_window_label(row), _label(row["column"])), row)
    names = "lam and " if result["has_lam"] and len({row["lam"] for row in result["rows"]}) > 1 else ""
    return [(f"each cell: its best {names}{result['scale_name']}", list(cells.values()))]


def draw_sweep(path: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Draws a sweep.

    Args:
      path: the PNG file; it appears whole.
      result: the content of sweep.json.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lines = panels(result)
    windows = list(dict.fromkeys(_window_label(row) for row in sorted(result["rows"], key=_by_window)))
    columns = list(
        dict.fromkeys(_label(row["column"]) for row in sorted(result["rows"], key=_by_cutoff) if not row["auto"])
    )
    columns = columns or ["as chosen"]
    levels = any(row["forget_level"] for row in result["rows"])
    measures = [COPIES, FRECHET, *([LEVEL] if levels else [])]
    height = 1.5 + 0.5 * len(windows)
    figure = Figure(figsize=(2.6 + (1.7 + 0.95 * len(columns)) * len(measures), height * len(lines) + 0.9), dpi=130)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(len(lines), len(measures), squeeze=False)
    best = best_of(result["rows"], result["before"])
    for (title, rows), line in zip(lines, grid):
        for measure, axes in zip(measures, line):
            _heat_map(axes, measure, result, rows, windows, columns, best)
            axes.set_title(f"{measure.title(result['before'])}\n{title}", fontsize=9, color=INK)
    marks = [Patch(fill=False, edgecolor=BEST, linewidth=2, label="best of the grid")] if best else []
    if any(row["auto"] for row in result["rows"]):
        marks.append(Patch(fill=False, edgecolor=AUTO, linewidth=2, label="automatic choice, with its own filter"))
    if marks:
        figure.legend(handles=marks, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    save_figure(path, figure)


def _by_window(row: Mapping[str, Any]) -> tuple:
    return row["auto"], tuple(row["window"])


def _by_cutoff(row: Mapping[str, Any]) -> tuple:
    column = row["column"]
    if isinstance(column, (list, tuple)):
        return (1, *column)
    return (0, column) if isinstance(column, (int, float)) else (2, 0)


def _heat_map(
    axes,
    measure: Measure,
    result: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    windows: Sequence[str],
    columns: Sequence[str],
    best: Mapping[str, Any] | None,
) -> None:
    from matplotlib.patches import Rectangle

    values = np.full((len(windows), len(columns)), np.nan)
    places = []
    for row in rows:
        y = windows.index(_window_label(row))
        # The automatic choice brings its own filter: its cell is as wide as the grid.
        at = slice(None) if row["auto"] else columns.index(_label(row["column"]))
        value = measure.of_row(row) if row["figures"] else None
        values[y, at] = np.nan if value is None else value
        places.append((row, y, at, value))
    everything = [measure.of_row(row) for row in result["rows"] if row["figures"]]
    finite = [v for v in everything if v is not None and np.isfinite(v)] or [0.0]
    low, high = min(finite), max(finite)
    colours = "viridis" if measure is LEVEL else "viridis_r"
    axes.imshow(values, aspect="auto", cmap=colours, vmin=low, vmax=high if high > low else low + 1)
    for row, y, at, value in places:
        x, width = (-0.5, len(columns)) if row["auto"] else (at - 0.5, 1)
        text = _figure(value) if row["figures"] else "broken"
        share = 0.0 if value is None or high == low else (value - low) / (high - low)
        dark = value is not None and (share > 0.55 if colours == "viridis_r" else share < 0.45)
        if row["auto"]:
            text += f"   {row['selection'].split(', ', 2)[-1]}"
        axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=8, color="white" if dark else INK)
        for mark, edge, inset in (
            (row["auto"], AUTO, 0.05),
            (best is not None and row["key"] == best["key"], BEST, 0.11),
        ):
            if mark:
                box = Rectangle(
                    (x + inset / 2, y - 0.5 + inset / 2),
                    width - inset,
                    1 - inset,
                    fill=False,
                    edgecolor=edge,
                    linewidth=2,
                )
                axes.add_patch(box)
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(windows)), windows, fontsize=8)
    axes.set_xlabel("cutoff", fontsize=8)
    axes.set_ylabel("window of t", fontsize=8)
