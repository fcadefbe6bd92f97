"""Guards: optax transformations that keep an update close to the old model, in a part of the weights or within a bound.

They are not losses. Compose them with :func:`optax.chain`; what freezes or bounds weights must act on the *final* update,
hence comes after the optimizer, and nothing may follow it:

    optax.chain(anchor(1e-2), optax.clip_by_global_norm(1.0), optax.adamw(1e-4), mask_updates(mask), plasticity_reserve())

======================  ======================================================================================
``anchor``              before the optimizer: adds the gradient of a quadratic pull to the old weights
``mask_updates``        multiplies the update by a 0/1 mask (:mod:`jaxunlearn.masks` computes masks from batches)
``l2_ball``             projects the new weights onto a ball around the old ones
``plasticity_reserve``  bounds the drift of every unit by a share of its own weights
======================  ======================================================================================

The old weights (``center``) are the parameters at ``init``, or a tree that is given, or ``"ref_params"``: then the state
holds no copy and every update must be given ``ref_params=``, as the training step does with ``TrainState.ref_params``. States
hold arrays only, so they checkpoint, and a resumed run keeps its old weights. All guards are functions of whole trees: they
run under jit, ``shard_map`` and pmap as the optimizer does.

No guard unlearns anything, and a bounded drift is no guarantee of privacy.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxunlearn.combine import tree_norm
from jaxunlearn.types import Array, PyTree

REF_PARAMS = "ref_params"
"""The ``center`` that is not stored but given to every update."""


class CenterState(NamedTuple):
    """State of a guard.

    Attributes:
      center: the old weights, or None where they are given to every update.
    """

    center: PyTree


class AnchorState(NamedTuple):
    """State of :func:`anchor`: the old weights and the precision, None where they are not stored."""

    center: PyTree
    precision: PyTree


class MaskState(NamedTuple):
    """State of :func:`mask_updates`: the mask, a tree of booleans."""

    mask: PyTree


class ReserveState(NamedTuple):
    """State of :func:`plasticity_reserve`: the old weights, or with ``recycle=False`` instead what is left per unit."""

    center: PyTree
    left: PyTree


def _copy(tree: PyTree) -> PyTree:
    # A state that shares memory with the parameters could not be donated with them.
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def _check_same(tree: PyTree, params: PyTree, what: str) -> None:
    wanted = jax.tree.map(jnp.shape, params), jax.tree.structure(params)
    got = jax.tree.map(jnp.shape, tree), jax.tree.structure(tree)
    if wanted != got:
        raise ValueError(f"{what} must be a tree of the structure and shapes of the parameters")


def _stored_center(center: PyTree | str | None, params: PyTree) -> PyTree:
    if isinstance(center, str):
        return None
    if center is not None:
        _check_same(center, params, "center")
    return _copy(params if center is None else center)


def _check_center(center: PyTree | str | None) -> None:
    if isinstance(center, str) and center != REF_PARAMS:
        raise ValueError(f"center must be None, a tree or 'ref_params', got {center!r}")


def _center(stored: PyTree, ref_params: PyTree, who: str) -> PyTree:
    if stored is not None:
        return stored
    if ref_params is None:
        raise ValueError(f"{who}(center='ref_params') needs update(..., ref_params=TrainState.ref_params)")
    return ref_params


def _need_params(params: PyTree, who: str) -> None:
    if params is None:
        raise ValueError(f"{who} needs the parameters: call update(updates, state, params)")


def _check_number(who: str, name: str, value: float, *, zero: bool = True) -> None:
    if not (math.isfinite(value) and (value >= 0 if zero else value > 0)):
        raise ValueError(f"{who} needs a finite {name} {'>= 0' if zero else '> 0'}, got {value}")


def anchor(
    weight: float, *, center: PyTree | str | None = None, precision: PyTree | None = None
) -> optax.GradientTransformationExtraArgs:
    """Adds ``weight * precision * (theta - center)``, the gradient of ``weight / 2 * sum precision (theta - center)^2``.

    Placed *before* the optimizer it acts like a term of the loss (L2-SP, Li et al. 2018, arXiv 1802.01483; with the Fisher
    information as precision, elastic weight consolidation, Kirkpatrick et al. 2017, arXiv 1612.00796).

    Args:
      weight: strength, not negative.
      center: see the module's text.
      precision: tree like the parameters, not negative; None means 1 everywhere. See ``fisher_precision`` and
        ``checkpoint_anchor`` in :mod:`jaxunlearn.objectives.anchor`, where the same pull is a term of the loss.

    Raises:
      ValueError: a bad weight; trees that do not fit the parameters (at init); no parameters or ``ref_params`` given.
    """
    _check_number("anchor", "weight", weight)
    _check_center(center)

    def init(params):
        if precision is not None:
            _check_same(precision, params, "precision")
        return AnchorState(_stored_center(center, params), None if precision is None else _copy(precision))

    def update(updates, state, params=None, *, ref_params=None, **extra_args):
        del extra_args
        _need_params(params, "anchor")
        old = _center(state.center, ref_params, "anchor")
        pull = jax.tree.map(lambda p, c: weight * (p - c), params, old)
        if state.precision is not None:
            pull = jax.tree.map(jnp.multiply, pull, state.precision)
        return jax.tree.map(lambda u, x: u + x.astype(u.dtype), updates, pull), state

    return optax.GradientTransformationExtraArgs(init, update)


def mask_updates(mask: PyTree) -> optax.GradientTransformationExtraArgs:
    """Keeps the update where the mask is true and makes it exactly 0 elsewhere, so that those weights stay bit-identical.

    After the optimizer it also stops weight decay and old momentum. Placed before it, only gradients are masked, as the
    published codes of SalUn and SFR-on do; masked weights then still decay.

    Args:
      mask: tree of booleans (or 0 and 1) like the parameters, of their shapes.

    Raises:
      ValueError: a mask that does not fit the parameters (at init), or values other than 0 and 1.

    >>> tx = optax.chain(optax.sgd(1.0), mask_updates({"w": jnp.array([True, False])}))
    >>> params = {"w": jnp.array([1.0, 1.0])}
    >>> tx.update({"w": jnp.ones(2)}, tx.init(params), params)[0]["w"]
    Array([-1.,  0.], dtype=float32)
    """
    for leaf in jax.tree.leaves(mask):
        if not isinstance(leaf, jax.core.Tracer) and not np.isin(np.asarray(leaf), (0, 1)).all():
            raise ValueError("mask_updates needs a mask of booleans (or 0 and 1)")

    def init(params):
        _check_same(mask, params, "mask")
        return MaskState(jax.tree.map(lambda x: jnp.asarray(x) != 0, mask))

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda m, u: jnp.where(m, u, jnp.zeros_like(u)), state.mask, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def l2_ball(
    radius: float, *, relative: bool = False, center: PyTree | str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Projects the new weights onto the ball ``|theta - center| <= radius`` (Euclidean norm of the whole tree).

    Inside the ball the update passes unchanged. A start outside of it is moved onto it by the first step.

    Args:
      radius: bound of the distance, positive.
      relative: measure the radius in norms of ``center``.
      center: see the module's text.

    Raises:
      ValueError: a bad radius; trees that do not fit; no parameters or ``ref_params`` given.
    """
    _check_number("l2_ball", "radius", radius, zero=False)
    _check_center(center)

    def init(params):
        return CenterState(_stored_center(center, params))

    def update(updates, state, params=None, *, ref_params=None, **extra_args):
        del extra_args
        _need_params(params, "l2_ball")
        old = _center(state.center, ref_params, "l2_ball")
        moved = jax.tree.map(lambda p, u, c: p + u - c, params, updates, old)
        distance = tree_norm(moved)
        bound = radius * tree_norm(old) if relative else radius
        scale = jnp.minimum(1, bound / jnp.where(distance > 0, distance, 1))
        inside = distance <= bound

        def project(p, u, c, m):
            return jnp.where(inside, u, (c + (scale * m).astype(m.dtype) - p).astype(u.dtype))

        return jax.tree.map(project, params, updates, old, moved), state

    return optax.GradientTransformationExtraArgs(init, update)


# The plasticity reserve. A unit is an index of a kernel's unit axis; every entry of a vector or scalar is its own unit.


def _unit_sum(x: Array, unit_axis: int) -> Array:
    """Sums of magnitudes per unit, with the summed axes kept: it multiplies x as it is."""
    magnitude = jnp.abs(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    if x.ndim < 2:
        return magnitude
    axes = tuple(i for i in range(x.ndim) if i != unit_axis % x.ndim)
    return jnp.sum(magnitude, axis=axes, keepdims=True)


def unit_drift(params: PyTree, center: PyTree, unit_axis: int = -1) -> PyTree:
    """``D_u = sum |theta_u - center_u|`` of every unit, summed axes kept with length 1."""
    return jax.tree.map(lambda p, c: _unit_sum(p - c, unit_axis), params, center)


def unit_capacity(center: PyTree, capacity: float = 0.05, floor: float = 0.0, unit_axis: int = -1) -> PyTree:
    """``C_u = max(capacity * max(n_u, mean of n over the leaf's units), floor * size_u)`` with ``n_u = sum |center_u|``."""

    def of_leaf(c):
        norms = _unit_sum(c, unit_axis)
        size = c.size // norms.size
        return jnp.maximum(capacity * jnp.maximum(norms, jnp.mean(norms)), floor * size)

    return jax.tree.map(of_leaf, center)


def frozen_units(center: PyTree, capacity: float = 0.05, floor: float = 0.0, unit_axis: int = -1) -> Array:
    """Number of units without any capacity, which never move (a leaf of zeros while ``floor`` is 0): int32, to be logged."""
    leaves = jax.tree.leaves(unit_capacity(center, capacity, floor, unit_axis))
    return sum((jnp.sum(c == 0, dtype=jnp.int32) for c in leaves), start=jnp.zeros((), jnp.int32))


def plasticity_reserve(
    capacity: float = 0.05,
    *,
    floor: float = 0.0,
    recycle: bool = True,
    unit_axis: int = -1,
    center: PyTree | str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A per-unit bound on how far the weights may drift from the old ones.

    Inspired by the constrained plasticity reserve of Nikitin, Lukyanova and Kunin (arXiv 2103.08143): synaptic growth in
    spiking networks draws on a limited protein reserve. Their update rule was not available to us; this is our own, with
    its own bound: a per-unit L1 trust region around the old weights (kin to L2-SP).

    With the update p, the drift ``D_u`` (:func:`unit_drift`) and the capacity ``C_u`` (:func:`unit_capacity`):

        R_u = max(C_u - D_u, 0)
        G_u = sum |theta_u + p_u - center_u| - D_u
        p_u <- p_u R_u / G_u   where G_u > R_u

    so that ``D_u <= C_u`` holds for every unit after every step (the distance is convex along the step). Moving back
    refunds the reserve. A moving average of the weights obeys the bound too. The bound does not hold where another
    transformation follows this one.

    Args:
      capacity: share of a unit's own magnitude (at least the mean one of its leaf) that it may drift; 0 freezes.
      floor: capacity per entry that even a unit of zeros has; with 0 a leaf of zeros stays frozen (:func:`frozen_units`).
      recycle: False pays ``sum |p_u|`` for every step, back or forth, out of a reserve that is never refunded: it bounds
        the length of the path. What is left is reckoned at init and stored, hence not with ``center="ref_params"``.
      unit_axis: the axis of kernels that counts units; Flax and this library's layers have outputs last.
      center: see the module's text.

    Raises:
      ValueError: negative or non-finite capacity or floor; trees that do not fit; no parameters or ``ref_params`` given;
        ``recycle=False`` with ``center="ref_params"``.
    """
    _check_number("plasticity_reserve", "capacity", capacity)
    _check_number("plasticity_reserve", "floor", floor)
    _check_center(center)
    if not recycle and isinstance(center, str):
        raise ValueError(
            "plasticity_reserve(recycle=False) stores what is left of the reserve at init, before any ref_params are given: "
            "take center=None (the parameters at init) or a tree"
        )

    def init(params):
        if recycle:
            return ReserveState(_stored_center(center, params), None)
        if center is not None:
            _check_same(center, params, "center")
        return ReserveState(None, unit_capacity(params if center is None else center, capacity, floor, unit_axis))

    def scaled(update, reserve, cost):
        share = jnp.where(cost > reserve, reserve / jnp.where(cost > 0, cost, 1), 1)
        # Kept exact where nothing is scaled, and exactly 0 where nothing is left.
        return jnp.where(cost > reserve, (share * update).astype(update.dtype), update)

    def update(updates, state, params=None, *, ref_params=None, **extra_args):
        del extra_args
        _need_params(params, "plasticity_reserve")
        if not recycle:
            cost = jax.tree.map(lambda u: _unit_sum(u, unit_axis), updates)
            left = jax.tree.map(lambda r, c: r - jnp.minimum(c, r), state.left, cost)
            return jax.tree.map(scaled, updates, state.left, cost), ReserveState(None, left)
        old = _center(state.center, ref_params, "plasticity_reserve")
        limits = unit_capacity(old, capacity, floor, unit_axis)

        def bounded(u, p, c, limit):
            drift = _unit_sum(p - c, unit_axis)
            growth = _unit_sum(p + u - c, unit_axis) - drift
            return scaled(u, jnp.maximum(limit - drift, 0), growth)

        return jax.tree.map(bounded, updates, params, old, limits), state

    return optax.GradientTransformationExtraArgs(init, update)


GUARDS = {
    "anchor": anchor,
    "mask_updates": mask_updates,
    "l2_ball": l2_ball,
    "plasticity_reserve": plasticity_reserve,
}
"""The one registry of guards: name -> factory. ``anchor`` goes before the optimizer, the others after it."""
