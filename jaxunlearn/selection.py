"""Choosing a window of t and a band of frequencies from the images, the schedule and the model, without a grid search.

Four curves decide: the share of the forget images among the training images, from which follows where it is decided that one
comes out (:mod:`jaxunlearn.responsibility`), or else which frequencies are there at which t (:mod:`jaxunlearn.spectrum`); the
loss gap, what the model knows of the forget images; their spectrum against that of the others, what sets them apart.
:func:`choose` joins them by a fixed rule. This is our own design, from no paper; the thresholds are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxunlearn.errors import filtered, weighted
from jaxunlearn.forgetting import ProbeLosses
from jaxunlearn.frequency import CORNER, FILTERS, RadialSpectrum, radial_spectrum, shell_power
from jaxunlearn.responsibility import ResponsibilityWindow
from jaxunlearn.schedule import Schedule
from jaxunlearn.spectrum import TINY_POWER, cutoff_from_spectrum, resolved_bins, window_from_spectrum
from jaxunlearn.timesteps import window
from jaxunlearn.types import Error, Example, PyTree

MIN_KEEP = 16
"""Keep images without which the spectra are not compared: their spread is the yardstick of a difference."""


# What the model has learned of the forget images.


class LossGap(NamedTuple):
    """How much better the model knows the forget images than held-out ones, per t.

    Attributes:
      t: [K], rising.
      gap: [K], ``1 - loss(forget) / loss(held out)``: 0 as unknown images, 1 known by heart. Any positive scale will do.
      error: [K], standard error of the gap.
    """

    t: np.ndarray
    gap: np.ndarray
    error: np.ndarray


def loss_gap(
    probe_losses: ProbeLosses, params: PyTree, forget: Example, held_out: Example, t: np.ndarray, least: int = 2
) -> LossGap:
    """The relative gap of the losses on the same probes.

    Args:
      probe_losses: from :func:`jaxunlearn.forgetting.make_probe_losses`.
      params: of the model before unlearning.
      forget: N forget images with their conditions.
      held_out: M images that were never trained on.
      t: the probes' timesteps, ``objectives.probes.strata`` with the same count and range.
      least: the least M.

    Returns:
      The gap; its error is the spread over noises and over held-out images.

    Raises:
      ValueError: too few images, or t of another length than the probes.
    """
    if len(forget.x0) < 1 or len(held_out.x0) < max(least, 2):
        raise ValueError(
            f"loss_gap needs forget images and at least {max(least, 2)} held-out ones, "
            f"got {len(forget.x0)} and {len(held_out.x0)}"
        )
    known, unknown = probe_losses(params, forget), probe_losses(params, held_out)
    t = np.asarray(t)
    if t.shape != known.shape[1:2]:
        raise ValueError(f"t must name the {known.shape[1]} strata of the probes, got shape {t.shape}")
    mean = unknown.mean(axis=(0, 2))
    paired = known.mean(axis=0) - unknown.mean(axis=0)  # [K, R]: the same noises
    variance = paired.var(axis=1, ddof=1) / paired.shape[1] + unknown.mean(axis=2).var(axis=0, ddof=1) / len(unknown)
    return LossGap(t, -paired.mean(axis=1) / mean, np.sqrt(variance) / mean)


# The choice.


class Choice(NamedTuple):
    """A proposal for the forget term.

    Attributes:
      window: (t1, t2), half-open.
      filter: ``none`` or a name of ``frequency.FILTERS``.
      kind: ``ideal``.
      cutoff: None, one number, or (low, high) for ``band``; in Nyquist units.
      reasons: why, in whole sentences, in the order in which it was decided.
      curves: what is behind it, for plots: ``bins``, ``forget_power``, ``keep_power``, ``difference`` [K+1] (shell 0 is the
        zero frequency); ``resolved_bins``, ``cutoff`` [T]; ``gap_t``, ``gap``, ``gap_error``.
    """

    window: tuple[int, int]
    filter: str
    kind: str
    cutoff: float | tuple[float, float] | None
    reasons: tuple[str, ...]
    curves: Mapping[str, np.ndarray]


def apply_choice(choice: Choice, error: Error, num_steps: int, **filter_options: Any) -> Error:
    """The error with the proposed selections, for ``forget_error=``.

    Args:
      choice: the proposal.
      error: of the whole residual.
      num_steps: T; the window is weighted by T / (t2 - t1), so that means stay comparable.
      **filter_options: ``normalise``, ``backend``.
    """
    if choice.filter != "none":
        cutoffs = choice.cutoff if isinstance(choice.cutoff, tuple) else (choice.cutoff,)
        error = filtered(error, FILTERS[choice.filter](*cutoffs, choice.kind, **filter_options))
    if choice.window != (0, num_steps):
        error = weighted(error, window(*choice.window, num_steps=num_steps))
    return error


def choose_window(
    schedule: Schedule,
    spectrum: RadialSpectrum,
    gap: LossGap | None,
    *,
    decided: ResponsibilityWindow | None = None,
    share: float = 0.8,
    sigmas: float = 3.0,
) -> tuple[tuple[int, int], list[str]]:
    """The window, and why.

    With ``decided``, the timesteps in which it is decided that a forget image comes out:

    1. Pixel distances overstate what a network resolves, and the model says by how much. Up to where there is a significant
       gap (``gap > sigmas * error``) its answers point to the forget images, so its own middle of the decision lies there or
       later. Where that is cleaner than ``decided.middle``, the window moves there, by a factor in the SNR.
    2. It begins no later than where the images take shape (:func:`window_from_spectrum`): what has taken shape before it is
       decided has to go as well. At smaller t only detail is left, and ascent there damages that.

    Without ``decided``: what the timesteps in which the images take shape have in common with the shortest run that holds
    ``share`` of the gap; where they have less than a twentieth of T in common, the run alone. Each timestep of the gap stands
    for the range up to the middle between it and the next. Where nothing is known about something, the rest decides;
    everything where nothing is known at all.

    Args:
      schedule: the noise schedule.
      spectrum: of the forget images.
      gap: what the model knows, or None.
      decided: from :func:`jaxunlearn.responsibility.window_from_responsibility`, or None.
      share: of the gap that the run must hold, in (0, 1].
      sigmas: standard errors that count as significant.

    Raises:
      ValueError: a gap of another form, share outside (0, 1], a decision outside of the schedule.
    """
    num_steps = schedule.num_steps
    shape, shape_reason = _shape_window(schedule, spectrum)
    known, known_reason = _known_window(gap, num_steps, share if decided is None else 1.0, sigmas)
    if decided is not None:
        t1, t2 = decided.window
        reasons = [
            f"Among the training images it is decided in t = [{t1}, {t2}) that a forget image comes out.",
            known_reason,
        ]
        t1, t2 = _as_resolved(schedule, decided, known)
        if (t1, t2) != decided.window:
            reasons.append(f"The network resolves less than pixels tell: that is moved to t = [{t1}, {t2}).")
        start = min(t1, shape[0]) if shape is not None else t1
        return (start, t2), [*reasons, shape_reason, f"The window is [{start}, {t2})."]
    reasons = [shape_reason, known_reason]
    if known is None:
        return shape or (0, num_steps), [*reasons, "The window is the first." if shape else "The window is everything."]
    if shape is None:
        return known, [*reasons, "The window is where the model knows them."]
    both = max(shape[0], known[0]), min(shape[1], known[1])
    if both[1] - both[0] >= num_steps / 20:
        return both, [*reasons, f"The window is what both have in common: [{both[0]}, {both[1]})."]
    return known, [*reasons, "Both have too little in common; the window is where the model knows them."]


def _shape_window(schedule: Schedule, spectrum: RadialSpectrum) -> tuple[tuple[int, int] | None, str]:
    """Where the forget images take shape, and the sentence about it."""
    try:
        t1, t2 = window_from_spectrum(schedule, spectrum)
    except ValueError as error:
        return None, f"Their spectrum gives no window: {error}."
    return (t1, t2), f"The forget images take shape (bins 1 to {max(spectrum.size / 8, 2):.3g}) in t = [{t1}, {t2})."


def _as_resolved(schedule: Schedule, decided: ResponsibilityWindow, known: tuple[int, int] | None) -> tuple[int, int]:
    """The window of the decision, moved to where the model's knowledge ends if that is earlier."""
    (t1, t2), middle, num_steps = decided.window, decided.middle, schedule.num_steps
    if not (0 <= t1 < t2 <= num_steps and 0 <= middle <= num_steps):
        raise ValueError(f"decided must hold 0 <= t1 < t2 <= {num_steps} and a middle in that range, got {decided}")
    if known is None or decided.memorised or known[1] >= middle:
        return t1, t2
    log_snr = np.asarray(schedule.log_snr(np.arange(num_steps)), np.float64)
    change = log_snr[known[1]] - log_snr[min(middle, num_steps - 1)]
    if not np.isfinite(change):  # no signal at all in the middle
        return t1, t2
    t1, t2 = (int(np.sum(log_snr > log_snr[min(t, num_steps - 1)] + change)) for t in (t1, t2))
    return t1, t2


def _known_window(gap, num_steps, share, sigmas) -> tuple[tuple[int, int] | None, str]:
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    if gap is None:
        return None, "No loss gap was given: what the model knows is not considered."
    t, value, error = (np.asarray(x, np.float64) for x in gap)
    fits = t.ndim == 1 and t.size and t.shape == value.shape == error.shape and np.all(np.diff(t) > 0)
    if not fits or t[0] < 0 or t[-1] >= num_steps or not np.all(np.isfinite(value)) or not np.all(error >= 0):
        raise ValueError(f"a loss gap needs rising t in 0..{num_steps - 1} and finite gaps and errors of their number")
    mass = np.where((value > sigmas * error) & (value > 0), value, 0)
    if not mass.any():
        return None, "The loss gap is flat: at no t does the model know the forget images better than held-out ones."
    cumulative = np.concatenate([[0], np.cumsum(mass)])
    need = share * cumulative[-1] * (1 - 1e-9)
    edges = np.concatenate([[0], np.ceil((t[1:] + t[:-1]) / 2), [num_steps]]).astype(int)
    runs = [(i, j) for i in range(len(t)) for j in range(i + 1, len(t) + 1) if cumulative[j] - cumulative[i] >= need]
    first, last = min(runs, key=lambda run: (edges[run[1]] - edges[run[0]], run[0]))
    found = int(edges[first]), int(edges[last])
    return found, f"The model knows them in t = [{found[0]}, {found[1]}): {share:.0%} of its loss gap lies there."


def choose_filter(
    forget_power: np.ndarray,
    keep_power: np.ndarray,
    count: np.ndarray,
    resolved: float,
    size: int,
    *,
    share: float = 0.95,
    sigmas: float = 3.0,
    floor: float = 0.5,
) -> tuple[str, float | tuple[float, float] | None, list[str], np.ndarray]:
    """The band of frequencies in which the forget images differ from the others, and why.

    Shells above ``resolved`` are left out: ascent there can only inject noise. A radius below ``floor`` counts as ``floor``:
    two images differ in phase also where their powers are alike, and narrower filters left more copies wherever they were
    measured (``scripts/selection_study.py``). In the others the difference is ``count *
    |mean power of forget - mean power of keep|``, and 0 unless it is larger than ``sigmas`` standard errors by the spread of
    the keep images. With ``inner`` the last shell below which less than ``1 - share`` of it lies and ``outer`` the first up
    to which ``share`` of it lies: ``low_pass(outer)`` where inner is less than ``floor``, else ``band(inner, outer)``;
    ``high_pass(inner)`` where outer is the Nyquist radius or more, since little lies in the corners; ``none`` where both
    are so. Without any difference the band is what is resolved.

    Args:
      forget_power: [N, K+1] from :func:`jaxunlearn.frequency.shell_power`.
      keep_power: [M, K+1].
      count: [K+1], bins of the shells.
      resolved: radius in bins that is resolved at the clean end of the window.
      size: shorter side of the images in pixels.
      share: of the difference that lies below the outer radius, and above the inner one.
      sigmas: standard errors that count as significant.
      floor: the least outer radius in Nyquist units; never less than 2 bins.

    Returns:
      ``(filter, cutoff in Nyquist units, reasons, difference [K+1])``.
    """
    forget_power, keep_power = np.asarray(forget_power, np.float64), np.asarray(keep_power, np.float64)
    last = len(count) - 1
    shells = np.arange(last + 1)
    if last < 1:
        return "none", None, ["Images of one pixel have no frequencies: no filter."], np.zeros(1)
    nyquist = lambda bins: float(2 * bins / size)  # noqa: E731
    least = max(floor * size / 2, 2.0)
    found = (
        f"At the clean end of the window radii up to {resolved:.3g} of {last} bins are resolved; noise hides the rest."
    )
    if resolved < least:
        found += f" A filter keeps at least {least:.3g} bins."
    resolved = max(resolved, least)
    whole = resolved >= last
    reasons = ["At the clean end of the window the whole spectrum is resolved." if whole else found]
    everything = ("none", None) if whole else ("low_pass", nyquist(resolved))
    if len(keep_power) < MIN_KEEP:
        reasons.append(f"{len(keep_power)} keep images are too few to compare spectra ({MIN_KEEP} are needed).")
        return *everything, reasons, np.zeros(last + 1)
    change = np.abs(forget_power.mean(axis=0) - keep_power.mean(axis=0))
    spread = keep_power.std(axis=0, ddof=1) * np.sqrt(1 / len(forget_power) + 1 / len(keep_power))
    seen = (change > sigmas * spread) & (change > TINY_POWER) & (shells <= resolved)
    difference = np.where(seen, change * count, 0)
    if not difference.any():
        reasons.append("The spectra of forget and keep images do not differ beyond the spread of the keep images.")
        return *everything, reasons, difference
    cumulative = np.cumsum(difference) / difference.sum()
    outer = int(np.argmax(cumulative >= share - 1e-12))
    below = np.flatnonzero(cumulative <= 1 - share + 1e-12)
    inner = int(below[-1]) if len(below) else -1
    held = cumulative[outer] - (cumulative[inner] if inner >= 0 else 0)
    reasons.append(f"{held:.0%} of the difference between forget and keep spectra lies in bins {inner + 1} to {outer}.")
    # Shell k holds radii from k - 1/2 to k + 1/2.
    top = max(min(outer + 0.5, resolved), least)
    to_the_corner = outer >= size / 2
    if inner + 0.5 < least:
        return (*(("none", None) if to_the_corner else ("low_pass", nyquist(top))), reasons, difference)
    if to_the_corner:
        return "high_pass", nyquist(inner + 0.5), reasons, difference
    return "band", (nyquist(inner + 0.5), nyquist(top)), reasons, difference


def choose(
    schedule: Schedule,
    forget: np.ndarray,
    keep: np.ndarray,
    *,
    gap: LossGap | None = None,
    decided: ResponsibilityWindow | None = None,
) -> Choice:
    """A window and a filter for the forget term, by :func:`choose_window` and then :func:`choose_filter`. Deterministic.

    Args:
      schedule: the noise schedule.
      forget: the forget images [N,H,W,C] in the model's own range ([-1, 1], or scaled latents).
      keep: keep images [M,H,W,C]; some hundreds are enough.
      gap: from :func:`loss_gap`, or of your own; None decides without the model.
      decided: from :func:`jaxunlearn.responsibility.window_from_responsibility`; None takes the spectrum in its place.

    Raises:
      ValueError: no forget images, shapes that differ, values that are not finite.
    """
    forget, keep = np.asarray(forget, np.float64), np.asarray(keep, np.float64)
    if forget.ndim != 4 or not len(forget) or keep.shape[1:] != forget.shape[1:]:
        raise ValueError(
            f"choose needs forget and keep images [N,H,W,C] of one shape and at least one forget image, "
            f"got {forget.shape} and {keep.shape}"
        )
    if not (np.all(np.isfinite(forget)) and np.all(np.isfinite(keep))):
        raise ValueError("the images must be finite")
    spectrum = radial_spectrum(forget)
    span, reasons = choose_window(schedule, spectrum, gap, decided=decided)
    forget_power, count = shell_power(forget)
    keep_power = shell_power(keep).power if len(keep) else np.zeros((0, len(count)))
    try:
        bins = resolved_bins(schedule, spectrum)
        cutoffs = cutoff_from_spectrum(schedule, spectrum)
    except ValueError:
        # No structure: nothing is ever resolved, and choose_filter says what that means.
        bins, cutoffs = np.zeros(schedule.num_steps), np.full(schedule.num_steps, CORNER)
    name, cutoff, why, difference = choose_filter(forget_power, keep_power, count, bins[span[0]], spectrum.size)
    curves = {
        "bins": np.arange(len(count)),
        "forget_power": forget_power.mean(axis=0),
        "keep_power": keep_power.mean(axis=0) if len(keep) else np.full(len(count), np.nan),
        "difference": difference,
        "resolved_bins": bins,
        "cutoff": cutoffs,
    }
    if gap is not None:
        curves |= {"gap_t": np.asarray(gap.t), "gap": np.asarray(gap.gap), "gap_error": np.asarray(gap.error)}
    return Choice(span, name, "ideal", cutoff, tuple([*reasons, *why]), curves)
