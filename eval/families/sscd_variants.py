"""Variants of the SSCD similarity of injected forget images. They are reconstructions, so they are off by default.

They compare each model's injections with those of the original model, which start from the same noises. The plain
similarity, ``sscd``, is the published number and stands in the protocol of each entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from eval.context import Column, Context
from eval.families.copy_detector import Detector, detector_of, injection_entry
from eval.once import OncePerRun
from eval.records import Entry, missing, value
from jaxunlearn.metrics import sscd_variants

PROJECTED, RATE, DIRECTION = METRICS = ("sscd_projected", "sscd_dissimilarity_rate", "sscd_direction")
THE_ORIGINAL = "it is the original model, with which the others are compared"
NO_ORIGINAL = "the original model has no injections to compare with"
NO_RADIUS = "the original model gives back the forget images themselves, so that there is no radius"

_original: OncePerRun[np.ndarray | None] = OncePerRun()


def failed_entries(settings: Mapping[str, Any]) -> list[Entry]:
    """Every metric at every t without a value."""
    return _without(METRICS, "", "failed", settings)


def measure(column: Column, context: Context) -> None:
    """The variants of each injection, mean over copies and then over forget images."""
    settings, made = context.settings, column.injections
    column.injections = None  # they are large
    first = context.name == "before"
    original = _original(context.refs, lambda: made if first else None)
    detector = detector_of(context)
    if isinstance(detector, tuple):
        column.entries += _without(METRICS, *detector, settings)
        return
    if made is None:
        reason = column.failed or "the injections hold NaN or infinity"
        column.entries += _without(METRICS, reason, "failed", settings)
        return
    if original is None:
        column.entries += _without(METRICS, NO_ORIGINAL, "failed", settings)
        return
    forget = context.refs.forget[context.refs.injected]
    radii = [sscd_variants.median_radius(*_pairs(forget, original[:, place])) for place in range(made.shape[1])]
    values = {name: np.empty(made.shape[:3]) for name in METRICS}
    for place in range(len(made)):
        for name, found in _of_image(detector, forget[place], original[place], made[place], radii).items():
            values[name][place] = found
        context.tick("variants of SSCD", (place + 1) / len(made))
    for name in METRICS:
        column.arrays[name] = values[name]
        for place, (t, radius) in enumerate(zip(settings["injection_t"], radii)):
            more = {"plain_similarity": value(column.entries, "sscd", t=t), "published": "no, a reconstruction"}
            if name == PROJECTED:
                more["radius"] = f"{radius:.4g}, the median distance of the original model's outputs at this t"
            reason = {DIRECTION: THE_ORIGINAL if first else None, PROJECTED: None if radius else NO_RADIUS}.get(name)
            if reason is not None:
                column.entries.append(missing(name, reason, protocol={"t": t, **more}))
                continue
            column.entries.append(injection_entry(name, values[name][:, place], t, detector, settings, **more))


def _of_image(
    detector: Detector, forget: np.ndarray, original: np.ndarray, made: np.ndarray, radii: list[float]
) -> dict[str, np.ndarray]:
    """The variants [T,K] of the injections [T,K,H,W,C] of one image [H,W,C]; without a radius the first says nothing."""
    times, copies = made.shape[:2]
    before, after = (_unit(x.reshape(-1, *x.shape[2:])) for x in (original, made))
    image = np.broadcast_to(_unit(forget), after.shape)
    embed, radius = _embed(detector), np.repeat([r or 1.0 for r in radii], copies).astype(np.float32)
    found = {
        PROJECTED: sscd_variants.sscd_projected(embed, image, after, radius),
        RATE: sscd_variants.sscd_dissimilarity_rate(embed, image, after),
        DIRECTION: sscd_variants.sscd_direction(embed, image, before, after),
    }
    return {name: np.asarray(x, np.float64).reshape(times, copies) for name, x in found.items()}


def _embed(detector: Detector) -> Callable[[np.ndarray], np.ndarray]:
    """The network on images in [0, 1], which it sees with 8 bits; the same pictures are looked at once."""
    known: dict[bytes, np.ndarray] = {}

    def embed(images) -> np.ndarray:
        pictures = np.round(np.asarray(images) * 255).astype(np.uint8)
        key = pictures.tobytes()
        if key not in known:
            same = np.array_equal(pictures, np.broadcast_to(pictures[:1], pictures.shape))
            found = detector.embed(pictures[:1] if same else pictures)
            known[key] = np.broadcast_to(found, (len(pictures), found.shape[1]))
        return known[key]

    return embed


def _unit(pictures: np.ndarray) -> np.ndarray:
    return pictures.astype(np.float32) / 255


def _pairs(forget: np.ndarray, made: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images [F,H,W,C] and what became of them [F,K,H,W,C], as pairs of [F * K,H,W,C]."""
    return _unit(np.repeat(forget, made.shape[1], axis=0)), _unit(made.reshape(-1, *made.shape[2:]))


def _without(names: tuple[str, ...], reason: str, status: str, settings: Mapping[str, Any]) -> list[Entry]:
    times = settings["injection_t"]
    return [missing(name, reason, status=status, protocol={"t": t}) for name in names for t in times]
