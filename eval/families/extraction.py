"""Further detectors of copies among the samples: each is blind where another sees.

They judge the samples of the forget prompts, which the family of samples has drawn. The plain detector, an rms distance,
is ``copy_rate``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from eval.context import Column, Context
from eval.parts import in_parts
from eval.records import Entry, entry, missing
from eval.runner import Runner
from jaxunlearn.images import to_uint8
from jaxunlearn.metrics import COPY_DETECTORS, distances, extraction
from jaxunlearn.metrics import copy_detectors as detectors

METRICS = tuple(f"copy_{name}" for name in COPY_DETECTORS)
SSIM_NEIGHBOURS = 256  # other images, nearest in rms, that calibrate the threshold of a forget image
LATENT_NEIGHBOURS = 16  # the same for latent models, where they go through the autoencoder


class _Thresholds(NamedTuple):
    patch: np.ndarray
    ssim: np.ndarray


_THRESHOLDS: weakref.WeakKeyDictionary[Runner, _Thresholds] = weakref.WeakKeyDictionary()


def failed_entries(settings: Mapping[str, Any]) -> list[Entry]:
    """Every metric without a value."""
    return [
        missing(f"copy_{name}", "", status="failed") for name in settings["extraction"]["detectors"] or COPY_DETECTORS
    ]


def measure(column: Column, context: Context) -> None:
    """Counts what each detector flags."""
    chosen = context.settings["extraction"]["detectors"]
    if column.samples is None:
        column.entries += [missing(f"copy_{name}", column.failed, status="failed") for name in chosen]
        return
    refs = context.refs
    latent = refs.round_trip is not None
    forget = refs.round_trip.images if latent else refs.forget
    to_forget = in_parts(lambda part: distances.pairwise(part, forget), column.samples)
    work = _Work(context, column.samples, forget, to_forget, {})
    common = {
        **context.runner.protocol,
        "copy_of": "what the autoencoder makes of a forget image" if latent else "a forget image",
    }
    if context.prompts is not None:
        which = "forget" if context.prompts.keep is not None else "forget and keep"
        common |= {"guidance": context.settings["guidance"], "prompts": which}
    for number, name in enumerate(chosen):
        context.tick(f"copies: {name}", number / len(chosen))
        values, limit, details = _DETECTORS[name](work)
        column.arrays[f"copy_{name}"] = values
        column.entries.append(_entry(f"copy_{name}", values, limit, {**common, **details}, context.settings))
    context.tick("copies", 1.0)


def _entry(name: str, values: np.ndarray, limit: float, protocol: dict[str, Any], settings) -> Entry:
    """The share of samples whose value [N] lies below the limit."""
    found = extraction.copy_rate(values < limit, settings["confidence"])
    protocol |= {
        "count": found.count,
        "upper_one_sided": found.upper.high,
        "threshold": limit,
        "min": float(values.min()),
    }
    return entry(name, found.rate, n=found.n, ci=found.ci, protocol=protocol)


class _Work(NamedTuple):
    context: Context
    samples: np.ndarray
    forget: np.ndarray
    to_forget: np.ndarray
    done: dict[str, np.ndarray]

    def neighbours(self) -> np.ndarray:
        """rms distances to the nearest keep images, [N, at most 50]; searched once."""
        if not self.done:
            keep, count = self.context.refs.keep, detectors.CARLINI_NEIGHBOURS
            self.done["near"] = in_parts(lambda part: distances.k_nearest(part, keep, count), self.samples)
        return self.done["near"]

    def thresholds(self) -> _Thresholds:
        """Distances of the nearest other image to each forget image, by the detectors that have no threshold of their own."""
        runner = self.context.runner
        if runner not in _THRESHOLDS:
            _THRESHOLDS[runner] = _calibrate(self.context, self.forget)
        return _THRESHOLDS[runner]


def _calibrate(context: Context, forget: np.ndarray) -> _Thresholds:
    """Over keep and held-out images but for near-duplicates; for latent models the nearest also after the autoencoder."""
    split, space = context.split, context.runner.space
    others = np.setdiff1d(np.concatenate([split.keep, split.held_out]), split.near_duplicates.index)
    others = split.images[others]
    patch = in_parts(lambda part: detectors.tile_distance(part, forget), others).min(axis=0)
    rms = in_parts(lambda part: distances.pairwise(part, forget), others)
    near = np.argsort(rms, axis=0)[: LATENT_NEIGHBOURS if space.latent else SSIM_NEIGHBOURS].T
    sets = [others]
    if space.latent:
        rows = np.unique(near)
        made = to_uint8(space.decode(space.encode(others[rows])))
        patch = np.minimum(patch, detectors.tile_distance(made, forget).min(axis=0))
        sets.append(dict(zip(rows.tolist(), made)))
    ssim = np.full(len(forget), np.inf)
    for images in sets:
        for place, (rows, one) in enumerate(zip(near, forget)):
            some = np.stack([images[row] for row in rows.tolist()])
            found = detectors.ssim_distance(some, np.repeat(one[None], len(some), axis=0), chunk=len(some))
            ssim[place] = min(ssim[place], found.min())
    return _Thresholds(patch, ssim)


def _carlini(work: _Work) -> tuple[np.ndarray, float, dict[str, Any]]:
    near = work.neighbours()
    values = detectors.carlini_ratio(work.to_forget, near).min(axis=1)
    rule = f"rms distance below {detectors.CARLINI_SCALE:g} x its mean over the nearest training images"
    return values, 1.0, {"rule": rule, "neighbours": near.shape[1], "scale": detectors.CARLINI_SCALE}


def _ratio(work: _Work) -> tuple[np.ndarray, float, dict[str, Any]]:
    values = detectors.neighbour_ratio(work.to_forget, work.neighbours()[:, 0])
    return values, detectors.RATIO_THRESHOLD, {"rule": "rms distance below 1/3 of that to the nearest keep image"}


def _patch(work: _Work) -> tuple[np.ndarray, float, dict[str, Any]]:
    limit = work.thresholds().patch
    distance = in_parts(lambda part: detectors.tile_distance(part, work.forget), work.samples)
    rule = f"largest rms distance of {detectors.TILES} x {detectors.TILES} tiles, over that of the nearest other image"
    return _relative(distance, limit).min(axis=1), extraction.COPY_FRACTION, {"rule": rule}


def _ssim(work: _Work) -> tuple[np.ndarray, float, dict[str, Any]]:
    """Each sample against the forget image that is nearest in rms."""
    limit, place = work.thresholds().ssim, work.to_forget.argmin(axis=1)
    distance = detectors.ssim_distance(work.samples, work.forget[place])
    rule = "1 - SSIM, over that of the most similar of the nearest other images"
    return (
        _relative(distance, limit[place]),
        extraction.COPY_FRACTION,
        {"rule": rule, "neighbours": LATENT_NEIGHBOURS if work.context.runner.space.latent else SSIM_NEIGHBOURS},
    )


def _relative(distance: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Distances in units of that of the nearest other image; infinite where another image is equal to a forget image."""
    return np.where(limit > 0, distance / np.where(limit > 0, limit, 1.0), np.inf)


_DETECTORS: dict[str, Callable[[_Work], tuple[np.ndarray, float, dict[str, Any]]]] = {
    "carlini": _carlini,
    "ratio": _ratio,
    "patch": _patch,
    "ssim": _ssim,
}
