"""One training step: draw -> terms -> gradient of each term -> mean over devices -> combine -> optax.

The step knows no devices. It runs under jit, ``shard_map``, pmap or vmap; given the name of a mapped axis it averages the
gradients of the terms over it, *before* the combiner, which is not linear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import optax

from jaxunlearn.combine import tree_norm
from jaxunlearn.images import to_model
from jaxunlearn.types import Array, Aux, Batch, Combine, Draw, Objective, Predict, PyTree, Terms, TrainState

Metrics = dict[str, Array]


class TrainStep(Protocol):
    """``(state, batch, draw, *, axis_name=None) -> (state, metrics)`` on one device's share of the batch."""

    def __call__(
        self, state: TrainState, batch: Batch, draw: Draw, *, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]: ...


def on_device(batch: Batch) -> Batch:
    """The batch with its images in [-1, 1]; hosts ship bytes."""
    keep = batch.keep._replace(x0=to_model(batch.keep.x0))
    forget = batch.forget
    if forget is not None:
        forget = forget._replace(x0=to_model(forget.x0))
    extra = {k: to_model(v) if v.dtype == jnp.uint8 else v for k, v in batch.extra.items()}
    return Batch(keep, forget, extra)


def term_grads(
    objective: Objective,
    predict: Predict,
    params: PyTree,
    batch: Batch,
    draw: Draw,
    *,
    ref_params: PyTree = None,
) -> tuple[dict[str, PyTree], Terms, Aux]:
    """The gradient of each term's mean over the examples.

    One ``jax.grad`` per term: within one jit XLA merges their common forward pass and drops the branches that a term
    does not touch.

    Returns:
      ``(grads, means of the terms, means of the aux values)``; the means are scalars.
    """
    grads = {}
    for name in objective.terms:

        def mean_term(p, name=name):
            terms, aux = objective(predict, p, batch, draw, ref_params=ref_params)
            terms = {k: jnp.mean(v * draw.t_weight) for k, v in terms.items()}
            return terms[name], (terms, {k: jnp.mean(v) for k, v in aux.items()})

        grads[name], (terms, aux) = jax.grad(mean_term, has_aux=True)(params)
    return grads, terms, aux


def _micro_batches(tree: PyTree, count: int) -> PyTree:
    def split(x):
        if x.shape[0] % count:
            raise ValueError(f"a batch of {x.shape[0]} examples does not divide into {count} micro-batches")
        return x.reshape(count, x.shape[0] // count, *x.shape[1:])

    return jax.tree.map(split, tree)


def accumulated_term_grads(
    objective: Objective,
    predict: Predict,
    params: PyTree,
    batch: Batch,
    draw: Draw,
    *,
    micro_batches: int,
    ref_params: PyTree = None,
) -> tuple[dict[str, PyTree], Terms, Aux]:
    """:func:`term_grads` as the mean over equal micro-batches, one after the other (``lax.scan``), to save memory.

    Raises:
      ValueError: the number of examples is not a multiple of ``micro_batches``.
    """

    def grads_of(batch_and_draw):
        part, part_draw = batch_and_draw
        return term_grads(objective, predict, params, part, part_draw, ref_params=ref_params)

    if micro_batches == 1:
        return grads_of((batch, draw))
    parts = _micro_batches((batch, draw), micro_batches)
    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grads_of, jax.tree.map(lambda x: x[0], parts))
    )
    total, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, grads_of(part)), None), zero, parts)
    return jax.tree.map(lambda x: x / micro_batches, total)


def make_train_step(
    objective: Objective,
    combine: Combine,
    predict: Predict,
    tx: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    ema_decay: float | Callable[[Array], Array] | None = None,
) -> TrainStep:
    """The step of a method: pure, jit-able, of one device's share.

    Args:
      objective: what is optimised, see :mod:`jaxunlearn.objectives`.
      combine: how the term gradients become one direction, see :mod:`jaxunlearn.combine`.
      predict: the model.
      tx: optax transformation of the direction (clipping, AdamW, guards).
      micro_batches: number of equal parts into which a device's share is split to save memory.
      ema_decay: decay of the moving average of the parameters, a number or a function of the step; None for no average.

    Returns:
      ``step(state, batch, draw, *, axis_name=None) -> (state, metrics)``. ``batch`` and ``draw`` are a device's rows;
      ``axis_name`` names the mapped axis over which gradients and metrics are averaged. Metrics are scalars:
      ``loss/<term>``, ``grad_norm/<term>``, ``aux/<name>``, what the combiner reports, ``update_norm`` and ``finite``
      (1 unless the direction holds a NaN or an infinity).

    Raises:
      ValueError: the combiner would train *on* the forget images: its sign differs from the objective's.
    """
    if objective.forget_sign != combine.forget_sign:
        meaning = {-1: "ascends", 0: "does not use", 1: "descends"}
        raise ValueError(
            f"the objective {meaning[objective.forget_sign]} the forget term but the combiner "
            f"{meaning[combine.forget_sign]} it; choose a combiner with forget_sign={objective.forget_sign}"
        )
    if micro_batches < 1:
        raise ValueError(f"micro_batches must be at least 1, got {micro_batches}")
    # Guards may compare with the frozen original; other transformations do not see the argument.
    tx = optax.with_extra_args_support(tx)

    def step(state, batch, draw, *, axis_name=None):
        batch = on_device(batch)
        grads, terms, aux = accumulated_term_grads(
            objective, predict, state.params, batch, draw, micro_batches=micro_batches, ref_params=state.ref_params
        )
        if axis_name is not None:
            grads, terms, aux = jax.lax.pmean((grads, terms, aux), axis_name)
        direction, combine_state, metrics = combine.apply(grads, state.combine_state, state.step)
        updates, opt_state = tx.update(direction, state.opt_state, state.params, ref_params=state.ref_params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_decay is not None:
            if ema_params is None:
                raise ValueError("ema_decay needs state.ema_params: build the state with init_state(..., ema=True)")
            decay = ema_decay(state.step) if callable(ema_decay) else ema_decay
            ema_params = optax.incremental_update(params, ema_params, 1 - decay)
        metrics = {
            **{f"loss/{name}": value for name, value in terms.items()},
            **{f"aux/{name}": value for name, value in aux.items()},
            **metrics,
            "update_norm": tree_norm(updates),
            "finite": jnp.isfinite(tree_norm(direction)).astype(jnp.float32),
        }
        new_state = TrainState(state.step + 1, params, opt_state, combine_state, ema_params, state.ref_params)
        return new_state, metrics

    return step


def init_state(
    params: PyTree,
    tx: optax.GradientTransformation,
    combine: Combine,
    *,
    ema: bool = False,
    ref: bool = False,
) -> TrainState:
    """The state before the first step.

    ``params``, ``ema_params`` and ``ref_params`` are copies: a step that donates its state must free neither the caller's
    arrays nor one of them through the other.

    Args:
      params: starting parameters.
      tx: the step's optax transformation.
      combine: the step's combiner.
      ema: keep a moving average (give the step an ``ema_decay``).
      ref: keep the starting parameters for objectives and guards that compare with them.
    """

    def copy(tree):
        return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)

    params = copy(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        combine_state=combine.init(params),
        ema_params=copy(params) if ema else None,
        ref_params=copy(params) if ref else None,
    )
