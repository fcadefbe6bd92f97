"""The evaluation of a work directory: data, then one column per model, then verdicts. Returns the report as a dict."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import pathlib
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
from eval.measure import Column, measure
from eval.prompts import Conditions, image_texts, text_block, without_texts
from eval.records import entry, missing
from eval.references import Chosen, References, choose, prepare
from eval.runner import Runner
from eval.sample_metrics import classifier_record, nearest_keep
from eval.spaces import space_of
from eval.wording import headline, limitations, not_tested
from jaxunlearn.io.diffusers import DiffusersModel
from jaxunlearn.io.hashing import tree_sha256
from jaxunlearn.io.manifest import commitment, load_or_create_key
from jaxunlearn.metrics import statistics
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
    chosen = choose(inputs.split, settings)
    space = space_of(inputs.models["before"], inputs.companion_batch_size)
    conditions, truncated = _conditions(inputs, chosen, say)
    refs = prepare(inputs.split, chosen, inputs.config, settings, space, conditions, say)
    timings["references"] = time.monotonic() - started

    columns, runner = {}, None
    for name, model in inputs.models.items():
        begin = time.monotonic()
        if runner is None or not runner.fits(model):
            runner = Runner(model, settings, space, conditions)
        columns[name] = measure(model.params, runner, refs, inputs.prompts, settings, _ticker(name, say))
        timings[name] = time.monotonic() - begin
        say(f"{name}: {columns[name].failed or _summary(columns[name])} ({timings[name]:.0f} s)")
    entries = {name: column.entries for name, column in columns.items()}
    entries["after"].append(_forget_level(entries, settings))
    failed = {name: column.failed for name, column in columns.items() if column.failed}
    judged = verdicts.judge(entries, failed, settings)
    timings["total"] = time.monotonic() - started
    report = _report(inputs, refs, entries, judged, timings, truncated)
    report["headline"] = headline(report)
    return report, columns, refs


def _conditions(inputs: Inputs, chosen: Chosen, say: Callable[[str], None]) -> tuple[Conditions, int]:
    """The embedding of every text that is asked for, and how many of the texts are longer than the model takes."""
    model, split = inputs.models["before"], inputs.split
    if inputs.prompts is None:
        if split.captions is not None:
            say("captions: not used, the models take no text")
        return Conditions(), 0
    texts = ("", *inputs.prompts.texts, *image_texts(inputs.config, split, chosen.positions))
    texts = tuple(dict.fromkeys(texts))
    truncated = sum(model.tokenizer.truncated(texts))
    return Conditions(texts, model.text(inputs.companion_batch_size).embed(texts)), truncated


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
        if any(verdicts.mean_loss(column, "loss_forget", settings) is None for column in entries.values()):
            reason = "a loss on the forget images is not a finite number"
        return missing("forget_level", reason, status="failed", protocol=protocol)
    return entry("forget_level", level, n=len(settings["loss_t"]), protocol=protocol)


def _control(refs: References, settings) -> list[dict[str, Any]]:
    """Held-out images, measured as if they were samples: what real data that was never trained on looks like."""
    names = ("nearest_keep_min", "nearest_keep_median", "inception_score")
    protocol, n = {"images": "held-out"}, len(refs.held_out)
    if n < 2:
        return [missing(name, "no images were held out", protocol=protocol) for name in names]
    nearest = nearest_keep(refs.held_out, refs)
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


def _report(inputs: Inputs, refs: References, entries, judged, timings, truncated: int) -> dict[str, Any]:
    config, settings, split = inputs.config, inputs.settings, inputs.split
    models = {name: _model(inputs, name) for name in inputs.models}
    unlearn, key = config.get("unlearn") or {}, load_or_create_key(inputs.workdir.root)
    hide = not settings["include_images"]
    first, prompts = inputs.models["before"], inputs.prompts
    text = None
    if prompts is not None:
        text = text_block(prompts, settings, key, truncated, first.text_encoder.sha256)
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
            **commitment(split, key),
            "unique": len(refs.forget),
            "share_of_training_set": len(split.forget) / (len(split.forget) + len(split.keep)),
        },
        "keep_set": {"n": len(split.keep), "source": split.source},
        "held_out_set": {"n": len(split.held_out)},
        "method": {
            "name": unlearn.get("method"),
            "config": without_texts(unlearn, ("prompt",), key) if hide else unlearn,
            "seed": config.get("seed"),
        },
        "autoencoder": _autoencoder(first, refs),
        "text": text,
        "calibration": {
            "rule": calibration.rule,
            "closest_other_image": [round(float(x), 6) for x in calibration.closest],
            "threshold": [round(float(x), 6) for x in calibration.threshold],
            "strict_threshold": [round(float(x), 6) for x in calibration.strict_threshold],
            "unit": "rms of [0, 1] pixels",
        },
        "settings": without_texts(settings, ("prompts",), key) if hide else dict(settings),
        "evaluation": {
            "before": entries["before"],
            "after": entries["after"],
            "retrained": entries.get("retrained", []),
            "control": _control(refs, settings),
        },
        "verdicts": judged,
        "overall": verdicts.overall(judged),
        "not_tested": not_tested("retrained" in models, text is not None),
        "limitations": limitations(refs, settings, len(split.near_duplicates), text),
        "timings_seconds": {name: round(seconds, 1) for name, seconds in timings.items()},
    }


def _autoencoder(model: DiffusersModel, refs: References) -> dict[str, Any] | None:
    """What stands between a latent model and its pictures; None for a model of pixels."""
    if refs.round_trip is None:
        return None
    rms = refs.round_trip.rms
    return {
        "sha256": model.vae.sha256,
        "scaling_factor": model.vae.config.scaling_factor,
        "latent_shape": list(refs.injection_inputs.x.shape[1:]),
        "rms_forget_images": [round(float(x), 6) for x in rms],
        "rms_mean": float(rms.mean()),
        "rms_max": float(rms.max()),
        "beyond_threshold": refs.beyond_reach,
        "reconstruction_threshold": [round(float(x), 6) for x in refs.round_trip.calibration.threshold],
        "unit": "rms of [0, 1] pixels",
    }


def _model(inputs: Inputs, name: str) -> dict[str, Any]:
    model = inputs.models[name]
    path = inputs.paths[name]
    if isinstance(path, pathlib.Path) and path.is_relative_to(inputs.workdir.root):
        path = path.relative_to(inputs.workdir.root)
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
