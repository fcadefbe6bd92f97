"""From the configuration to the parts of a training stage: schedules, the optimizer and its guards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax
from ml_collections import ConfigDict

from jaxunlearn import guards
from jaxunlearn.types import PyTree

LR_SCHEDULES = ("constant", "cosine")


def scheduler_json(config: ConfigDict) -> dict[str, Any]:
    """The configured noise schedule as diffusers writes it."""
    return {"_class_name": "DDPMScheduler", **config.scheduler.to_dict()}


def learning_rate(optimizer: ConfigDict, num_steps: int) -> optax.Schedule:
    """The learning rate as a function of the step."""
    if optimizer.lr_schedule == "constant":
        main = optax.constant_schedule(optimizer.learning_rate)
    else:
        main = optax.cosine_decay_schedule(optimizer.learning_rate, max(num_steps - optimizer.warmup_steps, 1))
    if not optimizer.warmup_steps:
        return main
    warmup = optax.linear_schedule(0.0, optimizer.learning_rate, optimizer.warmup_steps)
    return optax.join_schedules([warmup, main], [optimizer.warmup_steps])


def _optimizer(optimizer: ConfigDict, num_steps: int) -> tuple[optax.GradientTransformation, ...]:
    adamw = optax.adamw(
        learning_rate(optimizer, num_steps),
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
    )
    return optax.clip_by_global_norm(optimizer.clip_norm), adamw


def make_tx(optimizer: ConfigDict, num_steps: int) -> optax.GradientTransformation:
    """Clipping of the combined direction, then AdamW."""
    return optax.chain(*_optimizer(optimizer, num_steps))


def has_guards(unlearn: ConfigDict) -> bool:
    """Whether any guard compares with the starting parameters."""
    chosen = unlearn.guards
    return any(value is not None for value in (chosen.anchor_weight, chosen.l2_radius, chosen.reserve.capacity))


def make_guarded_tx(
    unlearn: ConfigDict, *, mask: PyTree | None = None, center: str | None = guards.REF_PARAMS
) -> optax.GradientTransformation:
    """The anchor, clipping, AdamW, the mask, the ball, the reserve: what bounds weights acts on the final update.

    Args:
      unlearn: ``config.unlearn``.
      mask: tree of booleans like the parameters; None where no mask is configured.
      center: ``"ref_params"`` where the state holds the starting parameters as ``ref_params``; None where the guards must
        hold their own copies.

    Raises:
      ValueError: a number out of its range.
    """
    chosen, before, after = unlearn.guards, [], []
    if chosen.anchor_weight is not None:
        before.append(guards.anchor(chosen.anchor_weight, center=center))
    if mask is not None:
        after.append(guards.mask_updates(mask))
    if chosen.l2_radius is not None:
        after.append(guards.l2_ball(chosen.l2_radius, relative=chosen.l2_relative, center=center))
    if chosen.reserve.capacity is not None:
        options = {"floor": chosen.reserve.floor, "recycle": chosen.reserve.recycle}
        # A reserve that is spent once and for all is reckoned from the parameters at init, which are the starting ones.
        own = center if chosen.reserve.recycle else None
        after.append(guards.plasticity_reserve(chosen.reserve.capacity, center=own, **options))
    return optax.chain(*before, *_optimizer(unlearn.optimizer, unlearn.num_steps), *after)


def ema_decay(max_decay: float) -> Callable:
    """diffusers' decay of the moving average: ``min(1 - (1 + step)^-0.75, max_decay)``, 0 at the first step."""
    import jax.numpy as jnp

    return lambda step: jnp.minimum(1 - (1.0 + step) ** -0.75, max_decay)
