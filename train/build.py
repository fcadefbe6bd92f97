"""From the configuration to the parts of a training stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax
from ml_collections import ConfigDict

from jaxunlearn import combine, errors, frequency, methods, timesteps
from jaxunlearn.registry import look_up
from jaxunlearn.schedule import Schedule
from jaxunlearn.types import Combine, DrawFn, Error, Objective

ERRORS: dict[str, Error] = {"sum_squares": errors.sum_squares, "mean_squares": errors.mean_squares}
FILTERS = {"low_pass": frequency.low_pass, "high_pass": frequency.high_pass}
LR_SCHEDULES = ("constant", "cosine")
COMBINER_VALUES = {
    "weighted_sum": ("keep", "forget"),
    "fixed_norm": ("c",),
    "relative_norm": ("rho",),
    "erasediff": ("eta",),
}
"""The combiners that the launcher knows, and which keys of ``unlearn.combine`` each of them reads."""
METHODS = ("naive", "neggrad", "siss", "siss_no_is", "bernoulli", "erasediff")
"""The methods that the launcher knows: their options are keys of ``unlearn``, and a batch is all the data they need."""


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


def make_tx(optimizer: ConfigDict, num_steps: int) -> optax.GradientTransformation:
    """Clipping of the combined direction, then AdamW."""
    adamw = optax.adamw(
        learning_rate(optimizer, num_steps),
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
    )
    return optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), adamw)


def ema_decay(max_decay: float) -> Callable:
    """diffusers' decay of the moving average: ``min(1 - (1 + step)^-0.75, max_decay)``, 0 at the first step."""
    import jax.numpy as jnp

    return lambda step: jnp.minimum(1 - (1.0 + step) ** -0.75, max_decay)


def forget_error(unlearn: ConfigDict, num_steps: int) -> Error | None:
    """The error of the forget term with its selections, or None where nothing is selected."""
    select = unlearn.select
    error = ERRORS[unlearn.error]
    if select.filter != "none":
        error = errors.filtered(error, FILTERS[select.filter](select.cutoff, select.kind))
    if tuple(select.window) != (0, 0):
        error = errors.weighted(error, timesteps.window(*select.window, num_steps=num_steps))
    return None if error is ERRORS[unlearn.error] else error


def make_objective(unlearn: ConfigDict, schedule: Schedule) -> Objective:
    """The objective of the configured method."""
    method = look_up("method", unlearn.method, methods.METHODS)
    selected = forget_error(unlearn, schedule.num_steps)
    if selected is not None and method.forget_sign == 0:
        raise ValueError(
            f"method {unlearn.method!r} has no forget term to select in; "
            "set --config.unlearn.select.window=(0,0) and --config.unlearn.select.filter=none"
        )
    options = {name: unlearn[name] for name in method.options}
    return methods.make_objective(
        unlearn.method,
        schedule,
        error=ERRORS[unlearn.error],
        forget_error=selected,
        **options,
    )


def make_combine(unlearn: ConfigDict) -> Combine:
    """The configured combiner, or the method's own one."""
    method = look_up("method", unlearn.method, methods.METHODS)
    name = unlearn.combine.name or method.combiner
    look_up("combiner", name, COMBINER_VALUES)
    options = {key: unlearn.combine[key] for key in COMBINER_VALUES[name]}
    if name == "weighted_sum":
        # A term without a gradient has no weight: naive has no forget term, NegGrad no keep term.
        # Those two have weighted_sum as their own combiner, and its default weights name their terms.
        terms = method.combiner_options if method.combiner == name else ("keep", "forget")
        options = {key: options[key] for key in terms}
        return combine.weighted_sum(**options)
    return methods.make_combine(unlearn.method, name, **options)


def make_draw(unlearn: ConfigDict, objective: Objective, num_steps: int) -> DrawFn:
    """How the randomness of an unlearning step is drawn."""
    return timesteps.DRAWS[unlearn.draw](
        num_steps,
        t_min=unlearn.t_min,
        t_max=unlearn.t_max or num_steps,
        stratify_lam=unlearn.lam if unlearn.stratify else None,
        extra=objective.draw_extra,
    )
