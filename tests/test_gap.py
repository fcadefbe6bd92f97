"""Gaps of Gaussians, whose divergence is known, and the statistics of replicates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.metrics import gap
from jaxunlearn.schedule import linear, zero_terminal_snr
from tests import oracle

SCHEDULE = linear(1000)
LOW, HIGH = gap.log_snr_range(SCHEDULE)
SHAPE = (2, 6, 1)


def gaussian(seed, size=12):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, size)) / np.sqrt(size)
    return {"mean": rng.uniform(-0.5, 0.5, size), "covariance": 0.3 * root @ root.T + 0.05 * np.eye(size)}


U, R = gaussian(0), gaussian(1)


def predict(params, x, t, cond=None):
    """The exact model of a Gaussian."""
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)

    def one(x, alpha, sigma):
        noisy = alpha**2 * params["covariance"] + sigma**2 * jnp.eye(x.size)
        return sigma * jnp.linalg.solve(noisy, x.reshape(-1) - alpha * params["mean"]).reshape(x.shape)

    return jax.vmap(one)(x, alpha, sigma)


def closed_form(u, r):
    """KL between the two at the first noise level minus that at the last."""

    def kl(t):
        alpha, sigma = oracle.alpha_sigma(SCHEDULE.alphas_cumprod, t)
        noised = [(alpha * p["mean"], alpha**2 * p["covariance"] + sigma**2 * np.eye(12)) for p in (u, r)]
        return oracle.gaussian_kl(*noised[0], *noised[1])

    return kl(0) - kl(999)


def expectation_points(u):
    """x0 and eps whose mean and covariance are those of N(u) and N(0, I): quadratic functions of them average exactly."""
    root, size = np.linalg.cholesky(u["covariance"]), 12
    offsets = np.sqrt(2 * size) * np.concatenate([np.eye(size), -np.eye(size)])
    x0 = np.concatenate([u["mean"] + offsets @ root.T, np.tile(u["mean"], (2 * size, 1))])
    eps = np.concatenate([np.zeros((2 * size, size)), offsets])
    return x0.reshape(-1, *SHAPE), eps.reshape(-1, *SHAPE)


def mean_square(u, r, levels):
    """E |eps_u - eps_r|^2 over x0 ~ u at each level, without Monte Carlo."""
    x0, eps = expectation_points(u)
    rows = jax.jit(gap.make_eps_rows(predict, SCHEDULE))

    def at(level):
        log_snr = np.full(len(x0), level)
        difference = rows(u, x0, log_snr, eps) - rows(r, x0, log_snr, eps)
        return float(jnp.sum(difference**2, axis=(1, 2, 3)).mean())

    return np.array([at(level) for level in levels])


def test_integral_is_the_divergence_of_gaussians_in_both_directions(x64):
    nodes, weights = np.polynomial.legendre.leggauss(80)
    for u, r in ((U, R), (R, U)):
        values = mean_square(u, r, LOW + (HIGH - LOW) * (nodes + 1) / 2)
        assert 0.25 * (HIGH - LOW) * weights @ values == pytest.approx(closed_form(u, r), rel=1e-4)
    assert closed_form(U, R) != pytest.approx(closed_form(R, U), rel=0.02)


def test_the_table_of_1000_steps_comes_close(x64):
    log_snr = np.asarray(SCHEDULE.log_snr(np.arange(1000)))
    square = mean_square(U, R, log_snr)
    table = 0.5 * np.sum(0.5 * (square[1:] + square[:-1]) * -np.diff(log_snr))
    assert table == pytest.approx(closed_form(U, R), rel=5e-3)


@pytest.fixture(scope="module")
def measured():
    """Gaps of U, R and U again at samples of U, in float32, with a ragged last batch."""
    rng = np.random.default_rng(2)
    x0 = rng.multivariate_normal(U["mean"], U["covariance"], 2000).reshape(-1, *SHAPE).astype(np.float32)
    models = [{k: v.astype(np.float32) for k, v in p.items()} for p in (U, R, U)]
    rows = jax.jit(gap.make_eps_rows(predict, SCHEDULE))
    return lambda **options: gap.gaps(rows, models, x0, SCHEDULE, jax.random.key(0), **options)


def test_draws_agree_with_the_divergence_and_equal_models_have_no_gap(measured):
    found = measured(n=1000, replicates=8, batch_size=384)
    estimate = gap.estimate(found.gap[:, 0, 1])
    assert abs(estimate.value - closed_form(U, R)) < 4 * estimate.error
    assert estimate.error < 0.03 * estimate.value
    assert np.all(found.gap[:, 0, 2] == 0)
    assert np.all(found.elbo(0, 2) == 0)
    np.testing.assert_array_equal(found.gap, found.gap.swapaxes(1, 2))
    # The bound difference is the KL as well, for samples of u: E[log p_u - log p_r].
    elbo = gap.estimate(found.elbo(0, 1))
    assert abs(elbo.value - closed_form(U, R)) < 4 * elbo.error
    np.testing.assert_array_equal(found.elbo(0, 1), -found.elbo(1, 0))
    # Strata: the spread between them is not counted as noise.
    pooled = 0.5 * (HIGH - LOW) * mean_square(U, R, np.linspace(LOW, HIGH, 20)).std() / np.sqrt(8000)
    assert estimate.error < pooled


@pytest.mark.slow
def test_batches_do_not_matter_and_draws_are_stratified(measured):
    small, large = (measured(n=100, replicates=2, batch_size=size) for size in (64, 100))
    np.testing.assert_allclose(small.gap, large.gap, rtol=1e-5)
    np.testing.assert_allclose(small.error, large.error, rtol=1e-5)
    u, image = gap._strata(jax.random.key(5), 100, 25)
    np.testing.assert_array_equal(np.floor(u * 100), np.arange(100))
    np.testing.assert_array_equal(np.bincount(image), np.full(25, 4))
    other, _ = gap._strata(jax.random.key(6), 100, 25)
    assert not np.allclose(u, other)


def test_estimate_ratio_and_floor():
    rng = np.random.default_rng(0)
    a, b = 6 + rng.normal(size=4000), 3 + 0.5 * rng.normal(size=4000)
    found = gap.estimate(a[:8])
    assert found.error == pytest.approx(a[:8].std(ddof=1) / np.sqrt(8))
    covered, covered_ratio = [], []
    for start in range(0, 4000, 8):
        part = slice(start, start + 8)
        interval = gap.estimate(a[part]).ci
        covered.append(interval.low <= 6 <= interval.high)
        interval = gap.ratio(a[part], b[part]).ci
        covered_ratio.append(interval.low <= 2 <= interval.high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.03)
    assert np.mean(covered_ratio) == pytest.approx(0.95, abs=0.03)
    assert gap.ratio(2 * b, b).value == pytest.approx(2)
    assert gap.ratio(2 * b, b).error == pytest.approx(0, abs=1e-12)  # common noise cancels
    distances = np.zeros((2, 3, 3))
    distances[:, 0, 1:] = distances[:, 1:, 0] = [[6.0, 8.0], [5.0, 9.0]]
    distances[:, 1, 2] = distances[:, 2, 1] = [3.0, 4.0]
    both = gap.Gaps(distances, np.zeros((2, 3)))
    assert gap.floor(both, (1, 2)).tolist() == [3.0, 4.0]
    assert gap.to_references(both, 0, (1, 2)).tolist() == [7.0, 7.0]
    assert gap.to_references(both, 1, (1, 2)).tolist() == [3.0, 4.0]


def test_refusals():
    with pytest.raises(ValueError, match="the retrained models do not differ"):
        gap.ratio(np.ones(8), np.zeros(8))
    with pytest.raises(ValueError, match="at least 2 retrained models, got 1"):
        gap.floor(gap.Gaps(np.zeros((2, 2, 2)), np.zeros((2, 2))), (1,))
    with pytest.raises(ValueError, match="2 or more replicates"):
        gap.estimate(np.ones(1))
    with pytest.raises(ValueError, match="paired"):
        gap.ratio(np.ones(8), np.ones(7))
    with pytest.raises(ValueError, match="0 images"):
        gap.gaps(None, [U], np.zeros((0, *SHAPE)), SCHEDULE, jax.random.key(0))
    with pytest.raises(ValueError, match="one for each image"):
        gap.gaps(None, [U], np.zeros((2, *SHAPE)), SCHEDULE, jax.random.key(0), cond=np.zeros((3, 1)))


def test_range_ends_before_pure_noise():
    low, high = gap.log_snr_range(zero_terminal_snr(SCHEDULE))
    assert np.isfinite(low)
    assert high > 9
    assert pytest.approx(float(SCHEDULE.log_snr(999)), rel=1e-5) == LOW
    assert pytest.approx(float(SCHEDULE.log_snr(0)), rel=1e-5) == HIGH
