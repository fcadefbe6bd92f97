"""Measures one model: every family of metrics that is switched on, and a reason for every number that is missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from eval.context import Column, Context
from eval.families import FAMILIES, family_key, switched_off
from eval.records import Entry


def measure(context: Context) -> Column:
    """All metrics of one model. Nothing is left out: what cannot be computed has an entry that says why.

    Args:
      context: the model; its parameters may be on the host, and hold NaN. Its key is not used.
    """
    column = Column([])
    leaves = jax.tree.leaves(context.params)
    bad = sum(int(not np.all(np.isfinite(leaf))) for leaf in leaves)
    if bad:
        column.failed = f"{bad} of the model's {len(leaves)} parameter arrays hold NaN or infinity"
    context = dataclasses.replace(context, params=None if bad else jax.device_put(context.params))
    for name, family in FAMILIES.items():
        if family.measure is None:
            continue
        first = len(column.entries)
        if not family.enabled(context.settings):
            column.entries += switched_off(name, context.settings)
        elif bad:
            column.entries += _with_reason(family.module.failed_entries(context.settings), column.failed)
        else:
            seed = context.settings["seed"]
            family.measure(column, dataclasses.replace(context, key=family_key(name, seed)))
        _name_key(column.entries[first:], name, context.settings)
    return column


def compare(columns: Mapping[str, Column], contexts: Mapping[str, Context], settings: Mapping[str, Any]) -> None:
    """Runs the families that compare models, after all columns. Parameters of several models are on the device then.

    Args:
      columns: column name -> what was measured.
      contexts: the same names -> models.
      settings: the evaluation's settings.
    """
    contexts = {name: context for name, context in contexts.items() if not columns[name].failed}
    placed: dict[str, Context] = {}
    for name, family in FAMILIES.items():
        if family.compare is None:
            continue
        first = {column: len(found.entries) for column, found in columns.items()}
        if not family.enabled(settings):
            if family.measure is None:
                columns["after"].entries += switched_off(name, settings)
            continue
        if not placed:
            placed = {key: dataclasses.replace(c, params=jax.device_put(c.params)) for key, c in contexts.items()}
        key = family_key(name, settings["seed"])
        family.compare(columns, {k: dataclasses.replace(c, key=key) for k, c in placed.items()}, settings)
        for column, found in columns.items():
            _name_key(found.entries[first[column] :], name, settings)


def _with_reason(entries: list[Entry], reason: str) -> list[Entry]:
    return [{**item, "status": "failed", "reason": reason} for item in entries]


def _name_key(entries: list[Entry], name: str, settings: Mapping[str, Any]) -> None:
    """Says in every number from which stream of random numbers it was made."""
    for item in entries:
        if item["status"] == "ok" and item["seed_key"] is None:
            item["seed_key"] = f"seed {settings['seed']}, {name}"
