"""How the samples look: CLIP-IQA and the aesthetic score, which need weights, and four measures that need none.

CLIP judges photographs: pictures below 64 pixels are refused unless ``photographs.force`` is set, and without its weights
its two metrics are "not_run". The four others stand beside their values on keep images, which are their yardstick.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from eval.context import Column, Context
from eval.feature_networks import refusal, weights_for
from eval.once import OncePerRun
from eval.records import Entry, entry, missing
from jaxunlearn.metrics import statistics
from jaxunlearn.metrics.aesthetic import aesthetic, clip_inputs
from jaxunlearn.metrics.clip_iqa import PROMPTS, clip_iqa, clip_iqa_inputs
from jaxunlearn.metrics.photographic import HIGH_BAND, MEASURES, too_small
from jaxunlearn.models.features import clip_resnet, clip_vit

NETWORKS = ("clip_iqa", "aesthetic")
METRICS = (*NETWORKS, *MEASURES)
GROUPS = {"Look of the samples": METRICS}

Score = Callable[[np.ndarray], np.ndarray]
"""uint8 [N,H,W,C] -> float64 [N]."""


class Judge(NamedTuple):
    """A loaded network.

    Attributes:
      score: of pictures.
      protocol: what the report says about it.
      weights_sha256: of its image tower.
    """

    score: Score
    protocol: Mapping[str, Any]
    weights_sha256: str


class Yardstick(NamedTuple):
    """What is the same for all columns.

    Attributes:
      judges: metric -> its network, or the entry's reason and status.
      keep: metric -> float64 [M], its values on keep images.
    """

    judges: Mapping[str, Judge | tuple[str, str]]
    keep: Mapping[str, np.ndarray]


_yardstick: OncePerRun[Yardstick] = OncePerRun()


def failed_entries(settings: Mapping[str, Any]) -> list[Entry]:
    """Every metric without a value."""
    return [missing(name, "", status="failed") for name in METRICS]


def measure(column: Column, context: Context) -> None:
    """All measures of the quality samples, at most ``photographs.samples`` of them."""
    if column.quality_samples is None:
        column.entries += [missing(name, column.failed, status="failed") for name in METRICS]
        return
    settings = context.settings
    samples = column.quality_samples[: settings["photographs"]["samples"]]
    yardstick = _yardstick(context.refs, lambda: _prepare(context))
    for name in METRICS:
        context.tick("look of the samples", METRICS.index(name) / len(METRICS))
        protocol, fields = {**context.runner.protocol, **_facts(name)}, {}
        if name in NETWORKS:
            judge = yardstick.judges[name]
            if not isinstance(judge, Judge):
                reason, status = judge
                column.entries.append(missing(name, reason, status=status))
                continue
            score, fields = judge.score, {"weights_sha256": judge.weights_sha256}
            protocol |= judge.protocol
        else:
            score = _measure_score(name, settings["photographs"]["batch_size"])
        values = column.arrays[name] = score(samples)
        keep = yardstick.keep[name]
        protocol |= {"keep_images": float(keep.mean()), "keep_n": len(keep)}
        finite = np.all(np.isfinite(values))
        interval = statistics.mean_interval(values, settings["confidence"]) if finite else None
        column.entries.append(entry(name, values.mean(), n=len(values), ci=interval, protocol=protocol, **fields))
    context.tick("look of the samples", 1.0)


def _facts(name: str) -> dict[str, Any]:
    if name == "clip_iqa":
        return {"prompts_of_clip": " / ".join(PROMPTS), "convention": "own size, no position embedding"}
    if name == "aesthetic":
        return {"convention": "short side to 224 pixels (PIL bicubic), centre"}
    return {"above": f"{HIGH_BAND:g} of the Nyquist frequency"} if name == "high_band_energy" else {}


def _prepare(context: Context) -> Yardstick:
    """Networks, and the values of at most ``photographs.keep_images`` keep images."""
    options, keep = context.settings["photographs"], context.refs.keep
    chosen = np.random.default_rng([context.settings["seed"], 5]).permutation(len(keep))[: options["keep_images"]]
    images = keep[np.sort(chosen)]
    small = None if options["force"] else too_small(*keep.shape[1:3])
    judges: dict[str, Judge | tuple[str, str]] = {}
    values = {name: _measure_score(name, options["batch_size"])(images) for name in MEASURES}
    for name, load in (("clip_iqa", _load_clip_iqa), ("aesthetic", _load_aesthetic)):
        if small is not None:
            judges[name] = f"{name} {small}", "not_run"
            continue
        try:
            judges[name] = load(context.settings)
            values[name] = judges[name].score(images)
        except ValueError as error:
            judges[name] = refusal(error)
    return Yardstick(judges, values)


def _load_clip_iqa(settings: Mapping[str, Any]) -> Judge:
    weights = weights_for(settings, "clip_rn50")
    tensors = dict(weights.tensors)
    prompts = jax.device_put(tensors.pop("prompts", np.zeros((0, 0), np.float32)))
    params = jax.device_put(clip_resnet.from_flat(tensors))
    run = jax.jit(lambda params, prompts, x: clip_iqa(clip_resnet.embed(params, x, position=False), prompts))

    def score(images):
        return np.asarray(run(params, prompts, clip_iqa_inputs(images)))

    return Judge(_in_batches(score, settings["photographs"]["batch_size"]), weights.record, weights.sha256)


def _load_aesthetic(settings: Mapping[str, Any]) -> Judge:
    head, tower = weights_for(settings, "aesthetic"), weights_for(settings, "clip_vit_l14")
    params = jax.device_put(clip_vit.from_flat(tower.tensors))
    if head.tensors.keys() != {"weight", "bias"}:
        raise ValueError(
            f"aesthetic.safetensors holds {', '.join(sorted(head.tensors))}, not weight and bias; convert again"
        )
    weight, bias = (jax.device_put(head.tensors[name]) for name in ("weight", "bias"))
    run = jax.jit(lambda params, x: aesthetic(clip_vit.embed(params, x), weight, bias))

    def score(images):
        return np.asarray(run(params, clip_inputs(images)))

    protocol = {**tower.record, **{f"head_{key}": value for key, value in head.record.items()}}
    return Judge(_in_batches(score, settings["photographs"]["batch_size"]), protocol, tower.sha256)


@functools.lru_cache(maxsize=32)
def _measure_score(name: str, batch_size: int) -> Score:
    run = jax.jit(MEASURES[name])
    return _in_batches(lambda images: np.asarray(run(images)), batch_size)


def _in_batches(score: Score, size: int) -> Score:
    """Scores pictures in batches of one size: the last one is filled up, so that the program compiles once."""

    def all_of(images: np.ndarray) -> np.ndarray:
        values = []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            fill = np.repeat(part[-1:], size - len(part), axis=0)
            values.append(score(np.concatenate([part, fill]))[: len(part)])
        return np.concatenate(values).astype(np.float64)

    return all_of
