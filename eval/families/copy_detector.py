"""SSCD, the copy detector: how much of a forget image comes back, and which samples are copies in its eyes.

The network's weights are a file of the user. Without it every metric here is "not_run". The injections are those of the
injection test, so all models start from the same noises.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from eval.context import Column, Context
from eval.feature_networks import refusal, weights_for
from eval.once import OncePerRun
from eval.records import Entry, entry, missing, value
from eval.references import some
from jaxunlearn.images import to_uint8
from jaxunlearn.metrics import entries, extraction, statistics
from jaxunlearn.metrics.resize import sscd_inputs
from jaxunlearn.metrics.significance import LEAST_BOOTSTRAP
from jaxunlearn.metrics.sscd_variants import sscd_calibrated
from jaxunlearn.models.features import sscd

METRICS = ("sscd", "sscd_calibrated", "copy_sscd")
LEAST_HELD_OUT = 64
"""Held-out images whose injection can stand in for a retrained model."""


@dataclasses.dataclass(frozen=True)
class Detector:
    """The loaded network and what it says about the data.

    Attributes:
      embed: pictures uint8 [N,H,W,C] -> unit descriptors float32 [N, 512], on the host.
      record: what the report says about its weights.
      forget: descriptors of the forget images [F, 512].
      calibrated: 99th percentile of the cosine of held-out images to their nearest keep image, or None.
      why_not: why there is none.
    """

    embed: Callable[[np.ndarray], np.ndarray]
    record: Mapping[str, Any]
    forget: np.ndarray
    calibrated: float | None
    why_not: str | None


_detector: OncePerRun[Detector | tuple[str, str]] = OncePerRun()


def detector_of(context: Context) -> Detector | tuple[str, str]:
    """The run's detector, or the reason why there is none and its status."""
    return _detector(context.refs, lambda: _load(context))


def failed_entries(settings: Mapping[str, Any]) -> list[Entry]:
    """Every metric without a value, the similarities at every t."""
    times = [missing(name, "", status="failed", protocol={"t": t}) for name in METRICS[:2] for t in _times(settings)]
    return [*times, missing("copy_sscd", "", status="failed")]


def measure(column: Column, context: Context) -> None:
    """Similarity of injections to their forget image, and copies among the samples."""
    settings = context.settings
    detector = detector_of(context)
    if isinstance(detector, tuple):
        column.entries += _without(("sscd", "copy_sscd"), *detector, settings)
        return
    _similarities(column, context, detector)
    column.entries.append(_copies(column, context, detector))


def compare(columns: Mapping[str, Column], contexts: Mapping[str, Context], settings: Mapping[str, Any]) -> None:
    """``sscd_calibrated`` of the unlearned model: its similarity between those of a retrained model and of the original."""
    after = columns["after"]
    if any(item["metric"] == "sscd_calibrated" for item in after.entries):
        return  # the model is broken, and its entry says so
    if "after" not in contexts:
        after.entries += _without(("sscd_calibrated",), after.failed, "failed", settings)
        return
    detector = detector_of(contexts["after"])
    if isinstance(detector, tuple):
        after.entries += _without(("sscd_calibrated",), *detector, settings)
        return
    retrained = entries.references(columns)
    held_out = None if retrained or "before" not in contexts else _held_out(contexts["before"], detector)
    for place, t in enumerate(_times(settings)):
        protocol = {"t": t, **_protocol(settings), **detector.record, "interval": "none: a ratio of differences"}
        scores = {name: value(column.entries, "sscd", t=t) for name, column in columns.items()}
        found = [scores[name] for name in retrained if scores[name] is not None]
        if found:
            reference, protocol["level"] = (
                float(np.mean(found)),
                "a retrained model" if len(found) == 1 else f"mean over {len(found)} retrained models",
            )
        elif held_out is not None:
            reference, protocol["level"] = float(held_out[place]), "injections of held-out images into the original"
        else:
            reason = f"needs a retrained model or {LEAST_HELD_OUT} held-out images whose losses are measured"
            after.entries.append(missing("sscd_calibrated", reason, protocol=protocol))
            continue
        protocol |= {"reference_similarity": reference, "before_similarity": scores["before"]}
        if scores["before"] is None or scores["after"] is None:
            reason = "the similarity of the original or of the unlearned model has no value"
            after.entries.append(missing("sscd_calibrated", reason, status="failed", protocol=protocol))
            continue
        try:
            calibrated = sscd_calibrated(scores["after"], scores["before"], reference)
        except ValueError as error:
            after.entries.append(missing("sscd_calibrated", str(error), status="failed", protocol=protocol))
            continue
        fields = {"weights_sha256": detector.record["weights_sha256"]}
        n = len(contexts["after"].refs.injected)
        after.entries.append(entry("sscd_calibrated", calibrated, n=n, protocol=protocol, **fields))


def _similarities(column: Column, context: Context, detector: Detector) -> None:
    settings, chosen = context.settings, context.refs.injected
    if column.injections is None:
        reason = column.failed or "the injections hold NaN or infinity"
        column.entries += _without(("sscd",), reason, "failed", settings)
        return
    made = column.injections  # [F,T,K,H,W,C]
    if not settings["sscd"]["variants"]:
        column.injections = None  # they are large, and nobody else needs them
    cosine = np.empty(made.shape[:3])
    for place, one in enumerate(made):
        found = detector.embed(one.reshape(-1, *one.shape[2:])) @ detector.forget[chosen[place]]
        cosine[place] = found.reshape(made.shape[1:3])
        context.tick("SSCD of injections", (place + 1) / len(made))
    column.arrays["sscd"] = cosine
    for place, t in enumerate(_times(settings)):
        column.entries.append(injection_entry("sscd", cosine[:, place], t, detector, settings))


def injection_entry(
    metric: str, values: np.ndarray, t: int, detector: Detector, settings: Mapping[str, Any], **protocol: Any
) -> Entry:
    """The mean of values [F,K] of the injections at t, over copies and then over forget images."""
    single = len(values) == 1
    subjects = values[0] if single else values.mean(axis=1)
    interval = None
    if np.all(np.isfinite(subjects)):
        if len(subjects) < LEAST_BOOTSTRAP:
            interval = statistics.mean_interval(subjects, settings["confidence"])
        else:
            interval = statistics.bootstrap_interval(
                subjects, settings["confidence"], statistic=np.mean, seed=settings["seed"]
            )
    if interval is not None and single:
        interval = interval._replace(method=interval.method.replace("over subjects", "over copies of one image"))
    protocol = {"t": t, **_protocol(settings), **detector.record, "images": len(values), **protocol}
    protocol["interval_over"] = "copies of the one forget image" if single else "forget images"
    if len(subjects) > 1 and interval is not None:
        protocol["sd"] = float(subjects.std(ddof=1))
    fields = {"ci": interval, "weights_sha256": detector.record["weights_sha256"]}
    return entry(metric, subjects.mean(), n=len(subjects), protocol=protocol, **fields)


def _copies(column: Column, context: Context, detector: Detector) -> Entry:
    """Samples whose cosine to a forget image is above both thresholds."""
    settings = context.settings
    if column.samples is None:
        return missing("copy_sscd", column.failed or "the samples hold NaN or infinity", status="failed")
    nearest = (detector.embed(column.samples) @ detector.forget.T).max(axis=1)
    column.arrays["sscd_of_samples"] = nearest
    threshold = max(sscd.COPY_COSINE, detector.calibrated if detector.calibrated is not None else sscd.COPY_COSINE)
    counted = extraction.copy_rate(nearest > threshold, settings["confidence"])
    protocol = {
        **context.runner.protocol,
        "convention": settings["sscd"]["convention"],
        **detector.record,
        "count": counted.count,
        "upper_one_sided": counted.upper.high,
        "threshold": threshold,
        "threshold_of_data": detector.calibrated,
        "rule": f"cosine above {sscd.COPY_COSINE} and above the 99th percentile of held-out to nearest keep images",
        "highest_cosine": float(nearest.max()),
    }
    if detector.why_not is not None:
        protocol["threshold_of_data_missing"] = detector.why_not
    fields = {"ci": counted.ci, "weights_sha256": detector.record["weights_sha256"]}
    context.tick("SSCD of samples", 1.0)
    return entry("copy_sscd", counted.rate, n=len(nearest), protocol=protocol, **fields)


def _held_out(context: Context, detector: Detector) -> np.ndarray | None:
    """Mean similarity [T] of held-out images and what the model makes of them noised; None if they are too few."""
    inputs = context.refs.loss_inputs.get("held_out")
    if inputs is None or len(inputs.x) < LEAST_HELD_OUT:
        return None
    x, rows = inputs.x[:LEAST_HELD_OUT], inputs.rows[:LEAST_HELD_OUT]
    space = context.runner.space
    originals = detector.embed(to_uint8(space.decode(x)))
    denoised = context.runner.inject(
        context.params, x, rows, lambda share: context.tick("injection of held-out images", share)
    )
    cosine = np.empty(denoised.shape[:3])
    for place, one in enumerate(denoised):
        pictures = space.decode(one.reshape(-1, *one.shape[2:]))
        if not np.all(np.isfinite(pictures)):
            return None
        cosine[place] = (detector.embed(to_uint8(pictures)) @ originals[place]).reshape(one.shape[:2])
    return cosine.mean(axis=(0, 2))


def _load(context: Context) -> Detector | tuple[str, str]:
    """The detector, or the reason why there is none and its status."""
    settings, split = context.settings, context.split
    try:
        weights = weights_for(settings, "sscd")
        params = jax.device_put(sscd.from_flat(weights.tensors))
    except ValueError as error:
        return refusal(error)
    program, size = jax.jit(sscd.embed), settings["sscd"]["batch_size"]

    def embed(pictures: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(pictures), size):
            take = np.minimum(np.arange(start, start + size), len(pictures) - 1)
            parts.append(np.asarray(program(params, sscd_inputs(pictures[take], settings["sscd"]["convention"]))))
        return np.concatenate(parts)[: len(pictures)]

    calibrated, why_not = None, "no images were held out"
    if len(split.held_out):
        most = settings["sscd"]["calibration_images"]

        def descriptors(positions: np.ndarray) -> np.ndarray:
            chosen = some(positions, most, settings["seed"])
            parts = np.array_split(chosen, -(-len(chosen) // 256))  # pictures may be large
            return np.concatenate([embed(split.images[part]) for part in parts])

        keep, held_out = descriptors(split.keep), descriptors(split.held_out)
        calibrated, why_not = float(np.quantile((held_out @ keep.T).max(axis=1), 0.99)), None
    return Detector(embed, weights.record, embed(context.refs.forget), calibrated, why_not)


def _times(settings: Mapping[str, Any]) -> tuple[int, ...]:
    return settings["injection_t"]


def _protocol(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "convention": settings["sscd"]["convention"],
        "copies": settings["injection_copies"],
        "sampler": "ddpm, every step",
    }


def _without(names: tuple[str, ...], reason: str, status: str, settings: Mapping[str, Any]) -> list[Entry]:
    """Entries without a value, one for each t where the metric has one."""
    out = []
    for name in names:
        for details in [{}] if name == "copy_sscd" else [{"t": t} for t in _times(settings)]:
            out.append(missing(name, reason, status=status, protocol=details))
    return out
