"""Denoising injection: forget images are noised to t and denoised. What is remembered comes back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from eval.context import Column, Context
from eval.records import Entry, entry, missing
from eval.references import References
from jaxunlearn.images import to_model, to_uint8
from jaxunlearn.metrics import injection, statistics

METRICS = ("injection_distance", "injection_similarity", "injection_copies")
SHOWN_INJECTIONS = 8
THE_IMAGE, RECONSTRUCTION = "the forget image", "the autoencoder's reconstruction of it"
"""What injections are compared with."""


def failed_entries(settings: Mapping[str, Any]) -> list[Entry]:
    """Every metric at every t without a value."""
    times = settings["injection_t"]
    return [missing(metric, "", status="failed", protocol={"t": t}) for metric in METRICS for t in times]


def measure(column: Column, context: Context) -> None:
    """Injections in the model's space, compared as pictures: with the image and, for latents, with its reconstruction."""
    runner, refs, settings = context.runner, context.refs, context.settings
    chosen, space = refs.injected, runner.space
    denoised = runner.inject(context.params, *refs.injection_inputs, lambda share: context.tick("injection", share))
    targets = {THE_IMAGE: (refs.forget[chosen], refs.calibration.threshold[chosen])}
    if refs.round_trip is not None:
        made = refs.round_trip
        targets[RECONSTRUCTION] = (made.images[chosen], made.calibration.threshold[chosen])
        column.arrays["injected_latents"] = denoised[0]
    distance = {name: np.empty(denoised.shape[:3]) for name in targets}
    similarity = {name: np.empty(denoised.shape[:3]) for name in targets}
    kept = [] if settings["sscd"]["enabled"] or settings["sscd"]["variants"] else None
    for place, one in enumerate(denoised):
        pictures = space.decode(one.reshape(-1, *one.shape[2:]))
        pictures = pictures.reshape(*one.shape[:2], *pictures.shape[1:])[None]
        for name, (images, _) in targets.items():
            a0 = np.asarray(to_model(images[place : place + 1]))
            distance[name][place] = injection.injection_distance(a0, pictures)[0]
            similarity[name][place] = injection.injection_similarity(a0, pictures)[0]
        if kept is not None:
            kept.append(to_uint8(pictures[0]) if np.all(np.isfinite(pictures)) else None)
        if place == 0:
            if not space.latent:
                column.arrays["injected"] = pictures[0]
            if np.all(np.isfinite(pictures)):
                column.injected = to_uint8(pictures[0, :, :SHOWN_INJECTIONS])
    if kept is not None and all(pictures is not None for pictures in kept):
        column.injections = np.stack(kept)
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
