"""Tables of the report: every entry of every column, made from the records alone, grouped by family of metrics."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from eval.families import FAMILIES
from eval.families.injection import THE_IMAGE
from eval.records import Entry, find
from eval.wording import FAMILY_TITLES, SHARES, number, title
from jaxunlearn.metrics import METRICS
from jaxunlearn.metrics.entries import columns_of

ROW_KEYS = ("t", "share", "compared_with", "prompts", "direction", "statistic")
"""Keys of a protocol that make rows of their own."""


def groups(report) -> dict[str, list[str]]:
    """Title of a table -> its metrics: those of a family, in its order; what no family names stands at the end."""
    measured = {item["metric"]: None for entries in columns_of(report).values() for item in entries}
    found: dict[str, list[str]] = {}
    for name, family in FAMILIES.items():
        own = getattr(family.module, "GROUPS", None) or {
            FAMILY_TITLES.get(name, name.capitalize().replace("_", " ")): family.metrics(report["settings"])
        }
        for heading, metrics in own.items():
            found.setdefault(heading, []).extend(metric for metric in metrics if metric in measured)
    rest = [metric for metric in measured if not any(metric in metrics for metrics in found.values())]
    return {heading: metrics for heading, metrics in {**found, "Other": rest}.items() if metrics}


def tables_section(report) -> str:
    """All numbers."""
    columns = columns_of(report)
    names = [name for name in columns if name != "control"]
    parts, absent = [], []
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in [*names, "held-out images"])
    for heading, metrics in groups(report).items():
        rows, without = [], []
        for metric in metrics:
            reason = _nowhere(columns, metric)
            if reason is None:
                rows += _rows(report, columns, names, metric)
            else:
                without.append((title(metric), reason))
        if rows:
            table = f'<table class="numbers"><tr><th>Metric</th>{head}</tr>{"".join(rows)}</table>'
            parts.append(f'<h3>{html.escape(heading)}</h3><div class="scroll">{table}</div>{_not_run(without)}')
        else:
            absent.append(f"<h4>{html.escape(heading)}</h4>{_not_run(without)}")
    if absent:
        hint = "<p>More of them run with <code>python -m eval.main --workdir DIR --preset standard</code>.</p>"
        parts.append(f"<h3>Not part of this evaluation</h3>{hint}{''.join(absent)}")
    legend = (
        "Small print: interval with its level, and n. The target of every metric of forgetting is the value of a retrained "
        "model, not the highest or lowest one. Reasons of missing numbers stand in their cells."
    )
    return f"<section><h2>All numbers</h2><p>{legend}</p>{''.join(parts)}</section>"


def _rows(report, columns: Mapping[str, list[Entry]], names: list[str], metric: str) -> list[str]:
    """The rows of one metric."""
    rows = []
    for protocol in _protocols(report, columns, metric, names):
        cells = [_cell(_entry_at(columns[name], metric, protocol), metric) for name in names]
        cells.append(_cell(find(columns["control"], metric, **_time(protocol)), metric))
        suffix = "".join(_suffix(key, value) for key, value in protocol.items())
        unit = "" if metric in SHARES else f"<br><small>{html.escape(_unit(columns, metric, names))}</small>"
        rows.append(
            f'<tr><td title="{html.escape(METRICS[metric].description)}">{html.escape(title(metric))}{suffix}'
            f"{unit}</td>{''.join(cells)}</tr>"
        )
    return rows


def _nowhere(columns: Mapping[str, list[Entry]], metric: str) -> str | None:
    """Why no column has a number of this metric, if they all say the same; None if one has a number."""
    found = [item for entries in columns.values() for item in entries if item["metric"] == metric]
    reasons = {item["reason"] for item in found}
    not_run = found and all(item["status"] == "not_run" for item in found) and len(reasons) == 1
    return reasons.pop() if not_run else None


def _not_run(without: list[tuple[str, str]]) -> str:
    """One line for each reason: the metrics that were not run for it."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in without:
        by_reason.setdefault(reason, []).append(name)
    lines = [f"{'; '.join(titles)}: {reason}" for reason, titles in by_reason.items()]
    return "".join(f'<p class="missing-line">{html.escape(line)}.</p>' for line in lines)


def _suffix(key: str, value: Any) -> str:
    """How a row of its own is named."""
    if key == "compared_with":
        return "" if value == THE_IMAGE else ", as the autoencoder returns it"
    if key == "prompts":
        return f", {value} prompts"
    if key == "share":
        return f", {100 * value:.0f}&nbsp;% fresh noise"
    return f", t&nbsp;=&nbsp;{value}" if key == "t" else f", {html.escape(str(value))}"


def _protocols(report, columns, metric: str, names: list[str]) -> list[dict[str, Any]]:
    """One row for each value of :data:`ROW_KEYS` that the metric has."""
    two = report["text"] is not None and report["text"]["keep_prompts"] is not None
    found: dict[tuple, dict[str, Any]] = {}
    for entry in (e for name in names for e in columns[name] if e["metric"] == metric):
        protocol = {key: entry["protocol"][key] for key in ROW_KEYS if key in entry["protocol"]}
        protocol = {key: value for key, value in protocol.items() if isinstance(value, int | float | str)}
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


def _unit(columns, metric: str, names: list[str]) -> str:
    """The unit of a metric in this report."""
    units = [e["unit"] for name in names for e in columns[name] if e["metric"] == metric]
    return units[0] if units else METRICS[metric].unit


def _cell(item: Entry | None, metric: str) -> str:
    if item is None:
        return '<td class="empty"></td>'
    if item["status"] != "ok":
        word = {"not_run": "not run", "failed": "failed"}[item["status"]]
        return f'<td class="missing">{word}<br><small>{html.escape(item["reason"] or "")}</small></td>'
    count = item["protocol"].get("count")
    size = "" if item["n"] is None else f"n = {item['n']:,}"
    size = f"{count:,} of {item['n']:,}" if isinstance(count, int) and item["n"] else size
    if item["floor"] is not None:
        size = f"floor {number(item['floor'], metric)}<br>{size}"
    interval = ""
    if item["ci"] is not None:
        low, high = (number(item["ci"][end], metric) for end in ("low", "high"))
        interval = f"{low} to {high} ({item['ci']['level']:.0%})<br>"
        size = f'<span title="{html.escape(item["ci"]["method"])}">{size}</span>'
    return f"<td><b>{number(item['value'], metric)}</b><br><small>{interval}{size}</small></td>"
