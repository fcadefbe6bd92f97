"""Errors, time weights, windows and the draws of a step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import Batch, Example, filtered, low_pass, mean_squares, sum_squares, weighted, window
from jaxunlearn.frequency import high_pass
from jaxunlearn.schedule import linear, scaled_linear, zero_terminal_snr
from jaxunlearn.timesteps import (
    DRAWS,
    WINDOW_UNITS,
    antithetic,
    importance,
    log_snr_bump,
    min_snr,
    resolve_window,
    smooth_window,
    table_weight,
    uniform,
    weighted_probabilities,
    window_from_log_snr,
)
from tests import tiny_model as tm
from tests.tiny_model import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH = Batch(Example(np.zeros((64, 2, 2, 1), np.float32)))
KEY = jax.random.key(5)


def residuals(count=4, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, 5, 6, 2)), jnp.float32)


def test_sum_and_mean_squares():
    x, t = residuals(), jnp.arange(4)
    want = np.sum(np.float64(x) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(sum_squares(x, t), want, rtol=1e-6)
    np.testing.assert_allclose(mean_squares(x, t), want / 60, rtol=1e-6)
    for dtype in (jnp.bfloat16, jnp.float16):
        assert sum_squares(x.astype(dtype), t).dtype == jnp.float32
    # In float16 the sum of squares would overflow.
    assert np.isfinite(sum_squares(jnp.full((1, 64, 64, 3), 10.0, jnp.float16), t[:1]))[0]


def test_weighted_and_filtered_compose_in_both_orders():
    t = np.array([100, 250, 749, 750])
    f, g, w = low_pass(0.6), high_pass(0.3), window(250, 750, 1000)
    errors = [
        weighted(filtered(sum_squares, f), w),
        filtered(weighted(sum_squares, w), f),
        filtered(sum_squares, f),
        filtered(filtered(sum_squares, f), g),
        lambda x, t: sum_squares(g(f(x, t), t), t),
    ]
    a, b, plain, twice, want = tm.evaluate(lambda x: [error(x, t) for error in errors], residuals())
    np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(a, np.array([0, 2, 2, 0]) * plain, rtol=1e-6)
    np.testing.assert_allclose(twice, want, rtol=1e-4)


def test_other_errors_get_the_filtered_residual():
    absolute = lambda residual, t: jnp.sum(jnp.abs(residual), axis=(1, 2, 3))  # noqa: E731
    x, t = residuals(), jnp.arange(4)
    np.testing.assert_allclose(filtered(absolute, low_pass(0.5))(x, t), absolute(low_pass(0.5)(x, t), t), rtol=1e-6)


def test_outside_the_window_even_a_nan_has_no_effect():
    x = np.array(residuals(2))
    x[0] = np.nan
    error = weighted(sum_squares, window(10, 20))
    value, slope = tm.evaluate(jax.value_and_grad(lambda x: jnp.sum(error(x, np.array([5, 15])))), x)
    assert np.isfinite(value)
    assert np.all(slope[0] == 0)
    np.testing.assert_allclose(slope[1], 2 * x[1], rtol=1e-6)


def test_window_ends_and_scale():
    t = jnp.array([249, 250, 251, 748, 749, 750])
    assert window(250, 750)(t).tolist() == [0, 1, 1, 1, 1, 0]
    assert window(250, 750, 1000)(t).tolist() == [0, 2, 2, 2, 2, 0]
    assert np.all(window(0, 1000, 1000)(jnp.arange(1000)) == 1)


def test_weighting_and_drawing_estimate_one_objective():
    """The mean of w f over all t is the mean of f over the window, exactly."""
    t = np.arange(1000)
    f = np.sin(t / 37.0) + t / 500
    for t1, t2 in ((250, 750), (750, 1000), (0, 1)):
        w = np.asarray(window(t1, t2, 1000)(jnp.asarray(t)), np.float64)
        np.testing.assert_allclose((w * f).mean(), f[t1:t2].mean(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("arguments", [(5, 5), (6, 5), (-1, 5), (0, 1001, 1000)])
def test_bad_windows_are_refused(arguments):
    with pytest.raises(ValueError, match="window needs 0 <= t1 < t2"):
        window(*arguments)


@pytest.mark.parametrize("schedule", [linear(), scaled_linear()], ids=["linear", "scaled_linear"])
def test_windows_by_noise_level_round_trip(schedule):
    in_float64 = np.log(schedule.alphas_cumprod) - np.log1p(-schedule.alphas_cumprod)
    for t1, t2 in [(250, 750), (0, 1), (1, 999), *((t, t + 137) for t in range(0, 860, 61))]:
        for log_snr in (schedule.log_snr(np.arange(1000)), in_float64):
            high, low = float(log_snr[t1]), float(log_snr[t2])
            assert window_from_log_snr(schedule, high=high, low=low) == (t1, t2)
    assert window_from_log_snr(schedule, high=np.inf, low=-np.inf) == (0, 1000)


def test_a_window_down_to_no_signal_holds_the_last_step_at_zero_terminal_snr():
    schedule = zero_terminal_snr(linear())
    assert schedule.log_snr(np.array(999)) == -np.inf
    assert window_from_log_snr(schedule, high=np.inf, low=-np.inf) == (0, 1000)
    assert window_from_log_snr(schedule, high=float(schedule.log_snr(np.array(400))), low=-np.inf) == (400, 1000)
    assert window_from_log_snr(schedule, high=-np.inf, low=-np.inf) == (999, 1000)
    # Any other bound leaves it out.
    assert window_from_log_snr(schedule, high=np.inf, low=-1e6) == (0, 999)


def test_windows_move_between_schedules_by_noise_level():
    at = lambda schedule, t: float(schedule.log_snr(jnp.array(t)))  # noqa: E731
    high, low = at(linear(), 250), at(linear(), 750)
    assert window_from_log_snr(scaled_linear(), high=high, low=low) == (342, 1000)
    high, low = at(scaled_linear(), 750), at(scaled_linear(), 999)
    assert window_from_log_snr(linear(), high=high, low=low) == (532, 727)
    with pytest.raises(ValueError, match="low <= high"):
        window_from_log_snr(linear(), high=-1.0, low=1.0)
    with pytest.raises(ValueError, match="no timestep"):
        window_from_log_snr(linear(), high=20.0, low=15.0)


def test_the_units_of_a_window():
    assert resolve_window(linear(), (250, 750)) == (250, 750)
    assert resolve_window(linear(), (0.25, 0.75), "fraction") == (250, 750)
    assert resolve_window(linear(200), (0.25, 1.0), "fraction") == (50, 200)
    log_snr = linear().log_snr(np.array([250, 750]))
    assert resolve_window(linear(), tuple(map(float, log_snr)), "log_snr") == (250, 750)
    assert set(WINDOW_UNITS) == {"t", "fraction", "log_snr"}


@pytest.mark.parametrize(
    ("bounds", "unit", "message"),
    [
        ((0.25, 0.75), "t", "whole steps, got"),
        ((250, 1001), "t", "t2 <= 1000"),
        ((250, 250), "t", "t1 < t2"),
        ((0.75, 0.25), "fraction", "start < stop"),
        ((0.0, 1.5), "fraction", "stop <= 1"),
        ((0.5001, 0.5002), "fraction", "no timestep of 1000"),
        ((-1.0, 1.0), "log_snr", "low <= high"),
        ((0.0, 1.0), "fractions", "unknown unit of a window 'fractions'; did you mean 'fraction'"),
    ],
)
def test_bad_windows_in_any_unit_are_refused(bounds, unit, message):
    with pytest.raises(ValueError, match=message):
        resolve_window(linear(), bounds, unit)


def test_smooth_windows():
    t = np.arange(1000)
    hard, soft = window(250, 750, 1000), smooth_window(250, 750, 100, 1000)
    np.testing.assert_allclose(smooth_window(250, 750, 0, 1000)(t), hard(t))
    w = np.asarray(soft(t), np.float64)
    np.testing.assert_allclose(w.mean(), 1, rtol=1e-6)
    scale = w.max()
    assert np.all(w[:200] == 0)
    assert np.all(w[800:] == 0)
    np.testing.assert_allclose(w[300:700], scale, rtol=1e-5)
    np.testing.assert_allclose(w[[249, 250]].mean(), scale / 2, rtol=1e-4)  # the ends are the middles of the flanks
    assert np.all(np.diff(w[200:300]) > 0)
    np.testing.assert_allclose(w, w[::-1], atol=1e-6)
    # At the border of the table the flank is cut off.
    assert smooth_window(0, 500, 100, 1000, normalise=False)(0) > 0.49
    with pytest.raises(ValueError, match="edge <= t2 - t1 = 10, got 11"):
        smooth_window(0, 10, 11, 1000)


def test_bumps_in_log_snr():
    t = np.arange(1000)
    for schedule in (linear(), scaled_linear()):
        w = np.asarray(log_snr_bump(schedule, -2.0, 1.0, normalise=False)(t), np.float64)
        log_snr = np.asarray(schedule.log_snr(t), np.float64)
        np.testing.assert_allclose(w, np.exp(-((log_snr + 2) ** 2) / 2), rtol=1e-4)
        np.testing.assert_allclose(log_snr_bump(schedule, -2.0, 1.0)(t).mean(), 1, rtol=1e-5)
    with pytest.raises(ValueError, match="width > 0"):
        log_snr_bump(linear(), 0.0, 0.0)
    with pytest.raises(ValueError, match="far outside"):
        log_snr_bump(linear(), 1e6, 1.0)


@pytest.mark.parametrize("bad", [[], [0.0, 0.0], [1.0, -1.0], [1.0, np.nan], [[1.0]]])
def test_bad_tables_of_weights_are_refused(bad):
    with pytest.raises(ValueError, match="table of weights"):
        table_weight(bad)


@pytest.mark.parametrize("weight", [window(250, 750, 1000), smooth_window(300, 900, 200, 1000)], ids=["hard", "smooth"])
def test_drawing_by_a_weight_keeps_both_means(weight):
    """E[t_weight f] = mean of f over all t and E[t_weight w f] = mean of w f: exact in the probabilities."""
    p = weighted_probabilities(weight, 1000, 0.25)
    t = np.arange(1000)
    w, f = np.asarray(weight(t), np.float64), np.sin(t / 37.0) + t / 500
    t_weight = 1 / (1000 * p)
    np.testing.assert_allclose(p.sum(), 1)
    np.testing.assert_allclose((p * t_weight * f).sum(), f.mean())
    np.testing.assert_allclose((p * t_weight * w * f).sum(), (w * f).mean())
    assert t_weight.max() <= 4 + 1e-9
    # And in the draws: the forget term has less variance than under a uniform t.
    drawn, drawn_weight = many_t(importance(p))
    np.testing.assert_allclose(drawn_weight, t_weight[drawn], rtol=1e-5)
    rows = drawn_weight * w[drawn] * f[drawn]
    batch_means = rows.mean(axis=1)
    assert abs(batch_means.mean() - (w * f).mean()) < 5 * batch_means.std() / np.sqrt(len(batch_means))
    plain, _ = many_t(uniform(1000))
    assert rows.var() < 0.7 * (w[plain] * f[plain]).var()


@pytest.mark.parametrize(
    ("weight", "share", "message"),
    [
        (window(0, 5), 0.0, "uniform_share must lie in"),
        (window(0, 5), 1.5, "uniform_share must lie in"),
        (window(90, 95), 0.5, "positive somewhere"),
        (lambda t: jnp.full(t.shape, jnp.nan), 0.5, "finite"),
    ],
)
def test_bad_weights_give_no_probabilities(weight, share, message):
    with pytest.raises(ValueError, match=message):
        weighted_probabilities(weight, 10, share)


def test_min_snr():
    t = jnp.arange(1000)
    snr = np.exp(np.float64(linear().log_snr(t)))
    np.testing.assert_allclose(min_snr(linear(), 5.0)(t), np.minimum(snr, 5.0) / snr, rtol=1e-5)
    with pytest.raises(ValueError, match="gamma > 0"):
        min_snr(linear(), 0.0)


# Draws.


@pytest.mark.parametrize("name", DRAWS)
def test_draws_have_the_promised_shapes_and_ranges(name):
    extra = {"noise": jax.random.uniform, "other": jax.random.normal}
    draw_fn = jax.jit(DRAWS[name](1000, t_min=200, t_max=700, extra=extra))
    draw = draw_fn(KEY, BATCH)
    assert draw.t.shape == draw.u.shape == draw.t_weight.shape == (64,)
    assert draw.t.dtype == jnp.int32
    assert draw.eps.shape == draw.extra["noise"].shape == (64, 2, 2, 1)
    assert draw.eps.dtype == draw.u.dtype == draw.t_weight.dtype == jnp.float32
    assert np.all((draw.t >= 200) & (draw.t < 700))
    assert np.all((draw.u >= 0) & (draw.u < 1))
    assert np.all(draw.t_weight == 1)
    again, other = draw_fn(KEY, BATCH), draw_fn(jax.random.key(6), BATCH)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(draw), jax.tree.leaves(again)))
    assert not np.array_equal(draw.eps, other.eps)
    # The parts of a draw are independent of each other.
    parts = np.stack([np.ravel(z) for z in (draw.eps, draw.extra["noise"], draw.extra["other"])])
    assert np.abs(np.corrcoef(parts) - np.eye(3)).max() < 0.3


def test_bytes_get_float_noise():
    for dtype in (jnp.uint8, jnp.bfloat16, jnp.float32):
        batch = Batch(Example(jax.ShapeDtypeStruct((4, 2, 2, 1), dtype)))
        assert jax.eval_shape(uniform(1000), KEY, batch).eps.dtype == jnp.float32


def many_t(draw_fn, batches=300):
    keys = jax.random.split(jax.random.key(1), 300)[:batches]
    return tm.evaluate(jax.vmap(lambda key: draw_fn(key, BATCH)[:2]), keys)


@pytest.mark.parametrize("name", DRAWS)
def test_t_is_uniform(name):
    t, _ = many_t(DRAWS[name](10, t_min=2, t_max=9))
    share = np.bincount(t.ravel(), minlength=10) / t.size
    assert np.all(share[[0, 1, 9]] == 0)
    assert np.all(np.abs(share[2:9] - 1 / 7) < 5 * np.sqrt(2 / 7 / t.size))


def test_antithetic_pairs():
    t, _ = many_t(antithetic(1000, t_min=100, t_max=900))
    assert np.all(t[:, 0::2] + t[:, 1::2] == 999)
    np.testing.assert_allclose(t.mean(axis=1), 499.5)
    odd = tm.evaluate(lambda key: antithetic(1000)(key, Batch(Example(np.zeros((5, 1, 1, 1), np.float32)))), KEY)
    assert odd.t.shape == (5,)
    assert odd.t[0] + odd.t[1] == 999


def test_importance_draws_reweight_exactly():
    p = np.array([0.0, 1.0, 4.0, 0.0, 3.0, 2.0, 0.0])
    t, weight = many_t(importance(p))
    share = np.bincount(t.ravel(), minlength=7) / t.size
    assert np.all(share[p == 0] == 0)
    assert np.all(np.abs(share - p / 10) < 5 * np.sqrt(0.25 / t.size))
    # weight = 1 / (n p) over the n timesteps that can occur: the weighted mean is the plain mean over them.
    np.testing.assert_allclose(weight, (1 / (4 * p[t] / 10)), rtol=1e-6)
    f = np.array([9.0, 1.0, 2.0, 9.0, 4.0, 8.0, 9.0])
    estimate = (weight * f[t]).mean(axis=1)
    assert abs(estimate.mean() - 3.75) < 5 * estimate.std() / np.sqrt(len(estimate))
    full = tm.evaluate(lambda key: importance(np.ones(1000))(key, BATCH).t_weight, KEY)
    np.testing.assert_allclose(full, 1, rtol=1e-6)


def test_antithetic_importance_draws():
    p = np.array([0.0, 1.0, 4.0, 0.0, 3.0, 2.0, 0.0])
    t, weight = many_t(importance(p, antithetic=True))
    share = np.bincount(t.ravel(), minlength=7) / t.size
    assert np.all(share[p == 0] == 0)
    assert np.all(np.abs(share - p / 10) < 5 * np.sqrt(0.5 / t.size))
    # A monotone function has less variance in the mean of a pair than in two independent draws.
    f = np.arange(7.0)
    pairs = (weight * f[t]).reshape(-1, 2).mean(axis=1)
    alone = weight * f[t]
    assert abs(pairs.mean() - 3.0) < 5 * pairs.std() / np.sqrt(pairs.size)
    assert pairs.var() < 0.35 * alone.var()
    odd = tm.evaluate(
        lambda key: importance(p, antithetic=True)(key, Batch(Example(np.zeros((5, 1, 1, 1), np.float32)))), KEY
    )
    assert odd.t.shape == odd.t_weight.shape == (5,)


@pytest.mark.parametrize("bad", [[], [-1.0, 2.0], [0.0, 0.0], [np.nan, 1.0], [[1.0]]])
def test_bad_probabilities_are_refused(bad):
    with pytest.raises(ValueError, match="importance needs"):
        importance(np.array(bad))


@pytest.mark.parametrize("bounds", [(5, 5), (-1, 5), (0, 1001), (7, 3)])
@pytest.mark.parametrize("name", DRAWS)
def test_bad_ranges_are_refused(name, bounds):
    with pytest.raises(ValueError, match="draws need 0 <= t_min < t_max <= 1000"):
        DRAWS[name](1000, t_min=bounds[0], t_max=bounds[1])


def test_a_single_timestep_can_be_asked_for():
    """The published scripts of SISS train at t = 999 only; that is a named option here."""
    assert np.all(tm.evaluate(lambda key: uniform(1000, t_min=999)(key, BATCH).t, KEY) == 999)
