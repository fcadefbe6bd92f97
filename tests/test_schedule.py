"""Noise schedules against their recurrences and published numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import schedule as schedules
from jaxunlearn.schedule import SCHEDULES, Schedule, cosine, from_betas, linear, per_example, scaled_linear
from tests import oracle

TABLES = {
    "linear": oracle.linear_table(),
    "scaled_linear": oracle.scaled_linear_table(),
    "cosine": oracle.cosine_table(),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_table_equals_the_recurrence(name):
    table = SCHEDULES[name](1000).alphas_cumprod
    assert table.dtype == np.float64
    np.testing.assert_allclose(table, TABLES[name], rtol=1e-11)
    assert np.all(np.diff(table) < 0)
    assert SCHEDULES[name](10).num_steps == 10


def test_golden_numbers():
    t = jnp.array([500])
    np.testing.assert_allclose(linear().alpha(t), 0.27892052, rtol=1e-6)
    np.testing.assert_allclose(linear().sigma(t), 0.96031419, rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (linear(), [9.210, 0.086, -2.473, -5.710, -10.118]),
        (scaled_linear(), [7.069, 0.725, -0.963, -2.822, -5.364]),
    ],
)
def test_log_snr(schedule, expected):
    np.testing.assert_allclose(schedule.log_snr(jnp.array([0, 250, 500, 750, 999])), expected, atol=5.1e-4)


@pytest.mark.usefixtures("x64")
def test_float64_precision_and_variance_preservation():
    t = jnp.arange(1000)
    alpha, sigma = oracle.alpha_sigma(TABLES["linear"], np.arange(1000))
    schedule = linear()
    assert schedule.alpha(t).dtype == jnp.float64
    np.testing.assert_allclose(schedule.alpha(t), alpha, rtol=1e-12)
    np.testing.assert_allclose(schedule.sigma(t), sigma, rtol=1e-11)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1, rtol=1e-14)
    np.testing.assert_allclose(schedule.log_snr(t), 2 * np.log(alpha / sigma), rtol=1e-9, atol=1e-10)


def test_float32_is_the_rounded_table_even_where_sigma_is_small():
    schedule = linear()
    alpha, sigma = oracle.alpha_sigma(TABLES["linear"], np.arange(1000))
    t = jnp.arange(1000)
    assert schedule.sigma(t).dtype == jnp.float32
    np.testing.assert_allclose(schedule.sigma(t), sigma, rtol=1e-7)
    np.testing.assert_allclose(jax.jit(schedule.alpha)(t), alpha, rtol=1e-7)


def test_add_noise():
    rng = np.random.default_rng(0)
    x0, eps = rng.normal(size=(2, 3, 4, 4, 2))
    t = np.array([0, 400, 999])
    want = oracle.noised(x0, eps, *oracle.alpha_sigma(TABLES["linear"], t))
    np.testing.assert_allclose(linear().add_noise(jnp.float32(x0), jnp.float32(eps), jnp.array(t)), want, atol=1e-6)


def test_per_example_shape():
    assert per_example(jnp.ones(3), jnp.ones((3, 2, 2, 1))).shape == (3, 1, 1, 1)


def test_zero_terminal_snr():
    shifted = schedules.zero_terminal_snr(linear())
    assert shifted.alphas_cumprod[-1] == 0
    np.testing.assert_allclose(shifted.alphas_cumprod[0], linear().alphas_cumprod[0], rtol=1e-12)
    # The numbers that diffusers gives for rescale_betas_zero_snr.
    np.testing.assert_allclose(shifted.alphas_cumprod[[250, 500]], [0.51886052, 0.07524620], rtol=1e-6)
    assert shifted.log_snr(jnp.array(999)) == -jnp.inf
    assert shifted.sigma(jnp.array(999)) == 1


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([], "non-empty"),
        ([[0.5, 0.4]], "shape"),
        ([0.5, np.nan], "must lie in"),
        ([1.0, 0.5], "must lie in"),
        ([0.5, 0.0, 0.0], "must lie in"),
        ([0.5, -0.1], "must lie in"),
        ([0.5, 0.6], "must not increase"),
    ],
)
def test_bad_tables_are_refused(table, message):
    with pytest.raises(ValueError, match=message):
        Schedule(np.array(table))


def test_the_table_is_a_copy_that_cannot_be_written():
    mine = np.array([0.9, 0.5])
    schedule = Schedule(mine)
    mine[0] = 0.1
    assert schedule.alphas_cumprod[0] == 0.9
    with pytest.raises(ValueError):
        schedule.alphas_cumprod[0] = 0.5


def test_from_betas_and_cosine_cap():
    np.testing.assert_allclose(from_betas([0.1, 0.5]).alphas_cumprod, [0.9, 0.45])
    ratio = cosine().alphas_cumprod[1:] / cosine().alphas_cumprod[:-1]
    np.testing.assert_allclose(ratio.min(), 0.001, rtol=1e-9)


def test_between_timesteps_log_snr_is_linear():
    table = linear(1000)
    t = jnp.array([0, 3, 500, 999])
    for name in ("alpha", "sigma", "log_snr"):
        function = getattr(table, name)
        np.testing.assert_allclose(function(t.astype(jnp.float32)), function(t), rtol=2e-5)
    halves = jnp.array([0.25, 500.5, 998.75])
    low, share = jnp.floor(halves).astype(int), halves % 1
    expected = table.log_snr(low) * (1 - share) + table.log_snr(low + 1) * share
    np.testing.assert_allclose(table.log_snr(halves), expected, rtol=1e-5)
    np.testing.assert_allclose(table.alpha(halves) ** 2 + table.sigma(halves) ** 2, 1.0, rtol=1e-6)
    np.testing.assert_allclose(table.time_of(table.log_snr(halves)), halves, rtol=1e-4)
    assert table.time_of(jnp.array([99.0, -99.0])).tolist() == [0.0, 999.0]


def test_floating_times_at_zero_terminal_snr():
    table = schedules.zero_terminal_snr(linear(1000))
    assert table.last_step == 998
    assert linear(1000).last_step == 999
    assert np.asarray(table.alpha(jnp.array([999.0]))).tolist() == [0.0]
    assert np.asarray(table.sigma(jnp.array([999.0]))).tolist() == [1.0]
    np.testing.assert_allclose(table.log_snr(jnp.array([998.0])), table.log_snr(jnp.array([998])), rtol=1e-6)
    assert float(table.time_of(jnp.array(-1e9))) == 998.0
