r"""Anchors: a pull of the parameters to where they were, stronger where it matters, as one more term of a loss.

    anchor = 1/2 sum_i precision_i (theta_i - center_i)^2

with its gradient ``precision (theta - center)``. Three kinds: ``l2`` (precision 1); ``fisher`` (elastic weight consolidation,
the idea of Selective Amnesia: the Fisher diagonal on images to be kept); ``checkpoint_var`` (the idea of VDU, arXiv
2510.04058, of which only the abstract was available: parameters that varied little between checkpoints are held most).

Center and precision are as large as the parameters, so they are never captured by a function, which would bake them into the
program: they travel in ``TrainState.ref_params`` as an :class:`Anchor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxunlearn.errors import at_least_float32, sum_squares
from jaxunlearn.objectives.base import PerExampleObjective
from jaxunlearn.objectives.denoise import denoising_error
from jaxunlearn.schedule import Schedule
from jaxunlearn.types import Draw, Error, Example, Predict, PyTree


class Anchor(NamedTuple):
    """What an anchor pulls to, and how hard: pass it as ``TrainState(ref_params=...)``.

    Attributes:
      center: tree of the parameters' shapes.
      precision: tree of the same shapes, not negative.
    """

    center: PyTree
    precision: PyTree


KINDS = {
    "l2": "the starting parameters",
    "fisher": "Anchor(params, fisher_precision([squared_gradients(...), ...]))",
    "checkpoint_var": "checkpoint_anchor([params_1, params_2, ...])",
}
"""Kind of anchor -> what ``ref_params`` must be for it."""


def anchor_loss(params: PyTree, center: PyTree, precision: PyTree | None = None) -> jax.Array:
    """``1/2 sum precision (params - center)^2`` over the whole tree; precision 1 if None. A scalar, float32 or wider.

    >>> float(anchor_loss({"w": jnp.array([1.0, 2.0])}, {"w": jnp.zeros(2)}, {"w": jnp.array([2.0, 1.0])}))
    3.0
    """

    def leaf(p, c, scale):
        return 0.5 * jnp.sum(scale * jnp.square(at_least_float32(p) - at_least_float32(c)))

    scales = jax.tree.map(jnp.ones_like, center) if precision is None else precision
    return sum(jax.tree.leaves(jax.tree.map(leaf, params, center, scales)), start=jnp.zeros(()))


def anchored(objective: PerExampleObjective, kind: str = "l2") -> PerExampleObjective:
    """The objective with a further term ``anchor`` [B]: :func:`anchor_loss`, the same number for every example.

    Its weight is the combiner's: ``weighted_sum(keep=1, forget=-0.2, anchor=1e-3)``. An objective that compares with
    ``ref_params`` itself is given the anchor's center.

    Args:
      objective: any objective without an anchor.
      kind: ``l2``: ``ref_params`` is the parameters to stay near. ``fisher``, ``checkpoint_var``: ``ref_params`` is an
        :class:`Anchor` from :func:`fisher_precision` or :func:`checkpoint_anchor`.

    Raises:
      ValueError: unknown kind, an objective that has an anchor; ``ref_params`` missing or of the other form.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown anchor {kind!r}; known: {', '.join(KINDS)}")
    if "anchor" in objective.terms:
        raise ValueError(f"{objective.name} has an anchor already")
    name = f"{objective.name} with a {kind} anchor"

    def function(predict, params, batch, draw, ref_params):
        if isinstance(ref_params, Anchor) != (kind != "l2"):
            raise ValueError(f"{name} needs ref_params={KINDS[kind]}, got {type(ref_params).__name__}")
        center, precision = ref_params if kind != "l2" else (ref_params, None)
        terms, aux = objective.function(predict, params, batch, draw, center)
        pull = anchor_loss(params, jax.lax.stop_gradient(center), jax.lax.stop_gradient(precision))
        return {**terms, "anchor": jnp.broadcast_to(pull, draw.t.shape)}, aux

    return PerExampleObjective(
        function,
        terms=(*objective.terms, "anchor"),
        forget_sign=objective.forget_sign,
        draw_extra=objective.draw_extra,
        needs_ref=True,
        batch_extra=objective.batch_extra,
        name=name,
    )


def squared_gradients(
    predict: Predict,
    params: PyTree,
    example: Example,
    draw: Draw,
    schedule: Schedule,
    *,
    error: Error = sum_squares,
) -> PyTree:
    """Mean over the rows of the squared gradient of ``err(z_t)`` of that row alone: one batch's Fisher diagonal.

    Squares of single rows, not of the mean gradient, which would shrink with the batch. One row runs at a time
    (``lax.scan``), so the memory is that of one example and two trees.

    Args:
      predict: the model.
      params: where the Fisher diagonal is taken: the starting parameters.
      example: images to be kept, [B,H,W,C] in [-1, 1].
      draw: their t and eps, drawn at random as in training; ``t_weight`` multiplies the squares.
      schedule: the noise schedule.
      error: summed over pixels, as a log-likelihood is.

    Returns:
      A tree like ``params``, float32 or wider.
    """

    def loss(p, row):
        one, its_draw = jax.tree.map(lambda z: z[None], row)
        return denoising_error(predict, p, one, its_draw, schedule, error)[0]

    def add(total, row):
        squares = jax.tree.map(lambda g: row[1].t_weight * jnp.square(at_least_float32(g)), jax.grad(loss)(params, row))
        return jax.tree.map(jnp.add, total, squares), None

    zero = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)
    total, _ = jax.lax.scan(add, zero, (example, draw._replace(extra={})))
    return jax.tree.map(lambda x: x / draw.t.shape[0], total)


def fisher_precision(parts: Sequence[PyTree]) -> PyTree:
    """The mean of :func:`squared_gradients` of equal batches, divided by its mean over all parameters: mean 1.

    Take at least 256 rows in all. Selective Amnesia squares the gradient summed over all 1000 timesteps instead and does not
    normalise, so its weights (10, and 50 for Stable Diffusion) do not carry over.

    Raises:
      ValueError: no part, or a Fisher diagonal that is zero or not finite everywhere (concrete arrays are checked).
    """
    if not parts:
        raise ValueError("fisher_precision needs at least one tree from squared_gradients, got none")
    mean = jax.tree.map(lambda *x: sum(x) / len(x), *parts)
    leaves = jax.tree.leaves(mean)
    overall = sum((jnp.sum(x) for x in leaves), start=jnp.zeros(())) / sum(x.size for x in leaves)
    if not isinstance(overall, jax.core.Tracer) and not (jnp.isfinite(overall) and overall > 0):
        raise ValueError(f"the mean of the Fisher diagonal must be finite and positive, got {overall}")
    return jax.tree.map(lambda x: x / overall, mean)


def checkpoint_anchor(checkpoints: Sequence[PyTree], *, floor: float = 1e-6) -> Anchor:
    """``Anchor(mean, 1 / (variance + floor))`` of the checkpoints of one run, elementwise.

    The variance divides by the number of checkpoints. Whether the VDU paper does so, and its floor, were not verified.

    Args:
      checkpoints: parameter trees of late checkpoints, two or more.
      floor: added to the variance, positive; bounds the precision by ``1 / floor``.

    Raises:
      ValueError: fewer than two checkpoints, or a floor that is not positive.
    """
    if len(checkpoints) < 2:
        raise ValueError(f"checkpoint_anchor needs two or more checkpoints for a variance, got {len(checkpoints)}")
    if not floor > 0:
        raise ValueError(f"floor must be positive, got {floor}")

    def mean_of(*x):
        return sum(at_least_float32(jnp.asarray(v)) for v in x) / len(x)

    center = jax.tree.map(mean_of, *checkpoints)
    variance = jax.tree.map(lambda c, *x: mean_of(*(jnp.square(v - c) for v in x)), center, *checkpoints)
    return Anchor(center, jax.tree.map(lambda v: 1 / (v + floor), variance))
