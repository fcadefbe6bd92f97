"""The likelihood on Gaussians, whose density is known at every noise level."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import likelihood, schedule
from jaxunlearn.closed_form import log_density, make_predict, weighted_set
from jaxunlearn.io import diffusers
from jaxunlearn.likelihood import log_likelihood, rademacher_probes
from jaxunlearn.metrics import nll
from jaxunlearn.models.parameters import init_params
from jaxunlearn.models.unet import sinusoid
from jaxunlearn.models.unet2d_config import UNet2DConfig
from tests import oracle

SCHEDULE = schedule.linear(1000)
FIRST, LAST = (tuple(x[0] for x in oracle.alpha_sigma(SCHEDULE.alphas_cumprod, [t])) for t in (0, 999))


def gaussian(size, seed=0):
    """Mean, rotation and eigenvalues 1e-3..1."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(size, size)))
    return rng.uniform(-0.5, 0.5, size), rotation, np.logspace(-3, 0, size)


def predict_gaussian(params, x, t, cond=None):
    """The exact model of N(mean, R diag(values) R'); ``params`` are these three."""
    mean, rotation, values = params
    alpha, sigma = SCHEDULE.alpha(t)[:, None], SCHEDULE.sigma(t)[:, None]
    z = (x.reshape(len(x), -1) - alpha * mean) @ rotation
    return (sigma * z / (alpha**2 * values + sigma**2) @ rotation.T).reshape(x.shape)


def density_at(level, params):
    """The log density of the noised Gaussian at ``(alpha, sigma)``, of rows [N, D]; numpy or jax."""
    (alpha, sigma), (mean, rotation, values) = level, params
    v = alpha**2 * values + sigma**2
    return lambda x: -0.5 * (((x - alpha * mean) @ rotation) ** 2 / v + np.log(2 * np.pi * v)).sum(-1)


def noised_points(params, count, seed=1):
    """Samples of the Gaussian at the first noise level, [count, D]."""
    mean, rotation, values = params
    alpha, sigma = FIRST
    rng = np.random.default_rng(seed)
    x0 = mean + (rng.normal(size=(count, len(mean))) * np.sqrt(values)) @ rotation.T
    return alpha * x0 + sigma * rng.normal(size=x0.shape)


def error(size, tolerance, *, exact_prior=True, count=4, **options):
    """The largest error in bits per value."""
    params = gaussian(size)
    side = round(size**0.5)
    x = noised_points(params, count)
    at_end = density_at(LAST, params)
    prior = (lambda z: at_end(z.reshape(-1))) if exact_prior else "standard"
    run = functools.partial(log_likelihood, predict_gaussian, schedule=SCHEDULE, prior=prior, exact=True, **options)
    found = jax.jit(lambda p, x: run(p, x, rtol=tolerance, atol=tolerance))(params, x.reshape(count, side, side, 1))
    assert not np.any(found.failed)
    truth = density_at(FIRST, params)(x)
    return np.abs(np.asarray(found.log_p) - truth).max() / size / np.log(2)


def test_density_of_a_gaussian_is_found_within_ten_tolerances(x64):
    assert error(16, 1e-4) < 10 * 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-4, 1e-5, 1e-7])
def test_error_falls_with_the_tolerance(x64, size, tolerance):
    assert error(size, tolerance) < 10 * tolerance


@pytest.mark.slow
def test_single_precision_is_enough_to_1e_5():
    assert error(64, 1e-5) < 10 * 1e-5


@pytest.mark.slow
def test_chunks_and_modes_give_the_same_number(x64):
    """To the tolerance: rounding may change a step."""
    params = gaussian(16)
    x = noised_points(params, 2).reshape(2, 4, 4, 1)
    values = [
        log_likelihood(predict_gaussian, params, x, SCHEDULE, exact=True, rtol=1e-6, atol=1e-6, **options).log_p
        for options in ({}, {"chunk": 5}, {"mode": "reverse"}, {"mode": "reverse", "chunk": 3})
    ]
    for value in values[1:]:
        np.testing.assert_allclose(value, values[0], rtol=1e-9)


@pytest.mark.slow
def test_mnist_size_exact_divergence_and_the_floor_of_the_standard_prior(x64):
    """28x28: an axis-parallel Gaussian has a diagonal Jacobian, for which one probe of signs is exact."""
    size, tolerance = 784, 1e-5
    mean, _, values = gaussian(size)[0], None, np.logspace(-3, 0, size)
    params = (mean, np.eye(size), values)
    x = noised_points(params, 2)
    truth = density_at(FIRST, params)(x)

    def diagonal(p, x, t, cond):
        alpha, sigma = SCHEDULE.alpha(t)[:, None], SCHEDULE.sigma(t)[:, None]
        return (sigma * (x.reshape(len(x), -1) - alpha * p[0]) / (alpha**2 * p[1] + sigma**2)).reshape(x.shape)

    at_end = density_at(LAST, params)
    options = {"rtol": tolerance, "atol": tolerance}
    images, probes = x.reshape(2, 28, 28, 1), rademacher_probes(jax.random.key(0), 2, 1, (28, 28, 1))
    given = {"probes": probes, "prior": lambda z: at_end(z.reshape(-1))}
    one = log_likelihood(diagonal, (mean, values), images, SCHEDULE, **options, **given).log_p
    bits = size * np.log(2)
    assert np.abs(one - truth).max() / bits < 10 * tolerance
    exact = log_likelihood(diagonal, (mean, values), images, SCHEDULE, **options, exact=True, chunk=112).log_p
    floor = np.abs(exact - truth).max() / bits
    assert 1e-4 < floor < 4e-4


@pytest.mark.slow
def test_mixture_with_a_bandwidth(x64):
    """Section with closed forms: members and others alike."""
    rng = np.random.default_rng(3)
    images = rng.uniform(-1, 1, (40, 8, 8, 1))
    params, h = weighted_set(images), 0.4
    fresh = images[rng.integers(0, 40, 6)] + h * rng.normal(size=(6, 8, 8, 1))
    alpha, sigma = FIRST
    x = alpha * fresh + sigma * rng.normal(size=fresh.shape)
    prior = lambda z: log_density(params, z[None], jnp.array([999]), SCHEDULE, h)[0]  # noqa: E731
    run = jax.jit(lambda x: log_likelihood(make_predict(SCHEDULE, h), params, x, SCHEDULE, exact=True, prior=prior))
    truth = oracle.weighted_set_log_density(x, np.zeros(6, int), images, np.ones(40), h, SCHEDULE.alphas_cumprod)
    assert np.abs(run(x).log_p - truth).max() / 64 / np.log(2) < 5e-3


@pytest.fixture(scope="module")
def small():
    """Images of 2x2, probes, and one compiled likelihood of a model with an unsymmetric Jacobian."""
    params = tuple(np.float32(x) for x in gaussian(4, seed=2))
    x = jnp.float32(noised_points(params, 3).reshape(3, 2, 2, 1))
    probes = rademacher_probes(jax.random.key(0), 3, 2, (2, 2, 1))
    run = jax.jit(lambda p, x, probes: log_likelihood(predict_gaussian, p, x, SCHEDULE, probes=probes))
    return params, x, probes, run


def test_an_image_does_not_depend_on_its_batch_mates_and_probes_decide_the_estimate(small):
    params, x, probes, run = small
    first, again = run(params, x, probes), run(params, x, probes)
    np.testing.assert_array_equal(first.log_p, again.log_p)
    other = run(params, x.at[1:].set(5 * x[1:]), probes)
    assert float(other.log_p[0]) == float(first.log_p[0])
    assert int(other.steps[0]) == int(first.steps[0])
    assert float(other.log_p[1]) != float(first.log_p[1])
    assert float(run(params, x, -probes).log_p[0]) == pytest.approx(float(first.log_p[0]), abs=1e-4)  # v and -v alike
    flipped = probes.at[:, :, 0, 0].multiply(-1)
    assert abs(float(run(params, x, flipped).log_p[0]) - float(first.log_p[0])) > 1e-3


def test_scaling_the_data_by_two_costs_one_bit_per_value(small):
    (mean, rotation, _), x, probes, run = small
    broad = (0 * mean, rotation, np.ones(4, np.float32))
    twice = (0 * mean, rotation, 4 * np.ones(4, np.float32))
    first, second = run(broad, x, probes).log_p, run(twice, 2 * x, probes).log_p
    bits = nll.nll_bpd(second, 4) - nll.nll_bpd(first, 4)
    np.testing.assert_allclose(bits, 1.0, atol=2e-3)


def test_too_few_steps_are_a_failure_and_not_a_number(small):
    params, x, probes, _ = small
    found = log_likelihood(predict_gaussian, params, x, SCHEDULE, probes=probes, max_steps=3)
    assert np.all(found.failed)
    assert np.all(np.isnan(found.log_p))
    assert found.steps.tolist() == [3, 3, 3]


def test_traces():
    rng = np.random.default_rng(0)
    matrix, x = jnp.float32(rng.normal(size=(6, 6))), jnp.zeros((2, 3, 1))
    jacobian = lambda v: (matrix @ v.reshape(-1)).reshape(v.shape)  # noqa: E731
    truth = np.trace(matrix)
    for chunk in (1, 4, 64):
        assert float(likelihood._exact_trace(jacobian, x, chunk)) == pytest.approx(truth, abs=1e-5)
    probes = rademacher_probes(jax.random.key(1), 400, 1, x.shape)
    values = np.array(jax.vmap(lambda v: likelihood._estimated_trace(jacobian, v))(probes))
    assert abs(values.mean() - truth) < 3 * values.std(ddof=1) / np.sqrt(len(values))
    assert values.std() > 0.5
    diagonal = lambda v: v * jnp.arange(6.0).reshape(v.shape)  # noqa: E731
    assert float(likelihood._estimated_trace(diagonal, probes[0])) == 15.0


def test_probes_of_an_image_do_not_depend_on_the_others():
    few, many = (rademacher_probes(jax.random.key(0), n, 2, (2, 2, 1)) for n in (2, 5))
    np.testing.assert_array_equal(many[:2], few)
    assert set(np.unique(many)) == {-1.0, 1.0}


def test_offset_and_dequantisation():
    assert nll.offset() == 7.0
    assert nll.offset(1.0) == 8.0
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    low, high = nll.dequantised(levels, 0.0), nll.dequantised(levels, 1.0)
    assert (float(low.min()), float(high.max())) == (-1.0, 1.0)
    np.testing.assert_array_equal(np.ravel(high)[:-1], np.ravel(low)[1:])  # the cells tile [-1, 1]
    # A density of one half everywhere on [-1, 1] is 8 bits: all levels alike.
    assert float(nll.nll_bpd(10 * np.log(0.5), 10)) == pytest.approx(8.0)


def counting(keys_seen):
    """A solver that returns the mean of x as log_p and remembers its keys."""

    def solve(params, x, keys, cond):
        keys_seen.append(keys)
        failed = np.zeros(len(x), bool)
        return likelihood.LogLikelihood(np.asarray(x).mean(axis=(1, 2, 3)) * params, np.full(len(x), 7), failed)

    return solve


def test_bits_per_value_of_batches_draws_and_seeds():
    images = np.random.default_rng(0).integers(0, 256, (3, 2, 2, 1)).astype(np.uint8)
    results = []
    for batch_size in (5, 100):
        seen = []
        found = nll.nll_bpd_uniform_deq(counting(seen), 1.0, images, jax.random.key(0), draws=4, batch_size=batch_size)
        assert all(len(keys) == min(batch_size, 12) for keys in seen)
        results.append(found.values)
    np.testing.assert_array_equal(results[0], results[1])
    assert results[0].shape == (3, 4)
    assert np.all(results[0].std(axis=1) > 0)  # draws differ
    # The mean over many draws is that of the cell's centre: v + 1/2.
    many = nll.nll_bpd_uniform_deq(counting([]), 1.0, images, jax.random.key(0), draws=64, batch_size=192)
    centre = nll.nll_bpd((2 * (images.mean(axis=(1, 2, 3)) + 0.5) / 256 - 1), 4)
    np.testing.assert_allclose(many.per_image, centre, atol=1.5e-3)
    raw = nll.nll_bpd_raw(counting([]), 1.0, images, jax.random.key(0))
    np.testing.assert_allclose(raw.values[:, 0], nll.nll_bpd(images.mean(axis=(1, 2, 3)) / 127.5 - 1, 4), rtol=1e-5)
    latents = np.float32(np.random.default_rng(1).normal(size=(2, 2, 2, 3)))
    found = nll.nll_latent(counting([]), 1.0, latents, jax.random.key(0))
    np.testing.assert_allclose(found.values[:, 0], -latents.mean(axis=(1, 2, 3)) / 12, rtol=1e-5)


def test_refusals():
    x = jnp.zeros((2, 2, 2, 1))
    ask = functools.partial(log_likelihood, predict_gaussian, gaussian(4), schedule=SCHEDULE)
    with pytest.raises(ValueError, match="give probes"):
        ask(x)
    with pytest.raises(ValueError, match=r"probes must be \[N,K,H,W,C\]"):
        ask(x, probes=jnp.ones((3, 1, 2, 2, 1)))
    with pytest.raises(ValueError) as caught:
        ask(jnp.zeros((1, 40, 40, 1)), exact=True, rtol=0.0, prior="flat", mode="sideways")
    assert len(str(caught.value).splitlines()) == 4
    with pytest.raises(ValueError, match=r"floating \[N,H,W,C\]"):
        ask(jnp.zeros((2, 2, 2, 1), jnp.uint8), exact=True)
    with pytest.raises(ValueError, match="bytes"):
        nll.nll_bpd_uniform_deq(counting([]), 1.0, np.zeros((1, 2, 2, 1)), jax.random.key(0))
    with pytest.raises(ValueError, match="probes must be at least 1"):
        nll.make_solver(predict_gaussian, SCHEDULE, probes=0)


def test_models_that_do_not_fit_are_refused_with_the_fix():
    x, table = jnp.zeros((1, 2, 2, 1)), jnp.arange(1000.0)
    by_table = lambda p, x, t, c: x * table[t][:, None, None, None]  # noqa: E731
    with pytest.raises(ValueError, match="floating times"):
        log_likelihood(by_table, None, x, SCHEDULE, exact=True)

    @jax.custom_vjp
    def layer(x):
        return 2 * x

    layer.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))
    with pytest.raises(ValueError, match="predict_forward_mode"):
        log_likelihood(lambda p, x, t, c: layer(x), None, x, SCHEDULE, exact=True)


def test_embeddings_take_floating_times():
    t = jnp.array([3, 250, 999])
    np.testing.assert_array_equal(sinusoid(t, 8, True, 0), sinusoid(t.astype(jnp.float32), 8, True, 0))
    half = sinusoid(jnp.array([3.5]), 8, True, 0)
    assert not np.allclose(half, sinusoid(jnp.array([3.0]), 8, True, 0), atol=1e-3)


@pytest.mark.slow
def test_a_unet_has_the_same_likelihood_by_both_modes():
    config = {
        "sample_size": 4,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [8, 8],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    scheduler = {"num_train_timesteps": 1000, "beta_schedule": "linear", "prediction_type": "v_prediction"}
    config = UNet2DConfig.from_dict(config)
    model = diffusers.new(config, init_params(config, 0), scheduler)
    x, t = jax.random.normal(jax.random.key(1), (2, 4, 4, 1)), jnp.array([3.0, 500.5])
    fast, plain = (f(model.params, x, t) for f in (model.predict, model.predict_forward_mode))
    np.testing.assert_allclose(fast, plain, atol=2e-5)
    probes = rademacher_probes(jax.random.key(0), 2, 3, (4, 4, 1))
    values = [
        log_likelihood(predict, model.params, x, model.schedule, probes=probes, rtol=1e-3, atol=1e-3, mode=mode).log_p
        for predict, mode in ((model.predict_forward_mode, "forward"), (model.predict, "reverse"))
    ]
    # In single precision rounding may change a step: within the tolerance's own error, in nats.
    np.testing.assert_allclose(values[0], values[1], atol=10 * 1e-3 * 16 * np.log(2))
    with pytest.raises(ValueError, match="no forward mode"):
        log_likelihood(model.predict, model.params, x, model.schedule, probes=probes)
