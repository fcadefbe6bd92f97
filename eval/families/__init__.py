"""Families of metrics: each measures one model, or compares models when all are measured.

A family is a module with some of these functions; :data:`FAMILIES` is the one table.

* ``measure(column, context)`` appends entries and arrays to the column. It never raises for a metric that cannot run:
  that one gets an entry from :func:`eval.records.missing` with the reason.
* ``compare(columns, contexts, settings)`` runs once, after all columns; ``contexts`` holds only models without NaN, so a
  column that is not in it gets entries with the reason ``column.failed``.
* ``failed_entries(settings)``: what stands in the report if the family did not run for a column; every metric of the
  family is in it, with status "failed" or "not_run" set by the caller.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from eval.families import (
    classifier_features,
    copy_detector,
    extraction,
    gap,
    inception_features,
    injection,
    inversion,
    likelihood,
    losses,
    membership,
    photographs,
    relearning,
    samples,
    sscd_variants,
)
from eval.records import Entry, missing


class Family(NamedTuple):
    """A family and its switch.

    Attributes:
      module: the module with the functions above.
      switch: dotted key below ``eval``; the family is off where its value is False, None, 0 or empty. None: always on.
    """

    module: Any
    switch: str | None = None

    @property
    def measure(self) -> Callable | None:
        """The function that measures one column, or None."""
        return getattr(self.module, "measure", None)

    @property
    def compare(self) -> Callable | None:
        """The function that compares all columns, or None."""
        return getattr(self.module, "compare", None)

    def metrics(self, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """Its metrics, in the order of the tables: METRICS of the module, else those of ``failed_entries``."""
        named = getattr(self.module, "METRICS", ())
        return tuple(dict.fromkeys((*named, *(item["metric"] for item in self.module.failed_entries(settings)))))

    def enabled(self, settings: Mapping[str, Any]) -> bool:
        """Whether the settings switch it on."""
        return self.switch is None or bool(lookup(settings, self.switch))


FAMILIES: dict[str, Family] = {
    "samples": Family(samples),
    "injection": Family(injection),
    "losses": Family(losses),
    "extraction": Family(extraction, switch="extraction.detectors"),
    "membership": Family(membership, switch="membership.scores"),
    "classifier_features": Family(classifier_features, switch="quality.classifier"),
    "inception_features": Family(inception_features, switch="quality.inception"),
    "copy_detector": Family(copy_detector, switch="sscd.enabled"),
    "sscd_variants": Family(sscd_variants, switch="sscd.variants"),
    "photographs": Family(photographs, switch="photographs.enabled"),
    "likelihood": Family(likelihood, switch="nll.draws"),
    "inversion": Family(inversion, switch="inversion.copies"),
    "gap": Family(gap, switch="gap.draws"),
    "relearning": Family(relearning, switch="relearn.keys"),
}
"""Name -> family, in the order of the report. A name is also the stream of the family's key: do not change it."""


def lookup(settings: Mapping[str, Any], dotted: str) -> Any:
    """The value of a dotted key."""
    for part in dotted.split("."):
        settings = settings[part]
    return settings


def family_key(name: str, seed: int) -> jax.Array:
    """The key of a family: a function of its name and ``eval.seed`` only."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def switched_off(name: str, settings: Mapping[str, Any]) -> list[Entry]:
    """The entries of a family that the settings switch off: one for each metric, "not_run", and how to switch it on."""
    family = FAMILIES[name]
    preset = settings["preset"]
    which = "these settings" if preset is None else f"the preset {preset}"
    reason = f"not part of {which}; eval.{family.switch} switches it on"
    units = {item["metric"]: item["unit"] for item in family.module.failed_entries(settings)}
    return [missing(metric, reason, unit=unit) for metric, unit in units.items()]
