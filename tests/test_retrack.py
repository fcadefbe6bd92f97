"""Redirection: golden target, weights, the identity between K targets and one, and its accuracy in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import Batch, Draw, Example, filtered, low_pass, mean_squares, retrack, sum_squares, surrogate, weighted
from jaxunlearn.errors import is_quadratic
from jaxunlearn.objectives import posterior_weights, redirect_target
from jaxunlearn.schedule import per_example
from jaxunlearn.step import term_grads
from jaxunlearn.timesteps import min_snr, window
from tests import oracle
from tests import tiny_model as tm
from tests.tiny_model import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCHEDULE = tm.SCHEDULE

# The worked example at t = 500: three neighbours, of which the first is the keep image of the example of SISS.
A0 = np.array([[-1.0, 0.75], [0.0, 0.5]]).reshape(1, 2, 2, 1)
EPS = np.array([[0.1, -0.2], [0.3, -0.4]]).reshape(1, 2, 2, 1)
NEIGHBOURS = np.array([[[0.5, -0.5], [0.25, 1.0]], [[-0.8, 0.7], [0.1, 0.4]], [[0.0, 0.0], [0.0, 0.0]]])
NEIGHBOURS = NEIGHBOURS.reshape(1, 3, 2, 2, 1)
WEIGHTS = [0.30413328, 0.34309011, 0.35277661]
TARGET = [-0.15489484, -0.00775199, 0.26795138, -0.38297089]


def golden(dtype):
    batch = Batch(Example(jnp.zeros((1, 2, 2, 1), dtype)), Example(jnp.asarray(A0, dtype)))
    batch = batch._replace(extra={"neighbours": jnp.asarray(NEIGHBOURS, dtype)})
    draw = Draw(jnp.array([500]), jnp.ones(1), jnp.asarray(EPS, dtype), jnp.zeros(1))
    alpha, sigma = SCHEDULE.alpha(draw.t), SCHEDULE.sigma(draw.t)
    w = posterior_weights(batch.forget.x0, batch.extra["neighbours"], draw.eps, alpha, sigma)
    mean = jnp.einsum("bk,bkhwc->bhwc", w, batch.extra["neighbours"])
    target = redirect_target(batch.forget.x0, mean, draw.eps, alpha, sigma)
    terms, aux = retrack(SCHEDULE)(lambda params, x, t, cond: jnp.zeros_like(x), None, batch, draw)
    return w, target, terms["forget"], aux["spread"]


def check_golden(dtype, tolerance):
    w, target, forget, spread = jax.jit(golden, static_argnums=0)(dtype)
    assert w.dtype == target.dtype == dtype
    np.testing.assert_allclose(w, [WEIGHTS], atol=tolerance)
    np.testing.assert_allclose(np.ravel(target), TARGET, atol=tolerance)
    np.testing.assert_allclose(forget, [0.24251715], atol=tolerance)
    np.testing.assert_allclose(spread, [0.05833454], atol=tolerance)
    np.testing.assert_allclose(forget + spread, [0.30085169], atol=tolerance)


def test_golden_values_in_float32():
    check_golden(jnp.float32, 1e-6)


@pytest.mark.usefixtures("x64")
def test_golden_values_in_float64():
    check_golden(jnp.float64, 1e-8)


def test_the_batches_of_the_other_tests_hold_mixed_and_one_hot_weights():
    a = tm.arrays(5, t=[10, 300, 500, 600, 999])
    alpha, sigma = oracle.alpha_sigma(oracle.linear_table(), a["t"])
    w, _, _, spread = oracle.redirection(a["a0"], a["neighbours"], a["eps"], alpha, sigma)
    got = posterior_weights(*(jnp.asarray(z) for z in (a["a0"], a["neighbours"], a["eps"], alpha, sigma)))
    np.testing.assert_allclose(got.sum(axis=1), 1, rtol=1e-6)
    assert w.max(axis=1)[0] > 0.999
    assert w.max(axis=1)[2:].max() < 0.9
    assert spread[1:].min() > 0


@pytest.mark.parametrize("t", [0, 250, 999])
def test_float32_target_at_256_is_that_of_float64(t):
    """On near neighbours, whose weights are not one-hot even at small t, and on far ones."""
    rng = np.random.default_rng(t)
    a0 = rng.uniform(-1, 1, (2, 256, 256, 3)).astype(np.float32)
    eps = rng.normal(size=a0.shape).astype(np.float32)
    apart = rng.normal(size=(2, 3, *a0.shape[1:]))
    alpha, sigma = oracle.alpha_sigma(oracle.linear_table(), np.full(2, t))
    apart[0] *= (sigma / alpha)[0] / np.sqrt(a0[0].size)
    neighbours = (a0[:, None] + apart).astype(np.float32)
    w, _, target, _ = oracle.redirection(a0, neighbours, eps, alpha, sigma)
    assert 0.01 < w[0].min() < w[0].max() < 0.99

    def run(a0, neighbours, eps, alpha, sigma):
        w = posterior_weights(a0, neighbours, eps, alpha, sigma)
        mean = jnp.sum(per_example(w, neighbours) * neighbours, axis=1)
        return w, redirect_target(a0, mean, eps, alpha, sigma)

    got_w, got = tm.evaluate(run, a0, neighbours, eps, alpha.astype(np.float32), sigma.astype(np.float32))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got_w, w.astype(float), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got, target.astype(float), rtol=1e-5, atol=1e-5 * np.abs(target).max())


ERRORS = {
    "plain": sum_squares,
    "mean": mean_squares,
    "low_pass": filtered(sum_squares, low_pass(0.5)),
    "window": weighted(sum_squares, window(250, 750, 1000)),
    "level": weighted(filtered(mean_squares, low_pass(0.7, "gaussian")), min_snr(SCHEDULE, 1.0)),
}


@pytest.mark.usefixtures("x64")
def test_the_loss_of_k_targets_is_the_forget_term_and_the_spread():
    batch, draw = tm.batch_and_draw(tm.arrays(6, dtype=np.float64, t=[3, 100, 300, 500, 700, 999]))
    start = tm.params(dtype=np.float64)
    near = batch.extra["neighbours"]

    def many(p, error):
        """sum_j w_j error(eps_hat - v_j), [B], with the weights by their definition."""
        alpha, sigma = (per_example(z, draw.eps) for z in (SCHEDULE.alpha(draw.t), SCHEDULE.sigma(draw.t)))
        a_t = alpha * batch.forget.x0 + sigma * draw.eps
        v = [(a_t - alpha * near[:, j]) / sigma for j in range(3)]
        w = jax.nn.softmax(jnp.stack([-0.5 * sum_squares(z, draw.t) for z in v]), axis=0)
        eps_hat = tm.predict(p, a_t, draw.t)
        return sum(w[j] * error(eps_hat - v[j], draw.t) for j in range(3))

    def run(p):
        out = {}
        for name, error in ERRORS.items():
            objective = retrack(SCHEDULE, forget_error=error)
            terms, aux = objective(tm.predict, p, batch, draw)
            gradient = term_grads(objective, tm.predict, p, batch, draw)[0]["forget"]
            of_many = jax.grad(lambda q, error=error: jnp.mean(many(q, error)))(p)
            out[name] = terms["forget"] + aux["spread"], many(p, error), gradient, of_many
        return out

    for together, want, gradient, wanted_gradient in tm.evaluate(run, start).values():
        np.testing.assert_allclose(together, want, rtol=1e-9)
        tm.close(gradient, wanted_gradient, 1e-9)


def test_other_errors_are_refused_unless_there_is_one_target():
    absolute = lambda residual, t: jnp.sum(jnp.abs(residual), axis=(1, 2, 3))  # noqa: E731
    batch, draw = tm.batch_and_draw(tm.arrays(2))
    for error in (absolute, weighted(absolute, window(0, 500)), filtered(absolute, low_pass(0.5))):
        assert not is_quadratic(error)
        objective = retrack(SCHEDULE, forget_error=error)
        with pytest.raises(ValueError, match="3 neighbours needs a quadratic forget error"):
            jax.eval_shape(lambda p, o=objective: o(tm.predict, p, batch, draw), tm.params())
        one = batch._replace(extra={"neighbours": batch.extra["neighbours"][:, :1]})
        jax.eval_shape(lambda p, o=objective, one=one: o(tm.predict, p, one, draw), tm.params())
    assert all(is_quadratic(error) for error in ERRORS.values())


def test_one_neighbour_is_a_surrogate():
    batch, draw = tm.batch_and_draw(tm.arrays(4))
    one = batch._replace(extra={"neighbours": batch.extra["surrogate"][:, None]})

    @jax.jit
    def run(p):
        return retrack(SCHEDULE)(tm.predict, p, one, draw), surrogate(SCHEDULE)(tm.predict, p, batch, draw)

    (many, aux), (single, none) = run(tm.params())
    tm.close(many, single, 1e-6)
    assert np.all(aux["spread"] == 0)
    assert none == {}


@pytest.mark.usefixtures("x64")
def test_the_ideal_denoiser_of_the_neighbours_has_no_forget_gradient():
    """If the keep set is exactly the K neighbours, the target is its posterior mean: the forget error is zero."""
    a = tm.arrays(5, dtype=np.float64, t=[0, 250, 500, 700, 999])
    batch, draw = tm.batch_and_draw(a)
    near = batch.extra["neighbours"]

    def ideal(params, x, t, cond):
        alpha, sigma = (per_example(z, x) for z in (SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
        distance = jnp.stack([jnp.sum((x - alpha * near[:, j]) ** 2, axis=(1, 2, 3)) for j in range(3)])
        w = jax.nn.softmax(-distance / (2 * sigma.ravel() ** 2), axis=0)
        mean = sum(per_example(w[j], x) * near[:, j] for j in range(3))
        return (x - alpha * mean) / sigma + params["shift"]

    objective = retrack(SCHEDULE)
    grads, terms, _ = jax.jit(lambda p: term_grads(objective, ideal, p, batch, draw))({"shift": jnp.zeros(())})
    assert terms["forget"] < 1e-16
    assert abs(grads["forget"]["shift"]) < 1e-8


def test_an_image_that_is_its_own_neighbour_is_told_the_noise_itself():
    batch, draw = tm.batch_and_draw(tm.arrays(3))
    same = batch._replace(extra={"surrogate": batch.forget.x0})
    target = redirect_target(batch.forget.x0, same.extra["surrogate"], draw.eps, jnp.ones(3), jnp.ones(3))
    assert np.array_equal(target, draw.eps)
