"""What can be wrong with ``config.unlearn.watch``, ``config.unlearn.stop`` and ``config.retrain``."""

from __future__ import annotations

import pathlib

from ml_collections import ConfigDict

from jaxunlearn.io import hub
from jaxunlearn.io.diffusers import DiffusersModel
from jaxunlearn.io.forget import Split
from train import yardstick
from train.examples import Examples
from train.probes import different_images
from train.problems import Problems

RETURNS = ("last", "best")


def check_watch(p: Problems) -> None:
    """Adds the problems of probes, stop rule and retrained models: each value, then whether they go together."""
    watch, before = p.config.unlearn.watch, len(p.lines)
    p.check("unlearn.watch.every", "0 (never) or more steps", lambda v: v >= 0)
    p.check("unlearn.watch.keep_images", "1 or more", lambda v: v >= 1)
    p.check("unlearn.watch.forget_images", "1 or more", lambda v: v >= 1)
    p.check("unlearn.watch.strata", "1 or more", lambda v: v >= 1)
    p.check("unlearn.watch.noises", "2 or more", lambda v: v >= 2)
    p.check("unlearn.watch.warn", "above 1, the ratio of the start", lambda v: v > 1)
    p.check("unlearn.watch.collapse", f"at least unlearn.watch.warn = {watch.warn}", lambda v: v >= watch.warn)
    p.check("unlearn.watch.samples", "0 (none), or 2 or more", lambda v: v == 0 or v >= 2)
    p.check("unlearn.watch.samples_every", "1 or more steps", lambda v: v >= 1)
    p.maybe_name("unlearn.watch.returns", "step to return", RETURNS)
    p.maybe("unlearn.stop.target", "positive, such as 0.95", lambda v: v > 0)
    p.check("unlearn.stop.patience", "1 or more probes", lambda v: v >= 1)
    p.maybe_name("unlearn.stop.source", "source of the target loss", yardstick.SOURCES)
    p.maybe("unlearn.stop.level", "positive", lambda v: v > 0)
    p.check("retrain.count", "1 or more models", lambda v: v >= 1)
    if len(p.lines) == before:
        _check_together(p)


def _check_together(p: Problems) -> None:
    config = p.config
    watch, stop = config.unlearn.watch, config.unlearn.stop
    if not watch.every:
        used = [
            f"unlearn.{key}"
            for key, value in (
                ("stop.target", stop.target),
                ("stop.source", stop.source),
                ("watch.samples", watch.samples),
                ("watch.returns", watch.returns),
            )
            if value
        ]
        if used:
            p.lines.append(
                f"config.unlearn.watch.every = 0: no probes, which are needed for {', '.join(used)}; give the steps between "
                "them"
            )
    elif watch.samples and watch.samples_every % watch.every:
        p.lines.append(
            f"config.unlearn.watch.samples_every = {watch.samples_every}: must be a multiple of "
            f"unlearn.watch.every = {watch.every}"
        )
    if stop.target is not None and stop.source is None:
        p.lines.append(
            f"config.unlearn.stop.target = {stop.target}: needs unlearn.stop.source, where the loss comes from at which the "
            "level is 1: 'retrained' (with --config.retrain.enabled=True), 'held_out' or 'value'"
        )
    _check_source(p)


def _check_source(p: Problems) -> None:
    config, stop = p.config, p.config.unlearn.stop
    if stop.source == "value" and stop.level is None:
        p.lines.append(
            "config.unlearn.stop.source = 'value': needs unlearn.stop.level, the mean-square loss of a retrained model on "
            "the forget images"
        )
    if stop.level is not None and stop.source != "value":
        p.lines.append(
            f"config.unlearn.stop.level = {stop.level}: is used with unlearn.stop.source=value alone; set it to None"
        )
    if stop.path is not None and stop.source != "retrained":
        p.lines.append(
            f"config.unlearn.stop.path = {stop.path!r}: is used with unlearn.stop.source=retrained alone; set it to None"
        )
    elif stop.path is not None:
        if not stop.path.startswith(hub.PREFIX) and not pathlib.Path(stop.path).expanduser().is_dir():
            p.lines.append(f"config.unlearn.stop.path = {stop.path!r}: no such folder; give a diffusers folder")
    elif stop.source == "retrained" and not config.retrain.enabled:
        p.lines.append(
            "config.unlearn.stop.source = 'retrained': needs --config.retrain.enabled=True, or the folder of a retrained "
            "model in unlearn.stop.path"
        )


def split_watch_problems(config: ConfigDict, split: Split, source: DiffusersModel | None) -> list[str]:
    """What stands between the images and the probes: no look-alikes, samples of models that are not of pixels."""
    watch, stop = config.unlearn.watch, config.unlearn.stop
    is_latent = source is not None and source.is_latent
    takes_text = source is not None and source.takes_text
    problems = []
    if watch.every and watch.samples and (is_latent or takes_text):
        kind = "works on latents" if is_latent else "takes text"
        problems.append(
            f"config.unlearn.watch.samples = {watch.samples}: counts copies among samples of models of pixels, and this one "
            f"{kind}; set it to 0"
        )
    if stop.source != "held_out":
        return problems
    if takes_text and config.unlearn.prompt is None:
        problems.append(
            "config.unlearn.stop.source = 'held_out': the model takes text, and held-out images have none here; give "
            "config.unlearn.prompt, one text for all of them, or use source=retrained"
        )
    # Those of a latent model are compared as latents, when they are encoded.
    if len(split.forget) and not is_latent:
        forget = different_images(config.seed, split.digests, split.forget, watch.forget_images)
        try:
            yardstick.look_alikes(split, config.seed, Examples(split).points, forget)
        except ValueError as error:
            problems.append(str(error))
    return problems
