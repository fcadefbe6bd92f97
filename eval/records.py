"""Entries of the report: one number with its unit, n, interval, protocol and status."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxunlearn.metrics import METRICS
from jaxunlearn.metrics.entries import Entry, find, value
from jaxunlearn.metrics.statistics import Interval

__all__ = ["Entry", "entry", "find", "missing", "value"]


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
    floor: float | None = None,
    weights_sha256: str | None = None,
    seed_key: str | None = None,
) -> Entry:
    """A record of ``metric``, which must be in METRICS. A value that is not finite becomes null and "failed".

    Other numbers that are not finite become null as well, those in the protocol too: a report holds finite ones only.

    Args:
      metric: its name.
      value: the number.
      n: what it was computed from: samples, images, pairs.
      ci: its interval; None where none is possible (then ``protocol`` says why).
      protocol: how it was computed.
      status: "ok", "not_run" or "failed".
      reason: why there is no value.
      unit: for models that do not work on pixels; None takes that of METRICS.
      floor: the same quantity between retrained models.
      weights_sha256: of the feature network's weights.
      seed_key: the stream of random numbers; None: filled in for the family.
    """
    if status == "ok" and (value is None or not math.isfinite(value)):
        status, reason = "failed", reason or "the result is not a finite number"
    known = METRICS[metric]
    bounds = None if ci is None or status != "ok" else _finite(ci._asdict())
    if bounds is not None and None in bounds.values():
        bounds = None
    return {
        "metric": metric,
        "value": float(value) if status == "ok" else None,
        "unit": unit or known.unit,
        "n": None if n is None else int(n),
        "ci": bounds,
        "target": known.target,
        "floor": None if floor is None or not math.isfinite(floor) else float(floor),
        "protocol": _finite(dict(protocol or {})),
        "weights_sha256": weights_sha256,
        "seed_key": seed_key,
        "status": status,
        "reason": reason,
    }


def _finite(value: Any) -> Any:
    """The same value with None for every float that is not finite, in dicts, lists and tuples as well."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_finite(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
