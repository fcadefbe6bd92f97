"""The evaluation of a work directory: data, then one column per model, then verdicts. Returns the report as a dict."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import jax
import numpy as np

import jaxunlearn
from eval import verdicts
from eval.inputs import Inputs
from eval.measure import Column, classifier_record, measure
from eval.records import entry, missing
from eval.references import References, prepare
from eval.runner import Runner
from eval.wording import headline, limitations, not_tested
from jaxunlearn.io.hashing import tree_sha256
from jaxunlearn.io.manifest import commitment, load_or_create_key
from jaxunlearn.metrics import distances, statistics
from jaxunlearn.metrics.inception_score import inception_score

SCHEMA_VERSION = 1
FIXED_SENTENCE = "This is not a legal certificate; it does not prove the absence of influence."
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy")


def evaluate(inputs: Inputs, say: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, Column], References]:
    """Measures all models of a work directory.

    Args:
      inputs: the opened work directory.
      say: prints one line.

    Returns:
      The report (plain JSON values), the columns with their arrays, and the references, for figures.

    Raises:
      ValueError: the data cannot be evaluated, for example because a forget image is also kept.
    """
    settings, timings, started = inputs.settings, {}, time.monotonic()
    say(
        f"data: {len(inputs.split.keep)} keep, {len(inputs.split.forget)} forget, "
        f"{len(inputs.split.held_out)} held-out images; columns: {', '.join(inputs.models)}"
    )
    refs = prepare(inputs.split, settings, say)
    timings["references"] = time.monotonic() - started

    columns, runner = {}, None
    for name, model in inputs.models.items():
        begin = time.monotonic()
        if runner is None or not runner.fits(model):
            runner = Runner(model, settings)
        columns[name] = measure(model.params, runner, refs, settings, _ticker(name, say))
        timings[name] = time.monotonic() - begin
        say(f"{name}: {columns[name].failed or _summary(columns[name])} ({timings[name]:.0f} s)")
    entries = {name: column.entries for name, column in columns.items()}
    entries["after"].append(_forget_level(entries, settings))
    failed = {name: column.failed for name, column in columns.items() if column.failed}
    judged = verdicts.judge(entries, failed, settings)
    timings["total"] = time.monotonic() - started
    report = _report(inputs, refs, entries, judged, timings)
    report["headline"] = headline(report)
    return report, columns, refs


def _ticker(column: str, say: Callable[[str], None]) -> Callable[[str, float], None]:
    """One line at the end of a stage, and one per 15 seconds within it."""
    last = [time.monotonic()]

    def tick(stage: str, share: float) -> None:
        if share >= 1.0 or time.monotonic() - last[0] > 15:
            say(f"{column}: {stage} {share:.0%}")
            last[0] = time.monotonic()

    return tick


def _summary(column: Column) -> str:
    return f"{int(column.flags.sum())} copies in {len(column.flags)} samples"


def _forget_level(entries, settings) -> dict[str, Any]:
    protocol = {"t": list(settings["loss_t"]), "noises": settings["loss_noises"], "level": "mean over t and images"}
    if "retrained" not in entries:
        return missing("forget_level", "no model was retrained without the forget set", protocol=protocol)
    level = verdicts.forget_level(entries, settings)
    if level is None:
        reason = "the retrained model's loss on the forget images does not differ from the original's"
        return missing("forget_level", reason, status="failed", protocol=protocol)
    return entry("forget_level", level, n=len(settings["loss_t"]), protocol=protocol)


def _control(refs: References, settings) -> list[dict[str, Any]]:
    """Held-out images, measured as if they were samples: what real data that was never trained on looks like."""
    names = ("nearest_keep_min", "nearest_keep_median", "inception_score")
    protocol, n = {"images": "held-out"}, len(refs.held_out)
    if n < 2:
        return [missing(name, "no images were held out", protocol=protocol) for name in names]
    nearest = distances.nearest(refs.held_out, refs.keep).distance
    interval = statistics.bootstrap_interval(nearest, settings["confidence"], seed=settings["seed"])
    out = [
        entry("nearest_keep_min", nearest.min(), n=n, protocol=protocol),
        entry("nearest_keep_median", np.median(nearest), n=n, ci=interval, protocol=protocol),
    ]
    if refs.classifier is None:
        return [*out, missing("inception_score", refs.no_classifier, protocol=protocol)]
    protocol = {**protocol, **classifier_record(refs)}
    if n < 20:
        return [*out, missing("inception_score", f"only {n} images were held out; the score needs 20")]
    score = inception_score(refs.classifier.apply(refs.held_out)[0], chunks=10, seed=settings["seed"])
    return [*out, entry("inception_score", score.mean, n=n, protocol={**protocol, "std_over_chunks": score.std})]


def _report(inputs: Inputs, refs: References, entries, judged, timings) -> dict[str, Any]:
    config, settings, split = inputs.config, inputs.settings, inputs.split
    models = {name: _model(inputs, name) for name in inputs.models}
    unlearn = config.get("unlearn") or {}
    calibration = refs.calibration
    return {
        "schema_version": SCHEMA_VERSION,
        "title": "Unlearning report (evidence)",
        "notice": FIXED_SENTENCE,
        "report_id": str(uuid.uuid4()),
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "tool": {
            "name": "jaxunlearn",
            "version": jaxunlearn.__version__,
            "packages": {name: _version(name) for name in PACKAGES},
            "python": platform.python_version(),
            "devices": ", ".join(sorted({f"{d.platform} {d.device_kind}" for d in jax.devices()})),
        },
        "config_sha256": canonical_sha256(config),
        "base_model": models["before"],
        "result_model": models["after"],
        "reference": {
            "kind": "retrained" if "retrained" in models else "none",
            "models": [models["retrained"]] if "retrained" in models else [],
        },
        "forget_set": {
            **commitment(split, load_or_create_key(inputs.workdir.root)),
            "unique": len(refs.forget),
            "share_of_training_set": len(split.forget) / (len(split.forget) + len(split.keep)),
        },
        "keep_set": {"n": len(split.keep), "source": split.source},
        "held_out_set": {"n": len(split.held_out)},
        "method": {"name": unlearn.get("method"), "config": unlearn, "seed": config.get("seed")},
        "calibration": {
            "rule": calibration.rule,
            "closest_other_image": [round(float(x), 6) for x in calibration.closest],
            "threshold": [round(float(x), 6) for x in calibration.threshold],
            "strict_threshold": [round(float(x), 6) for x in calibration.strict_threshold],
            "unit": "rms of [0, 1] pixels",
        },
        "settings": dict(settings),
        "evaluation": {
            "before": entries["before"],
            "after": entries["after"],
            "retrained": entries.get("retrained", []),
            "control": _control(refs, settings),
        },
        "verdicts": judged,
        "overall": verdicts.overall(judged),
        "not_tested": not_tested("retrained" in models),
        "limitations": limitations(len(refs.forget), settings, len(split.near_duplicates)),
        "timings_seconds": {name: round(seconds, 1) for name, seconds in timings.items()},
    }


def _model(inputs: Inputs, name: str) -> dict[str, Any]:
    model = inputs.models[name]
    inside = inputs.paths[name].is_relative_to(inputs.workdir.root)
    path = inputs.paths[name].relative_to(inputs.workdir.root) if inside else inputs.paths[name]
    return {
        "path": str(path),
        "format": "diffusers",
        "tree_sha256": tree_sha256(model.params),
        "params": model.num_params,
        "prediction_type": model.prediction_type,
        "train_timesteps": model.schedule.num_steps,
        "notes": list(model.notes),
    }


def canonical_sha256(value: Mapping[str, Any]) -> str:
    """SHA-256 of canonical JSON: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
