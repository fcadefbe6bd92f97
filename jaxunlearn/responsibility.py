"""When it is decided that a forget image comes out: its posterior share among the training images, per noise level.

For a forget image a0 among keep images x_i, with ``q = alpha^2 / sigma^2`` and ``D_i = |a0 - x_i|``,

    w(t) = E_eps copies / (copies + population / n * sum_i exp(-(q D_i^2 / 2 + sqrt(q) <a0 - x_i, eps>)))

is the share that the ideal denoiser of the training set gives to a0 at a0's own noised copies: 1 where the image is already
chosen (small t), near 0 where nothing points to it yet. Half is near ``SNR = 2 log(population / copies) / min D^2``. Pixel
distances overstate what a network resolves: treat the window as an upper end. Our own design, from no paper.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxunlearn.schedule import Schedule


def responsibility(
    schedule: Schedule,
    a0: np.ndarray,
    keep_x0: np.ndarray,
    *,
    copies: int = 1,
    population: int | None = None,
    probes: int = 64,
    seed: int = 0,
    every: int = 5,
    chunk: int = 1000,
) -> np.ndarray:
    """The share w(t), averaged over the forget images: float64 [T] in [0, 1], on the host.

    Args:
      schedule: the noise schedule.
      a0: forget images [N,H,W,C] in the model's own range.
      keep_x0: keep images [n,H,W,C], all of them or a sample.
      copies: number of identical training copies of each forget image.
      population: size of the keep set of which ``keep_x0`` is a sample; None means it is whole.
      probes: number of noises, the same for all t.
      seed: of the noises.
      every: timesteps between evaluations; linear in between.
      chunk: keep images at a time.

    Raises:
      ValueError: no images, a forget image that is still in keep, a count below 1.
    """
    population = len(keep_x0) if population is None else population
    counts = {"copies": copies, "population": population, "probes": probes, "every": every, "chunk": chunk}
    bad = [f"{name} must be at least 1, got {value}" for name, value in counts.items() if value < 1]
    if not len(a0) or not len(keep_x0):
        bad = [f"responsibility needs forget and keep images, got {len(a0)} and {len(keep_x0)}"]
    if bad:
        raise ValueError("\n".join(bad))
    a0, keep = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (a0, keep_x0))
    steps = np.unique(np.append(np.arange(0, schedule.num_steps, every), schedule.num_steps - 1))
    q = schedule.alphas_cumprod[steps] / (1 - schedule.alphas_cumprod[steps])
    eps = np.random.default_rng(seed).standard_normal((probes, a0.shape[1]))
    curves = [_one(image, keep, q, eps, copies, population / len(keep), chunk, i) for i, image in enumerate(a0)]
    return np.interp(np.arange(schedule.num_steps), steps, np.mean(curves, axis=0))


def _one(image, keep, q, eps, copies, per_row, chunk, number):
    others = np.full((len(q), len(eps)), -np.inf)  # log of the sum over keep images
    for start in range(0, len(keep), chunk):
        difference = image - keep[start : start + chunk]
        squares = np.sum(difference**2, axis=1)
        if not np.all(squares > 0):
            row = start + int(np.argmin(squares))
            raise ValueError(f"forget image {number} is keep image {row}: remove it from keep first")
        inner = eps @ difference.T
        for i, ratio in enumerate(q):
            exponent = -(ratio * squares / 2 + np.sqrt(ratio) * inner)
            top = exponent.max(axis=1)
            total = top + np.log(np.exp(exponent - top[:, None]).sum(axis=1))
            others[i] = np.logaddexp(others[i], total)
    # copies / (copies + per_row * e^others), without overflow.
    return np.exp(-np.logaddexp(0, others + np.log(per_row) - np.log(copies))).mean(axis=1)


class ResponsibilityWindow(NamedTuple):
    """The window in which the share of the forget images falls.

    Attributes:
      window: (t1, t2), half-open.
      middle: number of timesteps with a share above one half.
      memorised: the share never falls below ``high``, as for a prompt with one image: then the window is the last quarter.
    """

    window: tuple[int, int]
    middle: int
    memorised: bool


def window_from_responsibility(share: np.ndarray, *, high: float = 0.99, low: float = 0.05) -> ResponsibilityWindow:
    """``t1`` = number of timesteps with share >= high, ``t2`` = number with share > low.

    Args:
      share: [T], from :func:`responsibility`.
      high: below it the choice is no longer settled.
      low: above it something still points to the image.

    Raises:
      ValueError: not 0 <= low < high <= 1, or an empty window.
    """
    share = np.asarray(share, np.float64)
    if not 0 <= low < high <= 1:
        raise ValueError(f"need 0 <= low < high <= 1, got low={low}, high={high}")
    t1, t2, middle = int(np.sum(share >= high)), int(np.sum(share > low)), int(np.sum(share > 0.5))
    if t1 == len(share):
        return ResponsibilityWindow((3 * len(share) // 4, len(share)), middle, True)
    if t1 >= t2:
        raise ValueError(
            f"no timestep has a share in ({low}, {high}): the largest is {share.max():.3g}, so the image is never chosen; "
            "take the window from the spectrum"
        )
    return ResponsibilityWindow((t1, t2), middle, False)
