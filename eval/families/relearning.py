"""How fast the forget images are learned again, and what training on keep images alone brings back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eval import sample_metrics
from eval.context import Column, Context
from eval.records import Entry, entry, missing
from eval.references import Encoded
from jaxunlearn.errors import mean_squares
from jaxunlearn.forgetting import make_probe_losses
from jaxunlearn.metrics import entries, extraction, relearning
from jaxunlearn.metrics.verdicts import NO_REFERENCE
from jaxunlearn.objectives.denoise import denoising_error
from jaxunlearn.types import Draw, Example

STEPS, RATIO = "relearn_steps", "relearn_ratio"
BENIGN = ("relearn_benign", "benign_copy_rate")
NO_BENIGN = "not part of these settings; eval.relearn.benign_steps switches it on"
STREAM_RELEARN, STREAM_PROBE, STREAM_BENIGN = range(3)


def failed_entries(settings: Mapping[str, Any]) -> list[Entry]:
    """Every metric without a value."""
    return [missing(name, "", status="failed") for name in (STEPS, RATIO, *BENIGN)]


class Trainer:
    """Training on given images with a fresh optimiser, and the probe loss on the forget images."""

    def __init__(self, context: Context, options: Mapping[str, Any]):
        """Args:
        context: of one of the models, which are all of one architecture.
        options: the settings ``eval.relearn``.
        """
        runner, schedule = context.runner, context.runner.schedule
        part = context.refs.loss_inputs["forget"]
        self.forget = Encoded(part.x[: options["images"]], part.rows[: options["images"]])
        self.keep = context.refs.loss_inputs["keep"]
        self._conditions, self._predict = runner.conditions, runner.predict
        self._tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(options["learning_rate"]))
        key = jax.random.fold_in(context.key, STREAM_PROBE)
        self._losses = make_probe_losses(runner.predict, schedule, key, count=16, noises=4)

        def step(state, key, x0, cond):
            which, times, noise = jax.random.split(key, 3)
            index = jax.random.randint(which, (options["batch_size"],), 0, len(x0))
            x0, cond = x0[index], jax.tree.map(lambda c: c[index], cond)
            t = jax.random.randint(times, index.shape, 0, schedule.num_steps)
            draw = Draw(t, jnp.ones(t.shape), jax.random.normal(noise, x0.shape), jnp.zeros(t.shape))

            def loss(params):
                errors = denoising_error(self._predict, params, Example(x0, cond), draw, schedule, mean_squares)
                return jnp.mean(errors)

            updates, optimiser = self._tx.update(jax.grad(loss)(state[0]), state[1], state[0])
            return optax.apply_updates(state[0], updates), optimiser

        self._step = jax.jit(step)

    def start(self, params) -> tuple:
        """The state of a model before the first step."""
        return params, self._tx.init(params)

    def on(self, images: Encoded) -> relearning.StepFn:
        """Steps on the given images."""
        x0, cond = jnp.asarray(images.x), self._conditions.at(images.rows)
        return lambda state, key: self._step(state, key, x0, cond)

    def probe(self, state) -> float:
        """Mean loss on the forget images, on fixed probes."""
        example = Example(jnp.asarray(self.forget.x), self._conditions.at(self.forget.rows))
        return float(self._losses(state[0], example).mean())


def compare(columns: Mapping[str, Column], contexts: Mapping[str, Context], settings: Mapping[str, Any]) -> None:
    """Relearning of the unlearned and the retrained models, and both after training on keep images."""
    options = settings["relearn"]
    references = entries.references(contexts)
    absent = [name for name in ("before", "after") if name not in contexts]
    if not references or absent:
        bad = "; ".join(f"{name}: {columns[name].failed}" for name in absent)
        for name, column in columns.items():
            names = (STEPS, RATIO, *BENIGN) if name == "after" else (STEPS,)
            reason, status = (bad, "failed") if absent else (NO_REFERENCE, "not_run")
            column.entries += [missing(metric, reason, status=status) for metric in names]
        return
    tested = ["after", *references]
    if any(not contexts[name].runner.fits(contexts["before"].model) for name in tested):
        reason = "the models differ in architecture or noise schedule"
        columns["after"].entries += [missing(metric, reason) for metric in (STEPS, RATIO, *BENIGN)]
        return
    trainer = Trainer(contexts["after"], options)
    _relearn(columns, contexts, tested, references, trainer, settings)
    if options["benign_steps"]:
        _benign(columns, contexts, tested, references, trainer, settings)
    else:
        columns["after"].entries += [missing(metric, NO_BENIGN) for metric in BENIGN]


def _relearn(columns, contexts, tested: Sequence[str], references: Sequence[str], trainer: Trainer, settings) -> None:
    options, step = settings["relearn"], trainer.on(trainer.forget)
    target = trainer.probe(trainer.start(contexts["before"].params))
    keys = [jax.random.fold_in(contexts["after"].key, 100 + place) for place in range(options["keys"])]
    runs: dict[str, list[relearning.Relearned]] = {}
    for place, name in enumerate(tested):
        runs[name] = []
        for done, key in enumerate(keys, start=1):
            state = trainer.start(contexts[name].params)
            given = {"target": target, "budget": options["budget"], "every": options["every"]}
            runs[name].append(relearning.relearn_steps(step, state, trainer.probe, key, **given))
            contexts["after"].tick("relearning", (place * len(keys) + done) / (len(tested) * len(keys)))
    protocol = {
        "target_loss": target,
        "budget": options["budget"],
        "keys": options["keys"],
        "optimiser": f"Adam, learning rate {options['learning_rate']:g}, batches of {options['batch_size']}",
        "images": len(trainer.forget.x),
    }
    columns["before"].entries.append(entry(STEPS, 0.0, n=1, protocol={**protocol, "censored": 0}))
    for name, found in runs.items():
        columns[name].arrays["relearn_losses"] = _curves(found)
        censored = sum(run.censored for run in found)
        details = {**protocol, "censored": censored}
        if censored:
            details["bound"] = "a lower bound: not every run was back within the budget"
        mean = float(np.mean([run.steps for run in found]))
        columns[name].entries.append(entry(STEPS, mean, n=len(found), protocol=details))
    share = relearning.relearn_ratio(runs["after"], [runs[name] for name in references], settings["confidence"])
    details = {
        **protocol,
        "bound": share.bound,
        "steps_after": share.steps,
        "steps_reference": list(share.reference_steps),
    }
    if share.bound == "unknown":
        reason = "neither the unlearned nor a retrained model was back within the budget; raise eval.relearn.budget"
        if not np.mean(share.reference_steps) > 0:
            reason = "the retrained models are at the level of the model before already, so nothing has to be relearned"
        if any(run.failed for found in runs.values() for run in found):
            reason = "a loss became NaN or infinite; lower eval.relearn.learning_rate"
        columns["after"].entries.append(missing(RATIO, reason, status="failed", protocol=details))
        return
    columns["after"].entries.append(entry(RATIO, share.value, n=options["keys"], ci=share.ci, protocol=details))


def _curves(runs: Sequence[relearning.Relearned]) -> np.ndarray:
    """float64 [K, 2, longest]: steps and losses of each run, filled with NaN."""
    out = np.full((len(runs), 2, max(len(run.at) for run in runs)), np.nan)
    for place, run in enumerate(runs):
        out[place, :, : len(run.at)] = run.at, run.losses
    return out


def _benign(columns, contexts, tested: Sequence[str], references: Sequence[str], trainer: Trainer, settings) -> None:
    """Trains on keep images alone, then looks again: loss on the forget images, and copies among samples."""
    steps, step = settings["relearn"]["benign_steps"], trainer.on(trainer.keep)
    key = jax.random.fold_in(contexts["after"].key, STREAM_BENIGN)
    losses, protocol = {}, {"steps": steps, "keep_images": len(trainer.keep.x)}
    for place, name in enumerate(tested):
        context = contexts[name]
        state = relearning.train(step, trainer.start(context.params), key, steps)
        losses[name] = trainer.probe(state)
        texts = None if context.prompts is None else context.prompts.forget
        made = context.runner.sample(state[0], context.refs.keep.shape[1:], texts, lambda share: None)
        if made.broken:
            reason = f"{made.broken} samples hold NaN or infinity after training on keep images"
            columns[name].entries.append(missing(BENIGN[1], reason, status="failed", protocol=protocol))
        else:
            flags = sample_metrics.find_copies(made.images, context.refs).flags
            counted = extraction.copy_rate(flags, settings["confidence"])
            details = {**protocol, "count": counted.count, "upper_one_sided": counted.upper.high}
            columns[name].entries.append(entry(BENIGN[1], counted.rate, n=len(flags), ci=counted.ci, protocol=details))
        contexts["after"].tick("benign training", (place + 1) / len(tested))
    level = float(np.mean([losses[name] for name in references]))
    details = {**protocol, "loss_after": losses["after"], "loss_retrained": level}
    columns["after"].entries.append(entry(BENIGN[0], losses["after"] / level, n=1, protocol=details))
