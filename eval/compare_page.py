"""A comparison of runs for people: a Markdown table, and a page with the Pareto figure."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import Any

from eval.pareto import points
from eval.report_html import OVERALL, document
from eval.report_pictures import figure_element
from eval.summary_figures import scatter
from eval.wording import TITLES, number
from jaxunlearn.io.report import NOTICE

Shown = Callable[[Any], str]


def _plain(value: Any) -> str:
    return "" if value is None else number(value)


def _share(value: Any) -> str:
    return "" if value is None else number(value, "copy_rate")


COLUMNS: dict[str, tuple[str, Shown]] = {
    "method": ("method", lambda value: str(value or "")),
    "steps": ("steps", lambda value: "" if value is None else str(value)),
    "overall": ("checks", lambda value: OVERALL[value]),
    "copies_before": ("copies before", _share),
    "copies": ("copies after", _share),
    "copies_upper": ("at most", _share),
    "forget_level": ("forget level", _plain),
    "gap_ratio": ("gap / floor", _plain),
    "relearn_ratio": ("relearning ratio", _plain),
    "keep_loss_ratio": ("keep loss, after / before", _plain),
    "quality_before": ("quality before", _plain),
    "quality": ("quality after", _plain),
}
"""Key of a row -> heading, and how a value is written."""

FRONT = ' <span class="badge pass">front</span>'


def _used(comparison: Mapping[str, Any]) -> list[str]:
    """Columns in which some run has a value."""
    return [key for key in COLUMNS if any(row[key] is not None for row in comparison["rows"])]


def markdown(comparison: Mapping[str, Any]) -> str:
    """The table; runs on the Pareto front have a star."""
    keys = _used(comparison)
    lines = ["| run | front | " + " | ".join(COLUMNS[key][0] for key in keys) + " |", "|---" * (len(keys) + 2) + "|"]
    for row in comparison["rows"]:
        cells = [COLUMNS[key][1](row[key]) for key in keys]
        lines.append(f"| {row['run']} | {'*' if row['front'] else ''} | {' | '.join(cells)} |")
    lines += [
        "",
        f"\\* no other run is better on both {_axes(comparison)}.",
        *(f"{note}" for note in comparison["notes"]),
    ]
    return "\n".join(lines) + "\n"


def _axes(comparison: Mapping[str, Any]) -> str:
    forgetting = "copies" if comparison["x"] == "copy_rate" else "distance to the retrained level"
    return f"{forgetting} and {TITLES[comparison['y']]}"


def page(comparison: Mapping[str, Any], reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The page, self-contained."""
    x, y = comparison["x"], comparison["y"]
    placed, yardsticks = [], {}
    for name, report in reports.items():
        for point in points(report, x, y):
            if point.kind == "after":
                placed.append(point._replace(name=name))
            else:  # one original and its retrained models, where the runs share them
                yardsticks.setdefault((point.kind, round(point.x, 9), round(point.y, 9)), point)
    rows = {row["run"]: row for row in comparison["rows"]}
    front = [rows[point.name]["front"] for point in placed]
    keys = _used(comparison)
    head = "".join(f"<th>{html.escape(text)}</th>" for text in ("Run", *(COLUMNS[key][0] for key in keys)))
    body = "".join(
        f"<tr><td><b>{html.escape(row['run'])}</b>{FRONT if row['front'] else ''}</td>"
        + "".join(f"<td>{html.escape(COLUMNS[key][1](row[key]))}</td>" for key in keys)
        + "</tr>"
        for row in comparison["rows"]
    )
    picture = ""
    if placed:
        caption = "Left and down is better. Filled: no other run is better on both. Cross: before. Star: retrained."
        figure = scatter([*yardsticks.values(), *placed], x, front=front)
        picture = figure_element(figure, caption, "Forgetting against quality of all runs")
    best = [row["run"] for row in comparison["rows"] if row["front"]]
    title = f"{len(best)} of {len(rows)} runs are on the Pareto front"
    if len(best) == 1:
        title = f"No other run is better than {best[0]}"
    meaning = f"A run is on the front if no other one is as good on both {_axes(comparison)}, and better on one."
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in comparison["notes"])
    sections = [
        f'<header><p class="kicker">Comparison of unlearning runs</p><h1>{html.escape(title)}</h1>'
        f'<p>{html.escape(meaning)}</p><p class="notice">{NOTICE}</p></header>',
        f"<section><h2>Forgetting against quality</h2>{picture}</section>" if picture else "",
        f'<section><h2>Runs</h2><div class="scroll"><table class="runs"><tr>{head}</tr>{body}</table></div>'
        + (f"<ul>{notes}</ul>" if notes else "")
        + "</section>",
    ]
    return document("Comparison of unlearning runs", sections)
