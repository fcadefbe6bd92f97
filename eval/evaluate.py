"""The evaluation of a work directory: data, then one column per model, then verdicts. Returns the report as a dict."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from eval.context import Column, Context
from eval.inputs import Inputs
from eval.measure import compare, measure
from eval.prompts import Conditions, image_texts
from eval.record import record
from eval.records import Entry, entry, missing
from eval.references import Chosen, References, choose, prepare
from eval.runner import Runner
from eval.sample_metrics import classifier_record, nearest_keep
from eval.spaces import space_of
from jaxunlearn.metrics import statistics
from jaxunlearn.metrics.inception_score import inception_score


def evaluate(inputs: Inputs, say: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, Column], References]:
    """Measures all models of a work directory.

    Args:
      inputs: the opened work directory.
      say: prints one line.

    Returns:
      The report (plain JSON values), the columns with their arrays, and the references, for figures.

    Raises:
      ValueError: the data cannot be evaluated, for example because a forget image is also kept.
    """
    settings, timings, started = inputs.settings, {}, time.monotonic()
    say(
        f"data: {len(inputs.split.keep)} keep, {len(inputs.split.forget)} forget, "
        f"{len(inputs.split.held_out)} held-out images; columns: {', '.join(inputs.models)}"
    )
    chosen = choose(inputs.split, settings)
    space = space_of(inputs.models["before"], inputs.companion_batch_size)
    conditions, truncated = _conditions(inputs, chosen, say)
    refs = prepare(inputs.split, chosen, inputs.config, settings, space, conditions, say)
    timings["references"] = time.monotonic() - started

    columns, contexts, runner = {}, {}, None
    for name, model in inputs.models.items():
        begin = time.monotonic()
        if runner is None or not runner.fits(model):
            runner = Runner(model, settings, space, conditions)
        tick, key = _ticker(name, say), jax.random.key(settings["seed"])
        contexts[name] = Context(
            name,
            model.params,
            model,
            runner,
            refs,
            inputs.prompts,
            settings,
            tick,
            key,
            inputs.split,
            inputs.workdir.cache,
        )
        columns[name] = measure(contexts[name])
        timings[name] = time.monotonic() - begin
        say(f"{name}: {columns[name].failed or _summary(columns[name])} ({timings[name]:.0f} s)")
    begin = time.monotonic()
    compare(columns, contexts, settings)
    timings["comparison"] = time.monotonic() - begin
    timings["total"] = time.monotonic() - started
    control = _control(refs, settings)
    return record(inputs, refs, columns, control, timings, truncated), columns, refs


def _conditions(inputs: Inputs, chosen: Chosen, say: Callable[[str], None]) -> tuple[Conditions, int]:
    """The embedding of every text that is asked for, and how many of the texts are longer than the model takes."""
    model, split = inputs.models["before"], inputs.split
    if inputs.prompts is None:
        if split.captions is not None:
            say("captions: not used, the models take no text")
        return Conditions(), 0
    texts = ("", *inputs.prompts.texts, *image_texts(inputs.config, split, chosen.positions))
    texts = tuple(dict.fromkeys(texts))
    truncated = sum(model.tokenizer.truncated(texts))
    return Conditions(texts, model.text(inputs.companion_batch_size).embed(texts)), truncated


def _ticker(column: str, say: Callable[[str], None]) -> Callable[[str, float], None]:
    """One line at the end of a stage, and one per 15 seconds within it."""
    last = [time.monotonic()]

    def tick(stage: str, share: float) -> None:
        if share >= 1.0 or time.monotonic() - last[0] > 15:
            say(f"{column}: {stage} {share:.0%}")
            last[0] = time.monotonic()

    return tick


def _summary(column: Column) -> str:
    return f"{int(column.flags.sum())} copies in {len(column.flags)} samples"


def _control(refs: References, settings) -> list[Entry]:
    """Held-out images, measured as if they were samples: what real data that was never trained on looks like."""
    names = ("nearest_keep_min", "nearest_keep_median", "inception_score")
    protocol, n = {"images": "held-out"}, len(refs.held_out)
    if n < 2:
        return [missing(name, "no images were held out", protocol=protocol) for name in names]
    nearest = nearest_keep(refs.held_out, refs)
    interval = statistics.bootstrap_interval(nearest, settings["confidence"], seed=settings["seed"])
    out = [
        entry("nearest_keep_min", nearest.min(), n=n, protocol=protocol),
        entry("nearest_keep_median", np.median(nearest), n=n, ci=interval, protocol=protocol),
    ]
    if refs.classifier is None:
        return [*out, missing("inception_score", refs.no_classifier, protocol=protocol)]
    protocol = {**protocol, **classifier_record(refs)}
    if n < 20:
        return [*out, missing("inception_score", f"only {n} images were held out; the score needs 20")]
    score = inception_score(refs.classifier.apply(refs.held_out)[0], chunks=10, seed=settings["seed"])
    return [*out, entry("inception_score", score.mean, n=n, protocol={**protocol, "std_over_chunks": score.std})]
