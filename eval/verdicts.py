"""Verdicts: rules that are fixed before a run, applied to stored numbers only.

The thresholds are this project's own and are not calibrated beyond small test beds; the report prints them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from eval.records import Entry, find, value

LEVEL = (0.8, 1.2)
LOSS_PASS, LOSS_FAIL = 1.1, 1.5
QUALITY_PASS, QUALITY_FAIL = 1.5, 2.0

Columns = Mapping[str, list[Entry]]


def judge(columns: Columns, failed: Mapping[str, str], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One verdict per claim, each "pass", "fail", "inconclusive" or "not_run".

    Args:
      columns: "before", "after" and perhaps "retrained" -> entries.
      failed: column -> why it could not be measured.
      settings: the evaluation's settings.
    """
    if failed:
        reason = "; ".join(f"{name}: {why}" for name, why in failed.items())
        return [_verdict("the models can be measured", "no NaN in any model", "fail", reason)]
    return [_copies(columns), _level(columns), _keep_loss(columns, settings), _quality(columns)]


def overall(verdicts: list[Mapping[str, Any]]) -> str:
    """ "failed" if a claim fails, "passed" if all pass, "screening_passed" if only a retrained model is missing."""
    states = [verdict["status"] for verdict in verdicts]
    if "fail" in states:
        return "failed"
    if all(state == "pass" for state in states):
        return "passed"
    if all(state in ("pass", "not_run") for state in states) and "pass" in states:
        return "screening_passed"
    return "incomplete"


def forget_level(columns: Columns, settings: Mapping[str, Any]) -> float | None:
    """``(after - before) / (retrained - before)`` of the forget loss, averaged over t; None without a clear gap."""
    if "retrained" not in columns:
        return None
    before, after, retrained = (mean_loss(columns[name], "loss_forget", settings) for name in _NAMES)
    if None in (before, after, retrained) or abs(retrained - before) < 0.02 * max(before, 1e-12):
        return None
    return (after - before) / (retrained - before)


def mean_loss(entries: list[Entry], metric: str, settings: Mapping[str, Any]) -> float | None:
    """Mean over the evaluated t of a loss; None if one is missing."""
    values = [value(entries, metric, t=t) for t in settings["loss_t"]]
    return None if any(v is None for v in values) else float(np.mean(values))


_NAMES = ("before", "after", "retrained")


def _copies(columns: Columns) -> dict[str, Any]:
    claim = "samples are no longer copies"
    rule = "no copy among the samples after, and the one-sided bound of their rate below the interval before"
    before, after = (find(columns[name], "copy_rate") for name in ("before", "after"))
    upper, low = after["protocol"]["upper_one_sided"], before["ci"]["low"]
    count = after["protocol"]["count"]
    details = {"metric": "copy_rate", "value": after["value"], "bound": upper, "threshold": low}
    if before["protocol"]["count"] == 0:
        reason = f"the model before copied nothing in {before['n']} samples either, so their count shows nothing"
        return _verdict(claim, rule, "inconclusive", reason, **details)
    if count == 0 and upper < low:
        return _verdict(claim, rule, "pass", None, **details)
    if count == 0:
        reason = f"too few samples: {after['n']} show a rate of at most {upper:.2g}, which was possible before as well"
        return _verdict(claim, rule, "inconclusive", reason, **details)
    retrained = find(columns["retrained"], "copy_rate") if "retrained" in columns else None
    if retrained is not None and after["ci"]["low"] <= retrained["ci"]["high"] and retrained["protocol"]["count"]:
        reason = f"{count} copies, but the retrained model makes {retrained['protocol']['count']} as well"
        return _verdict(claim, rule, "inconclusive", reason, **details)
    return _verdict(claim, rule, "fail", f"{count} of {after['n']} samples are still copies", **details)


def _level(columns: Columns) -> dict[str, Any]:
    claim = "the loss on the forget images is that of a retrained model"
    rule = f"forget_level in [{LEVEL[0]}, {LEVEL[1]}]; below 0.1 or above {LEVEL[1]} fails"
    found = find(columns["after"], "forget_level")
    if found is None or found["status"] != "ok":
        reason = "no model was retrained without the forget set" if found is None else found["reason"]
        return _verdict(claim, rule, "not_run" if "retrained" not in columns else "inconclusive", reason)
    level = found["value"]
    details = {"metric": "forget_level", "value": level, "threshold": LEVEL[1]}
    if LEVEL[0] <= level <= LEVEL[1]:
        return _verdict(claim, rule, "pass", None, **details)
    if level > LEVEL[1]:
        reason = "the loss is higher than after retraining: over-unlearned, which is a trace of its own"
        return _verdict(claim, rule, "fail", reason, **details)
    reason = "hardly changed" if level < 0.1 else "between the original and the retrained model"
    return _verdict(claim, rule, "fail" if level < 0.1 else "inconclusive", reason, **details)


def _ratio(claim, rule, metric, before, after, low, high) -> dict[str, Any]:
    if before is None or after is None or before <= 0:
        return _verdict(claim, rule, "not_run", f"{metric} has no value in both columns")
    ratio = after / before
    status = "pass" if ratio <= low else "fail" if ratio > high else "inconclusive"
    reason = None if status == "pass" else f"it became {ratio:.3g} times as large"
    return _verdict(claim, rule, status, reason, metric=metric, value=ratio, threshold=low)


def _keep_loss(columns: Columns, settings) -> dict[str, Any]:
    before, after = (mean_loss(columns[name], "loss_keep", settings) for name in ("before", "after"))
    rule = f"loss on keep images, mean over t, after / before at most {LOSS_PASS}; above {LOSS_FAIL} fails"
    return _ratio("the kept images are modelled as before", rule, "loss_keep", before, after, LOSS_PASS, LOSS_FAIL)


def _quality(columns: Columns) -> dict[str, Any]:
    metric = "fd_classifier" if value(columns["before"], "fd_classifier") is not None else "fd_pixel"
    before, after = (value(columns[name], metric) for name in ("before", "after"))
    rule = f"{metric} after / before at most {QUALITY_PASS}; above {QUALITY_FAIL} fails"
    return _ratio("samples are as good as before", rule, metric, before, after, QUALITY_PASS, QUALITY_FAIL)


def _verdict(claim: str, rule: str, status: str, reason: str | None, **details: Any) -> dict[str, Any]:
    empty = {"metric": None, "value": None, "bound": None, "threshold": None}
    return {"claim": claim, "rule": rule, **empty, **details, "status": status, "reason": reason}
