"""Injection and denoising loss on closed-form models, where the answer is known without training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import sampling
from jaxunlearn import schedule as schedules
from jaxunlearn.metrics import denoising_loss as dl
from jaxunlearn.metrics import injection
from jaxunlearn.schedule import per_example

SCHEDULE = schedules.linear(1000)
SHAPE = (4, 4, 1)


def memory(images):
    """The optimal denoiser of a finite set of images: its samples are copies of them."""
    images = jnp.asarray(images)

    def predict(params, x, t):
        alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
        residual = x[:, None] - alpha[:, None, None, None, None] * images
        weights = jax.nn.softmax(-jnp.sum(residual**2, axis=(2, 3, 4)) / (2 * sigma[:, None] ** 2), axis=1)
        x0 = jnp.einsum("bn,nhwc->bhwc", weights, images)
        return (x - per_example(alpha, x) * x0) / per_example(sigma, x)

    return predict


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(5).uniform(-1, 1, (6, *SHAPE)).astype(np.float32)


def loss(predict, x0, key=0, **kwargs):
    rows = jax.jit(dl.make_loss_rows(predict, SCHEDULE))
    return dl.denoising_loss(rows, None, x0, jax.random.key(key), t=(50, 400), noises=8, **kwargs)


def test_members_of_a_memory_have_no_loss_and_others_do(images):
    predict = memory(images[:3])
    members, others = loss(predict, images[:3]), loss(predict, images[3:])
    assert members.shape == (3, 2)
    assert np.all(members[:, 0] < 1e-4)
    assert np.all(others[:, 0] > 10 * members[:, 0])


def test_a_model_that_answers_zero_has_the_loss_of_the_noise(images):
    values = loss(lambda params, x, t: jnp.zeros_like(x), images)
    np.testing.assert_allclose(values, np.broadcast_to(values[:1], values.shape), rtol=1e-6)  # the same noises for all
    assert values.mean() == pytest.approx(1.0, abs=0.2)


@pytest.mark.slow
def test_loss_does_not_depend_on_the_batch_or_on_the_other_images(images):
    predict = memory(images[:2])
    whole = loss(predict, images, batch_size=1000)
    np.testing.assert_allclose(loss(predict, images, batch_size=7), whole, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(loss(predict, images[4:]), whole[4:], rtol=2e-5, atol=1e-6)
    assert not np.allclose(loss(predict, images, key=1), whole)


def test_sum_is_mean_times_size(images):
    def values(error):
        rows = jax.jit(dl.make_loss_rows(memory(images[:2]), SCHEDULE, error))
        return dl.denoising_loss(rows, None, images[3:], jax.random.key(0), t=(100,), noises=2)

    np.testing.assert_allclose(values("sum_squares"), 16 * values("mean_squares"), rtol=1e-5)
    with pytest.raises(ValueError, match="known: mean_squares, sum_squares"):
        dl.make_loss_rows(memory(images), SCHEDULE, "huber")


def test_loss_refuses_empty_input(images):
    with pytest.raises(ValueError, match="0 images"):
        loss(memory(images), images[:0])


def test_injection_keys_are_independent_of_counts_and_different_from_each_other():
    key = jax.random.key(0)
    many = jax.random.key_data(injection.row_keys(key, 3, 50, 4))
    few = jax.random.key_data(injection.row_keys(key, 2, 50, 2))
    np.testing.assert_array_equal(many[:2, :2], few)
    other_t = jax.random.key_data(injection.row_keys(key, 3, 51, 4))
    data = np.concatenate([np.asarray(x).reshape(12, -1) for x in (many, other_t)])
    assert len(np.unique(data, axis=0)) == 24


def test_injection_noises_as_the_schedule_says_and_gives_rows_back_in_order(images):
    seen = {}

    def sample_from(x_t, t, keys):
        seen[t] = np.asarray(x_t).reshape(2, 3, *SHAPE)
        assert keys.shape == (6,)
        return x_t

    out = injection.denoise_injection(sample_from, images[:2], SCHEDULE, jax.random.key(1), t=(0, 700), copies=3)
    assert out.shape == (2, 2, 3, *SHAPE)
    np.testing.assert_array_equal(out[:, 1], seen[700])
    np.testing.assert_allclose(out[:, 0], np.repeat(images[:2, None], 3, axis=1), atol=0.06)
    eps = (seen[700] - float(SCHEDULE.alpha(700)) * images[:2, None]) / float(SCHEDULE.sigma(700))
    assert eps.std() == pytest.approx(1.0, abs=0.25)
    assert not np.allclose(eps[0, 0], eps[0, 1])


def ancestral(predict, t_max):
    config = sampling.SamplerConfig(kind="ddpm", clip_sample=True)
    return jax.jit(sampling.ancestral_chain(lambda p, x, t, c: predict(p, x, t), SCHEDULE, config, t_max))


@pytest.mark.slow
def test_chain_equals_the_sampler_from_any_start(images):
    predict = memory(images)
    chain = ancestral(predict, 60)
    keys = sampling.example_keys(jax.random.key(3), np.arange(4))
    x = jax.random.normal(jax.random.key(4), (4, *SHAPE))
    config = sampling.SamplerConfig(kind="ddpm", clip_sample=True)
    for t in (0, 60):
        steps = np.arange(t, -1, -1, dtype=np.int32)
        expected = sampling.sample(lambda p, x, t, c: predict(p, x, t), None, x, keys, SCHEDULE, config, steps)
        np.testing.assert_allclose(chain(None, x, t, keys), expected, atol=1e-5)
    assert chain._cache_size() == 1


@pytest.mark.slow
def test_memory_returns_its_images_and_another_memory_does_not(images):
    def results(predict):
        chain = ancestral(predict, 100)
        denoised = injection.denoise_injection(
            lambda x, t, keys: chain(None, x, t, keys), images[:1], SCHEDULE, jax.random.key(0), t=(50, 100), copies=4
        )
        return injection.injection_distance(images[:1], denoised), injection.injection_similarity(images[:1], denoised)

    remembered, forgotten = results(memory(images)), results(memory(images[1:]))
    assert remembered[0].shape == (1, 2, 4)
    assert np.all(remembered[0] < 0.02)
    assert np.all(remembered[1] > 0.99)
    assert np.all(forgotten[0] > 0.1)
    assert np.all(forgotten[1] < 0.9)


def test_similarity_ignores_contrast_and_distance_does_not(images):
    scaled = (0.5 * images[:2] + 0.1)[:, None, None]
    np.testing.assert_allclose(injection.injection_similarity(images[:2], scaled), 1.0, atol=1e-6)
    assert np.all(injection.injection_distance(images[:2], scaled) > 0.05)


@pytest.mark.parametrize(("t", "copies"), [((1000,), 2), ((-1,), 2), ((50,), 0), ((), 2)])
def test_injection_refuses(images, t, copies):
    with pytest.raises(ValueError, match=r"0\.\.999"):
        injection.denoise_injection(lambda x, t, k: x, images, SCHEDULE, jax.random.key(0), t=t, copies=copies)
