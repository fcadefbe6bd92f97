"""Samples: copies of the forget images among them, distances to the nearest images, and their quality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval import sample_metrics
from eval.context import Column, Context
from eval.records import Entry, missing
from eval.runner import Runner, Samples

GROUPS = {
    "Extraction: what samples show": (*sample_metrics.FORGET_METRICS, "nearest_keep_min", "nearest_keep_median"),
    "Quality of samples": ("fd_classifier", "fd_pixel", "inception_score"),
}
METRICS = sample_metrics.FORGET_METRICS + sample_metrics.KEEP_METRICS


def failed_entries(settings: Mapping[str, Any]) -> list[Entry]:
    """Every metric without a value."""
    return [missing(name, "", status="failed") for name in METRICS]


def measure(column: Column, context: Context) -> None:
    """Copies among the samples of the forget prompts, quality of those of the keep prompts; without text one set is both."""
    runner, refs, prompts, settings = context.runner, context.refs, context.prompts, context.settings

    def draw(texts, stage: str) -> Samples:
        return runner.sample(context.params, refs.keep.shape[1:], texts, lambda share: context.tick(stage, share))

    two = prompts is not None and prompts.keep is not None
    first = draw(None if prompts is None else prompts.forget, "samples of the forget prompts" if two else "samples")
    second = draw(prompts.keep, "samples of the keep prompts") if two else first
    broken = first.broken + (second.broken if two else 0)
    if broken:
        column.failed = f"{broken} of {settings['num_samples'] * (2 if two else 1)} samples hold NaN or infinity"
        column.entries += [missing(name, column.failed, status="failed") for name in METRICS]
        return
    forget_protocol = keep_protocol = runner.protocol
    if prompts is not None:
        forget_protocol = _protocol(runner, prompts.forget, "forget" if two else "forget and keep", settings)
        keep_protocol = _protocol(runner, prompts.keep, "keep", settings) if two else forget_protocol

    found = sample_metrics.find_copies(first.images, refs)
    column.samples, column.flags = first.images, found.flags
    column.arrays["nearest_forget"] = found.nearest_forget
    column.entries += sample_metrics.copy_entries(found, refs, settings, forget_protocol)
    flags = found.flags
    if two:
        other = sample_metrics.find_copies(second.images, refs)
        column.keep_samples, column.keep_flags, flags = second.images, other.flags, other.flags
        column.entries += sample_metrics.copy_entries(other, refs, settings, keep_protocol)
    nearest = column.arrays["nearest_keep"] = sample_metrics.nearest_keep(second.images, refs)
    column.entries += sample_metrics.distance_entries("nearest_forget", found.nearest_forget, settings, forget_protocol)
    column.entries += sample_metrics.distance_entries("nearest_keep", nearest, settings, keep_protocol)
    column.entries += sample_metrics.quality_entries(second.images, flags, refs, settings, keep_protocol)


def _protocol(runner: Runner, texts: tuple[str, ...], which: str, settings) -> dict[str, Any]:
    more = {"guidance": settings["guidance"], "prompts": which, "prompt_count": len(set(texts))}
    return {**runner.protocol, **more}
