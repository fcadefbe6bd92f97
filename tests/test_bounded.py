"""Bounded ascent: no gradient above the cap, ascent below it, no divergence; and the probes that measure caps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import (
    Example,
    clamped,
    filtered,
    init_state,
    low_pass,
    make_train_step,
    mean_squares,
    mirrored,
    sum_squares,
    weighted,
    window,
)
from jaxunlearn.methods import make_combine
from jaxunlearn.objectives import level_table, probe_levels
from jaxunlearn.objectives.probes import strata
from jaxunlearn.step import term_grads
from tests import oracle
from tests import tiny_model as tm
from tests.tiny_model import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCHEDULE = tm.SCHEDULE
TABLE = np.linspace(1.2, 0.7, 1000)
NUMBER = 0.9


def zeros(params, x, t, cond):
    return 0 * params["inner"][0, 0] + jnp.zeros_like(x)


def rows():
    return tm.batch_and_draw(tm.arrays(8, t=[0, 100, 300, 500, 600, 700, 900, 999]))


def test_rows_above_the_cap_have_no_gradient_and_rows_below_have_the_plain_one():
    batch, draw = rows()

    def run(p):
        def forget(q, objective):
            return objective(tm.predict, q, batch, draw)[0]["forget"]

        plain = mirrored(SCHEDULE, cap=1e9)
        out = {"plain": (forget(p, plain), jax.jacrev(forget)(p, plain), None)}
        for name, objective in (("number", mirrored(SCHEDULE, cap=NUMBER)), ("table", clamped(SCHEDULE, cap=TABLE))):
            aux = objective(tm.predict, p, batch, draw)[1]["capped"]
            out[name] = forget(p, objective), jax.jacrev(forget)(p, objective), aux
        return out

    out = tm.evaluate(run, tm.params())
    error, jacobian, _ = out["plain"]
    for name, cap in (("number", np.full(8, NUMBER)), ("table", TABLE[np.asarray(draw.t)])):
        value, slopes, capped = out[name]
        above = error >= cap
        assert 2 <= above.sum() <= 6
        assert np.array_equal(capped, above)
        np.testing.assert_allclose(value, np.minimum(error, cap), rtol=1e-6)
        for key, slope in slopes.items():
            assert np.all(slope[above] == 0)
            assert np.all(np.abs(jacobian[key]).max(axis=(1, 2)) > 0)
            np.testing.assert_allclose(slope[~above], jacobian[key][~above], rtol=1e-5, atol=1e-7)


ERRORS = {
    "mean": mean_squares,
    "sum": sum_squares,
    "filtered": filtered(mean_squares, low_pass(0.5)),
    "window": weighted(sum_squares, window(250, 750, 1000)),
}


@pytest.mark.parametrize("name", ERRORS)
def test_the_default_cap_is_the_null_level_of_every_error(name):
    """The error of eps itself: what a network of zeros has, in the unit and the selection of the forget error."""
    batch, draw = rows()
    error = ERRORS[name]
    objective = mirrored(SCHEDULE, forget_error=error)
    terms, aux = jax.jit(lambda p: objective(tm.predict, p, batch, draw))(tm.params())
    null = np.asarray(error(draw.eps, draw.t))
    residual = tm.predict(tm.params(), SCHEDULE.add_noise(batch.forget.x0, draw.eps, draw.t), draw.t) - draw.eps
    np.testing.assert_allclose(terms["forget"], np.minimum(error(residual, draw.t), null), rtol=1e-5)
    assert np.all(aux["capped"][null == 0] == 0)
    # An answer worse than none is at its cap, with nothing left to ascend; a better one is not.
    scaled = lambda p, x, t, cond: p["a"] * draw.eps  # noqa: E731
    run = jax.jit(lambda p: term_grads(objective, scaled, p, batch, draw))
    for a, inside in ((-0.01, False), (0.5, True)):
        grads, _, aux = run({"a": jnp.float32(a)})
        assert (grads["forget"]["a"] != 0) == inside
        np.testing.assert_allclose(aux["capped"], 0 if inside else np.mean(null > 0))


@pytest.mark.parametrize("name", ["mean", "sum"])
def test_the_measured_null_level_of_a_network_of_zeros_is_one_per_pixel(name):
    example = Example(jnp.zeros((3, 16, 16, 3)))
    levels = np.asarray(
        probe_levels(zeros, tm.params(3), example, SCHEDULE, jax.random.key(0), error=ERRORS[name], noises=8)
    )
    size = 16 * 16 * 3
    assert levels.shape == (3, 16)
    assert np.array_equal(levels[0], levels[2])  # the same probes for every image
    level = levels[0].mean() / (size if name == "sum" else 1)
    standard_error = np.sqrt(2 / (size * 16 * 8))
    assert abs(level - 1) < 3 * standard_error
    assert mirrored(SCHEDULE, cap=float(level)).terms == ("keep", "forget")


def test_probe_levels_equal_a_loop():
    a = tm.arrays(3)
    key = jax.random.key(4)
    cond = jnp.array([0.1, -0.3, 0.2])
    example = Example(jnp.asarray(a["a0"]), cond)
    got = probe_levels(tm.predict, tm.params(), example, SCHEDULE, key, count=5, noises=2, t_min=100, t_max=900)
    t = np.repeat(strata(1000, 5, t_min=100, t_max=900), 2)
    assert t[::2].tolist() == [180, 340, 500, 660, 820]
    eps = np.asarray(jax.random.normal(key, (10, 8, 8, 1)), np.float64)
    alpha, sigma = oracle.alpha_sigma(oracle.linear_table(), t)
    params = {k: np.float64(v) for k, v in tm.params().items()}
    for i in range(3):
        x_t = oracle.noised(np.repeat(a["a0"][i : i + 1].astype(np.float64), 10, 0), eps, alpha, sigma)
        features = oracle.net_features(x_t, t)
        features[..., 2] += float(cond[i])
        residual = np.tanh(features @ params["inner"]) @ params["outer"] - eps
        want = (residual**2).mean(axis=(1, 2, 3)).reshape(5, 2).mean(axis=1)
        np.testing.assert_allclose(got[i], want, rtol=1e-5)


def test_level_table():
    table = level_table(np.array([4.0, 2.0, 1.0, 3.0]), 1000, start=np.array([1.0, 2.5, 0.5, 1.0]))
    assert table.shape == (1000,)
    assert table[[0, 125, 375, 625, 875, 999]].tolist() == [4, 4, 2.5, 1, 3, 3]
    np.testing.assert_allclose(table[500], 1.75)
    clamped(SCHEDULE, cap=table)


@pytest.mark.parametrize("name", ["mirrored", "clamped"])
def test_a_thousand_steps_of_ascent_stay_finite_and_end_at_the_cap(name):
    """Plain ascent of the same size leaves every bound."""
    batch, draw = tm.batch_and_draw(tm.arrays(8, t=[50, 200, 300, 400, 500, 600, 700, 900]))
    tx, cap = optax.sgd(0.05), 3.0
    combine = make_combine(name, keep=0.0, forget=-1.0)
    steps = {
        label: make_train_step(make(SCHEDULE, cap=limit), combine, tm.predict, tx)
        for label, make, limit in (
            ("bounded", {"mirrored": mirrored, "clamped": clamped}[name], cap),
            ("free", mirrored, 1e30),
        )
    }

    def run(label):
        def one(state, _):
            state, metrics = steps[label](state, batch, draw)
            return state, (metrics["loss/forget"], metrics["finite"])

        return jax.lax.scan(one, init_state(tm.params(), tx, combine), None, length=1000)

    out = jax.jit(lambda: {label: run(label) for label in steps})()
    state, (loss, finite) = out["bounded"]
    assert np.all(finite == 1)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state.params))
    assert loss[0] < 0.9 * cap
    np.testing.assert_allclose(loss[-1], cap, rtol=1e-3)
    assert out["free"][1][0].max() > 100 * cap or not np.all(out["free"][1][1] == 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: clamped(SCHEDULE), "clamped needs cap=: the forget error of a retrained model"),
        (lambda: clamped(SCHEDULE, cap=np.ones(10)), r"a number or a table \[1000\] over t, got \(10,\)"),
        (lambda: clamped(SCHEDULE, cap=np.zeros(1000)), "cap must be finite and positive"),
        (lambda: clamped(SCHEDULE, cap=float("nan")), "cap must be finite and positive, got nan"),
        (lambda: mirrored(SCHEDULE, cap=0.0), "cap must be finite and positive, got 0.0"),
        (lambda: mirrored(SCHEDULE, cap=np.ones(1000)), "must be one number.*clamped takes a table"),
        (lambda: strata(1000, 0), "1 <= count"),
        (lambda: strata(1000, 4, t_min=900, t_max=1001), "t_max <= 1000"),
        (lambda: level_table(np.array([1.0, 0.0]), 10), "finite positive"),
        (lambda: level_table(np.ones(3), 10, start=np.ones(2)), "shape of levels"),
    ],
)
def test_bad_caps_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
