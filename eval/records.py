"""Entries of the report: one number with its unit, n, interval, protocol and status."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxunlearn.metrics import METRICS
from jaxunlearn.metrics.statistics import Interval

Entry = dict[str, Any]


def entry(
    metric: str,
    value: float | None,
    *,
    n: int | None = None,
    ci: Interval | None = None,
    protocol: Mapping[str, Any] | None = None,
    status: str = "ok",
    reason: str | None = None,
    unit: str | None = None,
) -> Entry:
    """A record of ``metric``, which must be in METRICS. A value that is not finite becomes null and "failed".

    ``unit`` is for models that do not work on pixels; None takes that of METRICS.
    """
    if status == "ok" and (value is None or not math.isfinite(value)):
        status, reason = "failed", reason or "the result is not a finite number"
    known = METRICS[metric]
    bounds = None if ci is None or status != "ok" else {key: getattr(ci, key) for key in ci._fields}
    return {
        "metric": metric,
        "value": float(value) if status == "ok" else None,
        "unit": unit or known.unit,
        "n": None if n is None else int(n),
        "ci": bounds,
        "target": known.target,
        "protocol": dict(protocol or {}),
        "status": status,
        "reason": reason,
    }


def missing(
    metric: str,
    reason: str,
    *,
    status: str = "not_run",
    protocol: Mapping[str, Any] | None = None,
    unit: str | None = None,
) -> Entry:
    """A record of a metric that has no value, and why."""
    return entry(metric, None, status=status, reason=reason, protocol=protocol, unit=unit)


def find(entries: list[Entry], metric: str, **protocol: Any) -> Entry | None:
    """The first entry of ``metric`` whose protocol holds the given values."""
    for item in entries:
        if item["metric"] == metric and all(item["protocol"].get(key) == value for key, value in protocol.items()):
            return item
    return None


def value(entries: list[Entry], metric: str, **protocol: Any) -> float | None:
    """The value of :func:`find`; None if there is no such entry or it has no value."""
    found = find(entries, metric, **protocol)
    return None if found is None else found["value"]
