"""What every entry of METHODS promises, with and without selections in time and frequency.

One program holds a method's steps for all selections under two optimisers, so three compilations a method serve all
comparisons between devices.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import METHODS, init_state, make_train_step
from jaxunlearn.methods import make_combine, make_objective
from jaxunlearn.parallel import make_mesh, pmap_step, replicate, sharded_step
from jaxunlearn.step import term_grads
from tests import tiny_model as tm
from tests.tiny_model import quick_compilation  # noqa: F401

CASES = [(m, s) for m in METHODS for s in tm.SELECTIONS if s == "none" or METHODS[m].forget_sign]
SGD_RATE = {"neggrad": 1e-2}
"""Of plain SGD, where 1e-4 would hardly move: NegGrad's weight is 0.01."""
STEPS = 10
pytestmark = pytest.mark.usefixtures("quick_compilation")
case = pytest.mark.parametrize(("name", "selection"), CASES)


def objective_of(name, selection):
    error = tm.SELECTIONS[selection]
    return make_objective(name, tm.SCHEDULE, **({} if error is None else {"forget_error": error}))


@functools.cache
def compiled_terms():
    """``{case: (terms, aux)}`` of all cases, one program."""
    objectives = {pair: objective_of(*pair) for pair in CASES}
    return jax.jit(lambda p, batch, draw: {k: o(tm.predict, p, batch, draw) for k, o in objectives.items()})


def rows(t=(10, 300, 500, 600, 999)):
    return tm.arrays(len(t), t=t)


def one_changed():
    """The rows with another example in the place of the third."""
    a, others = rows(), tm.arrays(5, seed=9)
    for k in ("x0", "a0", "eps", "noise"):
        a[k][2] = others[k][2]
    a["t"][2] = 420
    a["u"][2] = 0.9 if a["u"][2] < 0.5 else 0.1
    return a


ORDER = np.array([3, 0, 4, 1, 2])
INPUTS = {"rows": rows, "one changed": one_changed, "shuffled": lambda: {k: v[ORDER] for k, v in rows().items()}}


@functools.cache
def terms_of(label):
    return jax.tree.map(np.asarray, compiled_terms()(tm.params(), *tm.batch_and_draw(INPUTS[label]())))


@case
def test_terms_are_finite_numbers_per_example_and_jit_equals_eager(name, selection):
    batch, draw = tm.batch_and_draw(rows())
    objective = objective_of(name, selection)
    terms, aux = terms_of("rows")[name, selection]
    assert set(terms) == set(objective.terms)
    assert objective.forget_sign == METHODS[name].forget_sign
    assert ("forget" in terms) == (objective.forget_sign != 0)
    for value in (*terms.values(), *aux.values()):
        assert value.shape == (5,)
        assert value.dtype == jnp.float32
        assert np.all(np.isfinite(value))
    for value in terms.values():
        assert np.all(value >= 0)  # never signed
    tm.close((terms, aux), objective(tm.predict, tm.params(), batch, draw), 1e-5)


@case
def test_examples_do_not_mix(name, selection):
    before, changed, shuffled = (terms_of(label)[name, selection] for label in INPUTS)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(changed)):
        assert np.array_equal(np.delete(x, 2), np.delete(y, 2))
    assert all(before[0][k][2] != changed[0][k][2] for k in before[0])
    # The order of the examples does not matter.
    tm.close(shuffled, jax.tree.map(lambda v: v[ORDER], before), 1e-6)


@case
def test_half_precision_network_gives_float32_terms(name, selection):
    batch, draw = tm.batch_and_draw(rows())
    objective = objective_of(name, selection)

    def half(params, x, t, cond):
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        return tm.predict(params, x.astype(jnp.bfloat16), t, cond)

    terms, _ = jax.eval_shape(lambda p: objective(half, p, batch, draw), tm.params())
    assert all(v.dtype == jnp.float32 for v in terms.values())


WINDOWED = [(m, s) for m, s in CASES if s in ("window", "both")]


@functools.cache
def outside_the_window():
    """``{case: (gradients, terms, direction, metrics)}`` of a batch without a row in the window."""
    batch, draw = tm.batch_and_draw(rows(t=(0, 100, 249, 750, 999)))

    def run(p, pair):
        grads, terms, _ = term_grads(objective_of(*pair), tm.predict, p, batch, draw)
        direction, _, metrics = make_combine(pair[0]).apply(grads, (), jnp.int32(0))
        return grads, terms, direction, metrics

    return tm.evaluate(lambda p: {pair: run(p, pair) for pair in WINDOWED}, tm.params())


@pytest.mark.parametrize(("name", "selection"), WINDOWED)
def test_no_row_in_the_window_gives_no_forget_update(name, selection):
    grads, terms, direction, metrics = outside_the_window()[name, selection]
    assert terms["forget"] == 0
    assert all(np.all(g == 0) for g in jax.tree.leaves(grads["forget"]))
    assert all(np.isfinite(v) for v in metrics.values())
    for key, got in direction.items():
        assert np.array_equal(got, grads["keep"][key] if "keep" in grads else np.zeros_like(got))
        assert "keep" not in grads or np.any(got != 0)


class CountedPredict:
    """The network, counting how often it is traced."""

    def __init__(self):
        self.traces = 0

    def __call__(self, *args):
        self.traces += 1
        return tm.predict(*args)


def optimiser(name, label):
    if label == "sgd":
        return optax.sgd(SGD_RATE.get(name, 1e-4))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def quick_pairs(name):
    """Selections and optimisers: without and with everything."""
    return ("none", "sgd"), ("both" if METHODS[name].forget_sign else "none", "adamw")


def other_pairs(name):
    """All that :func:`quick_pairs` leaves out."""
    pairs = [(s, o) for s in tm.SELECTIONS for o in ("sgd", "adamw")]
    return tuple(pair for pair in pairs if pair not in quick_pairs(name))


@functools.cache
def trained(name, pairs):
    """``({form: {(selection, optimiser): parameters after 10 steps}}, {form: traces after the first step})``."""
    batch, _ = tm.batch_and_draw(tm.arrays(16))
    predict, combine = CountedPredict(), make_combine(name)
    txs = [optimiser(name, label) for _, label in pairs]
    steps = [make_train_step(objective_of(name, s), combine, predict, tx) for (s, _), tx in zip(pairs, txs)]
    step, draw_fn = tm.together(steps), tm.cheap_draw
    forms = {
        "1": lambda: sharded_step(step, draw_fn, make_mesh(jax.devices()[:1])),
        "8": lambda: sharded_step(step, draw_fn, make_mesh()),
        "pmap": lambda: pmap_step(step, draw_fn),
    }
    out, traces = {}, {}
    for form, make in forms.items():
        state = tm.Together(jnp.zeros((), jnp.int32), tuple(init_state(tm.params(), tx, combine) for tx in txs))
        if form != "pmap":
            state = replicate(state, make_mesh(jax.devices()[: int(form)]))
        run = make()
        for i in range(STEPS):
            state, metrics = run(state, jax.random.key(7), batch)
            jax.block_until_ready((state, metrics))
            if i == 0:
                predict.traces = 0
        traces[form] = predict.traces
        if form != "pmap":
            assert run._cache_size() == 1
        out[form] = {pair: jax.device_get(s.params) for pair, s in zip(pairs, state.states)}
        assert all(float(m["finite"]) == 1 for m in metrics)
        assert int(state.step) == STEPS
    return out, traces


def compare(name, pairs):
    out, traces = trained(name, pairs)
    start = tm.params()
    for pair in pairs:
        one = out["1"][pair]
        moved = max(np.abs(one[k] - start[k]).max() for k in start)
        assert moved > 1e-3  # far more than the tolerance
        tm.close(out["8"][pair], one, 1e-5)
        tm.close(out["pmap"][pair], one, 1e-5)
    assert traces == {"1": 0, "8": 0, "pmap": 0}


@pytest.mark.parametrize("name", METHODS)
def test_one_device_equals_eight_equals_pmap_after_ten_steps_and_each_compiles_once(name):
    compare(name, quick_pairs(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [m for m in METHODS if METHODS[m].forget_sign])
def test_the_same_for_all_other_selections_and_optimisers(name):
    compare(name, other_pairs(name))
