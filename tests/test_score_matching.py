"""SDEs against their differential equations, the denoising loss, and the conversions between parameterisations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import score_matching as sm
from jaxunlearn.objectives import denoise
from jaxunlearn.schedule import Schedule
from tests import tiny_model as tm
from tests.tiny_model import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")

SDES = {"vp": sm.VP(), "sub-vp": sm.SubVP(), "ve": sm.VE(), "vp other": sm.VP(0.2, 12.0), "ve other": sm.VE(0.1, 20.0)}
TAU = np.linspace(0.01, 1.0, 25)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", SDES)
def test_the_kernel_solves_the_equation(name):
    """d alpha/d tau = f alpha and d sigma^2/d tau = 2 f sigma^2 + g^2, the moments of dx = f x dtau + g dw."""
    sde = SDES[name]

    def run(tau):
        rates = [jax.vmap(jax.grad(f))(tau) for f in (sde.alpha, lambda u: sde.sigma(u) ** 2)]
        return rates, [f(tau) for f in (sde.alpha, sde.sigma, sde.drift, sde.diffusion)]

    (alpha_rate, variance_rate), values = tm.evaluate(run, TAU)
    alpha, sigma, f, g = values
    np.testing.assert_allclose(alpha_rate, f * alpha, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(variance_rate, 2 * f * sigma**2 + g**2, rtol=1e-9, atol=1e-12)
    assert all(value.shape == TAU.shape for value in values)


@pytest.mark.usefixtures("x64")
def test_golden_kernels():
    log_alpha = -0.25 * TAU**2 * 19.9 - 0.05 * TAU
    np.testing.assert_allclose(sm.VP().alpha(TAU), np.exp(log_alpha), rtol=1e-12)
    np.testing.assert_allclose(sm.VP().alpha(TAU) ** 2 + sm.VP().sigma(TAU) ** 2, 1, rtol=1e-12)
    np.testing.assert_allclose(sm.SubVP().sigma(TAU), 1 - np.exp(2 * log_alpha), rtol=1e-12)
    np.testing.assert_allclose(sm.VE().sigma(TAU), 0.01 * 5000**TAU, rtol=1e-12)
    assert np.all(sm.VE().alpha(TAU) == 1)
    assert np.all(sm.SubVP().sigma(TAU) <= sm.VP().sigma(TAU))


def test_small_tau_does_not_cancel_in_float32():
    exact = 0.1 * 1e-6 + 0.5 * 19.9 * 1e-12
    np.testing.assert_allclose(sm.VP().sigma(jnp.float32(1e-6)), np.sqrt(exact), rtol=1e-5)


def pair(count=3):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.normal(size=(count, 4, 4, 2)), jnp.float32) for _ in range(2))


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("weighting", sm.WEIGHTINGS)
def test_denoising_score_matching(name, weighting):
    sde = SDES[name]
    x0, eps = pair()
    tau = jnp.array([0.1, 0.5, 1.0])
    score_fn = lambda p, x, u: p * jnp.tanh(x) - u[:, None, None, None]  # noqa: E731
    got = sm.denoising_score_matching(score_fn, 0.7, x0, tau, eps, sde, weighting=weighting)
    assert got.shape == (3,)
    alpha, sigma, g = (
        np.asarray(f(tau), np.float64).reshape(-1, 1, 1, 1) for f in (sde.alpha, sde.sigma, sde.diffusion)
    )
    x_tau = alpha * np.float64(x0) + sigma * np.float64(eps)
    score = 0.7 * np.tanh(x_tau) - np.float64(tau).reshape(-1, 1, 1, 1)
    weight = {"noise": sigma**2, "likelihood": g**2, "none": 1.0}[weighting]
    want = np.sum(weight * (score + np.float64(eps) / sigma) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(got, want, rtol=2e-4)


def test_unknown_weighting_is_refused():
    x0, eps = pair()
    with pytest.raises(ValueError, match="unknown weighting 'snr'; known: noise, likelihood, none"):
        sm.denoising_score_matching(lambda p, x, u: x, None, x0, jnp.ones(3), eps, sm.VP(), weighting="snr")


def test_noise_weighting_is_the_discrete_denoising_loss():
    """With the schedule's table read as a VP kernel, both losses of one eps-model are the same number."""
    sde, steps = sm.VP(), 1000
    tau = (np.arange(steps) + 1) / steps
    schedule = Schedule(np.exp(2 * np.float64(sde.log_alpha(tau))))
    a = tm.arrays(4, t=[50, 300, 600, 999])
    batch, draw = tm.batch_and_draw(a)
    u = tau[a["t"]].astype(np.float32)

    def score_fn(p, x, u):
        return sm.score_from_eps(tm.predict(p, x, draw.t), sde.sigma(u))

    def run(p):
        discrete = denoise(schedule)(tm.predict, p, batch, draw)[0]["keep"]
        return discrete, sm.denoising_score_matching(score_fn, p, batch.keep.x0, u, draw.eps, sde)

    discrete, continuous = tm.evaluate(run, tm.params())
    np.testing.assert_allclose(continuous, discrete, rtol=1e-4)


def test_the_optimal_gaussian_score_leaves_the_known_error():
    """Data N(0, 1) under VP: the score is -x, and the expected noise-weighted loss is alpha^2 for each value."""
    sde, n = sm.VP(), 200_000
    rng = np.random.default_rng(1)
    x0, eps = (jnp.asarray(rng.normal(size=(n, 1, 1, 1)), jnp.float32) for _ in range(2))
    for u in (0.1, 0.4, 0.8):
        loss = sm.denoising_score_matching(lambda p, x, tau: -x, None, x0, jnp.full(n, u), eps, sde)
        loss = np.asarray(loss, np.float64)
        assert abs(loss.mean() - float(sde.alpha(u)) ** 2) < 4.5 * loss.std() / np.sqrt(n)


def test_conversions_round_trip():
    x0, eps = pair()
    alpha = jnp.array([0.99, 0.5, 0.1])
    sigma = jnp.sqrt(1 - alpha**2)
    x = alpha[:, None, None, None] * x0 + sigma[:, None, None, None] * eps
    np.testing.assert_allclose(sm.x0_from_eps(x, eps, alpha, sigma), x0, atol=1e-5)
    np.testing.assert_allclose(sm.eps_from_x0(x, x0, alpha, sigma), eps, atol=1e-5)
    v = sm.v_from_eps(x, eps, alpha, sigma)
    # v = alpha eps - sigma x0 (Salimans and Ho).
    np.testing.assert_allclose(v, alpha[:, None, None, None] * eps - sigma[:, None, None, None] * x0, atol=1e-5)
    np.testing.assert_allclose(sm.eps_from_v(x, v, alpha, sigma), eps, atol=1e-5)
    score = sm.score_from_eps(eps, sigma)
    np.testing.assert_allclose(sm.eps_from_score(score, sigma), eps, atol=1e-6)
    # The other entries of the table in the module's text.
    a, s = (z[:, None, None, None] for z in (alpha, sigma))
    np.testing.assert_allclose(score, (a * x0 - x) / s**2, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(score, -(a * v + s * x) / s, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("convert", [sm.x0_from_eps, sm.v_from_eps])
def test_nothing_of_the_image_is_left_at_alpha_0(convert):
    """The last step at zero terminal SNR: refused by name instead of NaN."""
    x, eps = pair()
    alpha = jnp.array([0.5, 0.1, 0.0])
    with pytest.raises(ValueError, match=f"{convert.__name__} needs alpha > 0"):
        convert(x, eps, alpha, jnp.sqrt(1 - alpha**2))
    # What is traced cannot be looked at.
    traced = jax.jit(convert)(x, eps, alpha, jnp.sqrt(1 - alpha**2))
    assert np.all(np.isfinite(traced[:2]))


def test_errors_in_the_three_parameterisations_are_proportional():
    """|eps_hat - eps|^2 = alpha^2 |v_hat - v|^2 = (alpha/sigma)^2 |x0_hat - x0|^2."""
    x0, eps = pair()
    eps_hat = eps + 0.3 * x0
    alpha = jnp.array([0.9, 0.5, 0.2])
    sigma = jnp.sqrt(1 - alpha**2)
    x = alpha[:, None, None, None] * x0 + sigma[:, None, None, None] * eps
    squares = lambda z: np.sum(np.float64(z) ** 2, axis=(1, 2, 3))  # noqa: E731
    want = squares(eps_hat - eps)
    v_gap = sm.v_from_eps(x, eps_hat, alpha, sigma) - sm.v_from_eps(x, eps, alpha, sigma)
    np.testing.assert_allclose(np.float64(alpha) ** 2 * squares(v_gap), want, rtol=1e-4)
    x0_gap = sm.x0_from_eps(x, eps_hat, alpha, sigma) - x0
    np.testing.assert_allclose(np.float64(alpha / sigma) ** 2 * squares(x0_gap), want, rtol=1e-3)
