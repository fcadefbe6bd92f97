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
from jaxunlearn.methods import make_combine
from jaxunlearn.parallel import make_mesh, pmap_step, replicate, sharded_step
from jaxunlearn.predictors import to_eps
from jaxunlearn.step import term_grads
from tests import tiny_model as tm
from tests.tiny_model import quick_compilation  # noqa: F401

CASES = [(m, s) for m in METHODS for s in tm.SELECTIONS if s == "none" or METHODS[m].forget_sign]
SGD_RATE = {"neggrad": 1e-2, "dpo": 1.0} | {m: 1e-2 for m in ("mirrored", "clamped", "npo", "simnpo")} | {"kto": 1e-1}
"""Of plain SGD, where 1e-4 would hardly move: NegGrad's weight is 0.01, others are means over pixels."""
WITH_ALL_FORMS = ("naive", "siss", "npo")
"""Methods whose quick test covers pmap and AdamW too; of the others they run with the slow tests."""
QUICK = ("naive", "siss", "erasediff", "npo", "retrack")
"""Methods whose step for many devices is compiled in the quick tests; the others run with the slow tests."""
STEPS = 10
pytestmark = pytest.mark.usefixtures("quick_compilation")
case = pytest.mark.parametrize(("name", "selection"), CASES)


@functools.cache
def compiled_terms():
    """``{case: (terms, aux)}`` of all cases, one program."""
    objectives = {pair: tm.make_objective(*pair) for pair in CASES}

    @jax.jit
    def run(p, batch, draw):
        return {k: o(tm.predict, p, batch, draw, ref_params=tm.ref_params(k[0])) for k, o in objectives.items()}

    return run


def rows(t=(10, 300, 500, 600, 999)):
    return tm.arrays(len(t), t=t)


def one_changed():
    """The rows with another example in the place of the third."""
    a, others = rows(), tm.arrays(5, seed=9)
    for k in ("x0", "a0", "eps", "noise", "neighbours", "surrogate"):
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
    objective = tm.make_objective(name, selection)
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
    eager = objective(tm.predict, tm.params(), batch, draw, ref_params=tm.ref_params(name))
    tm.close((terms, aux), eager, 1e-5)


@case
def test_examples_do_not_mix(name, selection):
    before, changed, shuffled = (terms_of(label)[name, selection] for label in INPUTS)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(changed)):
        assert np.array_equal(np.delete(x, 2), np.delete(y, 2))
    # Every term depends on its own example, but for the pull of the parameters, which is the same for all.
    assert all(before[0][k][2] != changed[0][k][2] for k in before[0] if k != "anchor")
    # The order of the examples does not matter.
    tm.close(shuffled, jax.tree.map(lambda v: v[ORDER], before), 1e-6)


@case
def test_half_precision_network_gives_float32_terms(name, selection):
    batch, draw = tm.batch_and_draw(rows())
    objective = tm.make_objective(name, selection)

    def half(params, x, t, cond):
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        return tm.predict(params, x.astype(jnp.bfloat16), t, cond)

    ref = tm.ref_params(name)
    terms, _ = jax.eval_shape(lambda p: objective(half, p, batch, draw, ref_params=ref), tm.params())
    assert all(v.dtype == jnp.float32 for v in terms.values())


PREFERENCE = ("npo", "simnpo", "dpo", "kto")


@pytest.mark.parametrize("name", METHODS)
def test_a_model_of_another_prediction_type_gives_the_same_terms_through_its_adapter(name):
    batch, draw = tm.batch_and_draw(rows())
    got, objective, ref = terms_of("rows")[name, "none"][0], tm.make_objective(name), tm.ref_params(name)

    def of_v(params, x, t, cond=None):
        return (tm.predict(params, x, t, cond) - column(tm.SCHEDULE.sigma(t)) * x) / column(tm.SCHEDULE.alpha(t))

    def of_x0(params, x, t, cond=None):
        return (x - column(tm.SCHEDULE.sigma(t)) * tm.predict(params, x, t, cond)) / column(tm.SCHEDULE.alpha(t))

    @jax.jit
    def run(p):
        wrapped = [to_eps(f, kind, tm.SCHEDULE) for f, kind in ((of_v, "v_prediction"), (of_x0, "sample"))]
        return [objective(predict, p, batch, draw, ref_params=ref)[0] for predict in wrapped]

    for terms in run(tm.params()):
        tm.close(terms, got, 2e-4)


def column(values):
    return values[:, None, None, None]


WINDOWED = [(m, s) for m, s in CASES if s in ("window", "both")]


@functools.cache
def outside_the_window():
    """``{case: (gradients, terms, direction, metrics)}`` of a batch without a row in the window."""
    batch, draw = tm.batch_and_draw(rows(t=(0, 100, 249, 750, 999)))

    def run(p, pair):
        ref = tm.ref_params(pair[0])
        grads, terms, _ = term_grads(tm.make_objective(*pair), tm.predict, p, batch, draw, ref_params=ref)
        direction, _, metrics = make_combine(pair[0]).apply(grads, (), jnp.int32(0))
        return grads, terms, direction, metrics

    return tm.evaluate(lambda p: {pair: run(p, pair) for pair in WINDOWED}, tm.params())


@pytest.mark.parametrize(("name", "selection"), WINDOWED)
def test_no_row_in_the_window_gives_no_forget_update(name, selection):
    grads, terms, direction, metrics = outside_the_window()[name, selection]
    # Preference losses are log 2 and the like where nothing is compared; all others are zero.
    assert (terms["forget"] == 0) == (name not in PREFERENCE)
    assert all(np.all(g == 0) for g in jax.tree.leaves(grads["forget"]))
    assert all(np.isfinite(v) for v in metrics.values())
    method = METHODS[name]
    weights = method.combiner_options if method.combiner == "weighted_sum" else {}
    rest = {term: weights.get(term, 1.0) for term in grads if term != "forget"}
    for key, got in direction.items():
        want = sum((np.float32(w) * grads[term][key] for term, w in rest.items()), start=np.zeros_like(got))
        np.testing.assert_array_max_ulp(got, want, 1) if len(rest) < 2 else np.testing.assert_allclose(got, want, 1e-5)
        assert np.any(got != 0) == bool(rest)


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
    """Selections and optimisers: without and with everything; of most methods only the second, under plain descent."""
    if name not in WITH_ALL_FORMS:
        return (("both" if METHODS[name].forget_sign else "none", "sgd"),)
    return ("none", "sgd"), ("both" if METHODS[name].forget_sign else "none", "adamw")


def other_pairs(name):
    """All that :func:`quick_pairs` leaves out."""
    pairs = [(s, o) for s in tm.SELECTIONS for o in ("sgd", "adamw")]
    return tuple(pair for pair in pairs if pair not in quick_pairs(name))


@functools.cache
def trained(name, pairs, which):
    """``({form: {(selection, optimiser): parameters after 10 steps}}, {form: traces after the first step})``."""
    batch, _ = tm.batch_and_draw(tm.arrays(16))
    predict, combine = CountedPredict(), make_combine(name)
    txs = [optimiser(name, label) for _, label in pairs]
    steps = [make_train_step(tm.make_objective(name, s), combine, predict, tx) for (s, _), tx in zip(pairs, txs)]
    step, draw_fn = tm.together(steps), tm.cheap_draw
    forms = {
        "1": lambda: sharded_step(step, draw_fn, make_mesh(jax.devices()[:1])),
        "8": lambda: sharded_step(step, draw_fn, make_mesh()),
        "pmap": lambda: pmap_step(step, draw_fn),
    }
    out, traces = {}, {}
    for form, make in ((form, forms[form]) for form in which):
        # A copy for each state: the step donates them.
        refs = (jax.tree.map(np.copy, tm.ref_params(name)) for _ in txs)
        states = tuple(init_state(tm.params(), tx, combine)._replace(ref_params=ref) for tx, ref in zip(txs, refs))
        state = tm.Together(jnp.zeros((), jnp.int32), states)
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


def compare(name, pairs, forms=("1", "8", "pmap")):
    out, traces = trained(name, pairs, forms)
    start = tm.params()
    for pair in pairs:
        one = out["1"][pair]
        moved = max(np.abs(one[k] - start[k]).max() for k in start)
        assert moved > 1e-3  # far more than the tolerance
        for form in forms[1:]:
            tm.close(out[form][pair], one, 1e-5)
    assert traces == dict.fromkeys(forms, 0)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_one_device_equals_eight_equals_pmap_after_ten_steps_and_each_compiles_once(name):
    compare(name, quick_pairs(name), ("1", "8", "pmap") if name in WITH_ALL_FORMS else ("1", "8"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [m for m in METHODS if METHODS[m].forget_sign])
def test_the_same_for_all_other_selections_and_optimisers(name):
    compare(name, other_pairs(name))
