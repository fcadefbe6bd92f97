"""Combiners against the oracle, their invariants, and what they do with a forget gradient of norm zero."""

from __future__ import annotations

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import filtered, low_pass, mean_squares, sum_squares
from jaxunlearn.combine import (
    COMBINERS,
    erasediff,
    fixed_norm,
    pcgrad,
    relative_norm,
    tree_dot,
    tree_norm,
    weighted_sum,
)
from jaxunlearn.methods import make_combine, make_objective
from jaxunlearn.step import term_grads
from tests import oracle
from tests import tiny_model as tm
from tests.tiny_model import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")

MADE = {
    "weighted_sum": weighted_sum(keep=1.0, forget=-0.5),
    "fixed_norm": fixed_norm(5.0),
    "fixed_norm up": fixed_norm(5.0, forget_sign=1),
    "relative_norm": relative_norm(0.1),
    "relative_norm up": relative_norm(0.3, forget_sign=1),
    "erasediff": erasediff(1e-3),
    "pcgrad": pcgrad(forget=0.7),
    "pcgrad down": pcgrad(forget=0.7, forget_sign=1),
    "pcgrad one-sided": pcgrad(forget=0.7, two_sided=False),
}
FORMULA = {
    "weighted_sum": lambda k, f: oracle.add(k, -0.5, f),
    "fixed_norm": lambda k, f: oracle.fixed_norm(k, f, 5.0),
    "fixed_norm up": lambda k, f: oracle.fixed_norm(k, f, 5.0, 1),
    "relative_norm": lambda k, f: oracle.relative_norm(k, f, 0.1),
    "relative_norm up": lambda k, f: oracle.relative_norm(k, f, 0.3, 1),
    "erasediff": lambda k, f: oracle.erasediff(k, f, 1e-3),
    "pcgrad": lambda k, f: oracle.pcgrad(k, f, 1.0, 0.7),
    "pcgrad down": lambda k, f: oracle.pcgrad(k, f, 1.0, 0.7, 1),
    "pcgrad one-sided": lambda k, f: oracle.pcgrad(k, f, 1.0, 0.7, two_sided=False),
}


def random_grads(seed=0, scale=1.0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    make = lambda: {"a": rng.normal(size=(3, 4)).astype(dtype), "b": rng.normal(size=5).astype(dtype)}  # noqa: E731
    keep, forget = make(), make()
    return keep, {k: (scale * v).astype(dtype) for k, v in forget.items()}


def direction(combine, keep, forget):
    grads = {"keep": jax.tree.map(jnp.asarray, keep), "forget": jax.tree.map(jnp.asarray, forget)}
    return combine.apply(grads, combine.init(grads["keep"]), jnp.int32(0))


def test_every_combiner_is_tested():
    assert {name.split()[0] for name in MADE} == set(COMBINERS)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", MADE)
def test_formula(name):
    for seed, scale in ((0, 1.0), (1, 1e3), (2, 1e-3)):
        keep, forget = random_grads(seed, scale)
        got, _, metrics = direction(MADE[name], keep, forget)
        tm.close(got, FORMULA[name](keep, forget), 1e-12)
        np.testing.assert_allclose(metrics["grad_norm/keep"], oracle.norm(keep), rtol=1e-12)
        np.testing.assert_allclose(metrics["grad_norm/forget"], oracle.norm(forget), rtol=1e-12)
        if "grad_cosine" in metrics:
            cosine = oracle.dot(keep, forget) / oracle.norm(keep) / oracle.norm(forget)
            np.testing.assert_allclose(metrics["grad_cosine"], cosine, rtol=1e-10)


@pytest.mark.parametrize("name", MADE)
def test_zero_forget_gradient_gives_the_keep_gradient_exactly(name):
    keep, forget = random_grads(dtype=np.float32)
    zero = jax.tree.map(np.zeros_like, forget)
    for run in (direction, jax.jit(direction, static_argnums=0)):
        got, _, metrics = run(MADE[name], keep, zero)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(keep)):
            assert np.array_equal(x, y)
        assert all(np.isfinite(v) for v in metrics.values())
    # The next AdamW step is finite.
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    updates, _ = tx.update(got, tx.init(keep), keep)
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("name", MADE)
def test_zero_keep_gradient_and_both_zero_stay_finite(name):
    keep, forget = random_grads(dtype=np.float32)
    zero = jax.tree.map(np.zeros_like, keep)
    for k, f in ((zero, forget), (zero, zero)):
        got, _, metrics = direction(MADE[name], k, f)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((got, metrics)))


@pytest.mark.parametrize("name", MADE)
def test_tiny_forget_gradients_never_overflow(name):
    keep, forget = random_grads(dtype=np.float32)
    for size in (1e-12, 1e-18, 1e-21, 1e-30, 1e-44):
        small = jax.tree.map(lambda x, size=size: (x * size).astype(np.float32), forget)
        got, _, _ = direction(MADE[name], keep, small)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(got))
        assert oracle.norm({k: np.float64(v) for k, v in got.items()}) < 20


@pytest.mark.parametrize("name", MADE)
def test_a_nan_is_passed_on_and_not_hidden(name):
    keep, forget = random_grads(dtype=np.float32)
    forget["a"][0, 0] = np.nan
    got, _, _ = direction(MADE[name], keep, forget)
    assert np.isnan(oracle.norm({k: np.float64(v) for k, v in got.items()}))


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("rho", [0.0, 0.1, 2.0])
def test_relative_norm_gives_the_ratio_exactly(rho, sign):
    for scale in (1e-6, 1.0, 1e6):
        keep, forget = random_grads(3, scale, np.float32)
        got, _, metrics = direction(relative_norm(rho, forget_sign=sign), keep, forget)
        # The forget part itself, not its difference to keep: a keep gradient of zero would hide it in rounding.
        part = {k: np.float64(metrics["forget_scale"]) * np.float64(forget[k]) for k in forget}
        np.testing.assert_allclose(oracle.norm(part), rho * oracle.norm(keep), rtol=1e-6)
        tm.close(got, oracle.relative_norm(keep, forget, rho, sign), 1e-6)


def test_fixed_norm_scales_up_and_down_and_ignores_the_scale_of_forget():
    keep, forget = random_grads(4, 1.0, np.float32)
    outcomes = [
        direction(fixed_norm(5.0), keep, {k: np.float32(c) * v for k, v in forget.items()})[0] for c in (1e-4, 1, 1e4)
    ]
    tm.close(outcomes[0], outcomes[1], 1e-5)
    tm.close(outcomes[2], outcomes[1], 1e-5)


@pytest.mark.parametrize("make", [fixed_norm, relative_norm])
def test_max_scale_is_respected(make):
    keep, forget = random_grads(5, 1e-6, np.float32)
    got, _, metrics = direction(make(1.0, max_scale=3.0), keep, forget)
    assert metrics["forget_scale"] == 3.0
    tm.close(got, oracle.add(keep, -3.0, forget), 1e-6)
    _, _, metrics = direction(make(1.0, max_scale=1e30), keep, forget)
    assert metrics["forget_scale"] > 1e3


def test_erasediff_factor_is_never_negative_and_the_constraint_holds():
    for seed in range(20):
        keep, forget = random_grads(seed, dtype=np.float32)
        if seed % 2:  # strongly aligned: the factor would be negative
            forget = {k: forget[k] + np.float32(5) * keep[k] for k in keep}
        got, _, metrics = direction(erasediff(0.1), keep, forget)
        assert metrics["forget_scale"] >= 0
        got = {k: np.float64(v) for k, v in got.items()}
        assert oracle.dot(got, forget) >= 0.1 * oracle.dot(forget, forget) * (1 - 1e-5)


def test_keep_loss_falls_to_first_order_under_relative_norm():
    for seed in range(20):
        keep, forget = random_grads(seed, dtype=np.float32)
        got, _, _ = direction(relative_norm(0.5), keep, forget)
        got = {k: np.float64(v) for k, v in got.items()}
        assert oracle.dot(keep, got) >= 0.5 * oracle.dot(keep, keep) * (1 - 1e-5)


def surgery(keep, forget, **options):
    """``(direction, h', k', h)`` as vectors; with one weight zero the direction is the other projected gradient."""
    flat = lambda tree: np.concatenate([np.ravel(tree[k]) for k in sorted(tree)]).astype(np.float64)  # noqa: E731
    parts = [flat(direction(pcgrad(**w, **options), keep, forget)[0]) for w in ({}, {"keep": 0.0}, {"forget": 0.0})]
    return *parts, options.get("forget_sign", -1) * flat(forget)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sign", [-1, 1])
def test_pcgrad_ends_the_conflict_and_leaves_peace_alone(sign):
    conflicts = 0
    for seed in range(20):
        keep, forget = random_grads(seed, 10.0 ** (seed % 5 - 2))
        both, h_new, k_new, h = surgery(keep, forget, forget_sign=sign)
        g = np.concatenate([np.ravel(keep[k]) for k in sorted(keep)])
        slack = 1e-12 * np.linalg.norm(g) * np.linalg.norm(h)
        assert h_new @ g >= -slack
        assert k_new @ h >= -slack
        assert both @ g >= -slack
        np.testing.assert_allclose(both, h_new + k_new, rtol=1e-12, atol=1e-12)
        _, _, metrics = direction(pcgrad(forget_sign=sign), keep, forget)
        assert bool(metrics["conflict"]) == (h @ g < 0)
        conflicts += h @ g < 0
        if h @ g >= 0:
            np.testing.assert_allclose(both, g + h, rtol=1e-12)
        else:
            np.testing.assert_allclose([h_new @ g, k_new @ h], 0, atol=slack)
        one, _, k_one, _ = surgery(keep, forget, forget_sign=sign, two_sided=False)
        np.testing.assert_allclose(k_one, g, rtol=1e-12)
        np.testing.assert_allclose(one, g + h_new, rtol=1e-12, atol=1e-12)
    assert 3 < conflicts < 17


@pytest.mark.usefixtures("x64")
def test_pcgrad_of_opposed_gradients_is_zero_and_its_metrics_show_it():
    keep, _ = random_grads(8)
    same = {k: 3.0 * v for k, v in keep.items()}  # ascended, so exactly against keep
    got, _, metrics = direction(pcgrad(), keep, same)
    assert oracle.norm(got) < 1e-12 * oracle.norm(keep)
    np.testing.assert_allclose(metrics["grad_cosine"], 1, rtol=1e-12)
    assert metrics["conflict"] == 1
    # One-sided, keep is never weakened.
    tm.close(direction(pcgrad(two_sided=False), keep, same)[0], keep, 1e-12)


def test_a_scheduled_forget_weight_needs_a_sign_and_keeps_it():
    keep, forget = random_grads(7, dtype=np.float32)
    grads = {"keep": keep, "forget": forget}
    rising = lambda step: 0.1 * (step - 2)  # noqa: E731
    combine = weighted_sum(keep=1.0, forget=rising, forget_sign=1)
    assert combine.forget_sign == 1
    tm.close(combine.apply(grads, (), jnp.int32(5))[0], oracle.add(keep, 0.3, forget), 1e-6)
    tm.close(combine.apply(grads, (), jnp.int32(0))[0], keep, 0)  # the other sign counts as zero
    falling = make_combine("siss_no_is", "weighted_sum", keep=1.0, forget=lambda step: -0.1 * step)
    assert falling.forget_sign == -1
    tm.close(falling.apply(grads, (), jnp.int32(3))[0], oracle.add(keep, -0.3, forget), 1e-6)


def test_coefficients_may_depend_on_the_step():
    keep, forget = random_grads(6, dtype=np.float32)
    grads = {"keep": keep, "forget": forget}
    rising = lambda step: 0.1 * step  # noqa: E731
    for make in (fixed_norm, relative_norm, erasediff, lambda value: pcgrad(forget=value)):
        scheduled = jax.jit(make(rising).apply)(grads, (), jnp.int32(3))[0]
        tm.close(scheduled, make(0.3).apply(grads, (), 0)[0], 1e-6)
    scheduled = weighted_sum(keep=rising, forget=-1.0).apply(grads, (), jnp.int32(3))[0]
    tm.close(scheduled, weighted_sum(keep=0.3, forget=-1.0).apply(grads, (), 0)[0], 1e-6)


def test_a_number_that_turns_negative_never_turns_the_forget_part_round():
    """A schedule that falls below zero counts as zero, for both signs: it must not train on the images."""
    keep, forget = random_grads(6, dtype=np.float32)
    keep = {k: v - forget[k] for k, v in keep.items()}
    falling = lambda step: 0.1 * (2 - step)  # noqa: E731
    made = [(fixed_norm, "c"), (relative_norm, "rho"), (pcgrad, "forget"), (pcgrad, "keep")]
    for (make, name), sign in itertools.product(made, (-1, 1)):
        scheduled = make(**{name: falling}, forget_sign=sign)
        for step, value in ((0, 0.2), (7, 0.0)):
            got, _, metrics = scheduled.apply({"keep": keep, "forget": forget}, (), jnp.int32(step))
            tm.close(got, direction(make(**{name: value}, forget_sign=sign), keep, forget)[0], 1e-6)
            assert metrics["forget_scale"] >= 0


def test_half_precision_gradients_are_measured_in_float32():
    """In float16 the squares of this gradient overflow; its norm must not."""
    big = {"a": jnp.full((4, 4), 300.0, jnp.float16)}
    assert tree_norm(big).dtype == jnp.float32
    np.testing.assert_allclose(tree_norm(big), 1200.0)
    np.testing.assert_allclose(tree_dot(big, {"a": jnp.ones((4, 4), jnp.bfloat16)}), 4800.0)
    got, _, metrics = fixed_norm(12.0).apply({"keep": big, "forget": big}, (), 0)
    assert got["a"].dtype == jnp.float16
    np.testing.assert_allclose(metrics["forget_scale"], 0.01)


def test_sums_are_means_times_the_number_of_values_and_fixed_norm_does_not_see_the_difference():
    a = tm.arrays(4)
    batch, draw = tm.batch_and_draw(a)
    p = tm.params()

    @jax.jit
    def run():
        out = {}
        for label, error in (("sum", sum_squares), ("mean", mean_squares)):
            for name in ("siss", "siss_no_is"):
                grads, _, _ = term_grads(make_objective(name, tm.SCHEDULE, error=error), tm.predict, p, batch, draw)
                out[label, name] = grads
            narrow = filtered(error, low_pass(0.55))
            objective = make_objective("siss", tm.SCHEDULE, forget_error=narrow)
            out[label, "filtered"] = term_grads(objective, tm.predict, p, batch, draw)[0]
        return out

    out = run()
    size = a["x0"][0].size
    for name in ("siss", "siss_no_is", "filtered"):
        for term in ("keep", "forget") if name != "filtered" else ("forget",):
            ratio = tree_norm(out["sum", name][term]) / tree_norm(out["mean", name][term])
            np.testing.assert_allclose(ratio, size, rtol=1e-5)
    keep = out["sum", "siss"]["keep"]
    one, _, _ = fixed_norm(5.0).apply({"keep": keep, "forget": out["sum", "filtered"]["forget"]}, (), 0)
    two, _, _ = fixed_norm(5.0).apply({"keep": keep, "forget": out["mean", "filtered"]["forget"]}, (), 0)
    tm.close(one, two, 1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fixed_norm(-1.0), "c >= 0"),
        (lambda: fixed_norm(float("nan")), "c >= 0"),
        (lambda: fixed_norm(1.0, forget_sign=0), "forget_sign"),
        (lambda: fixed_norm(1.0, max_scale=0.0), "max_scale"),
        (lambda: relative_norm(-0.1), "rho >= 0"),
        (lambda: relative_norm(float("inf")), "rho >= 0"),
        (lambda: erasediff(-1e-3), "eta >= 0"),
        (lambda: weighted_sum(), "at least one"),
        (lambda: weighted_sum(keep=float("nan")), "finite"),
        (lambda: weighted_sum(keep=1.0, forget=lambda step: 1.0), "must be a number"),
        (lambda: weighted_sum(keep=1.0, forget=1.0, forget_sign=-1), "has not the sign"),
        (lambda: weighted_sum(keep=1.0, forget=1.0, forget_sign=2), "forget_sign must be"),
        (lambda: pcgrad(keep=-1.0), "finite keep >= 0"),
        (lambda: pcgrad(forget=float("inf")), "finite forget >= 0"),
        (lambda: pcgrad(forget_sign=0), "forget_sign must be"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", MADE)
def test_other_terms_than_expected_are_refused(name):
    keep, _ = random_grads(dtype=np.float32)
    with pytest.raises(ValueError, match=r"combines the terms .* but the objective has \['keep'\]"):
        MADE[name].apply({"keep": keep}, (), 0)


def test_make_combine():
    assert make_combine("siss").forget_sign == -1
    assert make_combine("erasediff", "fixed_norm", c=2.0).forget_sign == 1
    assert make_combine("siss", "weighted_sum", keep=1.0, forget=-0.2).forget_sign == -1
    assert make_combine("siss", "pcgrad").forget_sign == -1
    assert make_combine("surrogate").forget_sign == make_combine("kto", "pcgrad", keep=5.0).forget_sign == 1
    for arguments, message in [
        (("siss", "fixed_norm"), "c"),
        (("siss", "relative_norms"), "did you mean 'relative_norm'"),
        (("sisss",), "did you mean 'siss'"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_combine(*arguments)
    with pytest.raises(ValueError, match="rhoo"):
        make_combine("siss", rhoo=0.1)


def test_signatures_name_their_options():
    """The launcher passes options by name."""
    assert set(inspect.signature(fixed_norm).parameters) == {"c", "forget_sign", "max_scale"}
    assert set(inspect.signature(relative_norm).parameters) == {"rho", "forget_sign", "max_scale"}
    assert set(inspect.signature(pcgrad).parameters) == {"keep", "forget", "forget_sign", "two_sided"}
