r"""The likelihood of images under a diffusion model, by its probability-flow ODE (Song et al. 2021, arXiv 2011.13456, D.2).

In ``y = x / alpha`` and ``u = log(sigma / alpha)`` the ODE needs the noise prediction alone, no rates of the schedule::

    dy/du = e^u eps_hat(alpha y, t(u)),   alpha = 1 / sqrt(1 + e^(2u))
    log p(x) = log p_T(x_T) + D log alpha_T + integral of div_y(dy/du) over u - D log alpha_0

from the first noise level (t = 0) to the last; D is the number of values of an image. ``t(u)`` interpolates the index in the
table, so the model is asked at *floating* times. A table that the model looks t up in is refused: rounded times make the
right-hand side piecewise constant, which costs many more steps and a bias.

What is evaluated is the density at the table's first noise level. Its divergence is exact or estimated with random signs
(Hutchinson's estimator): the same signs for all models make their differences nearly exact.

diffrax (Kidger 2021) solves the ODE; it is imported when a likelihood is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.registry import unknown_name
from jaxunlearn.schedule import Schedule
from jaxunlearn.types import Array, Predict, PyTree

EXACT_LIMIT = 1024
"""Values of an image up to which the exact divergence is offered: it costs that many backward passes an evaluation."""

SAFETY = 2.0
"""A step is held to the tolerance divided by this, so that the result's error stays below ten times the tolerance."""

Prior = Callable[[Array], Array]
"""``x_T [H,W,C] -> log density`` in nats, of one image at the last noise level."""


class LogLikelihood(NamedTuple):
    """Likelihoods of N images.

    Attributes:
      log_p: [N], nats per image; NaN where ``failed``.
      steps: int32 [N], steps of the solver, the rejected ones too; six evaluations of the model each.
      failed: bool [N], the solver ran out of steps or met a number that is not finite.
    """

    log_p: Array
    steps: Array
    failed: Array


def standard_normal(x: Array) -> Array:
    """``log N(x; 0, I)``: what the last noise level of a schedule is meant to be."""
    return -0.5 * jnp.sum(x**2) - 0.5 * x.size * math.log(2 * math.pi)


def rademacher_probes(key: Array, images: int, count: int, shape: tuple[int, ...]) -> Array:
    """Random signs [images, count, *shape] for the divergence. Those of an image do not depend on how many others there are.

    Rademacher signs, because they are exact where the Jacobian is diagonal and never worse than normal numbers.
    """
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(images))
    return jax.vmap(lambda k: jax.random.rademacher(k, (count, *shape), jnp.float32))(keys)


def log_likelihood(
    predict: Predict,
    params: PyTree,
    x: Array,
    schedule: Schedule,
    *,
    probes: Array | None = None,
    exact: bool = False,
    chunk: int = 64,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    prior: str | Prior = "standard",
    cond: PyTree = None,
    max_steps: int = 4096,
    mode: str = "forward",
) -> LogLikelihood:
    """``log p(x)`` of each image, in nats. Pure; jit it. Every image has its own step sizes, so images do not mix.

    Args:
      predict: the model, of noise. It gets floating t, and batches of one image under ``vmap``.
      params: its parameters.
      x: [N,H,W,C], as the model takes images at t = 0.
      schedule: the noise schedule.
      probes: [N,K,H,W,C] random signs, see :func:`rademacher_probes`; None with ``exact``.
      exact: the exact divergence, for images of up to 1024 values.
      chunk: how many entries of the exact divergence are computed at once, to bound memory.
      rtol, atol: tolerances of a step. The error of an image in bits per value stays below about ten times them.
      prior: "standard" (normal), or a function, see :data:`Prior`. The standard normal is not quite what a table ends in:
        with alpha_T^2 = 4e-5 that costs up to 1e-3 bits per value, the same for all models.
      cond: condition of each image, a tree of [N, ...], or None.
      max_steps: of the solver, after which the image counts as failed.
      mode: how the model is differentiated, "forward" or "reverse"; the numbers are the same. Layers with a backward pass of
        their own (those of ``DiffusersModel.predict``) have no forward mode; ``DiffusersModel.predict_forward_mode`` has. On
        CPU the backward pass of a convolution inside the solver's loop is more than ten times slower.

    Returns:
      :class:`LogLikelihood`.

    Raises:
      ValueError: neither or both of probes and ``exact``, shapes that do not fit, too large images for ``exact``, numbers out
        of range, an unknown prior or mode, or a model that does not take floating times or has no forward mode.
    """
    x = jnp.asarray(x)
    _check(x, probes, exact, chunk, rtol, atol, prior, max_steps, mode)
    _check_model(predict, params, x, cond, mode)
    log_prior = standard_normal if prior == "standard" else prior
    last, size = schedule.last_step, math.prod(x.shape[1:])
    u = -0.5 * np.log(schedule.alphas_cumprod[[0, last]] / (1 - schedule.alphas_cumprod[[0, last]]))
    log_alpha = 0.5 * np.log(schedule.alphas_cumprod[[0, last]])

    def one(x, probes, cond):
        def rate(y, u):
            alpha = jax.lax.rsqrt(1 + jnp.exp(2 * u)).astype(x.dtype)
            t = schedule.time_of(-2 * u).astype(jnp.result_type(x.dtype, jnp.float32))
            given = None if cond is None else jax.tree.map(lambda c: c[None], cond)
            eps_hat = predict(params, (alpha * y)[None], t[None], given)[0]
            return (jnp.exp(u) * eps_hat).astype(y.dtype)

        def vector_field(u, state, _):
            value, jacobian = _differentiate(lambda y: rate(y, u), state[0], mode)
            divergence = _exact_trace(jacobian, x, chunk) if exact else _estimated_trace(jacobian, probes)
            return value, divergence / size

        start = (x / math.exp(log_alpha[0]), jnp.zeros((), x.dtype))
        (y, mean_divergence), steps, good = _solve(vector_field, start, u, rtol, atol, max_steps)
        log_p = log_prior(y * math.exp(log_alpha[1])) + size * (mean_divergence + log_alpha[1] - log_alpha[0])
        good &= jnp.isfinite(log_p)
        return LogLikelihood(jnp.where(good, log_p, jnp.nan), steps, ~good)

    return jax.vmap(one)(x, None if exact else jnp.asarray(probes, x.dtype), cond)


def _solve(vector_field, start, u, rtol, atol, max_steps):
    """The state at u[1], the number of steps, and whether the solver got there."""
    import diffrax

    def norm(error):
        # The divergence per value is held to the tolerance on its own: among the D values of the image its error would
        # count 1/D of the mean square.
        return SAFETY * jnp.maximum(jnp.sqrt(jnp.mean(error[0] ** 2)), jnp.abs(error[1]))

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        diffrax.Dopri5(),
        t0=jnp.asarray(u[0], start[0].dtype),
        t1=jnp.asarray(u[1], start[0].dtype),
        dt0=None,
        y0=start,
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol, norm=norm),
        max_steps=max_steps,
        throw=False,
        adjoint=diffrax.ForwardMode(),
    )
    end = jax.tree.map(lambda leaf: leaf[-1], solution.ys)
    return end, solution.stats["num_steps"].astype(jnp.int32), solution.result == diffrax.RESULTS.successful


def _differentiate(function, y: Array, mode: str):
    """The value, and the Jacobian (or its transpose: the trace is the same) as a linear function."""
    if mode == "forward":
        return jax.linearize(function, y)
    value, pull = jax.vjp(function, y)
    return value, lambda v: pull(v)[0]


def _estimated_trace(jacobian, probes: Array) -> Array:
    """Mean over the probes of ``v . J v``."""
    return jnp.mean(jax.vmap(lambda v: jnp.sum(jacobian(v) * v))(probes))


def _exact_trace(jacobian, x: Array, chunk: int) -> Array:
    """The sum of the Jacobian's diagonal, ``chunk`` entries at a time."""
    chunk = min(chunk, x.size)

    def entry(index):
        unit = (jnp.arange(x.size) == index).astype(x.dtype).reshape(x.shape)
        return jnp.sum(jacobian(unit) * unit)  # an index beyond the image has no unit vector and adds nothing

    rows = jnp.arange(-(-x.size // chunk) * chunk).reshape(-1, chunk)
    if len(rows) == 1:
        return jnp.sum(jax.vmap(entry)(rows[0]))
    return jnp.sum(jax.lax.map(lambda part: jnp.sum(jax.vmap(entry)(part)), rows))


def _check(x, probes, exact, chunk, rtol, atol, prior, max_steps, mode) -> None:
    problems = []
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        problems.append(f"x must be floating [N,H,W,C], got {x.dtype} {x.shape}")
    if exact == (probes is not None):
        problems.append("give probes (random signs [N,K,H,W,C]), or exact=True without probes")
    elif probes is not None and (
        jnp.ndim(probes) != x.ndim + 1 or jnp.shape(probes)[:1] + jnp.shape(probes)[2:] != x.shape
    ):
        problems.append(f"probes must be [N,K,H,W,C] for x {x.shape}, got {jnp.shape(probes)}")
    if exact and math.prod(x.shape[1:]) > EXACT_LIMIT:
        problems.append(f"exact: {math.prod(x.shape[1:])} values an image; allowed: up to {EXACT_LIMIT}; give probes")
    if isinstance(prior, str) and prior != "standard":
        problems.append(f"prior {prior!r}; allowed: 'standard', or a function of one image")
    if mode not in ("forward", "reverse"):
        problems.append(unknown_name("mode", mode, ("forward", "reverse")))
    for name, value in (("rtol", rtol), ("atol", atol), ("chunk", chunk), ("max_steps", max_steps)):
        if not value > 0:
            problems.append(f"{name} must be positive, got {value}")
    if problems:
        raise ValueError("\n".join(problems))


def _check_model(predict: Predict, params: PyTree, x: Array, cond: PyTree, mode: str) -> None:
    """Tries the model with floating t, and its derivative, without computing anything."""
    t = jax.ShapeDtypeStruct((1,), jnp.result_type(x.dtype, jnp.float32))
    one = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    given = None if cond is None else jax.tree.map(lambda c: jax.ShapeDtypeStruct((1, *c.shape[1:]), c.dtype), cond)
    try:
        jax.eval_shape(predict, params, one, t, given)
    except TypeError as error:
        raise ValueError(
            "the likelihood asks the model at floating times, which it does not take (a table over t?); embed t with a "
            f"function of it: {str(error).splitlines()[0]}"
        ) from error
    if mode == "reverse":
        return

    def derivative(p, x, t, c):
        # Under vmap, as in the solver: alone, a layer without a forward mode is found out only when it is compiled.
        return jax.vmap(jax.linearize(lambda x: predict(p, x, t, c), x)[1])(x[None])

    try:
        jax.eval_shape(derivative, params, one, t, given)
    except TypeError as error:
        raise ValueError(
            "the model has no forward mode (a layer with a backward pass of its own); give DiffusersModel's "
            f"predict_forward_mode, or mode='reverse': {str(error).splitlines()[0]}"
        ) from error
