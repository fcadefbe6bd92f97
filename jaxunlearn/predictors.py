"""Any model becomes a :data:`~jaxunlearn.types.Predict`: ``(params, x_t, t, cond) -> eps_hat``.

Objectives live in eps space only; this is the one place that converts other parameterisations
(diffusers' ``epsilon``, ``v_prediction`` and ``sample``).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxunlearn.registry import look_up
from jaxunlearn.schedule import Schedule, per_example
from jaxunlearn.types import Array, Predict, PyTree, TimeWeight


def from_linen(module: Any, **apply_kwargs) -> Predict:
    """A Flax Linen module called as ``module(x_t, t)``, or ``module(x_t, t, cond)`` where a condition is given."""

    def predict(params: PyTree, x_t: Array, t: Array, cond: PyTree = None) -> Array:
        args = (x_t, t) if cond is None else (x_t, t, cond)
        return module.apply({"params": params}, *args, **apply_kwargs)

    return predict


def from_nnx(graphdef: Any, *rest: PyTree) -> Predict:
    """A Flax NNX module split by ``graphdef, params, *rest = nnx.split(model, nnx.Param, ...)``.

    The first state is ``params``; further states (``rest``) are fixed.
    """
    from flax import nnx

    def predict(params: PyTree, x_t: Array, t: Array, cond: PyTree = None) -> Array:
        model = nnx.merge(graphdef, params, *rest)
        return model(x_t, t) if cond is None else model(x_t, t, cond)

    return predict


def from_equinox(static: PyTree, *, batched: bool = False) -> Predict:
    """An Equinox module split by ``params, static = eqx.partition(model, eqx.is_inexact_array)``.

    Equinox modules work on one example; they are mapped over the batch unless ``batched``.
    """
    import equinox
    import jax

    def predict(params: PyTree, x_t: Array, t: Array, cond: PyTree = None) -> Array:
        model = equinox.combine(params, static)
        call = model if batched else jax.vmap(model)
        return call(x_t, t) if cond is None else call(x_t, t, cond)

    return predict


def eps_from_v(predict_v: Predict, schedule: Schedule) -> Predict:
    """``eps_hat = alpha v_hat + sigma x_t`` for a model of ``v = alpha eps - sigma x0`` (Salimans and Ho 2022).

    Finite at zero terminal SNR, where alpha = 0.
    """

    def predict(params: PyTree, x_t: Array, t: Array, cond: PyTree = None) -> Array:
        v_hat = predict_v(params, x_t, t, cond)
        return per_example(schedule.alpha(t), x_t) * v_hat + per_example(schedule.sigma(t), x_t) * x_t

    return predict


def eps_from_x0(predict_x0: Predict, schedule: Schedule) -> Predict:
    """``eps_hat = (x_t - alpha x0_hat) / sigma`` for a model of the clean image.

    Raises:
      ValueError: the schedule has a step without noise.
    """
    if np.any(schedule.alphas_cumprod >= 1):
        raise ValueError("eps_from_x0 needs sigma > 0 at every timestep")

    def predict(params: PyTree, x_t: Array, t: Array, cond: PyTree = None) -> Array:
        x0_hat = predict_x0(params, x_t, t, cond)
        return (x_t - per_example(schedule.alpha(t), x_t) * x0_hat) / per_example(schedule.sigma(t), x_t)

    return predict


def to_eps(predict: Predict, prediction_type: str, schedule: Schedule) -> Predict:
    """The eps-predictor of a model with diffusers' ``prediction_type``.

    Raises:
      ValueError: a type other than ``epsilon``, ``v_prediction``, ``sample``.
    """
    conversions = {"epsilon": lambda model, _: model, "v_prediction": eps_from_v, "sample": eps_from_x0}
    return look_up("prediction_type", prediction_type, conversions)(predict, schedule)


NATIVE_WEIGHTS = {
    "epsilon": lambda schedule, t: jnp.ones(jnp.shape(t)),
    "v_prediction": lambda schedule, t: 1 + jnp.exp(-schedule.log_snr(t)),
    "sample": lambda schedule, t: jnp.exp(-schedule.log_snr(t)),
}
"""Squared error of the model's own output over that of eps, by prediction type: 1, ``1 / alpha^2``, ``(sigma / alpha)^2``."""


def native_weight(schedule: Schedule, prediction_type: str, *, cap: float = 20.0) -> TimeWeight:
    """The weight that gives a wrapped model the loss it was trained with, ``weighted(error, native_weight(...))``.

    ``|v_hat - v|^2 = |eps_hat - eps|^2 / alpha^2`` and ``|x0_hat - x0|^2 = (sigma / alpha)^2 |eps_hat - eps|^2``. At the
    noisiest steps these weights are huge (25,000 on the linear schedule): they are cut off at ``cap``, a value of our own.

    Args:
      schedule: the noise schedule.
      prediction_type: ``epsilon`` (the weight is 1), ``v_prediction`` or ``sample``.
      cap: the largest weight, positive; ``math.inf`` for the exact loss.

    Raises:
      ValueError: unknown type, a cap that is not positive, or a step with alpha = 0, where the weight has no value.
    """
    ratio = look_up("prediction_type", prediction_type, NATIVE_WEIGHTS)
    if not cap > 0:
        raise ValueError(f"native_weight needs cap > 0, got {cap}")
    if prediction_type != "epsilon" and schedule.alphas_cumprod[-1] == 0:
        raise ValueError(
            f"native_weight of {prediction_type} needs alpha > 0 at every timestep; the last one of this schedule has none "
            "(zero terminal SNR)"
        )
    return lambda t: jnp.minimum(ratio(schedule, t), cap)
