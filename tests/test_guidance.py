"""Classifier-free guidance against two separate calls, under every transformation, and where the rows of a batch live."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import schedule as schedules
from jaxunlearn.guidance import classifier_free
from jaxunlearn.predictors import eps_from_v, eps_from_x0
from jaxunlearn.sampling import SamplerConfig, sample, trajectory

B, N, D = 3, 4, 5
rng = np.random.default_rng(0)
X = rng.standard_normal((B, 2, 2, 2)).astype(np.float32)
T = np.array([3, 40, 77], np.int32)
COND = rng.standard_normal((B, N, D)).astype(np.float32)
NULL = rng.standard_normal((1, N, D)).astype(np.float32)
PARAMS = {"mix": rng.standard_normal((D, 2)).astype(np.float32), "gain": np.float32(0.7)}


def predict(params, x, t, cond):
    """Not linear in the condition, and different for every row."""
    pooled = jnp.tanh(cond.mean(1) @ params["mix"])[:, None, None, :]
    return params["gain"] * x * pooled + jnp.sin(t.astype(x.dtype))[:, None, None, None] * pooled**2


def twice(params, x, t, cond, scale, uncond=NULL):
    """The definition, with two calls."""
    without = predict(params, x, t, jnp.broadcast_to(uncond, cond.shape))
    return without + scale * (predict(params, x, t, cond) - without)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 7.5, -1.0, np.float32(2.0), jnp.float32(3.0)])
def test_equals_two_calls(scale):
    guided = classifier_free(predict, scale, NULL)
    np.testing.assert_allclose(guided(PARAMS, X, T, COND), twice(PARAMS, X, T, COND, scale), rtol=1e-5, atol=1e-6)
    own = np.flip(COND, 0)
    got = classifier_free(predict, scale, own)(PARAMS, X, T, COND)
    np.testing.assert_allclose(got, twice(PARAMS, X, T, COND, scale, own), rtol=1e-5, atol=1e-6)


def test_known_numbers():
    def model(params, x, t, cond):
        return cond

    guided = classifier_free(model, 7.5, np.full((1, 1), 2.0, np.float32))
    np.testing.assert_array_equal(guided(None, np.zeros((2, 1)), np.zeros(2, np.int32), np.array([[3.0], [2.0]])),
                                  [[9.5], [2.0]])  # fmt: skip


def test_one_call_of_twice_the_batch_and_scale_one_of_the_batch_itself():
    calls = []

    def counting(params, x, t, cond):
        calls.append((x.shape[0], t.shape[0], cond["text"].shape[0], cond["more"].shape))
        return predict(params, x, t, cond["text"])

    cond = {"text": COND, "more": np.zeros((B,), np.int32)}
    null = {"text": NULL, "more": np.ones((1,), np.int32)}
    classifier_free(counting, 2.0, null)(PARAMS, X, T, cond)
    classifier_free(counting, 1.0, null)(PARAMS, X, T, cond)
    classifier_free(counting, 1, null)(PARAMS, X, T, cond)
    assert calls == [(2 * B, 2 * B, 2 * B, (2 * B,)), (B, B, B, (B,)), (B, B, B, (B,))]


def test_a_scalar_t_and_the_dtype_of_the_condition():
    guided = classifier_free(predict, 4.0, NULL.astype(np.float64))
    np.testing.assert_allclose(
        guided(PARAMS, X, 5, COND), twice(PARAMS, X, np.full(B, 5), COND, 4.0), rtol=1e-5, atol=1e-5
    )


def test_jit_vmap_and_a_traced_scale():
    run = jax.jit(lambda scale, null, x: classifier_free(predict, scale, null)(PARAMS, x, T, COND))
    for scale in (1.0, 7.5):
        np.testing.assert_allclose(run(scale, NULL, X), twice(PARAMS, X, T, COND, scale), rtol=1e-5, atol=1e-5)
    scales = jnp.array([1.0, 2.0, 7.5])
    mapped = jax.vmap(run, in_axes=(0, None, None))(scales, NULL, X)
    for row, scale in zip(mapped, scales, strict=True):
        np.testing.assert_allclose(row, twice(PARAMS, X, T, COND, scale), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(run, in_axes=(None, None, 0))(7.5, NULL, X[None])[0], run(7.5, NULL, X))


def test_gradients():
    """Of the parameters, the images, both conditions and the scale: those of the two calls."""

    def loss(call):
        return lambda params, x, cond, null, scale: (call(params, x, cond, null, scale) ** 2).sum()

    ours = loss(lambda params, x, cond, null, scale: classifier_free(predict, scale, null)(params, x, T, cond))
    theirs = loss(lambda params, x, cond, null, scale: twice(params, x, T, cond, scale, null))
    at = (PARAMS, X, COND, NULL, 3.0)
    both = (jax.jit(jax.grad(call, argnums=range(5)))(*at) for call in (ours, theirs))
    for got, expected in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("convert", [eps_from_v, eps_from_x0])
def test_guiding_and_converting_commute(convert):
    """eps is affine in v and in x0 with the same offset on both sides, and the weights of guidance add up to 1."""
    schedule = schedules.linear(100)
    first = classifier_free(convert(predict, schedule), 7.5, NULL)
    last = convert(classifier_free(predict, 7.5, NULL), schedule)
    np.testing.assert_allclose(first(PARAMS, X, T, COND), last(PARAMS, X, T, COND), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["ddim", "pndm"])
def test_in_a_chain(kind):
    """A guided model samples like the model of two calls; jitted, with the parameters as an argument."""
    schedule, config = schedules.scaled_linear(), SamplerConfig(kind, clip_sample=False)
    steps = trajectory(schedule, config, 5)

    def run(model):
        return jax.jit(lambda params, x: sample(model, params, x, None, schedule, config, steps, cond=COND))(PARAMS, X)

    got, expected = run(classifier_free(predict, 3.0, NULL)), run(lambda p, x, t, cond: twice(p, x, t, cond, 3.0))
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_a_divided_batch_stays_where_it_is():
    """Over eight devices: the same numbers, and no row travels to another device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P())
    x, cond = (np.resize(a, (8, *a.shape[1:])) for a in (X, COND))
    t = np.arange(8, dtype=np.int32)
    guided = classifier_free(predict, 7.5, NULL)
    run = jax.jit(guided, in_shardings=(everywhere, rows, rows, rows), out_shardings=rows)
    np.testing.assert_allclose(run(PARAMS, x, t, cond), twice(PARAMS, x, t, cond, 7.5), rtol=1e-5, atol=1e-5)
    program = run.lower(PARAMS, x, t, cond).compile().as_text()
    for transfer in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
        assert transfer not in program


def test_refusals():
    for scale, match in [
        (np.ones(2), r"scale of shape \(2,\): must be one number"),
        (float("nan"), "scale nan: must be finite"),
        (np.inf, "must be finite"),
    ]:
        with pytest.raises(ValueError, match=match):
            classifier_free(predict, scale, NULL)
    guided = classifier_free(predict, 2.0, NULL)
    with pytest.raises(ValueError, match="give cond, or use the model without"):
        guided(PARAMS, X, T)
    with pytest.raises(ValueError, match="must have 3 rows"):
        guided(PARAMS, X, T, COND[:2])
    for bad in (NULL[0], NULL[:, :2], np.concatenate([NULL, NULL]), np.float32(0)):
        with pytest.raises(ValueError, match=r"uncond of shape .*: must be \(1, 4, 5\) or \(3, 4, 5\)"):
            classifier_free(predict, 2.0, bad)(PARAMS, X, T, COND)
    with pytest.raises(ValueError, match=r"uncond\['text'\] of shape"):
        classifier_free(predict, 2.0, {"text": NULL[0]})(PARAMS, X, T, {"text": COND})
    with pytest.raises(ValueError, match="must be like the condition's"):
        classifier_free(predict, 2.0, {"text": NULL})(PARAMS, X, T, COND)
