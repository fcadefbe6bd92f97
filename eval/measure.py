"""Measures one column of the report: a model's samples, injections and losses, as entries and arrays for figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from eval import sample_metrics
from eval.prompts import Prompts
from eval.records import Entry, entry, missing
from eval.references import References
from eval.runner import Runner, Samples
from jaxunlearn.images import to_model, to_uint8
from jaxunlearn.metrics import injection, statistics
from jaxunlearn.types import PyTree

Tick = Callable[[str, float], None]
"""Called with the name of the stage and its finished share."""

LOSSES = {"forget": "loss_forget", "keep": "loss_keep", "held_out": "loss_held_out"}
INJECTIONS = ("injection_distance", "injection_similarity", "injection_copies")
CONDITION = "each image's caption, else unlearn.prompt, else the empty text; no guidance"
SHOWN_INJECTIONS = 8
THE_IMAGE, RECONSTRUCTION = "the forget image", "the autoencoder's reconstruction of it"
"""What injections are compared with."""


@dataclasses.dataclass
class Column:
    """One column: entries for the report, and arrays for its figures.

    Attributes:
      entries: records, in the order of the report.
      samples: uint8 [N,H,W,C], those in which copies are counted, or None.
      flags: bool [N], which samples are copies.
      keep_samples: uint8 [N,H,W,C], samples of the keep prompts, or None where ``samples`` serve for quality too.
      keep_flags: bool [N], which of them are copies.
      injected: uint8 [T,K,H,W,C], the first forget image's injections (at most 8 of each t), or None.
      arrays: name -> array (distances, losses).
      failed: why the column as a whole could not be measured, or None.
    """

    entries: list[Entry]
    samples: np.ndarray | None = None
    flags: np.ndarray | None = None
    keep_samples: np.ndarray | None = None
    keep_flags: np.ndarray | None = None
    injected: np.ndarray | None = None
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    failed: str | None = None


def measure(
    params: PyTree, runner: Runner, refs: References, prompts: Prompts | None, settings: Mapping[str, Any], tick: Tick
) -> Column:
    """All metrics of one model. Nothing is left out: what cannot be computed has an entry that says why.

    Args:
      params: parameters of the model.
      runner: its programs.
      refs: what all columns are measured against.
      prompts: the text of each sample; None for a model without text.
      settings: the evaluation's settings.
      tick: called with progress.
    """
    column = Column([])
    bad = sum(int(not np.all(np.isfinite(leaf))) for leaf in jax.tree.leaves(params))
    if bad:
        column.failed = f"{bad} of the model's {len(jax.tree.leaves(params))} parameter arrays hold NaN or infinity"
        column.entries = _all_failed(column.failed, settings)
        return column
    params = jax.device_put(params)
    _measure_samples(column, params, runner, refs, prompts, settings, tick)
    _measure_injection(column, params, runner, refs, settings, lambda share: tick("injection", share))
    _measure_losses(column, params, runner, refs, settings, lambda share: tick("loss", share))
    return column


def _measure_samples(column: Column, params, runner: Runner, refs: References, prompts, settings, tick: Tick) -> None:
    """Copies among the samples of the forget prompts, quality of those of the keep prompts; without text one set is both."""

    def draw(texts, stage: str) -> Samples:
        return runner.sample(params, refs.keep.shape[1:], texts, lambda share: tick(stage, share))

    two = prompts is not None and prompts.keep is not None
    first = draw(None if prompts is None else prompts.forget, "samples of the forget prompts" if two else "samples")
    second = draw(prompts.keep, "samples of the keep prompts") if two else first
    broken = first.broken + (second.broken if two else 0)
    if broken:
        column.failed = f"{broken} of {settings['num_samples'] * (2 if two else 1)} samples hold NaN or infinity"
        names = sample_metrics.FORGET_METRICS + sample_metrics.KEEP_METRICS
        column.entries = [missing(name, column.failed, status="failed") for name in names]
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


def _measure_injection(column: Column, params, runner: Runner, refs: References, settings, tick) -> None:
    """Injections in the model's space, compared as pictures: with the image and, for latents, with its reconstruction."""
    chosen, space = refs.injected, runner.space
    denoised = runner.inject(params, *refs.injection_inputs, tick)
    targets = {THE_IMAGE: (refs.forget[chosen], refs.calibration.threshold[chosen])}
    if refs.round_trip is not None:
        made = refs.round_trip
        targets[RECONSTRUCTION] = (made.images[chosen], made.calibration.threshold[chosen])
        column.arrays["injected_latents"] = denoised[0]
    distance = {name: np.empty(denoised.shape[:3]) for name in targets}
    similarity = {name: np.empty(denoised.shape[:3]) for name in targets}
    for place, one in enumerate(denoised):
        pictures = space.decode(one.reshape(-1, *one.shape[2:]))
        pictures = pictures.reshape(*one.shape[:2], *pictures.shape[1:])[None]
        for name, (images, _) in targets.items():
            a0 = np.asarray(to_model(images[place : place + 1]))
            distance[name][place] = injection.injection_distance(a0, pictures)[0]
            similarity[name][place] = injection.injection_similarity(a0, pictures)[0]
        if place == 0:
            if not space.latent:
                column.arrays["injected"] = pictures[0]
            if np.all(np.isfinite(pictures)):
                column.injected = to_uint8(pictures[0, :, :SHOWN_INJECTIONS])
    back = np.zeros(denoised.shape[:3], bool)
    for name, (_, threshold) in targets.items():
        back |= distance[name] < threshold[:, None, None]
        which = "injection_distance" if name == THE_IMAGE else "injection_distance_to_reconstruction"
        column.arrays[which] = distance[name]
    _injection_entries(column, distance, similarity, back, refs, settings)


def _injection_entries(column: Column, distance, similarity, back, refs: References, settings) -> None:
    single = back.shape[0] == 1
    common = {"copies": settings["injection_copies"], "images": back.shape[0], "sampler": "ddpm, every step"}
    common["interval_over"] = "copies of the one forget image" if single else "forget images"
    if refs.round_trip is not None:
        common["autoencoder_rms"] = float(refs.round_trip.rms[refs.injected].mean())
    for place, t in enumerate(settings["injection_t"]):
        details = {"t": t, **common}
        for target in distance:
            compared = {} if refs.round_trip is None else {"compared_with": target}
            for name, values in (
                ("injection_distance", distance[target]),
                ("injection_similarity", similarity[target]),
            ):
                subjects = values[0, place] if single else values[:, place].mean(axis=1)
                interval = None
                if np.all(np.isfinite(subjects)):
                    interval = _renamed(statistics.mean_interval(subjects, settings["confidence"]), single)
                protocol = {**details, **compared}
                column.entries.append(entry(name, subjects.mean(), n=len(subjects), ci=interval, protocol=protocol))
        # Copies of one image share it, so their flags are not independent trials: a rate without an interval.
        flags = back[:, place]
        share = flags.mean() if all(np.all(np.isfinite(values[:, place])) for values in distance.values()) else np.nan
        column.entries.append(
            entry("injection_copies", share, n=flags.size, protocol={**details, "count": int(flags.sum())})
        )


def _renamed(interval: statistics.Interval | None, single: bool) -> statistics.Interval | None:
    if interval is None or not single:
        return interval
    return interval._replace(method="Student t over copies of one image")


def _measure_losses(column: Column, params, runner: Runner, refs: References, settings, tick) -> None:
    sets, space = refs.loss_inputs, runner.space
    everything = np.concatenate([part.x for part in sets.values()])
    rows = np.concatenate([part.rows for part in sets.values()])
    cuts = np.cumsum([len(part.rows) for part in sets.values()])
    values = dict(zip(sets, np.split(runner.loss(params, everything, rows, tick), cuts)))
    column.arrays.update({LOSSES[name]: value for name, value in values.items()})
    common = {"noises": settings["loss_noises"], "error": "mean_squares", "noise": "common to all images and models"}
    if space.latent:
        common["space"] = "latents: means of the autoencoder's posterior times its scaling factor"
    if runner.takes_text:
        common["condition"] = CONDITION
    for name, metric in LOSSES.items():
        for place, t in enumerate(settings["loss_t"]):
            details = {**common, "t": t}
            if name not in values:
                reason = "no images were held out"
                column.entries.append(missing(metric, reason, protocol=details, unit=space.loss_unit))
                continue
            losses = values[name][:, place]
            interval = statistics.mean_interval(losses, settings["confidence"]) if np.all(np.isfinite(losses)) else None
            column.entries.append(
                entry(metric, losses.mean(), n=len(losses), ci=interval, protocol=details, unit=space.loss_unit)
            )
    for place, t in enumerate(settings["loss_t"]):
        details = {**common, "t": t}
        if "held_out" not in values:
            column.entries.append(missing("rank_p", "no images were held out", protocol=details))
            continue
        scores, others = values["forget"][:, place], values["held_out"][:, place]
        finite = np.all(np.isfinite(scores)) and np.all(np.isfinite(others))
        ranks = [statistics.rank_p(score, others) if finite else np.nan for score in scores]
        column.entries.append(entry("rank_p", np.mean(ranks), n=len(values["held_out"]), protocol=details))


def _all_failed(reason: str, settings: Mapping[str, Any]) -> list[Entry]:
    names = sample_metrics.FORGET_METRICS + sample_metrics.KEEP_METRICS
    out = [missing(name, reason, status="failed") for name in names]
    for metrics, key in ((INJECTIONS, "injection_t"), ((*LOSSES.values(), "rank_p"), "loss_t")):
        out += [missing(m, reason, status="failed", protocol={"t": t}) for m in metrics for t in settings[key]]
    return out
