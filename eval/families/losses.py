"""Denoising loss of forget, keep and held-out images at several t, the rank of a forget image, and the forget level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from eval.context import Column, Context
from eval.records import Entry, entry, missing
from jaxunlearn.metrics import statistics, verdicts
from jaxunlearn.metrics.entries import mean_value, references

METRICS = ("loss_forget", "loss_keep", "loss_held_out", "rank_p", "forget_level")
LOSSES = {"forget": "loss_forget", "keep": "loss_keep", "held_out": "loss_held_out"}
CONDITION = "each image's caption, else unlearn.prompt, else the empty text; no guidance"


def failed_entries(settings: Mapping[str, Any]) -> list[Entry]:
    """Every metric at every t without a value."""
    metrics, times = (*LOSSES.values(), "rank_p"), settings["loss_t"]
    return [missing(metric, "", status="failed", protocol={"t": t}) for metric in metrics for t in times]


def measure(column: Column, context: Context) -> None:
    """Losses with noises that all images and models share."""
    runner, refs, settings = context.runner, context.refs, context.settings
    sets, space = refs.loss_inputs, runner.space

    def tick(share: float) -> None:
        context.tick("loss", share)

    everything = np.concatenate([part.x for part in sets.values()])
    rows = np.concatenate([part.rows for part in sets.values()])
    cuts = np.cumsum([len(part.rows) for part in sets.values()])
    values = dict(zip(sets, np.split(runner.loss(context.params, everything, rows, tick), cuts)))
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


def compare(columns: Mapping[str, Column], contexts: Mapping[str, Context], settings: Mapping[str, Any]) -> None:
    """The forget level: where the unlearned model's loss lies between the original's and the retrained models'."""
    entries = {name: column.entries for name, column in columns.items()}
    protocol = {"t": list(settings["loss_t"]), "noises": settings["loss_noises"], "level": "mean over t and images"}
    names = references(entries)
    if not names:
        columns["after"].entries.append(missing("forget_level", verdicts.NO_REFERENCE, protocol=protocol))
        return
    protocol["retrained_models"] = len(names)
    level = verdicts.forget_level(entries)
    if level is not None:
        columns["after"].entries.append(entry("forget_level", level, n=len(settings["loss_t"]), protocol=protocol))
        return
    reason = "the retrained model's loss on the forget images does not differ from the original's"
    if any(mean_value(column, "loss_forget") is None for column in entries.values()):
        reason = "a loss on the forget images is not a finite number"
    columns["after"].entries.append(missing("forget_level", reason, status="failed", protocol=protocol))
