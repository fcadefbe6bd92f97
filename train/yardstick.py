"""Where a run of unlearning starts and what is enough: the losses that every later probe is compared with.

They are measured once, before the first step, and kept in the work directory, so that a resumed run compares with the same
numbers.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxunlearn import forgetting
from jaxunlearn.io.batches import batch_indices
from jaxunlearn.io.diffusers import DiffusersModel
from jaxunlearn.io.forget import Split
from jaxunlearn.io.manifest import write_json
from jaxunlearn.io.workdir import Workdir, retrained_names
from train import prepare
from train.distributed import from_first
from train.examples import Examples
from train.log import say
from train.probes import Probes

FILE = "yardstick.json"
"""The file in the work directory."""
SOURCES = ("held_out", "retrained", "value")
"""Where the target loss may come from, see ``unlearn.stop.source``."""
LOOK_ALIKES = 64
KEEP_SAMPLE = 1000
"""Keep images whose distance to held-out images says what is near."""


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """The losses of the starting model and of the target; the last three are NaN where there is no level.

    Attributes:
      keep: loss of the starting model on the keep probe.
      start: l_0, its mean loss on the forget images.
      target: l*, the loss at which enough is forgotten.
      error: standard error of ``target - start``.
    """

    keep: float
    start: float = math.nan
    target: float = math.nan
    error: float = math.nan

    @property
    def has_level(self) -> bool:
        """Whether a forget level can be given."""
        return math.isfinite(self.target)

    def level(self, loss: float) -> float:
        """The forget level of a mean loss on the forget images: 0 untouched, 1 as if they had never been seen."""
        return (loss - self.start) / (self.target - self.start)


def look_alikes(split: Split, seed: int, points: Callable[[np.ndarray], np.ndarray], forget: np.ndarray) -> np.ndarray:
    """Positions [F, k] of the held-out images that stand for each forget image; near-duplicates of those are left out.

    Args:
      split: the images.
      seed: chooses the keep images that say what is near.
      points: positions -> where the images lie in the model's space, [N, ...].
      forget: positions of the forget images.

    Raises:
      ValueError: too few images, or a forget image that no held-out image is near to; with the cures.
    """
    held_out = np.setdiff1d(split.held_out, split.near_duplicates.index)
    keep = split.keep[batch_indices(seed, "watch/near", 0, len(split.keep), min(KEEP_SAMPLE, len(split.keep)))]
    try:
        return held_out[forgetting.look_alikes(points(forget), points(held_out), points(keep), count=LOOK_ALIKES)]
    except ValueError as error:
        raise ValueError(
            f"config.unlearn.stop.source = 'held_out': {error}: --config.unlearn.stop.source=retrained "
            "--config.retrain.enabled=True; or give the loss of such a model with source=value"
        ) from None


def measure(
    config: ConfigDict,
    workdir: Workdir,
    model: DiffusersModel,
    examples: Examples,
    probes: Probes,
    poll: Callable[[], None],
) -> Yardstick:
    """The yardstick of a run: from the work directory, or measured and written there.

    Args:
      config: the whole configuration.
      workdir: where it is kept, and where retrained models are.
      model: the starting model.
      examples: the images as it takes them.
      probes: the fixed images and noises.
      poll: called now and then; what it raises ends the measuring.

    Raises:
      ValueError: no look-alikes, a retrained model that does not fit, or no gap between start and target while the stop
        rule is on; each with its cures.
    """
    path, stop = workdir.root / FILE, config.unlearn.stop
    keys = ("keep_loss", "start_loss", "target_loss", "gap_error")
    if from_first(np.int32(path.exists())):
        saved = json.loads(path.read_text()) if jax.process_index() == 0 else dict.fromkeys(keys)
        return Yardstick(*_shared([saved[key] for key in keys]))
    params = probes.local(model.params)
    numbers, text, gap = [probes.keep_loss(params, poll)], "none", None
    if stop.source is not None:
        start = probes.losses(params, probes.forget, poll)
        target, nearest, text = _target(config, workdir, model, examples, probes, start, poll)
        gap = forgetting.forget_level(start, start, target, paired=nearest is None, nearest=nearest)
        numbers += [start.mean(), start.mean() + gap.gap, gap.gap_error]
        no_gap = bool(from_first(np.int32(gap.status == "no_gap")))
    found = Yardstick(*_shared(numbers + [math.nan] * (4 - len(numbers))))
    if not (math.isfinite(found.keep) and found.keep > 0):
        raise ValueError(f"the loss of the starting model on keep images is {found.keep}; check the model")
    if gap is not None:
        _tell(stop, found, text, len(probes.forget), no_gap)
        if no_gap:
            found = Yardstick(found.keep)
    if jax.process_index() == 0:
        values = dict(zip(keys, dataclasses.astuple(found)))
        about = {"source": text, "forget_images": len(probes.forget), "status": _status(gap, found)}
        write_json(path, {name: None if math.isnan(v) else v for name, v in values.items()} | about)
    return found


def _shared(numbers: list[float | None]) -> list[float]:
    """float32 numbers of process 0 in every process; None becomes NaN."""
    values = np.array([math.nan if v is None else v for v in numbers], np.float32)
    return [float(v) for v in from_first(values)]


def _status(gap: forgetting.ForgetLevel | None, found: Yardstick) -> str:
    if gap is None:
        return "no_source"
    return "ok" if found.has_level else "no_gap"


def _target(
    config: ConfigDict,
    workdir: Workdir,
    model: DiffusersModel,
    examples: Examples,
    probes: Probes,
    start: np.ndarray,
    poll: Callable[[], None],
) -> tuple[np.ndarray, np.ndarray | None, str]:
    """The target's losses, the look-alikes of each forget image among them (None: the same images), and their source."""
    stop, split = config.unlearn.stop, examples.split
    if stop.source == "value":
        return np.full(start.shape, stop.level), None, "a value of the user"
    if stop.source == "held_out":
        near = look_alikes(split, config.seed, examples.points, probes.forget)
        distinct, nearest = np.unique(near, return_inverse=True)
        losses = probes.losses(probes.local(model.params), distinct, poll)
        text = f"the starting model on the {near.shape[1]} held-out images most like each forget image"
        return losses, nearest.reshape(near.shape), text
    names = retrained_names(config.retrain.count)
    paths = [stop.path] if stop.path is not None else [str(workdir.model(name)) for name in names]
    losses = []
    for path in paths:
        key = "retrain" if stop.path is None else "unlearn.stop.path"
        params = prepare.other_parameters(config, path, model, key)
        losses.append(probes.losses(probes.local(params), probes.forget, poll))
        if len(paths) > 1:
            say(f"unlearn: l* of {path}: {losses[-1].mean():.4g}")
    text = f"{len(paths)} retrained model{'s' if len(paths) > 1 else ''}: {', '.join(paths)}"
    return np.mean(losses, axis=0), None, text


def _tell(stop: ConfigDict, found: Yardstick, text: str, images: int, no_gap: bool) -> None:
    """Prints l_0 and l* with its source and error; refuses a stop rule without a gap."""
    plural = "s" if images > 1 else ""
    numbers = (
        f"l* = {found.target:.4g} +- {found.error:.2g} (standard error of l* - l_0) from {text}; "
        f"l_0 = {found.start:.4g} on {images} different forget image{plural}"
    )
    if not no_gap:
        say(f"unlearn: forget level 1 is {numbers}")
        return
    if stop.target is None:
        say(f"warning: unlearn: there is no forget level: {numbers}, no gap of two standard errors (no_gap)")
        return
    raise ValueError(
        f"no_gap: {numbers}: the target does not lie two standard errors above the start, so there is nothing to stop at. "
        "Use a source further from the start (unlearn.stop.source=retrained is the definition), more unlearn.watch.noises, "
        "a model that has learnt the forget images, or switch the rule off with --config.unlearn.stop.target=None"
    )
