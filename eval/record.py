"""Assembles the report: everything that was measured, by what, on what, and what was not, as plain JSON values."""

from __future__ import annotations

import collections
import importlib.metadata
import platform
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import jax

import jaxunlearn
from eval.context import Column
from eval.inputs import Inputs
from eval.model_record import model_record, reference_record, schedule_record
from eval.prompts import text_block, without_texts
from eval.records import Entry
from eval.references import References
from eval.run_record import git_revision, method_record, selection_record
from eval.wording import headline, limitations, not_tested
from jaxunlearn.io.diffusers import DiffusersModel
from jaxunlearn.io.lineage import lineage
from jaxunlearn.io.manifest import commitment, keep_manifest
from jaxunlearn.io.report import NOTICE, SCHEMA_VERSION, TITLE, canonical_sha256
from jaxunlearn.metrics.entries import find, references
from jaxunlearn.metrics.verdicts import NO_REFERENCE, THRESHOLDS, judge, overall

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy")


def record(
    inputs: Inputs,
    refs: References,
    columns: Mapping[str, Column],
    control: list[Entry],
    timings: Mapping[str, float],
    truncated: int,
) -> dict[str, Any]:
    """The report, but for the hashes of the files beside it.

    Args:
      inputs: the opened work directory.
      refs: what the columns were measured against.
      columns: column name -> what was measured.
      control: entries of real images that were never trained on.
      timings: part of the evaluation -> seconds.
      truncated: number of texts that the tokenizer cuts.
    """
    config, settings, split = inputs.config, inputs.settings, inputs.split
    key, hide = inputs.key, not settings["include_images"]
    entries = {name: column.entries for name, column in columns.items()}
    failed = {name: column.failed for name, column in columns.items() if column.failed}
    method = method_record(inputs, key if hide else None)
    judged = judge({**entries, "control": control}, failed, method["collapse"])
    first, prompts, kept = inputs.models["before"], inputs.prompts, keep_manifest(split)
    text = None
    if prompts is not None:
        text = text_block(prompts, settings, key, truncated, first.text_encoder.sha256)
    base, now = model_record(inputs, "before"), datetime.now(UTC).isoformat(timespec="seconds")
    request = settings["request"]
    report = {
        "schema_version": SCHEMA_VERSION,
        "title": TITLE,
        "notice": NOTICE,
        "report_id": str(uuid.uuid4()),
        "request_id": request["id"],
        "created_utc": now,
        "tool": {
            "name": "jaxunlearn",
            "version": jaxunlearn.__version__,
            "git": git_revision(inputs.workdir.root),
            "packages": {name: _version(name) for name in PACKAGES},
            "python": platform.python_version(),
            "devices": _devices(),
        },
        "request": {
            "received_utc": request["received_utc"],
            "completed_utc": now,
            "operator": request["operator"],
            "basis": request["basis"],
        },
        "config_sha256": canonical_sha256(config),
        "base_model": base,
        "result_model": model_record(inputs, "after"),
        "schedule": schedule_record(first),
        "lineage": lineage(inputs.workdir, config, base["path"]),
        "forget_set": {
            **commitment(split, key),
            "unique": len(refs.forget),
            "size": [int(n) for n in split.images.shape[1:]],
            "share_of_training_set": len(split.forget) / (len(split.forget) + len(split.keep)),
        },
        "keep_set": {
            "rule": kept["rule"],
            "n": kept["count"],
            "source": split.source,
            "hash_of_hashes": kept["hash_of_hashes"],
            "disjoint": kept["disjoint"],
            "access": "full",
        },
        "held_out_set": {"n": len(split.held_out), "hash_of_hashes": kept["held_out"]["hash_of_hashes"]},
        "method": method,
        "selection": selection_record(inputs.workdir.root),
        "reference": reference_record(inputs),
        "autoencoder": _autoencoder(first, refs),
        "text": text,
        "calibration": _calibration(refs),
        "settings": without_texts(settings, ("prompts",), key) if hide else dict(settings),
        "evaluation": {
            "preset": settings["preset"],
            "before": entries["before"],
            "after": entries["after"],
            "reference": [{"model": name, **item} for name in references(entries) for item in entries[name]],
            "control": control,
            "failed": failed,
        },
        "robustness": _robustness(entries),
        "thresholds": THRESHOLDS,
        "verdicts": judged,
        "overall": overall(judged, bool(references(entries))),
        "not_tested": not_tested(entries, text is not None, settings),
        "limitations": limitations(refs, settings, len(split.near_duplicates), text),
        "timings_seconds": {name: round(seconds, 1) for name, seconds in timings.items()},
        "files": {},
        "record_sha256": "",
        "signature": None,
    }
    report["headline"] = headline(report)
    return report


def _calibration(refs: References) -> dict[str, Any]:
    calibration = refs.calibration
    return {
        "rule": calibration.rule,
        "closest_other_image": [round(float(x), 6) for x in calibration.closest],
        "threshold": [round(float(x), 6) for x in calibration.threshold],
        "strict_threshold": [round(float(x), 6) for x in calibration.strict_threshold],
        "unit": "rms of [0, 1] pixels",
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


def _robustness(entries: Mapping[str, list[Entry]]) -> dict[str, Any]:
    """What happens when training goes on: on the forget images alone, and on the keep images alone."""
    absent = NO_REFERENCE if not references(entries) else "it is not part of these settings"
    found = {}
    for name, metrics in (("relearn", ("relearn_ratio",)), ("benign", ("relearn_benign", "benign_copy_rate"))):
        items = [item for metric in metrics if (item := find(entries["after"], metric)) is not None]
        if not items:
            found[name] = {"status": "not_run", "reason": absent}
            continue
        item = items[0]
        number = "ratio" if name == "relearn" else "value"
        found[name] = {number: item["value"], **item["protocol"], "status": item["status"], "reason": item["reason"]}
    return found


def _devices() -> str:
    """Kinds of devices with their numbers, such as "8 x NVIDIA H200"."""
    kinds = collections.Counter(device.device_kind for device in jax.devices())
    return ", ".join(f"{count} x {kind}" if count > 1 else kind for kind, count in sorted(kinds.items()))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
