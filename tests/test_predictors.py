"""Any model becomes an eps-predictor: Linen, NNX, Equinox, and the three prediction types."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import predictors, sum_squares, weighted
from jaxunlearn.methods import make_objective
from jaxunlearn.schedule import linear, scaled_linear, zero_terminal_snr
from jaxunlearn.step import term_grads
from tests import tiny_model as tm
from tests.tiny_model import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCHEDULE = linear()


def constant(params, x, t, cond=None):
    return jnp.full_like(x, 0.25)


def test_golden_conversions():
    """Linear schedule, t = 500, x_t = .5, output .25."""
    x, t = jnp.full((1, 2, 2, 1), 0.5), jnp.array([500])
    from_v = predictors.eps_from_v(constant, SCHEDULE)(None, x, t)
    from_x0 = predictors.eps_from_x0(constant, SCHEDULE)(None, x, t)
    np.testing.assert_allclose(from_v, 0.54988723, rtol=1e-6)
    np.testing.assert_allclose(from_x0, 0.44805114, rtol=1e-6)


def v_of(predict, schedule=SCHEDULE):
    """The v-model that an eps-model is."""

    def predict_v(params, x, t, cond=None):
        alpha, sigma = (z(t)[:, None, None, None] for z in (schedule.alpha, schedule.sigma))
        return (predict(params, x, t, cond) - sigma * x) / alpha

    return predict_v


def x0_of(predict, schedule=SCHEDULE):
    def predict_x0(params, x, t, cond=None):
        alpha, sigma = (z(t)[:, None, None, None] for z in (schedule.alpha, schedule.sigma))
        return (x - sigma * predict(params, x, t, cond)) / alpha

    return predict_x0


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_siss_step_does_not_depend_on_the_parameterisation(prediction_type):
    batch, draw = tm.batch_and_draw(tm.arrays(4, t=[200, 400, 600, 700]))
    native = {"epsilon": tm.predict, "v_prediction": v_of(tm.predict), "sample": x0_of(tm.predict)}[prediction_type]
    wrapped = predictors.to_eps(native, prediction_type, SCHEDULE)
    objective = make_objective("siss", SCHEDULE)

    @jax.jit
    def run(p):
        return [term_grads(objective, f, p, batch, draw) for f in (wrapped, tm.predict)]

    got, want = run(tm.params())
    tm.close(got, want, 1e-4)
    if prediction_type == "epsilon":
        assert wrapped is tm.predict


def test_zero_terminal_snr_stays_finite():
    schedule = zero_terminal_snr(SCHEDULE)
    x, t = jnp.full((1, 2, 2, 1), 0.5), jnp.array([999])
    predict = predictors.eps_from_v(lambda p, x, t, cond=None: p * x, schedule)
    value, slope = jax.value_and_grad(lambda p: jnp.sum(predict(p, x, t)))(2.0)
    np.testing.assert_allclose(value, 2.0)  # sigma x_t
    assert slope == 0  # alpha = 0: nothing of the output is left


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_native_weight_gives_the_native_loss_and_its_gradient(prediction_type):
    """What a model of eps, v or x0 was trained with: the squared error of its own output."""
    a = tm.arrays(4, t=[20, 300, 600, 900])
    t = a["t"]
    alpha, sigma = (np.asarray(f(t)).reshape(-1, 1, 1, 1) for f in (SCHEDULE.alpha, SCHEDULE.sigma))
    x_t = alpha * a["x0"] + sigma * a["eps"]
    v = alpha * a["eps"] - sigma * a["x0"]
    own = {"epsilon": a["eps"], "v_prediction": v, "sample": a["x0"]}[prediction_type]
    wrapped = predictors.to_eps(tm.predict, prediction_type, SCHEDULE)
    error = weighted(sum_squares, predictors.native_weight(SCHEDULE, prediction_type, cap=math.inf))

    def run(p):
        native = jax.value_and_grad(lambda p: jnp.sum(jnp.square(tm.predict(p, x_t, t) - own)))(p)
        return native, jax.value_and_grad(lambda p: jnp.sum(error(wrapped(p, x_t, t) - a["eps"], t)))(p)

    native, through_eps = tm.evaluate(run, tm.params())
    tm.close(through_eps, native, 1e-4)


def test_native_weights_are_capped():
    t = np.arange(1000)
    largest = [predictors.native_weight(s(), "v_prediction", cap=math.inf)(t).max() for s in (linear, scaled_linear)]
    np.testing.assert_allclose(
        largest, [1 / linear().alphas_cumprod[-1], 1 / scaled_linear().alphas_cumprod[-1]], rtol=1e-3
    )
    np.testing.assert_allclose(largest, [2.5e4, 215], rtol=0.02)
    table = linear().alphas_cumprod
    wanted = {"epsilon": np.ones(1000), "v_prediction": 1 / table, "sample": (1 - table) / table}
    for name, weight in wanted.items():
        got = predictors.native_weight(linear(), name)(t)
        np.testing.assert_allclose(got, np.minimum(weight, 20), rtol=1e-4)
        np.testing.assert_allclose(
            predictors.native_weight(linear(), name, cap=0.5)(t), np.minimum(weight, 0.5), rtol=1e-4
        )
    schedule = zero_terminal_snr(linear())
    for name in ("v_prediction", "sample"):
        with pytest.raises(ValueError, match=f"native_weight of {name} needs alpha > 0 .*zero terminal SNR"):
            predictors.native_weight(schedule, name)
    assert np.all(predictors.native_weight(schedule, "epsilon")(t) == 1)
    with pytest.raises(ValueError, match="cap > 0, got 0"):
        predictors.native_weight(linear(), "sample", cap=0)
    with pytest.raises(ValueError, match="unknown prediction_type 'v'"):
        predictors.native_weight(linear(), "v")


def test_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="unknown prediction_type 'score'; known: epsilon, v_prediction, sample"):
        predictors.to_eps(constant, "score", SCHEDULE)


def test_conditions_pass_through_the_conversions():
    seen = []

    def spy(params, x, t, cond=None):
        seen.append(cond)
        return x

    x, t, cond = jnp.ones((2, 2, 2, 1)), jnp.array([1, 2]), jnp.array([3, 4])
    for make in (predictors.eps_from_v, predictors.eps_from_x0):
        make(spy, SCHEDULE)(None, x, t, cond)
    assert all(c is cond for c in seen)


def test_linen():
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, t, labels=None, scale=1.0):
            h = nn.Dense(4)(x) + t[:, None, None, None]
            if labels is not None:
                h = h + nn.Embed(3, 4)(labels)[:, None, None, :]
            return scale * nn.Dense(x.shape[-1])(h)

    x, t, labels = jnp.ones((2, 4, 4, 1)), jnp.array([1, 2]), jnp.array([0, 2])
    net = Net()
    params = net.init(jax.random.key(0), x, t, labels)["params"]
    predict = predictors.from_linen(net)
    np.testing.assert_array_equal(predict(params, x, t, labels), net.apply({"params": params}, x, t, labels))
    np.testing.assert_array_equal(predict(params, x, t), net.apply({"params": params}, x, t))
    doubled = predictors.from_linen(net, scale=2.0)(params, x, t)
    np.testing.assert_allclose(doubled, 2 * predict(params, x, t), rtol=1e-6)


def test_nnx_model_trains():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(1, 4, rngs=rngs)
            self.outer = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, x, t, labels=None):
            h = self.inner(x) + t.astype(x.dtype)[:, None, None, None] / 1000
            if labels is not None:
                h = h + labels[:, None, None, None]
            return self.outer(jnp.tanh(h))

    net = Net(nnx.Rngs(0))
    graphdef, params, rest = nnx.split(net, nnx.Param, ...)
    predict = predictors.from_nnx(graphdef, rest)
    batch, draw = tm.batch_and_draw(tm.arrays(3))
    np.testing.assert_allclose(predict(params, draw.eps, draw.t), net(draw.eps, draw.t), rtol=1e-6)
    labels = jnp.array([0.1, 0.2, 0.3])
    np.testing.assert_allclose(predict(params, draw.eps, draw.t, labels), net(draw.eps, draw.t, labels), rtol=1e-6)
    grads, _, _ = jax.jit(lambda p: term_grads(make_objective("siss", SCHEDULE), predict, p, batch, draw))(params)
    assert jax.tree.structure(grads["keep"]) == jax.tree.structure(params)
    assert all(np.any(g != 0) for g in jax.tree.leaves(grads["forget"]))


def test_equinox():
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        weight: jax.Array

        def __call__(self, x, t, cond=None):
            return self.weight * x + t + (0 if cond is None else cond)

    params, static = eqx.partition(Net(jnp.array(2.0)), eqx.is_inexact_array)
    x, t = jnp.ones((2, 3, 3, 1)), jnp.array([1.0, 2.0])
    got = predictors.from_equinox(static)(params, x, t)
    np.testing.assert_allclose(got, 2 * x + t[:, None, None, None])
    got = predictors.from_equinox(static)(params, x, t, jnp.array([10.0, 20.0]))
    np.testing.assert_allclose(got, 2 * x + 11 * t[:, None, None, None])
