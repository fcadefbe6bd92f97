"""Runs the membership scores of a model on forget and held-out images, the same images for all models."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from eval.context import Column, Context
from eval.references import Encoded
from eval.runner import Runner
from jaxunlearn.images import to_unit
from jaxunlearn.metrics import membership, quantile_attack

LEAST_HELD_OUT = 30
CALIBRATION_SHARE = 3  # one of so many held-out images
SIMA_T = range(0, 301, 10)
QUANTILE_T = 100
TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class Sets:
    """Images as the model takes them, and where in them the sets are: index arrays.

    Attributes:
      images: forget, held-out and keep images.
      forget: those in question.
      judged: held-out images that they are compared with.
      calibration: held-out images that choose, never compared with.
      keep: as many training images, which choose as well.
    """

    images: Encoded
    forget: np.ndarray
    judged: np.ndarray
    calibration: np.ndarray
    keep: np.ndarray


class Scored(NamedTuple):
    """One score of all images that are judged, or why there is none.

    Attributes:
      score: its name in ``eval.membership.scores``.
      protocol: how it was computed.
      forget, judged: float64, low is member-like; None without a value.
      reason: why there is none.
    """

    score: str
    protocol: dict[str, Any]
    forget: np.ndarray | None = None
    judged: np.ndarray | None = None
    reason: str | None = None


class _Programs:
    """Compiled functions that all models of one architecture share; the first of them (before) chooses t of sima."""

    def __init__(self, runner: Runner):
        self.predict = jax.jit(runner.predict)
        self.sima_t: int | None = None
        self._secmi = None

    def secmi(self, runner: Runner) -> Callable:
        if self._secmi is None:
            self._secmi = jax.jit(membership.make_secmi(runner.predict, runner.schedule))
        return self._secmi


_PROGRAMS: weakref.WeakKeyDictionary[Runner, _Programs] = weakref.WeakKeyDictionary()


def sets_of(inputs: Mapping[str, Encoded]) -> Sets | str:
    """The sets among "forget", "keep" and perhaps "held_out" images; or, in words, that too few were held out."""
    count = {name: len(part.rows) for name, part in inputs.items()}
    held_out = count.get("held_out", 0)
    if held_out < LEAST_HELD_OUT:
        return f"{held_out} images were held out; membership scores need {LEAST_HELD_OUT} to compare with"
    parts = [inputs[name] for name in ("forget", "held_out", "keep")]
    places = np.split(
        np.arange(sum(len(part.rows) for part in parts)), np.cumsum([len(part.rows) for part in parts[:2]])
    )
    first = places[1][::CALIBRATION_SHARE]
    return Sets(
        Encoded(np.concatenate([part.x for part in parts]), np.concatenate([part.rows for part in parts])),
        places[0],
        np.setdiff1d(places[1], first),
        first,
        places[2][: len(first)],
    )


def score_all(column: Column, context: Context, sets: Sets) -> list[Scored]:
    """Every score that the settings name, but for the shadow attack. The denoising losses are those of the column."""
    chosen = [name for name in context.settings["membership"]["scores"] if name in _SCORES]
    programs = _PROGRAMS.setdefault(context.runner, _Programs(context.runner))
    size = min(context.settings["batch_size"], len(sets.forget) + len(sets.judged))
    work = _Work(column, context, sets, programs, size)
    out = []
    for number, name in enumerate(chosen):
        context.tick(f"membership: {name}", number / len(chosen))
        try:
            out += _SCORES[name](work)
        except ValueError as error:
            out.append(Scored(name, {}, reason=str(error)))
    context.tick("membership", 1.0)
    return out


class _Work(NamedTuple):
    column: Column
    context: Context
    sets: Sets
    programs: _Programs
    batch_size: int

    def run(self, rows: Callable[..., jax.Array], places: np.ndarray, *more: np.ndarray) -> np.ndarray:
        """A score of the images at some places: float64 [n]."""
        images, params = self.sets.images, self.context.params
        cond = self.context.runner.conditions.at(images.rows[places])
        arrays = (images.x[places], *more, *(() if cond is None else (cond,)))
        return membership.score_images(rows, params, *arrays, batch_size=self.batch_size)

    def judge(self, name: str, rows: Callable[..., jax.Array], *more: np.ndarray, **protocol: Any) -> list[Scored]:
        """The score of all images that are judged."""
        return self.divided(name, self.run(rows, self.used, *more), **protocol)

    def divided(self, name: str, values: np.ndarray, **protocol: Any) -> list[Scored]:
        return [Scored(name, protocol, *np.split(values, [len(self.sets.forget)]))]

    @property
    def used(self) -> np.ndarray:
        return np.concatenate([self.sets.forget, self.sets.judged])

    def losses(self) -> np.ndarray:
        """The denoising loss of all images at each t, as the family of losses left it."""
        return np.concatenate([self.column.arrays[f"loss_{name}"] for name in ("forget", "held_out", "keep")])


def _loss_t(work: _Work) -> list[Scored]:
    losses, settings, out = work.losses()[work.used], work.context.settings, []
    for place, t in enumerate(settings["loss_t"]):
        out += work.divided("loss_t", losses[:, place], t=t, noises=settings["loss_noises"])
    return out


def _secmi(work: _Work) -> list[Scored]:
    return work.judge("secmi", work.programs.secmi(work.context.runner), t=100, step=10)


def _pia(work: _Work, name: str = "pia") -> list[Scored]:
    schedule = work.context.runner.schedule
    rows = membership.make_pia(work.programs.predict, schedule, t=200, power=4.0, normalised=name == "pian")
    return work.judge(name, rows, t=200, power=4)


def _pian(work: _Work) -> list[Scored]:
    return _pia(work, "pian")


def _sima(work: _Work) -> list[Scored]:
    rows, sets = membership.make_sima(work.programs.predict), work.sets
    times = np.array([t for t in SIMA_T if t < work.context.runner.schedule.num_steps], np.int32)
    if work.programs.sima_t is None:
        members, others = (
            work.run(rows, np.repeat(places, len(times)), np.tile(times, len(places))).reshape(-1, len(times))
            for places in (sets.keep, sets.calibration)
        )
        work.programs.sima_t = int(times[membership.best_t(members, others)])
    t = work.programs.sima_t
    chosen = f"t of 0..{times[-1]} that best tells keep from other held-out images, in the first model measured"
    return work.judge("sima", rows, np.full(len(work.used), t, np.int32), t=t, power=4, chosen=chosen)


def _clid(work: _Work) -> list[Scored]:
    runner, settings, images = work.context.runner, work.context.settings, work.sets.images
    if not runner.takes_text:
        raise ValueError("the model takes no text")
    null = np.full(len(work.used), runner.conditions.rows([""])[0], np.int32)
    if np.array_equal(images.rows[work.used], null):
        raise ValueError("the images have no text")
    without = runner.loss(work.context.params, images.x[work.used], null, lambda share: None)
    scores = membership.clid(work.losses()[work.used], without)
    return work.divided("clid", scores, mean_over_t=list(settings["loss_t"]), noises=settings["loss_noises"])


def _quantile(work: _Work) -> list[Scored]:
    settings, sets, space = work.context.settings, work.sets, work.context.runner.space
    place = int(np.argmin(np.abs(np.array(settings["loss_t"]) - QUANTILE_T)))
    least = quantile_attack.least_public(0.1)
    if len(sets.calibration) < least:
        raise ValueError(
            f"{len(sets.calibration)} held-out images are left to predict the quantile of the loss; it needs {least}"
        )
    scores = np.log(work.losses()[:, place] + TINY)
    both = []
    for places in (sets.calibration, work.used):
        both += [
            quantile_attack.image_features(np.asarray(to_unit(space.decode(sets.images.x[places])))),
            scores[places],
        ]
    protocol = {"t": settings["loss_t"][place], "quantile": 0.1, "fitted_on": len(sets.calibration)}
    return work.divided("quantile", quantile_attack.quantile_scores(*both, seed=settings["seed"]), **protocol)


_SCORES = {
    "loss_t": _loss_t,
    "secmi": _secmi,
    "pia": _pia,
    "pian": _pian,
    "sima": _sima,
    "clid": _clid,
    "quantile": _quantile,
}
