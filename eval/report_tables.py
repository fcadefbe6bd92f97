"""Tables of the report: every entry of every column, made from the records alone."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from eval.measure import THE_IMAGE
from eval.records import Entry, find
from eval.wording import SHARES, TITLES, number
from jaxunlearn.metrics import METRICS

GROUPS = {
    "Extraction: what samples show": (
        "copy_rate",
        "copy_rate_strict",
        "nearest_forget_min",
        "nearest_forget_median",
        "nearest_keep_min",
        "nearest_keep_median",
    ),
    "Denoising injection: what comes back": ("injection_distance", "injection_similarity", "injection_copies"),
    "Denoising loss": ("loss_forget", "loss_keep", "loss_held_out", "rank_p", "forget_level"),
    "Quality of samples": ("fd_classifier", "fd_pixel", "inception_score"),
}
ROW_KEYS = ("t", "compared_with", "prompts")
"""Keys of a protocol that make rows of their own."""


def columns_of(report) -> list[str]:
    """Names of the columns that were measured."""
    return [name for name in ("before", "after", "retrained") if report["evaluation"][name]]


def tables_section(report) -> str:
    """All numbers."""
    names = columns_of(report)
    control = report["evaluation"]["control"]
    parts = []
    for title, metrics in GROUPS.items():
        rows = []
        for metric in metrics:
            for protocol in _protocols(report, metric, names):
                cells = [_cell(_entry_at(report["evaluation"][name], metric, protocol), metric) for name in names]
                cells.append(_cell(find(control, metric, **_time(protocol)), metric))
                suffix = "".join(_suffix(key, value) for key, value in protocol.items())
                unit = "" if metric in SHARES else f"<br><small>{html.escape(_unit(report, metric, names))}</small>"
                rows.append(
                    f'<tr><td title="{html.escape(METRICS[metric].description)}">{html.escape(TITLES[metric])}{suffix}'
                    f"{unit}</td>{''.join(cells)}</tr>"
                )
        head = "".join(f"<th>{name}</th>" for name in [*names, "held-out images"])
        parts.append(
            f'<h3>{title}</h3><div class="scroll"><table class="numbers"><tr><th>Metric</th>{head}</tr>'
            f"{''.join(rows)}</table></div>"
        )
    legend = (
        "Small print: interval with its level, and n. The target of every metric of forgetting is the value of a retrained "
        "model, not the highest or lowest one. Reasons of missing numbers stand in their cells."
    )
    return f"<section><h2>All numbers</h2><p>{legend}</p>{''.join(parts)}</section>"


def _suffix(key: str, value: Any) -> str:
    """How a row of its own is named."""
    if key == "compared_with":
        return "" if value == THE_IMAGE else ", as the autoencoder returns it"
    return f", t = {value}" if key == "t" else f", {value} prompts"


def _protocols(report, metric: str, names: list[str]) -> list[dict[str, Any]]:
    """One row per t, target of comparison and set of prompts, for metrics that have them."""
    two = report["text"] is not None and report["text"]["keep_prompts"] is not None
    found: dict[tuple, dict[str, Any]] = {}
    for entry in (e for name in names for e in report["evaluation"][name] if e["metric"] == metric):
        protocol = {key: entry["protocol"][key] for key in ROW_KEYS if key in entry["protocol"]}
        if not isinstance(protocol.get("t", 0), int):
            del protocol["t"]
        if not two:
            protocol.pop("prompts", None)
        found.setdefault(tuple(protocol.items()), protocol)
    full = {len(protocol) for protocol in found.values()}
    rows = [protocol for protocol in found.values() if len(protocol) == max(full)]  # a failed column says less
    return sorted(rows, key=lambda protocol: protocol.get("t", 0)) if rows else [{}]


def _time(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """What is left for entries without prompts and targets: those of real images, and of columns that failed."""
    return {key: value for key, value in protocol.items() if key == "t"}


def _entry_at(entries: list[Entry], metric: str, protocol: Mapping[str, Any]) -> Entry | None:
    """The entry of a row, or why the column has none."""
    found = find(entries, metric, **protocol)
    if found is None:
        found = find(entries, metric, **_time(protocol))
        found = None if found is None or found["status"] == "ok" else found
    return found


def _unit(report, metric: str, names: list[str]) -> str:
    """The unit of a metric in this report."""
    units = [e["unit"] for name in names for e in report["evaluation"][name] if e["metric"] == metric]
    return units[0] if units else METRICS[metric].unit


def _cell(item: Entry | None, metric: str) -> str:
    if item is None:
        return '<td class="empty"></td>'
    if item["status"] != "ok":
        word = {"not_run": "not run", "failed": "failed"}[item["status"]]
        return f'<td class="missing">{word}<br><small>{html.escape(item["reason"] or "")}</small></td>'
    count = item["protocol"].get("count")
    size = f"{count:,} of {item['n']:,}" if count is not None else f"n = {item['n']:,}"
    interval = ""
    if item["ci"] is not None:
        low, high = (number(item["ci"][end], metric) for end in ("low", "high"))
        interval = f"{low} to {high} ({item['ci']['level']:.0%})<br>"
        size = f'<span title="{html.escape(item["ci"]["method"])}">{size}</span>'
    return f"<td><b>{number(item['value'], metric)}</b><br><small>{interval}{size}</small></td>"
