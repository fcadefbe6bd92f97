"""What came out of a sweep: the rule that orders its rows, the best one, and the table for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxunlearn.forgetting import StopRule

LEVEL_TARGET = StopRule.target
"""Forget level at which enough is forgotten."""
SHARE_OF_COPIES = 0.1
"""Share of the starting model's copies up to which enough is forgotten."""
COLLAPSE = StopRule.collapse
"""Keep loss over that of the starting model from which on a row has collapsed, whatever it has forgotten."""
RULE = (
    f"enough is forgotten: copies at most {SHARE_OF_COPIES:g} of the starting model's, or, where a retrained model is there, "
    f"a forget level of at least {LEVEL_TARGET:g}; and the keep ratio is below {COLLAPSE:g}; among these the lowest Frechet "
    "distance"
)


def _collapsed(row: Mapping[str, Any]) -> bool:
    return row["status"] != "ok" or row["keep_ratio"] is None or row["keep_ratio"] >= COLLAPSE


def enough(row: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether a judged row has forgotten enough, by :data:`RULE`. Without copies before, copies say nothing."""
    if _collapsed(row):
        return False
    few = before["copies"] > 0 and row["figures"]["copies"] <= SHARE_OF_COPIES * before["copies"]
    level = (row.get("forget_level") or {}).get("level")
    return few or (level is not None and level >= LEVEL_TARGET)


def ordered(rows: Sequence[Mapping[str, Any]], before: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows, best first: with enough forgotten by their distance, the others by copies, then collapsed and broken ones."""

    def rank(row):
        fd = row["figures"]["fd"] if row["figures"] else None
        fd = math.inf if fd is None else fd
        if enough(row, before):
            return (0, 0, fd)
        if row["status"] != "ok":
            return (3, 0, fd)
        return (2 if _collapsed(row) else 1, row["figures"]["copies"], fd)

    return sorted(rows, key=rank)


def best_of(rows: Sequence[Mapping[str, Any]], before: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The best row by :data:`RULE`, or None where none has forgotten enough."""
    first = ordered(rows, before)[:1]
    return first[0] if first and enough(first[0], before) and first[0]["figures"]["fd"] is not None else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def table(result: Mapping[str, Any]) -> str:
    """sweep.md: the rows in their order, with the starting and the retrained model."""
    before, rows = result["before"], result["rows"]
    head = ["", "selection", *(["lam"] if result["has_lam"] else []), result["scale_name"]]
    head += ["enough", "copies", "nearest", before["fd_name"], "keep ratio", "forget level", "seconds"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    best = best_of(rows, before)

    def cells(mark, selection, row, figures, judged):
        level = (row.get("forget_level") or {}).get("level")
        parts = [mark, selection, *([_text(row.get("lam"))] if result["has_lam"] else []), _text(row.get("scale"))]
        if figures is None:
            return [*parts, row["status"], "", "", "", "", "", _number(row.get("seconds"))]
        return [
            *parts,
            judged,
            f"{figures['copies']} of {figures['samples']}",
            _number(figures["nearest"]),
            _number(figures["fd"]),
            _number(row.get("keep_ratio")),
            _number(level),
            _number(row.get("seconds")),
        ]

    for name in ("before", "retrained"):
        if result.get(name):
            lines.append(" | ".join(cells("", name, {}, result[name], "")))
    for row in ordered(rows, before):
        marks = " ".join((["**best**"] if row is best else []) + (["**auto**"] if row["auto"] else []))
        judged = "yes" if enough(row, before) else "no"
        lines.append(" | ".join(cells(marks, row["selection"], row, row["figures"], judged)))
    return "\n".join(
        [
            f"# Sweep: {result['method']}, {result['combiner']}, {result['num_steps']} steps a row",
            "",
            f"Order: {RULE}. {verdict(result)}",
            "",
            f"Judged by {before['samples']} samples of {result['sampling_steps']} steps, one seed: small differences are "
            "chance.",
            "",
            *(f"| {line} |" for line in lines),
            "",
        ]
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else _number(value)


def verdict(result: Mapping[str, Any]) -> str:
    """One or two sentences: the best row and the automatic one."""
    before, rows = result["before"], result["rows"]
    best, sentences = best_of(rows, before), []
    name = before["fd_name"]
    if best is None:
        sentences.append(
            "No row has forgotten enough."
            if before["copies"] or any(row.get("forget_level") for row in rows)
            else "The starting model makes no copies and there is no retrained model, so no row can be called the best."
        )
    else:
        scale = f"{result['scale_name']} {_text(best['scale'])}"
        sentences.append(
            f"The best of the grid: {best['selection']}, {scale}, {name} {_number(best['figures']['fd'])}."
        )
    if best is None and not before["copies"]:
        return sentences[0]
    automatic = [row for row in ordered(rows, before) if row["auto"]]
    if automatic and automatic[0]["figures"]:
        row = automatic[0]
        forgotten = "enough forgotten" if enough(row, before) else "not enough forgotten"
        place = ordered(rows, before).index(row) + 1
        sentences.append(
            f"The automatic choice ({row['selection']}) comes {place}. of {len(rows)}: {forgotten}, "
            f"{name} {_number(row['figures']['fd'])}."
        )
    return " ".join(sentences)
