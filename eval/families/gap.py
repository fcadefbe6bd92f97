"""Distances between the models' scores, in nats: near the forget images, and at the models' own samples.

The yardstick is the distance between retrained models. With one of them there is no floor, without any nothing is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from eval.context import Column, Context
from eval.records import Entry, entry, missing
from jaxunlearn.metrics import entries, gap
from jaxunlearn.metrics.verdicts import NO_REFERENCE

NEAR, ELBO, SAMPLES = METRICS = ("gap_kl_forget", "elbo_gap", "gap_kl_samples")
NO_FLOOR = "one retrained model gives no floor: it needs two"
NO_OTHER = "it is the only retrained model"


def failed_entries(settings: Mapping[str, Any]) -> list[Entry]:
    """Every metric without a value."""
    return [missing(name, "", status="failed") for name in METRICS]


def compare(columns: Mapping[str, Column], contexts: Mapping[str, Context], settings: Mapping[str, Any]) -> None:
    """Gaps of every model to the retrained ones."""
    names = [name for name in columns if name in contexts]
    references = entries.references(names)
    for name, column in columns.items():
        if not references:
            column.entries += [missing(metric, NO_REFERENCE) for metric in METRICS]
        elif name not in contexts:
            column.entries += [missing(metric, column.failed, status="failed") for metric in METRICS]
    if not references:
        return
    different = [name for name in names if not contexts[name].runner.fits(contexts[references[0]].model)]
    for name in different:
        reason = "its architecture or noise schedule differs from that of the retrained models"
        columns[name].entries += [missing(metric, reason) for metric in METRICS]
    names = [name for name in names if name not in different]
    eps_rows = jax.jit(
        gap.make_eps_rows(contexts[references[0]].runner.predict, contexts[references[0]].runner.schedule)
    )
    _near(columns, contexts, names, references, eps_rows, settings)
    _at_samples(columns, contexts, names, references, eps_rows, settings)


def _measure(eps_rows, contexts, names: Sequence[str], x0, rows, stream: int, stage: str, settings) -> gap.Gaps:
    first, options = contexts[names[0]], settings["gap"]
    batch = min(settings["batch_size"], options["draws"])
    calls, done = options["replicates"] * -(-options["draws"] // batch), 0

    def each() -> None:
        nonlocal done
        done += 1
        first.tick(stage, done / calls)

    return gap.gaps(
        eps_rows,
        [contexts[name].params for name in names],
        x0,
        first.runner.schedule,
        jax.random.fold_in(first.key, stream),
        n=options["draws"],
        replicates=options["replicates"],
        batch_size=batch,
        cond=first.runner.conditions.at(rows),
        each=each,
    )


def _near(columns, contexts, names, references, eps_rows, settings) -> None:
    """At the forget images; all models see the same noised images."""
    part, most = contexts[names[0]].refs.loss_inputs["forget"], settings["gap"]["images"]
    x0, rows = part.x[:most], part.rows[:most]
    found = _measure(eps_rows, contexts, names, x0, rows, 0, "gap near the forget images", settings)
    places = [names.index(name) for name in references]
    protocol = {"at": "the forget images", "images": len(x0), "references": len(references)}
    floor = gap.floor(found, places) if len(places) > 1 else None
    pairs = [abs(found.elbo(i, j).mean()) for i in places for j in places if i < j]
    for place, name in enumerate(names):
        others = [r for r in places if r != place]
        if not others:
            columns[name].entries += [missing(metric, NO_OTHER) for metric in (NEAR, ELBO)]
            continue
        distance = gap.to_references(found, place, places)
        columns[name].entries.append(_entry(NEAR, distance, floor, protocol, settings))
        elbo = np.mean([found.elbo(place, r) for r in others], axis=0)
        own = {**protocol, "floor_is": "mean absolute value between retrained models" if pairs else NO_FLOOR}
        level = float(np.mean(pairs)) if pairs else None
        columns[name].entries.append(_entry(ELBO, elbo, None, own, settings, level=level))


def _at_samples(columns, contexts, names, references, eps_rows, settings) -> None:
    """At the samples of each model itself."""
    distances: dict[str, np.ndarray] = {}
    protocol = {"at": "the model's own samples", "direction": "model to retrained", "references": len(references)}
    for name in names:
        samples, others = columns[name].quality_samples, [r for r in references if r != name]
        if samples is None:
            columns[name].entries.append(missing(SAMPLES, "its samples are broken", status="failed"))
        elif not others:
            columns[name].entries.append(missing(SAMPLES, NO_OTHER))
        else:
            x0, rows = _samples(contexts[name], samples, settings)
            stage = f"gap at the samples of {name}"
            found = _measure(eps_rows, contexts, [name, *others], x0, rows, 1, stage, settings)
            distances[name] = gap.to_references(found, 0, range(1, 1 + len(others)))
            protocol["images"] = len(x0)
    floors = [distances[name] for name in references if name in distances]
    floor = np.mean(floors, axis=0) if len(floors) > 1 else None
    for name, distance in distances.items():
        columns[name].entries.append(_entry(SAMPLES, distance, floor, protocol, settings))


def _samples(context: Context, samples: np.ndarray, settings) -> tuple[np.ndarray, np.ndarray]:
    """At most as many samples as there are draws, in the model's space, and their conditions."""
    count = min(len(samples), settings["gap"]["draws"])
    texts, prompts = [""] * count, context.prompts
    if prompts is not None:
        texts = (prompts.forget if prompts.keep is None else prompts.keep)[:count]
    return context.runner.space.encode(samples[:count]), context.runner.conditions.rows(texts)


def _entry(
    metric: str, replicates: np.ndarray, floor: np.ndarray | None, protocol, settings, *, level: float | None = None
) -> Entry:
    """The entry of a distance; ``floor`` in replicates gives a ratio as well, ``level`` is a floor without them."""
    options, confidence = settings["gap"], settings["confidence"]
    found = gap.estimate(replicates, confidence)
    n = options["draws"] * options["replicates"]
    details = {
        **protocol,
        "draws": options["draws"],
        "replicates": options["replicates"],
        "standard_error": found.error,
    }
    if floor is None:
        details.setdefault("floor_is", NO_FLOOR)
        return entry(metric, found.value, n=n, ci=found.ci, protocol=details, floor=level)
    details["floor_is"] = "mean over ordered pairs of retrained models"
    if floor.mean() > 0:
        share = gap.ratio(replicates, floor, confidence)
        details |= {"ratio": share.value, "ratio_low": share.ci.low, "ratio_high": share.ci.high}
    return entry(metric, found.value, n=n, ci=found.ci, protocol=details, floor=float(floor.mean()))
