"""The inversion probe: how far around its own noise a forget image still comes back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eval.context import Column, Context
from eval.once import OncePerRun
from eval.records import Entry, entry, missing
from jaxunlearn.images import to_unit
from jaxunlearn.metrics import inversion, statistics

METRIC = "inversion_distance"
_probe: OncePerRun[inversion.Probe] = OncePerRun()


def failed_entries(settings: Mapping[str, Any]) -> list[Entry]:
    """The metric at every share without a value."""
    shares = settings["inversion"]["shares"]
    return [missing(METRIC, "", status="failed", protocol={"share": share}) for share in shares]


def measure(column: Column, context: Context) -> None:
    """rms distance between each forget image and what comes back, for each share of fresh noise."""
    settings, refs, runner = context.settings, context.refs, context.runner
    options, inputs = settings["inversion"], refs.injection_inputs

    def make() -> inversion.Probe:
        given = {"steps": options["steps"], "shares": options["shares"], "copies": options["copies"]}
        return jax.jit(inversion.make_inversion_probe(runner.predict, runner.schedule, **given))

    probe = _probe(runner, make)
    targets = refs.forget[refs.injected] / 255.0
    distance = np.empty((len(targets), len(options["shares"]), options["copies"]))
    for place in range(len(targets)):
        key = jax.random.fold_in(context.key, place)
        cond = runner.conditions.at(inputs.rows[place : place + 1])
        back = np.asarray(probe(context.params, jnp.asarray(inputs.x[place : place + 1]), key, cond))[0]
        pictures = runner.space.decode(back.reshape(-1, *back.shape[2:]))
        pictures = np.asarray(to_unit(pictures), np.float64).reshape(*back.shape[:2], *targets.shape[1:])
        distance[place] = np.sqrt(np.mean((pictures - targets[place]) ** 2, axis=(-3, -2, -1)))
        context.tick("inversion", (place + 1) / len(targets))
    column.arrays[METRIC] = distance
    common = {
        "sampler": "ddim, up and down, levels even in log_snr",
        "steps": options["steps"],
        "start": "its own noise, scaled to the length of fresh noise and mixed with it",
        "copies": options["copies"],
    }
    for place, share in enumerate(options["shares"]):
        single = len(targets) == 1
        subjects = distance[0, place] if single else distance[:, place].mean(axis=1)
        interval = None
        if np.all(np.isfinite(subjects)) and not (single and share == 0):
            interval = statistics.mean_interval(subjects, settings["confidence"])
            if interval is not None and single:
                interval = interval._replace(method="Student t over copies of one image")
        protocol = {**common, "share": share, "images": len(targets)}
        column.entries.append(entry(METRIC, subjects.mean(), n=len(subjects), ci=interval, protocol=protocol))
