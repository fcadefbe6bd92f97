"""Measures one column of the report: a model's samples, injections and losses, as entries and arrays for figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from eval.records import Entry, entry, missing
from eval.references import References
from eval.runner import Runner
from jaxunlearn.images import to_model, to_uint8
from jaxunlearn.metrics import distances, extraction, frechet, injection, statistics
from jaxunlearn.metrics.inception_score import inception_score
from jaxunlearn.types import PyTree

Tick = Callable[[str, float], None]
"""Called with the name of the stage and its finished share."""

SAMPLE_METRICS = (
    "copy_rate",
    "copy_rate_strict",
    "nearest_forget_min",
    "nearest_forget_median",
    "nearest_keep_min",
    "nearest_keep_median",
    "fd_classifier",
    "fd_pixel",
    "inception_score",
)
LOSSES = {"forget": "loss_forget", "keep": "loss_keep", "held_out": "loss_held_out"}


@dataclasses.dataclass
class Column:
    """One column: entries for the report, and arrays for its figures.

    Attributes:
      entries: records, in the order of the report.
      samples: uint8 [N,H,W,C], or None.
      flags: bool [N], which samples are copies.
      arrays: name -> array (distances, losses).
      failed: why the column as a whole could not be measured, or None.
    """

    entries: list[Entry]
    samples: np.ndarray | None = None
    flags: np.ndarray | None = None
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    failed: str | None = None


def measure(params: PyTree, runner: Runner, refs: References, settings: Mapping[str, Any], tick: Tick) -> Column:
    """All metrics of one model. Nothing is left out: what cannot be computed has an entry that says why."""
    column = Column([])
    bad = sum(int(not np.all(np.isfinite(leaf))) for leaf in jax.tree.leaves(params))
    if bad:
        column.failed = f"{bad} of the model's {len(jax.tree.leaves(params))} parameter arrays hold NaN or infinity"
        column.entries = _all_failed(column.failed, settings)
        return column
    params = jax.device_put(params)

    images = runner.sample(params, refs.keep.shape[1:], lambda share: tick("samples", share))
    broken = int(np.sum(~np.all(np.isfinite(images), axis=(1, 2, 3))))
    if broken:
        column.failed = f"{broken} of {len(images)} samples hold NaN or infinity"
        column.entries = [missing(name, column.failed, status="failed") for name in SAMPLE_METRICS]
    else:
        column.samples = to_uint8(images)
        measure_samples(column, column.samples, refs, settings, runner.protocol)
    _measure_injection(column, params, runner, refs, settings, lambda share: tick("injection", share))
    _measure_losses(column, params, runner, refs, settings, lambda share: tick("loss", share))
    return column


def measure_samples(
    column: Column, samples: np.ndarray, refs: References, settings: Mapping[str, Any], protocol: Mapping[str, Any]
) -> None:
    """Copies, nearest distances and quality of samples uint8 [N,H,W,C]."""
    confidence, n, calibration = settings["confidence"], len(samples), refs.calibration
    to_forget = distances.pairwise(samples, refs.forget)
    column.arrays["nearest_forget"] = to_forget.min(axis=1)
    column.arrays["nearest_keep"] = distances.nearest(samples, refs.keep).distance
    column.flags = extraction.copies(to_forget, calibration.threshold)
    strict = extraction.copies(to_forget, calibration.strict_threshold)
    for name, flags, threshold in (
        ("copy_rate", column.flags, calibration.threshold),
        ("copy_rate_strict", strict, calibration.strict_threshold),
    ):
        found = extraction.copy_rate(flags, confidence)
        details = {
            **protocol,
            "count": found.count,
            "upper_one_sided": found.upper.high,
            "threshold_min": float(threshold.min()),
            "threshold_max": float(threshold.max()),
            "rule": calibration.rule if name == "copy_rate" else "rms distance below half of the calibration distance",
        }
        column.entries.append(entry(name, found.rate, n=n, ci=found.ci, protocol=details))
    for name in ("nearest_forget", "nearest_keep"):
        values = column.arrays[name]
        column.entries.append(entry(f"{name}_min", values.min(), n=n, protocol=protocol))
        interval = statistics.bootstrap_interval(values, confidence, seed=settings["seed"])
        column.entries.append(entry(f"{name}_median", np.median(values), n=n, ci=interval, protocol=protocol))
    column.entries += _quality(samples, column.flags, refs, settings, protocol)


def _quality(samples, flags, refs: References, settings, protocol) -> list[Entry]:
    n = len(samples)
    details = {**protocol, **refs.reference, "copies_of_forget_images": "left in"}
    pixel = frechet.frechet_distance(frechet.moments(refs.basis(samples)), refs.pixels)
    out = [entry("fd_pixel", pixel, n=n, protocol={**details, "components": refs.basis.basis.shape[1]})]
    if refs.classifier is None:
        return [missing(name, refs.no_classifier) for name in ("fd_classifier", "inception_score")] + out
    logits, features = refs.classifier.apply(samples)
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


def _measure_injection(column: Column, params, runner: Runner, refs: References, settings, tick) -> None:
    a0 = np.asarray(to_model(refs.forget[refs.injected]))
    denoised = runner.inject(params, a0, tick)
    column.arrays["injected"] = denoised[0]
    distance = injection.injection_distance(a0, denoised)
    similarity = injection.injection_similarity(a0, denoised)
    column.arrays["injection_distance"] = distance
    threshold = refs.calibration.threshold[refs.injected][:, None]
    single = len(a0) == 1
    for place, t in enumerate(settings["injection_t"]):
        details = {"t": t, "copies": settings["injection_copies"], "images": len(a0), "sampler": "ddpm, every step"}
        details["interval_over"] = "copies of the one forget image" if single else "forget images"
        for name, values in (("injection_distance", distance), ("injection_similarity", similarity)):
            subjects = values[0, place] if single else values[:, place].mean(axis=1)
            interval = None
            if np.all(np.isfinite(subjects)):
                interval = statistics.mean_interval(subjects, settings["confidence"])
            column.entries.append(
                entry(name, subjects.mean(), n=len(subjects), ci=_renamed(interval, single), protocol=details)
            )
        # Copies of one image share it, so their flags are not independent trials: a rate without an interval.
        back = distance[:, place] < threshold
        column.entries.append(
            entry("injection_copies", back.mean(), n=back.size, protocol={**details, "count": int(back.sum())})
        )


def _renamed(interval: statistics.Interval | None, single: bool) -> statistics.Interval | None:
    if interval is None or not single:
        return interval
    return interval._replace(method="Student t over copies of one image")


def _measure_losses(column: Column, params, runner: Runner, refs: References, settings, tick) -> None:
    sets = {name: images for name, images in refs.loss_sets.items() if len(images)}
    everything = np.concatenate([np.asarray(to_model(images)) for images in sets.values()])
    values = dict(
        zip(sets, np.split(runner.loss(params, everything, tick), np.cumsum([len(s) for s in sets.values()])))
    )
    column.arrays.update({LOSSES[name]: value for name, value in values.items()})
    common = {"noises": settings["loss_noises"], "error": "mean_squares", "noise": "common to all images and models"}
    for name, metric in LOSSES.items():
        for place, t in enumerate(settings["loss_t"]):
            if name not in values:
                column.entries.append(missing(metric, "no images were held out", protocol={**common, "t": t}))
                continue
            losses = values[name][:, place]
            interval = statistics.mean_interval(losses, settings["confidence"]) if np.all(np.isfinite(losses)) else None
            column.entries.append(entry(metric, losses.mean(), n=len(losses), ci=interval, protocol={**common, "t": t}))
    for place, t in enumerate(settings["loss_t"]):
        details = {**common, "t": t}
        if "held_out" not in values:
            column.entries.append(missing("rank_p", "no images were held out", protocol=details))
            continue
        ranks = [statistics.rank_p(score, values["held_out"][:, place]) for score in values["forget"][:, place]]
        column.entries.append(entry("rank_p", np.mean(ranks), n=len(values["held_out"]), protocol=details))


def _all_failed(reason: str, settings: Mapping[str, Any]) -> list[Entry]:
    out = [missing(name, reason, status="failed") for name in SAMPLE_METRICS]
    for names, key in (
        (("injection_distance", "injection_similarity", "injection_copies"), "injection_t"),
        ((*LOSSES.values(), "rank_p"), "loss_t"),
    ):
        out += [missing(m, reason, status="failed", protocol={"t": t}) for m in names for t in settings[key]]
    return out
