"""The training step on one device: parity with the oracle, micro-batches, descent, guards and state."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import METHODS, Batch, Draw, Example, init_state, make_train_step
from jaxunlearn.combine import COMBINERS, erasediff, fixed_norm, relative_norm, tree_norm, weighted_sum
from jaxunlearn.methods import make_combine, make_objective
from jaxunlearn.step import accumulated_term_grads, term_grads
from tests import oracle
from tests import tiny_model as tm
from tests.tiny_model import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")

RATE = 1e-2


def adam(rate=RATE):
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-4))


def rescaled(name):
    """The combiner of parity with the published settings: c = 5."""
    if name in ("siss", "siss_no_is", "bernoulli"):
        return fixed_norm(5.0), lambda k, f: oracle.fixed_norm(k, f, 5.0)
    if name == "erasediff":
        return erasediff(1e-3), lambda k, f: oracle.erasediff(k, f, 1e-3)
    return make_combine(name), None


@pytest.mark.usefixtures("x64")
def test_steps_equal_the_oracle_in_float64():
    """B = 6, t = 3..999, lam = 1/2, c = 5: losses, norms and parameters of three clipped AdamW steps, to 1e-12."""
    batches = [tm.arrays(6, seed=i, dtype=np.float64, t=[3, 100, 400, 700, 900, 999]) for i in range(3)]
    start = tm.params(dtype=np.float64)
    steps, states, refs = {}, {}, {}
    for name in METHODS:
        combine, _ = rescaled(name)
        steps[name] = make_train_step(tm.make_objective(name), combine, tm.predict, adam())
        refs[name] = tm.ref_params(name, dtype=np.float64)
        states[name] = init_state(start, adam(), combine)._replace(ref_params=refs[name])
    run = jax.jit(lambda s, b, d: {name: step(s[name], b, d) for name, step in steps.items()})
    oracles = {name: (start, None) for name in METHODS}
    for a in batches:
        out = run(states, *tm.batch_and_draw(a))
        for name in METHODS:
            states[name], metrics = out[name]
            params, moments = oracles[name]
            args = (a["x0"], a["a0"], a["t"], a["eps"], a["u"], oracle.linear_table())
            extra = {k: a[k] for k in ("noise", "neighbours", "surrogate")} | tm.METHOD_OPTIONS.get(name, {})
            terms, grads = oracle.objective(name, params, *args, **extra, ref=refs[name])
            for term in terms:
                np.testing.assert_allclose(metrics[f"loss/{term}"], terms[term].mean(), rtol=1e-12)
                # The two halves of dpo's pairs almost cancel.
                tolerance = 1e-10 if name == "dpo" else 1e-12
                np.testing.assert_allclose(metrics[f"grad_norm/{term}"], oracle.norm(grads[term]), rtol=tolerance)
            weights = METHODS[name].combiner_options
            if rescaled(name)[1] is not None:
                direction = rescaled(name)[1](grads["keep"], grads["forget"])
            elif name == "surrogate":
                direction = oracle.pcgrad(grads["keep"], grads["forget"], weights["keep"], weights["forget"], +1)
            else:
                direction = {k: sum(weights[term] * g[k] for term, g in grads.items()) for k in params}
            clipped = oracle.clip(direction, 1.0)
            oracles[name] = oracle.adamw(params, clipped, moments, RATE)
            update = {k: oracles[name][0][k] - params[k] for k in params}
            np.testing.assert_allclose(metrics["update_norm"], oracle.norm(update), rtol=10 * tolerance)
            tm.close(states[name].params, oracles[name][0], tolerance)
            assert metrics["finite"] == 1
            assert states[name].step.dtype == jnp.int32


@pytest.mark.parametrize("name", ["siss", "erasediff"])
def test_micro_batches_give_the_same_direction(name):
    batch, draw = tm.batch_and_draw(tm.arrays(16))
    p = tm.params()
    objective, combine = make_objective(name, tm.SCHEDULE), make_combine(name)

    @jax.jit
    def run():
        out = {}
        for count in (1, 4, 16):
            grads, terms, aux = accumulated_term_grads(objective, tm.predict, p, batch, draw, micro_batches=count)
            out[count] = combine.apply(grads, (), jnp.int32(0))[0], grads, terms, aux

        # Combining in each micro-batch and averaging afterwards is another direction.
        def share(i):
            rows = jax.tree.map(lambda x: x[4 * i : 4 * i + 4], (batch, draw))
            return combine.apply(term_grads(objective, tm.predict, p, *rows)[0], (), 0)[0]

        wrong = jax.tree.map(lambda *x: sum(x) / 4, *(share(i) for i in range(4)))
        return out, wrong

    out, wrong = run()
    tm.close(out[4], out[1], 1e-5)
    tm.close(out[16], out[1], 1e-5)
    difference = tree_norm(jax.tree.map(jnp.subtract, wrong, out[1][0]))
    assert difference > 0.01 * tree_norm(out[1][0])


def test_micro_batches_must_divide():
    batch, draw = tm.batch_and_draw(tm.arrays(6))
    step = make_train_step(
        make_objective("siss", tm.SCHEDULE), make_combine("siss"), tm.predict, adam(), micro_batches=4
    )
    state = init_state(tm.params(), adam(), make_combine("siss"))
    with pytest.raises(ValueError, match="6 examples does not divide into 4"):
        jax.eval_shape(step, state, batch, draw)
    with pytest.raises(ValueError, match="micro_batches must be at least 1"):
        make_train_step(make_objective("siss", tm.SCHEDULE), make_combine("siss"), tm.predict, adam(), micro_batches=0)


@pytest.mark.usefixtures("x64")
def test_keep_loss_falls_by_at_least_half_of_naive_descent():
    """relative_norm(0.5), plain SGD of a tiny rate on the full batch: the first-order bound 1 - rho."""
    batch, draw = tm.batch_and_draw(tm.arrays(8, dtype=np.float64, t=[50, 200, 400, 500, 600, 700, 900, 990]))
    start = tm.params(dtype=np.float64)
    tx = optax.sgd(1e-7)
    naive = make_objective("naive", tm.SCHEDULE)

    def keep_loss(p):
        return naive(tm.predict, p, batch, draw)[0]["keep"].mean()

    @jax.jit
    def falls():
        out = {}
        for name, combine in (("naive", weighted_sum(keep=1.0)), ("siss_no_is", relative_norm(0.5))):
            step = make_train_step(make_objective(name, tm.SCHEDULE), combine, tm.predict, tx)
            after, _ = step(init_state(start, tx, combine), batch, draw)
            out[name] = keep_loss(start) - keep_loss(after.params)
        return out

    fall = falls()
    assert fall["naive"] > 0
    assert fall["siss_no_is"] >= 0.5 * fall["naive"]
    assert abs(fall["siss_no_is"] / fall["naive"] - 1) > 0.01


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.forget_sign])
def test_the_forget_part_alone_moves_its_loss_as_the_sign_says(name):
    """-1 raises the forget loss, +1 lowers it: a small SGD step with the keep part removed."""
    batch, draw = tm.batch_and_draw(tm.arrays(8))
    objective, p, ref = tm.make_objective(name), tm.params(), tm.ref_params(name)

    @jax.jit
    def change():
        grads, before, _ = term_grads(objective, tm.predict, p, batch, draw, ref_params=ref)
        grads = {k: g if k == "forget" else jax.tree.map(jnp.zeros_like, g) for k, g in grads.items()}
        combine = {
            "relative_norm": lambda: fixed_norm(1.0),  # relative to a keep gradient of zero nothing would be left
            "erasediff": lambda: erasediff(1.0),
        }.get(METHODS[name].combiner, lambda: make_combine(name))()
        assert combine.forget_sign == objective.forget_sign == METHODS[name].forget_sign
        direction, _, _ = combine.apply(grads, (), jnp.int32(0))
        moved = jax.tree.map(lambda x, d: x - 1e-2 * d / tree_norm(direction), p, direction)
        terms, _ = objective(tm.predict, moved, batch, draw, ref_params=ref)
        return jnp.mean(terms["forget"]) - before["forget"]

    assert np.sign(change()) == -METHODS[name].forget_sign


def test_a_combiner_of_the_wrong_sign_is_refused():
    for name in METHODS:
        objective = tm.make_objective(name)
        for combine in (weighted_sum(keep=1.0), fixed_norm(1.0), fixed_norm(1.0, forget_sign=1), erasediff(1e-3)):
            if combine.forget_sign == objective.forget_sign:
                continue
            with pytest.raises(ValueError, match=f"choose a combiner with forget_sign={objective.forget_sign}"):
                make_train_step(objective, combine, tm.predict, adam())


@pytest.mark.parametrize("combiner", COMBINERS)
def test_a_batch_without_forget_signal_changes_nothing_but_keep(combiner):
    """Every forget row outside the window: AdamW sees the keep gradient alone, and the parameters stay finite."""
    name = "erasediff" if combiner == "erasediff" else "siss"
    options = {
        "weighted_sum": {"keep": 1.0, "forget": -0.5},
        "fixed_norm": {"c": 5.0},
        "relative_norm": {"rho": 0.1},
        "erasediff": {"eta": 1e-3},
        "pcgrad": {"keep": 1.0, "forget": 0.5},
    }[combiner]
    combine = make_combine(name, combiner, **options)
    objective = make_objective(name, tm.SCHEDULE, forget_error=tm.SELECTIONS["both"])
    batch, draw = tm.batch_and_draw(tm.arrays(4, t=[0, 100, 800, 999]))
    p = tm.params()

    @jax.jit
    def run(state):
        grads, _, _ = term_grads(objective, tm.predict, p, batch, draw)
        only_keep = make_train_step(
            objective, combine._replace(apply=lambda g, s, i: (g["keep"], s, {})), tm.predict, adam()
        )
        both = make_train_step(objective, combine, tm.predict, adam())
        return grads, both(state, batch, draw), only_keep(state, batch, draw)

    grads, (state, metrics), (want, _) = run(init_state(p, adam(), combine))
    assert all(np.all(g == 0) for g in jax.tree.leaves(grads["forget"]))
    assert metrics["loss/forget"] == 0
    assert metrics["finite"] == 1
    tm.close(state.params, want.params, 1e-7)


def test_bytes_and_floats_are_the_same_images():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 4, 8, 8, 1)).astype(np.uint8)
    floats = pixels.astype(np.float32) / 127.5 - 1
    _, draw = tm.batch_and_draw(tm.arrays(4))
    combine = make_combine("siss")
    step = jax.jit(make_train_step(make_objective("siss", tm.SCHEDULE), combine, tm.predict, optax.sgd(1e-3)))
    state = init_state(tm.params(), optax.sgd(1e-3), combine)
    results = [step(state, Batch(Example(z[0]), Example(z[1])), draw)[0].params for z in (pixels, floats)]
    tm.close(results[0], results[1], 1e-6)
    with pytest.raises(TypeError, match="uint8"):
        step(state, Batch(Example(pixels[0].astype(np.int32)), Example(pixels[1])), draw)


def test_t_weight_multiplies_every_term():
    batch, draw = tm.batch_and_draw(tm.arrays(4))
    weight = jnp.array([0.0, 1.0, 2.0, 5.0])
    p, objective = tm.params(), make_objective("siss", tm.SCHEDULE)

    @jax.jit
    def run(draw):
        grads, means, _ = term_grads(objective, tm.predict, p, batch, draw)
        return grads, means, objective(tm.predict, p, batch, draw)[0]

    grads, means, terms = run(draw._replace(t_weight=weight))
    for name in terms:
        np.testing.assert_allclose(means[name], np.mean(terms[name] * weight), rtol=1e-5)
    rows = [run(draw._replace(t_weight=4.0 * jnp.eye(4)[i]))[0] for i in range(4)]
    tm.close(grads, jax.tree.map(lambda *g: sum(w * x for w, x in zip(weight, g)) / 4, *rows), 1e-5)


def test_average_of_the_parameters_and_frozen_copies():
    batch, draw = tm.batch_and_draw(tm.arrays(4))
    combine, tx = make_combine("siss"), optax.sgd(1e-3)
    decay = lambda step: jnp.minimum(0.9, (1.0 + step) / (10.0 + step))  # noqa: E731
    step = jax.jit(make_train_step(make_objective("siss", tm.SCHEDULE), combine, tm.predict, tx, ema_decay=decay))
    state = init_state(tm.params(), tx, combine, ema=True, ref=True)
    average = tm.params()
    for i in range(3):
        state, _ = step(state, batch, draw)
        d = min(0.9, (1 + i) / (10 + i))
        average = {k: d * average[k] + (1 - d) * np.asarray(state.params[k]) for k in average}
    tm.close(state.ema_params, average, 1e-6)
    assert int(state.step) == 3
    for k, v in tm.params().items():
        assert np.array_equal(state.ref_params[k], v)
    assert step._cache_size() == 1


def test_an_average_that_was_not_set_up_is_refused():
    batch, draw = tm.batch_and_draw(tm.arrays(2))
    combine, tx = make_combine("siss"), optax.sgd(1e-3)
    step = make_train_step(make_objective("siss", tm.SCHEDULE), combine, tm.predict, tx, ema_decay=0.9)
    with pytest.raises(ValueError, match="ema=True"):
        jax.eval_shape(step, init_state(tm.params(), tx, combine), batch, draw)


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_donation_spares_the_callers_parameters_and_the_frozen_copy():
    batch, draw = tm.batch_and_draw(tm.arrays(4))
    combine, tx = make_combine("siss"), adam()
    mine = jax.tree.map(jnp.asarray, tm.params())
    state = init_state(mine, tx, combine, ema=True, ref=True)
    first = state
    step = jax.jit(
        make_train_step(make_objective("siss", tm.SCHEDULE), combine, tm.predict, tx, ema_decay=0.9), donate_argnums=0
    )
    for _ in range(3):
        state, _ = step(state, batch, draw)
    assert first.params["inner"].is_deleted()
    for k, v in tm.params().items():
        assert np.array_equal(mine[k], v)
        assert np.array_equal(state.ref_params[k], v)
        assert not np.array_equal(state.ema_params[k], v)


def test_non_finite_gradients_are_reported():
    batch, draw = tm.batch_and_draw(tm.arrays(2))
    p = tm.params()
    p["outer"][0] = np.nan
    combine, tx = make_combine("siss"), optax.sgd(1e-3)
    step = jax.jit(make_train_step(make_objective("siss", tm.SCHEDULE), combine, tm.predict, tx))
    _, metrics = step(init_state(p, tx, combine), batch, draw)
    assert metrics["finite"] == 0


def test_objectives_that_need_a_reference_get_it_or_raise():
    """`ref_params` reach the objective as an argument, not as a constant of the program."""
    from jaxunlearn.objectives import PerExampleObjective

    def function(predict, params, batch, draw, ref_params):
        difference = predict(params, batch.keep.x0, draw.t, None) - predict(ref_params, batch.keep.x0, draw.t, None)
        return {"keep": jnp.sum(difference**2, axis=(1, 2, 3))}, {}

    objective = PerExampleObjective(function, terms=("keep",), forget_sign=0, needs_ref=True)
    batch, draw = tm.batch_and_draw(tm.arrays(2))
    combine, tx = weighted_sum(keep=1.0), optax.sgd(1e-3)
    step = jax.jit(make_train_step(objective, combine, tm.predict, tx))
    state, metrics = step(init_state(tm.params(), tx, combine, ref=True), batch, draw)
    assert metrics["loss/keep"] == 0
    moved = jax.tree.map(lambda x: x + 0.1, state.ref_params)
    _, metrics = step(state._replace(ref_params=moved), batch, draw)
    assert metrics["loss/keep"] > 0
    with pytest.raises(ValueError, match="needs ref_params"):
        step(init_state(tm.params(), tx, combine), batch, draw)


def test_vmap_with_an_axis_name_is_the_step_of_many_devices():
    """The step knows no devices: mapped by vmap over shares of the batch it gives the step of the whole batch."""
    batch, draw = tm.batch_and_draw(tm.arrays(8))
    combine, tx = make_combine("siss"), optax.sgd(1e-4)
    step = make_train_step(make_objective("siss", tm.SCHEDULE), combine, tm.predict, tx)
    state = init_state(tm.params(), tx, combine)
    whole, _ = jax.jit(step)(state, batch, draw)
    shares = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), (batch, draw))
    mapped = jax.jit(jax.vmap(partial(step, axis_name="i"), (None, 0, 0), axis_name="i"))
    parts, _ = mapped(state, *shares)
    for i in range(4):
        tm.close(jax.tree.map(lambda x, i=i: x[i], parts.params), whole.params, 1e-6)


def test_draw_defaults():
    """A draw without further arrays serves every objective that asks for none."""
    batch, draw = tm.batch_and_draw(tm.arrays(2))
    plain = Draw(draw.t, draw.t_weight, draw.eps, draw.u)
    for name in METHODS:
        objective = tm.make_objective(name)
        if not objective.draw_extra:
            call = partial(objective, tm.predict, tm.params(), ref_params=tm.ref_params(name))
            terms, _ = jax.eval_shape(call, batch, plain)
            assert set(terms) == set(objective.terms)
