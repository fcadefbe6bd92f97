"""What samples show: copies, nearest distances, quality. Samples are pictures, whatever the model works on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from eval.parts import in_parts, parts_of
from eval.records import Entry, entry, missing
from eval.references import References
from jaxunlearn.metrics import distances, extraction, frechet, statistics
from jaxunlearn.metrics.inception_score import inception_score

COPY_METRICS = ("copy_rate", "copy_rate_strict")
FORGET_METRICS = (*COPY_METRICS, "nearest_forget_min", "nearest_forget_median")
KEEP_METRICS = ("nearest_keep_min", "nearest_keep_median", "fd_classifier", "fd_pixel", "inception_score")


class Copies(NamedTuple):
    """Which samples are copies.

    Attributes:
      nearest_forget: float64 [N], rms distance to the nearest forget image.
      flags: bool [N], copies of a forget image, or of what the autoencoder makes of one.
      strict: bool [N], strict copies.
    """

    nearest_forget: np.ndarray
    flags: np.ndarray
    strict: np.ndarray


def find_copies(samples: np.ndarray, refs: References) -> Copies:
    """Compares samples uint8 [N,H,W,C] with the forget images and, for latent models, with their reconstructions.

    A latent model that has memorised an image makes its reconstruction, not the image itself.
    """
    to_forget = in_parts(lambda part: distances.pairwise(part, refs.forget), samples)
    flags = extraction.copies(to_forget, refs.calibration.threshold)
    strict = extraction.copies(to_forget, refs.calibration.strict_threshold)
    if refs.round_trip is not None:
        made = refs.round_trip
        distance = in_parts(lambda part: distances.pairwise(part, made.images), samples)
        flags |= extraction.copies(distance, made.calibration.threshold)
        strict |= extraction.copies(distance, made.calibration.strict_threshold)
    return Copies(to_forget.min(axis=1), flags, strict)


def copy_entries(found: Copies, refs: References, settings, protocol: Mapping[str, Any]) -> list[Entry]:
    """Counts of copies with their bounds."""
    calibration, out = refs.calibration, []
    for name, flags, threshold in (
        ("copy_rate", found.flags, calibration.threshold),
        ("copy_rate_strict", found.strict, calibration.strict_threshold),
    ):
        counted = extraction.copy_rate(flags, settings["confidence"])
        details = {
            **protocol,
            "count": counted.count,
            "upper_one_sided": counted.upper.high,
            "threshold_min": float(threshold.min()),
            "threshold_max": float(threshold.max()),
            "rule": calibration.rule if name == "copy_rate" else "rms distance below half of the calibration distance",
        }
        if refs.round_trip is not None:
            details["copy_of"] = "a forget image, or what the autoencoder makes of it, each with its own threshold"
            details["autoencoder_rms"] = float(refs.round_trip.rms.mean())
        out.append(entry(name, counted.rate, n=len(flags), ci=counted.ci, protocol=details))
    return out


def distance_entries(name: str, values: np.ndarray, settings, protocol: Mapping[str, Any]) -> list[Entry]:
    """Minimum and median of ``nearest_forget`` or ``nearest_keep`` distances [N]."""
    interval = statistics.bootstrap_interval(values, settings["confidence"], seed=settings["seed"])
    return [
        entry(f"{name}_min", values.min(), n=len(values), protocol=protocol),
        entry(f"{name}_median", np.median(values), n=len(values), ci=interval, protocol=protocol),
    ]


def nearest_keep(samples: np.ndarray, refs: References) -> np.ndarray:
    """rms distance float64 [N] of samples to their nearest keep image."""
    return in_parts(lambda part: distances.nearest(part, refs.keep).distance, samples)


def quality_entries(samples, flags, refs: References, settings, protocol: Mapping[str, Any]) -> list[Entry]:
    """Frechet distances and score of samples uint8 [N,H,W,C], of which ``flags`` [N] are copies."""
    n = len(samples)
    details = {**protocol, **refs.reference, "copies_of_forget_images": "left in"}
    pixel = frechet.frechet_distance(frechet.moments(in_parts(refs.basis, samples)), refs.pixels)
    out = [entry("fd_pixel", pixel, n=n, protocol={**details, "components": refs.basis.basis.shape[1]})]
    if refs.classifier is None:
        return [missing(name, refs.no_classifier) for name in ("fd_classifier", "inception_score")] + out
    outputs = [refs.classifier.apply(part) for part in parts_of(samples)]
    logits, features = (np.concatenate(part) for part in zip(*outputs))
    trained = classifier_record(refs)
    distance = frechet.frechet_distance(frechet.moments(features), refs.features)
    fd = entry("fd_classifier", distance, n=n, protocol={**details, **trained, "dimensions": features.shape[1]})
    return [fd, *out, _inception(logits[~flags], refs, settings, {**protocol, **trained})]


def _inception(logits, refs: References, settings, protocol) -> Entry:
    least, accuracy = settings["classifier"]["min_accuracy"], refs.classifier.held_out_accuracy
    protocol = {**protocol, "chunks": 10, "copies_of_forget_images": "left out"}
    if accuracy < least:
        reason = f"the classifier's held-out accuracy {accuracy:.3f} is below {least:g}: its score would say little"
        return missing("inception_score", reason, status="failed", protocol=protocol)
    if len(logits) < 20:
        reason = f"only {len(logits)} samples are not copies; the score needs 20"
        return missing("inception_score", reason, protocol=protocol)
    score = inception_score(logits, chunks=10, seed=settings["seed"])
    return entry("inception_score", score.mean, n=score.n, protocol={**protocol, "std_over_chunks": score.std})


def classifier_record(refs: References) -> dict[str, Any]:
    """Accuracy and training set of the run's classifier."""
    accuracy = refs.classifier.held_out_accuracy
    return {
        "classifier_held_out_accuracy": None if np.isnan(accuracy) else accuracy,
        "classifier_train_images": refs.classifier.train_images,
        "classifier_classes": len(refs.classifier.classes),
    }
