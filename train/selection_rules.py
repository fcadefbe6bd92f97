"""The rules behind ``config.select``: each looks at the images, the noise schedule and perhaps the model, and proposes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxunlearn import selection
from jaxunlearn.errors import mean_squares
from jaxunlearn.forgetting import make_probe_losses
from jaxunlearn.frequency import radial_spectrum, shell_power
from jaxunlearn.images import to_model
from jaxunlearn.io.batches import stream_id
from jaxunlearn.io.diffusers import DiffusersModel
from jaxunlearn.objectives.probes import strata
from jaxunlearn.responsibility import ResponsibilityWindow, responsibility, window_from_responsibility
from jaxunlearn.spectrum import cutoff_from_spectrum, resolved_bins, window_from_spectrum
from jaxunlearn.types import Example
from train.examples import Examples

FORGET_IMAGES, KEEP_IMAGES = 512, 512
"""Different forget images and keep images whose spectra are compared, at most."""
GAP_FORGET, GAP_HELD_OUT = 32, 64
"""Images of the loss gap, at most; each is asked at GAP_STRATA timesteps with GAP_NOISES noises."""
GAP_STRATA, GAP_NOISES = 16, 8
SHARE_FORGET, SHARE_KEEP = 16, 2000
"""Images of the responsibilities, at most; a sample of keep counts for all of it."""


class Proposal(NamedTuple):
    """What a rule proposes.

    Attributes:
      window: (t1, t2), half-open.
      filter: ``none`` or a name of ``frequency.FILTERS``.
      kind: of the filter.
      cutoff: None, a radius, two of a band, or a table over t; in Nyquist units.
      reasons: whole sentences.
      curves: name -> array, for the figure.
    """

    window: tuple[int, int]
    filter: str
    kind: str
    cutoff: float | tuple[float, float] | np.ndarray | None
    reasons: tuple[str, ...]
    curves: Mapping[str, np.ndarray]


def distinct(images: np.ndarray, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the different ones among images, in their order, and how often each occurs: int64 [N], int64 [N]."""
    digests = examples.split.digests[images]
    _, first, count = np.unique(digests, axis=0, return_index=True, return_counts=True)
    order = np.argsort(first)
    return images[first[order]], count[order]


def _some(images: np.ndarray, most: int, config: ConfigDict, stream: str) -> np.ndarray:
    """At most so many images, chosen by the seed, in their order."""
    if len(images) <= most:
        return images
    chosen = np.random.default_rng([config.seed, stream_id(stream)]).choice(len(images), most, replace=False)
    return images[np.sort(chosen)]


def _gap(config: ConfigDict, model: DiffusersModel, examples: Examples, poll: Callable[[], None]):
    """The loss gap and the sentence about how it was measured; None where too few images are held out."""
    split = examples.split
    held_out = np.setdiff1d(split.held_out, split.near_duplicates.index)
    if len(held_out) < 2:
        return None, f"Only {len(held_out)} images are held out, so what the model knows cannot be measured."
    forget = _some(distinct(split.forget, examples)[0], GAP_FORGET, config, "select/forget")
    held_out = _some(held_out, GAP_HELD_OUT, config, "select/held_out")
    known, unknown = (
        examples.take(images, seed=config.seed, stream=f"select/{name}", step=0, whole=True)
        for name, images in (("forget", forget), ("held_out", held_out))
    )
    if known.cond is not None:
        # Under the same texts: the gap is of the images, not of their texts.
        unknown = unknown._replace(cond=known.cond[np.arange(len(held_out)) % len(forget)])
    key = jax.random.fold_in(jax.random.key(config.seed), stream_id("select/gap"))
    probe = make_probe_losses(
        model.predict, model.schedule, key, error=mean_squares, count=GAP_STRATA, noises=GAP_NOISES
    )

    def losses(params, example: Example) -> np.ndarray:
        poll()
        return probe(params, example._replace(x0=to_model(example.x0)))

    t = strata(model.schedule.num_steps, GAP_STRATA)
    gap = selection.loss_gap(losses, model.params, known, unknown, t)
    return gap, (
        f"The loss gap is that of {len(forget)} different forget images against {len(held_out)} held-out ones, "
        f"at {GAP_STRATA} timesteps with {GAP_NOISES} noises each."
    )


def spectrum(config: ConfigDict, model: DiffusersModel, examples: Examples, poll: Callable[[], None]) -> Proposal:
    """Where the forget images take shape, and at each t a low-pass filter up to what the noise leaves of them.

    Raises:
      ValueError: images without structure.
    """
    forget = _some(distinct(examples.split.forget, examples)[0], FORGET_IMAGES, config, "select/forget")
    points, schedule = examples.points(forget), model.schedule
    power = radial_spectrum(points)
    window, cutoff = window_from_spectrum(schedule, power), cutoff_from_spectrum(schedule, power)
    t1, t2 = window
    reasons = (
        f"The forget images take shape (bins 1 to {max(power.size / 8, 2):.3g}) in t = [{t1}, {t2}).",
        "At each t the frequencies are those whose power in the forget images exceeds that of the noise, at least 2 bins: "
        f"up to {cutoff[t1]:.3g} Nyquist at t = {t1} and {cutoff[t2 - 1]:.3g} at t = {t2 - 1}.",
        f"The spectrum is the mean of {len(forget)} different forget images; the model was not asked.",
    )
    forget_power, count = shell_power(points)
    curves = {
        "bins": np.arange(len(count)),
        "forget_power": forget_power.mean(axis=0),
        "resolved_bins": resolved_bins(schedule, power),
        "cutoff": cutoff,
    }
    return Proposal(window, "low_pass", "ideal", cutoff, reasons, curves)


def share_of_forget(
    config: ConfigDict, model: DiffusersModel, examples: Examples, poll: Callable[[], None]
) -> np.ndarray:
    """Mean posterior share of the forget images over t: float64 [T]; each image with its copies in the training set.

    Raises:
      ValueError: no forget image is in the training set.
    """
    split = examples.split
    images, copies = distinct(np.intersect1d(split.forget, split.train), examples)
    if not len(images):
        raise ValueError(
            "config.select = 'responsibility': no forget image is in the training set, so nothing can be decided for it; "
            "set --config.select=spectrum or manual"
        )
    chosen = np.isin(images, _some(images, SHARE_FORGET, config, "select/forget"))
    images, copies = images[chosen], copies[chosen]
    keep = _some(split.keep, SHARE_KEEP, config, "select/keep")
    keep_points, total = examples.points(keep), np.zeros(model.schedule.num_steps)
    for count in np.unique(copies):
        poll()
        group = images[copies == count]
        total += len(group) * responsibility(
            model.schedule,
            examples.points(group),
            keep_points,
            copies=int(count),
            population=len(split.keep),
            seed=config.seed,
        )
    return total / len(images)


def by_responsibility(
    config: ConfigDict, model: DiffusersModel, examples: Examples, poll: Callable[[], None]
) -> Proposal:
    """Where the share of the forget images among the training images falls; all frequencies.

    Raises:
      ValueError: no forget image in the training set, or none that ever has a share.
    """
    share = share_of_forget(config, model, examples, poll)
    (t1, t2), _, memorised = window_from_responsibility(share)
    images, copies = distinct(np.intersect1d(examples.split.forget, examples.split.train), examples)
    found = (
        f"The share never falls below 99 %, so the window is the last quarter: t = [{t1}, {t2})."
        if memorised
        else f"The share falls from 99 % to 5 % in t = [{t1}, {t2}): there it is decided that a forget image comes out."
    )
    counts = f"{copies.min()}" if copies.min() == copies.max() else f"{copies.min()} to {copies.max()}"
    reasons = (
        f"At each t the share of the forget images among all training images was computed for their own noised copies "
        f"({min(len(images), SHARE_FORGET)} of {len(images)} different images, {counts} copies of each in the training set).",
        found,
        "Pixel distances overstate what a network resolves: the window is an upper end. The rule chooses no filter.",
    )
    return Proposal((t1, t2), "none", "ideal", None, reasons, {"share": share})


def _decided(
    config: ConfigDict, model: DiffusersModel, examples: Examples, poll: Callable[[], None]
) -> tuple[ResponsibilityWindow | None, tuple[str, ...], dict[str, np.ndarray]]:
    """Where it is decided that a forget image comes out, and the curve; None where it cannot be told, with the reason."""
    try:
        share = share_of_forget(config, model, examples, poll)
        return window_from_responsibility(share), (), {"share": share}
    except ValueError as error:
        return None, (f"Where it is decided cannot be told from the training images: {error}.",), {}


def auto(config: ConfigDict, model: DiffusersModel, examples: Examples, poll: Callable[[], None]) -> Proposal:
    """:func:`jaxunlearn.selection.choose` with the share of the forget images and the loss gap of the model."""
    split = examples.split
    forget = _some(distinct(split.forget, examples)[0], FORGET_IMAGES, config, "select/forget")
    keep = _some(split.keep, KEEP_IMAGES, config, "select/keep")
    decided, why_not, curves = _decided(config, model, examples, poll)
    gap, measured = _gap(config, model, examples, poll)
    points = examples.points(forget), examples.points(keep)
    choice = selection.choose(model.schedule, *points, gap=gap, decided=decided)
    return Proposal(*choice[:4], (*choice.reasons, *why_not, measured), {**choice.curves, **curves})


RULES = {"auto": auto, "spectrum": spectrum, "responsibility": by_responsibility}
"""Name -> ``(config, model, examples, poll) -> Proposal``."""
NEED_MODEL = ("auto",)
"""Rules that ask the trained model; the others need the images and the noise schedule alone."""
