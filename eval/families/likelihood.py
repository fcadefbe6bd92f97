"""Negative log-likelihood of forget and held-out images by the probability-flow ODE, with the same probes for all models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from eval.context import Column, Context
from eval.families.losses import CONDITION
from eval.once import OncePerRun
from eval.records import Entry, entry, missing
from jaxunlearn.images import to_uint8
from jaxunlearn.metrics import nll, statistics

PIXELS = {"forget": "nll_bpd_uniform_deq", "held_out": "nll_held_out"}
LATENTS = {"forget": "nll_latent", "held_out": "nll_held_out"}
METRICS = ("nll_bpd_uniform_deq", "nll_latent", "nll_held_out")
BATCH = 32
"""Rows that are solved together: as many steps as the slowest of them needs."""

_solver: OncePerRun[nll.Solver] = OncePerRun()


def failed_entries(settings: Mapping[str, Any]) -> list[Entry]:
    """Every metric without a value."""
    return [missing(name, "", status="failed") for name in PIXELS.values()]


def measure(column: Column, context: Context) -> None:
    """NLL of every chosen image, mean over its dequantisations."""
    options, space = context.settings["nll"], context.runner.space
    names = LATENTS if space.latent else PIXELS
    size = int(np.prod(context.refs.loss_inputs["forget"].x.shape[1:]))
    exact = options["exact"] and size <= nll.EXACT_LIMIT
    probes = options["probes"] or nll.default_probes(size)
    common = {
        "tolerance": options["tolerance"],
        "max_steps": options["max_steps"],
        "divergence": "exact" if exact else f"{probes} Rademacher probes, the same for all models",
        "solver": "Dopri5 on the probability-flow ODE, floating t",
        "prior": "standard normal",
        "density_at": "the first noise level of the schedule",
    }
    if context.runner.takes_text:
        common["condition"] = CONDITION

    def make() -> nll.Solver:
        predict, schedule = context.model.predict_forward_mode, context.runner.schedule
        given = {"tolerance": options["tolerance"], "max_steps": options["max_steps"]}
        return nll.make_solver(predict, schedule, probes=probes, exact=exact, **given)

    solve = _solver(context.runner, make)
    parts = {name: _chosen(context, name, options) for name in names if name in context.refs.loss_inputs}
    draws = {"forget": 1 if space.latent else options["draws"], "held_out": 1}
    calls, done = sum(-(-len(x) * draws[name] // BATCH) for name, (x, _) in parts.items()), 0

    def each() -> None:
        nonlocal done
        done += 1
        context.tick("likelihood", done / calls)

    for place, (name, metric) in enumerate(names.items()):
        if name not in parts:
            column.entries.append(missing(metric, "no images were held out", protocol=common))
            continue
        x, rows = parts[name]
        key = jax.random.fold_in(context.key, place)
        given = {
            "batch_size": min(BATCH, len(x) * draws[name]),
            "each": each,
            "cond": context.runner.conditions.at(rows),
        }
        if space.latent:
            found = nll.nll_latent(solve, context.params, x, key, **given)
        else:
            found = nll.nll_bpd_uniform_deq(solve, context.params, to_uint8(x), key, draws=draws[name], **given)
        column.arrays[metric] = found.values
        details = {**common, "draws": draws[name], "steps_mean": float(found.steps.mean())}
        column.entries.append(_entry(metric, found, details, context))


def _chosen(context: Context, name: str, options: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The first images of a set of the losses, which are the same in all columns, and their conditions."""
    part, most = context.refs.loss_inputs[name], options["images"] if name == "forget" else options["held_out"]
    return part.x[:most], part.rows[:most]


def _entry(metric: str, found: nll.Nll, protocol: dict[str, Any], context: Context) -> Entry:
    space = context.runner.space
    unit = "nats per latent number" if space.latent else None
    if found.failed:
        reason = f"{found.failed} of {found.values.size} solutions needed more than the allowed steps or are not finite"
        return missing(metric, reason, status="failed", protocol=protocol, unit=unit)
    level, images = context.settings["confidence"], len(found.values)
    interval = statistics.mean_interval(found.per_image if images > 1 else found.values[0], level)
    if interval is not None and images == 1:
        interval = interval._replace(method="Student t over dequantisations of one image")
    return entry(metric, found.values.mean(), n=images, ci=interval, protocol=protocol, unit=unit)
