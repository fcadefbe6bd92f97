"""How much is enough: the forget level, the look-alikes it is measured against, and the rule that stops a run.

The target of unlearning is the loss of a model that never saw the images, not infinity. With the same noises for every image
and model,

    forget_level = (l - l_0) / (l* - l_0)

where ``l`` is the mean denoising loss of the model on the forget images, ``l_0`` that of the starting model, and ``l*`` the
target: the loss of a retrained model on the same images (the definition), or that of the starting model on the held-out
images that look most like each of them. 0 is untouched, 1 as if never seen, above 1 over-unlearned: a loss above that of a
retrained model is itself a trace. This is our own design, from no paper; the thresholds are ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxunlearn.errors import mean_squares
from jaxunlearn.objectives.probes import probe_levels, strata
from jaxunlearn.schedule import Schedule
from jaxunlearn.types import Array, Error, Example, Predict, PyTree

STATUSES = ("untouched", "partial", "retrain_level", "over_unlearned", "no_gap", "collapsed")
"""What a level means: below .1, below .8, up to 1.2, above; ``no_gap``: nothing to measure; ``collapsed``: not finite."""


ProbeLosses = Callable[[PyTree, Example], np.ndarray]
"""``(params, N images with their conditions) -> float64 [N, strata, noises]``, from :func:`make_probe_losses`."""


def make_probe_losses(
    predict: Predict,
    schedule: Schedule,
    key: Array,
    *,
    error: Error = mean_squares,
    count: int = 16,
    noises: int = 4,
    t_min: int = 0,
    t_max: int | None = None,
) -> ProbeLosses:
    """Losses on fixed probes: the same t and noises for every image and model, and the noises apart, to know their spread.

    Make it once: it compiles once for each number of images.

    Args:
      predict: the model.
      schedule: the noise schedule.
      key: JAX key of the noises.
      error: of a residual; wrap it to measure a selection in time or frequency.
      count: number of strata of t; their midpoints are ``objectives.probes.strata``.
      noises: draws of eps at each t, at least 2.
      t_min: first timestep.
      t_max: one past the last (T if None).

    Raises:
      ValueError: fewer than 2 noises, or a bad range of t.
    """
    if noises < 2:
        raise ValueError(f"probes need noises >= 2 to know their spread, got {noises}")
    strata(schedule.num_steps, count, t_min=t_min, t_max=t_max)
    options = {"error": error, "count": count, "noises": 1, "t_min": t_min, "t_max": t_max}

    @jax.jit
    def losses(params, example, keys):
        return jax.lax.map(lambda k: probe_levels(predict, params, example, schedule, k, **options), keys)

    def probe_losses(params, example):
        return np.moveaxis(np.asarray(losses(params, example, jax.random.split(key, noises)), np.float64), 0, -1)

    return probe_losses


class ForgetLevel(NamedTuple):
    """How far the forget images are unlearned.

    Attributes:
      level: ratio of means over the forget images; NaN for ``no_gap`` and ``collapsed``.
      low: lower end of its interval.
      high: upper end.
      per_image: float64 [N], the level of each image; NaN where the image has no gap of its own.
      gap: ``l* - l_0``, the mean over the forget images.
      gap_error: its standard error.
      status: one of :data:`STATUSES`.
    """

    level: float
    low: float
    high: float
    per_image: np.ndarray
    gap: float
    gap_error: float
    status: str


def _status(level: float) -> str:
    if level < 0.1:
        return "untouched"
    if level < 0.8:
        return "partial"
    return "retrain_level" if level <= 1.2 else "over_unlearned"


def _own_targets(
    target: np.ndarray, nearest: np.ndarray | None, count: int, rng: np.random.Generator, resamples: int
) -> tuple[np.ndarray, np.ndarray]:
    """The target of each forget image from its look-alikes [N, K, R], and how their mean varies with the look-alikes [S].

    One look-alike may stand for several images: the distinct ones are drawn, each with all that it contributes.
    """
    share = np.full((count, len(target)), 1 / len(target))
    if nearest is not None:
        share = np.zeros_like(share)
        np.add.at(share, (np.arange(count)[:, None], nearest), 1 / nearest.shape[1])
    of_look_alike = target.mean(axis=(1, 2))
    part = share.mean(axis=0) * of_look_alike - share.T @ (share @ of_look_alike) / count  # they sum to 0
    n = len(target) if nearest is None else nearest.shape[1]
    pick = rng.integers(0, len(target), (resamples, len(target)))
    return np.tensordot(share, target, axes=1), np.sqrt(n / (n - 1)) * part[pick].sum(axis=1)


def _resampled(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Means of the last axis of values [..., n] under resampling by index [S, ..., n]: spread as that of a true redraw."""
    n = values.shape[-1]
    mean = values.mean(axis=-1)
    drawn = np.take_along_axis(np.broadcast_to(values, index.shape), index, axis=-1).mean(axis=-1)
    return mean + np.sqrt(n / (n - 1)) * (drawn - mean)


def forget_level(
    current: np.ndarray,
    start: np.ndarray,
    target: np.ndarray,
    *,
    paired: bool,
    nearest: np.ndarray | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> ForgetLevel:
    """The forget level with its interval, from losses on the same probes (one :func:`make_probe_losses`).

    The interval is a bootstrap over the noises, the same resample for all models, and over the look-alikes where the target
    is them; the forget images are all there are and are not resampled. It is deterministic. With few noises it is rough.

    Args:
      current: losses of the unlearned model on the forget images [N, K, R]: images, strata of t, noises.
      start: those of the starting model, [N, K, R].
      target: of a retrained model on the same images [N, K, R] (``paired=True``), or of the starting model on look-alikes
        [M, K, R] with M >= 2 (``paired=False``). A number of your own: ``np.full(start.shape, value)``, paired.
      paired: which of both.
      nearest: the look-alikes of each forget image, [N, k] positions in ``target`` with k >= 2 (:func:`look_alikes`); None:
        all of them stand for every image.
      confidence: of the interval, in (0, 1).
      resamples: of the bootstrap.
      seed: of the bootstrap.

    Returns:
      :class:`ForgetLevel`. ``no_gap`` where the target lies less than two standard errors above the start: then there is
      no level and no stop rule. ``collapsed`` where a current loss is not finite.

    Raises:
      ValueError: shapes that do not fit; start or target not finite; too few noises or look-alikes; positions of
        look-alikes that are not there.
    """
    current, start, target = (np.asarray(x, np.float64) for x in (current, start, target))
    _check_losses(current, start, target, paired)
    _check_nearest(nearest, start, target, paired)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    rng = np.random.default_rng(seed)
    noises = rng.integers(0, start.shape[2], (resamples, *start.shape[1:]))

    def over_noises(per_probe):
        return _resampled(per_probe, noises).mean(axis=1)

    spread = 0.0
    if not paired:
        target, spread = _own_targets(target, nearest, len(start), rng, resamples)
    own_gaps = target - start
    gaps = over_noises(own_gaps.mean(axis=0)) + spread
    gap, gap_error = float(own_gaps.mean()), float(gaps.std(ddof=1))
    nothing = ForgetLevel(math.nan, math.nan, math.nan, np.full(len(start), math.nan), gap, gap_error, "")
    if not np.all(np.isfinite(current)):
        return nothing._replace(status="collapsed")
    if not gap > 2 * gap_error:
        return nothing._replace(status="no_gap")
    change = (current - start).mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        levels = over_noises(change) / gaps
    level = float(change.mean() / gap)
    tail = (1 - confidence) / 2
    low, high = np.quantile(levels[gaps > 0], [tail, 1 - tail])
    own_gap = own_gaps.mean(axis=(1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        own = np.where(own_gap > 2 * gap_error, (current - start).mean(axis=(1, 2)) / own_gap, math.nan)
    return ForgetLevel(level, float(low), float(high), own, gap, gap_error, _status(level))


def _check_losses(current: np.ndarray, start: np.ndarray, target: np.ndarray, paired: bool) -> None:
    problems = []
    if start.ndim != 3 or min(start.shape, default=0) < 1 or start.shape[-1] < 2:
        problems.append(f"losses must be [images, strata, noises >= 2], got start {start.shape}")
    if current.shape != start.shape:
        problems.append(f"current and start must be of the same images and probes, got {current.shape}, {start.shape}")
    if target.ndim != 3 or target.shape[1:] != start.shape[1:] or (paired and target.shape != start.shape):
        problems.append(f"target must be on the same probes{' and images' if paired else ''}, got {target.shape}")
    if not paired and target.ndim == 3 and len(target) < 2:
        problems.append(f"look-alikes must be at least 2, got {len(target)}")
    if not (np.all(np.isfinite(start)) and np.all(np.isfinite(target))):
        problems.append("the losses of the starting model and of the target must be finite")
    if problems:
        raise ValueError("\n".join(problems))


def _check_nearest(nearest: np.ndarray | None, start: np.ndarray, target: np.ndarray, paired: bool) -> None:
    if nearest is None:
        return
    if paired:
        raise ValueError("nearest says which look-alikes stand for an image; a paired target has none")
    if nearest.ndim != 2 or len(nearest) != len(start) or nearest.shape[1] < 2:
        raise ValueError(f"nearest must be [{len(start)} forget images, look-alikes >= 2], got {nearest.shape}")
    if nearest.min() < 0 or nearest.max() >= len(target):
        raise ValueError(
            f"nearest must be positions of the {len(target)} look-alikes, got {nearest.min()}..{nearest.max()}"
        )


def _nearest(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """rms distance [N, M] in the images' own unit, in float64."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (images, references))
    squares = np.sum(a**2, axis=1)[:, None] + np.sum(b**2, axis=1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0) / a.shape[1])


def look_alikes(
    forget: np.ndarray, held_out: np.ndarray, keep: np.ndarray, *, count: int = 64, quantile: float = 0.99
) -> np.ndarray:
    """Which held-out images stand for each forget image: the nearest ones, refused where none is near.

    A forget image that is unlike all others has a retrain level far above any held-out image, and a rule that stops at theirs
    would stop far too early.

    Args:
      forget: [N,H,W,C].
      held_out: [M,H,W,C], never trained on.
      keep: [K,H,W,C], training images (a sample will do): how far from held-out images an ordinary image lies.
      count: number of look-alikes of each forget image (all held-out images where M is smaller).
      quantile: of the keep images' distances beyond which a forget image has no look-alikes.

    Returns:
      int64 [N, min(count, M)], indices into ``held_out``, nearest first.

    Raises:
      ValueError: fewer than 2 held-out or 2 keep images; a forget image without look-alikes.
    """
    if len(held_out) < 2 or len(keep) < 2 or not len(forget):
        raise ValueError(
            f"look_alikes needs forget images, 2 held-out and 2 keep images; got {len(forget)}, {len(held_out)}, {len(keep)}"
        )
    if count < 2:
        raise ValueError(f"look_alikes needs count >= 2, got {count}")
    limit = float(np.quantile(_nearest(keep, held_out).min(axis=1), quantile))
    distance = _nearest(forget, held_out)
    far = np.flatnonzero(distance.min(axis=1) > limit)
    if len(far):
        raise ValueError(
            f"{len(far)} of {len(forget)} forget images have no look-alikes: the held-out image nearest to number {far[0]} "
            f"is {distance[far[0]].min():.3g} away (rms), beyond {limit:.3g}, the {quantile:.0%} quantile of keep images. "
            "Measure against a model retrained without them"
        )
    return np.argsort(distance, axis=1, kind="stable")[:, :count]


# When to stop.


class Measurement(NamedTuple):
    """What a loop measured at a step.

    Attributes:
      step: the optimiser step.
      keep_ratio: keep loss over that of the starting model, on fixed images and noises.
      level: the forget level (its mean over images), or None where there is no yardstick.
    """

    step: int
    keep_ratio: float
    level: float | None = None


class Decision(NamedTuple):
    """What to do after the last measurement.

    Attributes:
      action: ``continue`` or ``stop``.
      reason: ``reached``, ``collapsed``, or empty.
      best_step: the step to return by the rule of :class:`StopRule`; None where no step was sound.
      last_sound_step: the last step before now whose keep ratio was below the warning; where a collapse restores to.
      warning: the last keep ratio lies at or above the warning.
      text: one sentence.
    """

    action: str
    reason: str
    best_step: int | None
    last_sound_step: int | None
    warning: bool
    text: str


@dataclasses.dataclass(frozen=True)
class StopRule:
    """Stops at the target level, or at a collapse. Pure: :meth:`decide` looks at the measurements alone, hence resumes.

    * **collapsed**: a keep ratio at or above ``collapse``, or a keep ratio or level that is not finite. A level of status
      ``no_gap`` must not be fed: give None instead.
    * **reached**: ``patience`` measurements in a row at or above ``target``.
    * A measurement is **sound** below ``warn``. The **best step**: where reached, the first of the row, if it is sound;
      otherwise the sound one whose level is nearest to the target (the earliest of equals); without levels the last sound
      one.

    Attributes:
      target: level at which enough is forgotten.
      collapse: keep ratio that counts as a collapse.
      warn: keep ratio that counts as damage.
      patience: measurements in a row, at least 1.

    Raises:
      ValueError: limits out of order, or not finite.

    >>> rule = StopRule(patience=2)
    >>> rule.decide([Measurement(5, 1.0, 0.4), Measurement(10, 1.0, 0.97), Measurement(15, 1.01, 1.0)])[:3]
    ('stop', 'reached', 10)
    """

    target: float = 0.95
    collapse: float = 1.5
    warn: float = 1.1
    patience: int = 2

    def __post_init__(self):
        if not (math.isfinite(self.target) and self.target > 0):
            raise ValueError(f"the target level must be finite and positive, got {self.target}")
        if not (1 <= self.warn <= self.collapse and math.isfinite(self.collapse)):
            raise ValueError(f"need 1 <= warn <= collapse < inf, got warn={self.warn}, collapse={self.collapse}")
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")

    def decide(self, measurements: Sequence[Measurement]) -> Decision:
        """The decision after the given measurements, oldest first. What follows a stop is not looked at.

        Raises:
          ValueError: steps that do not increase.
        """
        if any(b.step <= a.step for a, b in zip(measurements, measurements[1:])):
            raise ValueError(f"measurements must be in order of their steps, got {[m.step for m in measurements]}")
        row: list[Measurement] = []
        for i, m in enumerate(measurements):
            seen = measurements[: i + 1]
            if self._collapsed(m):
                text = f"collapsed at step {m.step}: keep loss {m.keep_ratio:.3g} times that of the start"
                return self._decision("collapsed", seen, self._best(seen), f"{text}, level {_text(m.level)}")
            row = [*row, m] if m.level is not None and m.level >= self.target else []
            if len(row) == self.patience:
                best = row[0].step if self._sound(row[0]) else self._best(seen)
                text = f"level {row[0].level:.3g} at step {row[0].step} reaches the target {self.target:.3g}"
                return self._decision("reached", seen, best, text)
        text = "no measurement yet"
        if measurements:
            last = measurements[-1]
            text = (
                f"step {last.step}: level {_text(last.level)}, keep loss {last.keep_ratio:.3g} times that of the start"
            )
        return self._decision("", measurements, self._best(measurements), text)

    def _decision(self, reason: str, seen: Sequence[Measurement], best: int | None, text: str) -> Decision:
        sound = [m.step for m in seen if self._sound(m)]
        warning = bool(seen) and not self._sound(seen[-1])
        return Decision("stop" if reason else "continue", reason, best, sound[-1] if sound else None, warning, text)

    def _collapsed(self, m: Measurement) -> bool:
        finite = math.isfinite(m.keep_ratio) and (m.level is None or math.isfinite(m.level))
        return not finite or m.keep_ratio >= self.collapse

    def _sound(self, m: Measurement) -> bool:
        return not self._collapsed(m) and m.keep_ratio < self.warn

    def _best(self, seen: Sequence[Measurement]) -> int | None:
        sound = [m for m in seen if self._sound(m)]
        levels = [m for m in sound if m.level is not None]
        if levels:
            return min(levels, key=lambda m: abs(m.level - self.target)).step
        return sound[-1].step if sound else None


def _text(level: float | None) -> str:
    return "unknown" if level is None else f"{level:.3g}"
