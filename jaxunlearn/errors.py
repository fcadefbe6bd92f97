"""Errors: how a residual becomes one number per example, and what a selection in time or frequency does to it.

An :data:`~jaxunlearn.types.Error` is a function ``(residual [B,H,W,C], t [B]) -> [B]``. Selections wrap it, so they
work with every objective and on either term:

>>> import jax.numpy as jnp
>>> from jaxunlearn.frequency import low_pass
>>> from jaxunlearn.timesteps import window
>>> coarse_middle = weighted(filtered(sum_squares, low_pass(0.5)), window(250, 750))
>>> coarse_middle(jnp.ones((2, 8, 8, 1)), jnp.array([100, 500]))
Array([ 0., 64.], dtype=float32)

Selecting a window of t and a band of frequencies follows the abstract and the public reviews of arXiv 2510.17917. It is
a reconstruction: filter, cut-offs and weighting may differ from the authors' code.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxunlearn.frequency import masked_energy
from jaxunlearn.types import Array, Error, Filter, TimeWeight


def at_least_float32(x: Array) -> Array:
    """Half-precision arrays become float32; float32 and float64 stay. Errors and weights are never computed in halves."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def sum_squares(residual: Array, t: Array) -> Array:
    """``sum_hwc residual^2``: [B,H,W,C] -> [B]. The convention of SISS; its ``fixed_norm`` constants assume it."""
    del t
    residual = at_least_float32(residual)
    return jnp.sum(jnp.square(residual), axis=tuple(range(1, residual.ndim)))


def mean_squares(residual: Array, t: Array) -> Array:
    """``mean_hwc residual^2``: [B,H,W,C] -> [B]; ``sum_squares`` divided by H*W*C."""
    return sum_squares(residual, t) / (residual.size // residual.shape[0])


sum_squares.quadratic = mean_squares.quadratic = True


def is_quadratic(error: Error) -> bool:
    """Whether the error is a quadratic form of the residual: squares, also filtered and weighted.

    For such errors the mean over several targets has the gradient of the error to their mean. Another error that is one says
    so by an attribute ``quadratic = True``.

    >>> is_quadratic(weighted(sum_squares, lambda t: 2.0 * t)), is_quadratic(lambda residual, t: abs(residual).sum())
    (True, False)
    """
    return getattr(error, "quadratic", False)


def filtered(error: Error, filter: Filter) -> Error:
    """The error of the filtered residual.

    For :func:`sum_squares` and :func:`mean_squares` it is computed from the spectrum (Parseval: one ``rfft2``, no way
    back); any other error is given the filtered residual.
    """

    def filtered_error(residual: Array, t: Array) -> Array:
        if error is sum_squares:
            return masked_energy(residual, t, filter)
        if error is mean_squares:
            return masked_energy(residual, t, filter) / (residual.size // residual.shape[0])
        return error(filter(residual, t), t)

    filtered_error.quadratic = is_quadratic(error)
    return filtered_error


def weighted(error: Error, time_weight: TimeWeight) -> Error:
    """``time_weight(t) * error(residual, t)``.

    Where the weight is zero the term and its gradient are exactly zero, whatever the residual.
    """

    def weighted_error(residual: Array, t: Array) -> Array:
        weight = time_weight(t)
        inside = (weight != 0).reshape(weight.shape + (1,) * (residual.ndim - 1))
        return weight * error(jnp.where(inside, residual, 0), t)

    weighted_error.quadratic = is_quadratic(error)
    return weighted_error
