"""Quality on features of the run's own classifier: kernel distance and manifolds, for when no weights are at hand.

Their names say so: ``kd_classifier`` is no KID. The Frechet distance of these features stands among the samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from eval.context import Column, Context
from eval.feature_entries import MANIFOLDS, kernel_entry, manifold_entries
from eval.once import OncePerRun
from eval.parts import in_parts
from eval.records import Entry, missing
from eval.references import MAX_REFERENCE, some
from eval.sample_metrics import classifier_record

METRICS = ("kd_classifier", *(f"{name}_classifier" for name in MANIFOLDS))

_keep: OncePerRun[np.ndarray] = OncePerRun()


def failed_entries(settings: Mapping[str, Any]) -> list[Entry]:
    """Every metric without a value."""
    return [missing(name, "", status="failed") for name in METRICS]


def measure(column: Column, context: Context) -> None:
    """Features of the quality samples against those of keep images, at most ``quality.rows`` of each."""
    refs, settings = context.refs, context.settings
    if column.quality_samples is None:
        column.entries += [missing(name, column.failed, status="failed") for name in METRICS]
        return
    if refs.classifier is None:
        column.entries += [missing(name, refs.no_classifier) for name in METRICS]
        return

    def features(images: np.ndarray) -> np.ndarray:
        return in_parts(lambda part: refs.classifier.apply(part)[1], images)

    most = settings["quality"]["rows"]
    positions = some(context.split.keep, min(most, MAX_REFERENCE), settings["seed"])
    keep = _keep(refs, lambda: features(context.split.images[positions]))
    samples = features(column.quality_samples[:most])
    protocol = {
        **context.runner.protocol,
        "reference": "keep images",
        **classifier_record(refs),
        "dimensions": keep.shape[1],
        "copies_of_forget_images": "left in",
    }
    column.entries.append(kernel_entry("kd_classifier", keep, samples, settings, protocol))
    column.entries += manifold_entries("_classifier", keep, samples, protocol)
    context.tick("features of the classifier", 1.0)
