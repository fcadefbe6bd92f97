"""Which weights matter: masks for :func:`jaxunlearn.guards.mask_updates`, computed from batches of images.

``forget`` and ``keep`` batches are sequences of ``(Example, Draw)``; the gradient of a batch is that of the mean denoising
error of its noised images (DDPM, Ho et al. 2020, Eq. 14), and is clipped to norm 1 as in the published codes. Give models
without dropout. The masks are made once, on the host, before unlearning starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.combine import tree_norm
from jaxunlearn.errors import sum_squares
from jaxunlearn.objectives.denoise import denoising_error
from jaxunlearn.schedule import Schedule
from jaxunlearn.types import Draw, Error, Example, Predict, PyTree

Batches = Iterable[tuple[Example, Draw]]
"""Images with the randomness of their noising; ``Draw.u`` is not used."""

RATIO_TINY = 1e-15
"""Added to both Fisher informations before their ratio is taken (as in SFR-on)."""


def _mean_error(predict: Predict, schedule: Schedule, error: Error) -> Callable:
    def mean_error(params, example, draw):
        return jnp.mean(draw.t_weight * denoising_error(predict, params, example, draw, schedule, error))

    return mean_error


def _clipped_gradient(predict: Predict, schedule: Schedule, error: Error) -> Callable:
    gradient = jax.grad(_mean_error(predict, schedule, error))

    @jax.jit
    def clipped(params, example, draw):
        grads = gradient(params, example, draw)
        norm = tree_norm(grads)
        scale = 1 / jnp.maximum(norm, 1)
        return jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)) * scale, grads)

    return clipped


def _sum(trees: Iterable[PyTree], what: str) -> tuple[PyTree, int]:
    total, count = None, 0
    for tree in trees:
        total = tree if total is None else jax.tree.map(jnp.add, total, tree)
        count += 1
    if total is None:
        raise ValueError(f"{what} needs at least one batch")
    return total, count


def largest(scores: PyTree, fraction: float) -> PyTree:
    """True for the ``floor(fraction * P)`` largest of all P entries of the tree; ties go to the lower flat index.

    Raises:
      ValueError: fraction outside (0, 1], so small that nothing is left, or scores that are not finite or all 0.

    >>> largest({"a": jnp.array([1.0, 3.0]), "b": jnp.array([3.0, 3.0])}, 0.5)
    {'a': array([False,  True]), 'b': array([ True, False])}
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, scores))
    flat = np.concatenate([np.ravel(x) for x in leaves])
    wanted = int(np.floor(fraction * flat.size))
    if wanted == 0:
        raise ValueError(f"a fraction of {fraction} of {flat.size} weights is less than one weight")
    if not np.all(np.isfinite(flat)) or not np.any(flat > 0):
        raise ValueError("the scores of the weights must be finite and not all 0: no gradient reached the parameters")
    threshold = np.partition(flat, flat.size - wanted)[flat.size - wanted]
    chosen = flat > threshold
    ties = np.flatnonzero(flat == threshold)
    chosen[ties[: wanted - np.count_nonzero(chosen)]] = True
    ends = np.cumsum([x.size for x in leaves])[:-1]
    return jax.tree.unflatten(structure, [c.reshape(x.shape) for c, x in zip(np.split(chosen, ends), leaves)])


def saliency_mask(
    predict: Predict,
    schedule: Schedule,
    params: PyTree,
    forget: Batches,
    *,
    fraction: float = 0.5,
    error: Error = sum_squares,
) -> PyTree:
    """The weights that the forget images pull at most (SalUn, Fan et al. 2024, arXiv 2310.12508).

    Score of a weight: magnitude of the sum over batches of the clipped batch gradients.

    Args:
      predict: the model.
      schedule: its noise schedule.
      params: where the gradients are taken.
      forget: batches of forget images.
      fraction: share of all weights that may move, in (0, 1].
      error: of the denoising residual; wrap it to select times or frequencies.

    Returns:
      A tree of booleans like ``params``, for :func:`jaxunlearn.guards.mask_updates`.

    Raises:
      ValueError: no batch, a bad fraction, or gradients that are all 0.
    """
    gradient = _clipped_gradient(predict, schedule, error)
    total, _ = _sum((gradient(params, *batch) for batch in forget), "saliency_mask")
    return largest(jax.tree.map(jnp.abs, total), fraction)


def fisher_ratio_mask(
    predict: Predict,
    schedule: Schedule,
    params: PyTree,
    forget: Batches,
    keep: Batches,
    *,
    threshold: float = 1.0,
    error: Error = sum_squares,
) -> PyTree:
    """The weights that matter more for forget than for keep: ``(F_forget + 1e-15) / (F_keep + 1e-15) >= threshold``.

    ``F`` is the mean over batches of the squared clipped batch gradient (SFR-on, Huang et al. 2024, arXiv 2409.19732). There
    the mask holds for the forget step alone; :func:`jaxunlearn.guards.mask_updates` holds for the whole update.

    Args:
      predict: the model.
      schedule: its noise schedule.
      params: where the gradients are taken.
      forget: batches of forget images.
      keep: batches of keep images.
      threshold: positive; larger keeps fewer weights.
      error: of the denoising residual.

    Returns:
      A tree of booleans like ``params``.

    Raises:
      ValueError: no batch; a bad threshold; batches of unequal size (the square of a mean over B shrinks with B).
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be positive, got {threshold}")
    gradient = _clipped_gradient(predict, schedule, error)
    sizes = set()

    def fisher(batches, what):
        def squares():
            for example, draw in batches:
                sizes.add(len(example.x0))
                if len(sizes) > 1:
                    raise ValueError(f"all batches of fisher_ratio_mask must have one size, got {sorted(sizes)}")
                yield jax.tree.map(jnp.square, gradient(params, example, draw))

        total, count = _sum(squares(), f"fisher_ratio_mask: {what}")
        return jax.tree.map(lambda x: np.asarray(x, np.float64) / count, total)

    of_forget, of_keep = fisher(forget, "forget"), fisher(keep, "keep")
    return jax.tree.map(lambda f, k: (f + RATIO_TINY) / (k + RATIO_TINY) >= threshold, of_forget, of_keep)
