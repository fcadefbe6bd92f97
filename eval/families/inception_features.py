"""Quality on Inception features: FID, KID, precision, recall, density, coverage, and the score of its logits.

The network's weights are a file of the user. Without it every metric here is "not_run", and nothing else takes its name.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from eval.context import Column, Context
from eval.feature_entries import MANIFOLDS, kernel_entry, manifold_entries
from eval.feature_networks import refusal, weights_for
from eval.once import OncePerRun
from eval.records import Entry, entry, missing
from eval.references import reference_positions
from jaxunlearn.io.moments_cache import MomentsKey, data_sha256, load_moments, save_moments
from jaxunlearn.metrics.feature_moments import FeatureFn, FeatureStream
from jaxunlearn.metrics.frechet import Moments, frechet_distance, frechet_distance_rows
from jaxunlearn.metrics.inception_score import inception_score
from jaxunlearn.metrics.resize import CONVENTIONS, fid_inputs
from jaxunlearn.models.features import inception
from jaxunlearn.parallel import make_mesh
from jaxunlearn.types import PyTree

METRICS = ("fid", "kid", *MANIFOLDS, "inception_score_imagenet")
CHUNKS = 10


@dataclasses.dataclass(frozen=True)
class Network:
    """The loaded network and the features of the keep images.

    Attributes:
      params: its parameters.
      record: what the report says about its weights.
      moments: of the features of the keep images.
      rows: float32 [n, 2048], the first of these features.
    """

    params: PyTree
    record: Mapping[str, Any]
    moments: Moments
    rows: np.ndarray


_network: OncePerRun[Network | tuple[str, str]] = OncePerRun()


def failed_entries(settings: Mapping[str, Any]) -> list[Entry]:
    """Every metric without a value."""
    return [missing(name, "", status="failed") for name in METRICS]


def measure(column: Column, context: Context) -> None:
    """All metrics of the quality samples against keep images."""
    if column.quality_samples is None:
        column.entries += [missing(name, column.failed, status="failed") for name in METRICS]
        return
    network = _network(context.refs, lambda: _load(context))
    if isinstance(network, tuple):
        reason, status = network
        column.entries += [missing(name, reason, status=status) for name in METRICS]
        return
    settings, samples = context.settings, column.quality_samples
    try:
        stream = _stream(network.params, settings)
        _add(stream, samples, np.arange(len(samples)), lambda share: context.tick("Inception features", share))
        moments, rows = stream.moments(), stream.rows()
    except ValueError as error:
        column.entries += [missing(name, str(error), status="failed") for name in METRICS]
        return
    protocol = {**context.runner.protocol, **_protocol(settings), **network.record, "reference": "keep images"}
    fields = {"weights_sha256": network.record["weights_sha256"]}
    exact = len(samples) <= len(rows)
    distance = frechet_distance_rows(network.moments, rows) if exact else frechet_distance(network.moments, moments)
    key = f"fid@{len(samples)}, {settings['quality']['convention']}, {network.moments.n} keep images"
    details = {**protocol, "key": key, "reference_n": network.moments.n, "copies_of_forget_images": "left in"}
    column.entries.append(entry("fid", distance, n=len(samples), protocol=details, **fields))
    details = {**protocol, "copies_of_forget_images": "left in"}
    column.entries.append(kernel_entry("kid", network.rows, rows, settings, details, **fields))
    column.entries += manifold_entries("", network.rows, rows, details, **fields)
    others = rows[~column.quality_flags[: len(rows)]]
    column.entries.append(_score(others, network, settings, protocol, fields))


def _score(rows, network: Network, settings, protocol, fields) -> Entry:
    """Inception Score of the 1008 logits without their bias, which are linear in the features."""
    protocol = {**protocol, "chunks": CHUNKS, "copies_of_forget_images": "left out"}
    name = "inception_score_imagenet"
    if len(rows) < 2 * CHUNKS:
        return missing(
            name, f"only {len(rows)} samples are not copies; the score needs {2 * CHUNKS}", protocol=protocol
        )
    logits = rows.astype(np.float64) @ np.asarray(network.params["fc"]["kernel"], np.float64)
    score = inception_score(logits, chunks=CHUNKS, seed=settings["seed"])
    return entry(name, score.mean, n=score.n, protocol={**protocol, "std_over_chunks": score.std}, **fields)


def _load(context: Context) -> Network | tuple[str, str]:
    """The network with the features of the keep images, or the reason why there is none and its status."""
    settings = context.settings
    try:
        weights = weights_for(settings, "inception")
        params = jax.device_put(inception.from_flat(weights.tensors))
    except ValueError as error:
        return refusal(error)
    # In random order, because only the first rows are kept.
    images, positions = context.split.images, reference_positions(context.split, settings["seed"])
    positions = np.random.default_rng([settings["seed"], 3]).permutation(positions)
    key = MomentsKey(settings["quality"]["convention"], weights.sha256, data_sha256(images, positions))
    path = None if context.cache is None else context.cache / key.file_name
    stored, refused = _stored(path, key)
    stream = _stream(params, settings)
    # Moments are stored, rows are not: with stored moments only the rows that are asked for are computed.
    needed = positions if stored is None else positions[: settings["quality"]["rows"]]
    _add(stream, images, needed, lambda share: context.tick("Inception features of keep images", share))
    moments = stored or stream.moments()
    if stored is None and path is not None:
        save_moments(path, moments, key)
    record = weights.record if refused is None else {**weights.record, "stored_moments_refused": refused}
    return Network(params, record, moments, stream.rows())


def _stored(path: pathlib.Path | None, key: MomentsKey) -> tuple[Moments | None, str | None]:
    """Stored moments, or None and, where there is a file that is not they, why it is refused (it is written again)."""
    if path is None or not path.is_file():
        return None, None
    try:
        return load_moments(path, key), None
    except ValueError as error:
        return None, str(error).replace(f"{path.parent}{os.sep}", "")


@functools.lru_cache(maxsize=len(CONVENTIONS))
def _features(convention: str) -> FeatureFn:
    """The same function each time, so that all columns share one compiled program."""
    return lambda params, pictures: inception.outputs(params, fid_inputs(pictures, convention)).features


def _stream(params: PyTree, settings: Mapping[str, Any]) -> FeatureStream:
    devices = jax.local_devices()
    mesh = make_mesh(devices) if len(devices) > 1 else None
    options = settings["quality"]
    feature_fn = _features(options["convention"])
    return FeatureStream(feature_fn, params, options["batch_size"], mesh=mesh, keep_rows=options["rows"])


def _add(stream: FeatureStream, images, positions: np.ndarray, tick: Callable[[float], None]) -> None:
    size = max(1, min(1000, 2**28 // int(np.prod(images.shape[1:]))))
    for start in range(0, len(positions), size):
        stream.add(images[positions[start : start + size]])
        tick(min(1.0, (start + size) / len(positions)))


def _protocol(settings: Mapping[str, Any]) -> dict[str, Any]:
    name = settings["quality"]["convention"]
    return {"convention": name, "resize": CONVENTIONS[name].description, "dimensions": 2048}
