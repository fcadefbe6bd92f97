"""Entries of metrics that compare features of samples with features of keep images, whatever network made them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from eval.records import Entry, entry, missing
from jaxunlearn.metrics.kid import kernel_distance
from jaxunlearn.metrics.prdc import prdc

MANIFOLDS = ("precision", "recall", "density", "coverage")


def kernel_entry(
    metric: str, keep: np.ndarray, samples: np.ndarray, settings: Mapping[str, Any], more: Mapping[str, Any], **fields
) -> Entry:
    """Kernel distance of features of keep images [n, d] and of samples [m, d], under the name ``metric``.

    ``more`` joins the protocol, ``fields`` go to :func:`eval.records.entry`.
    """
    options = settings["quality"]
    protocol = {**more, "kernel": "(x.y / d + 1)^3, unbiased", "kernel_reference_n": len(keep)}
    try:
        found = kernel_distance(
            keep, samples, subsets=options["subsets"], size=options["subset_size"], seed=settings["seed"]
        )
    except ValueError as error:
        return missing(metric, str(error), status="failed", protocol=protocol)
    protocol |= {"subsets": found.subsets, "subset_size": found.size, "interval": "none: subsets overlap"}
    if np.isfinite(found.std):
        protocol["std_over_subsets"] = found.std
    return entry(metric, found.mean, n=len(samples), protocol=protocol, **fields)


def manifold_entries(
    suffix: str, keep: np.ndarray, samples: np.ndarray, more: Mapping[str, Any], **fields
) -> list[Entry]:
    """Precision, recall, density and coverage of the same features; ``suffix`` follows each name."""
    names = [name + suffix for name in MANIFOLDS]
    protocol = {**more, "manifold_reference_n": len(keep), "interval": "none: points share their neighbours"}
    try:
        found = prdc(keep, samples)
    except ValueError as error:
        return [missing(name, str(error), status="failed", protocol=protocol) for name in names]
    rules = [f"k = {found.k}, distance <= radius"] * 2 + [f"k = {found.k_density}, distance < radius"] * 2
    return [
        entry(name, value, n=len(samples), protocol={**protocol, "neighbours": rule}, **fields)
        for name, value, rule in zip(names, found[:4], rules)
    ]
