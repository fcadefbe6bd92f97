"""Anchors: the term and its gradient, the Fisher diagonal and the variance of checkpoints against float64 loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import Draw, Example, fisher_anchor, init_state, make_train_step, neggrad, npo, vdu_style
from jaxunlearn.methods import make_combine
from jaxunlearn.objectives import Anchor, anchored, checkpoint_anchor, fisher_precision, squared_gradients
from jaxunlearn.step import term_grads
from tests import oracle
from tests import tiny_model as tm
from tests.tiny_model import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCHEDULE = tm.SCHEDULE


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["l2", "fisher"])
def test_the_gradient_is_that_of_the_quadratic_loss(kind):
    batch, draw = tm.batch_and_draw(tm.arrays(3, dtype=np.float64))
    p, ref = tm.params(dtype=np.float64), tm.ref_params("fisher_anchor", dtype=np.float64)
    ones = jax.tree.map(np.ones_like, p)
    objective = fisher_anchor(SCHEDULE, anchor=kind)
    given = ref if kind == "fisher" else ref.center
    run = jax.jit(lambda p, ref: term_grads(objective, tm.predict, p, batch, draw, ref_params=ref))
    grads, terms, _ = run(p, given)
    value, gradient = oracle.anchor(p, ref.center, ref.precision if kind == "fisher" else ones)
    np.testing.assert_allclose(terms["anchor"], value, rtol=1e-12)
    tm.close(grads["anchor"], gradient, 1e-12)
    at_center, terms, _ = run(ref.center, given)
    assert terms["anchor"] == 0
    assert all(np.all(g == 0) for g in jax.tree.leaves(at_center["anchor"]))


def test_an_anchor_pulls_a_model_back():
    """With next to no ascent the direction leads to the center; its length is the weight times precision times distance."""
    batch, draw = tm.batch_and_draw(tm.arrays(8))
    ref, objective = tm.ref_params("vdu_style"), vdu_style(SCHEDULE)
    far = jax.tree.map(lambda c: c + np.float32(0.5), ref.center)
    grads, _, _ = jax.jit(lambda p, r: term_grads(objective, tm.predict, p, batch, draw, ref_params=r))(far, ref)
    direction, _, _ = make_combine("vdu_style", forget=-1e-9, anchor=0.1).apply(grads, (), 0)
    tm.close(direction, jax.tree.map(lambda w: 0.1 * 0.5 * w, ref.precision), 1e-4)


def test_the_anchor_of_an_objective_that_compares_gives_it_the_center():
    batch, draw = tm.batch_and_draw(tm.arrays(3))
    ref = tm.ref_params("fisher_anchor")
    plain = npo(SCHEDULE, level=1.0)
    objective = anchored(plain, "fisher")
    assert objective.terms == ("keep", "forget", "anchor")

    def run(p, r):
        return objective(tm.predict, p, batch, draw, ref_params=r), plain(
            tm.predict, p, batch, draw, ref_params=r.center
        )

    (terms, aux), (want, want_aux) = tm.evaluate(run, tm.params(), ref)
    tm.close(({k: terms[k] for k in want}, aux), (want, want_aux), 1e-7)


def test_precision_and_center_are_arguments_of_the_program():
    """Other values need no second compilation."""
    batch, draw = tm.batch_and_draw(tm.arrays(3))
    combine, tx = make_combine("fisher_anchor"), optax.sgd(1e-4)
    step = jax.jit(make_train_step(fisher_anchor(SCHEDULE), combine, tm.predict, tx))
    state = init_state(tm.params(), tx, combine)._replace(ref_params=tm.ref_params("fisher_anchor"))
    _, first = step(state, batch, draw)
    doubled = state.ref_params._replace(precision=jax.tree.map(lambda x: 2 * x, state.ref_params.precision))
    _, second = step(state._replace(ref_params=doubled), batch, draw)
    np.testing.assert_allclose(second["loss/anchor"], 2 * first["loss/anchor"], rtol=1e-6)
    assert step._cache_size() == 1


@pytest.mark.usefixtures("x64")
def test_the_fisher_diagonal_is_the_mean_of_squared_gradients_of_single_rows():
    parts, loops = [], []
    p = tm.params(dtype=np.float64)
    run = jax.jit(lambda p, example, draw: squared_gradients(tm.predict, p, example, draw, SCHEDULE))
    for seed in range(2):
        a = tm.arrays(5, seed=seed, dtype=np.float64)
        batch, draw = tm.batch_and_draw(a)
        draw = draw._replace(t_weight=jnp.linspace(0.5, 1.5, 5))
        parts.append(run(p, batch.keep, draw))
        squares = []
        for i in range(5):
            row = {k: v[i : i + 1] for k, v in a.items()}
            args = (row["x0"], row["a0"], row["t"], row["eps"], row["u"], oracle.linear_table())
            gradient = oracle.objective("naive", p, *args)[1]["keep"]
            squares.append({k: np.linspace(0.5, 1.5, 5)[i] * g**2 for k, g in gradient.items()})
        loops.append({k: sum(s[k] for s in squares) / 5 for k in p})
        tm.close(parts[-1], loops[-1], 1e-11)
        # Not the square of the mean gradient, which shrinks with the batch.
        mean = oracle.objective("naive", p, *(a[k] for k in ("x0", "a0", "t", "eps", "u")), oracle.linear_table())[1]
        assert oracle.norm(parts[-1]) > 1.2 * oracle.norm({k: g**2 for k, g in mean["keep"].items()})
    precision = fisher_precision(parts)
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(precision)])
    np.testing.assert_allclose(flat.mean(), 1, rtol=1e-12)
    both = {k: (loops[0][k] + loops[1][k]) / 2 for k in p}
    overall = np.concatenate([np.ravel(x) for x in both.values()]).mean()
    tm.close(precision, {k: v / overall for k, v in both.items()}, 1e-11)


@pytest.mark.usefixtures("x64")
def test_checkpoints_give_their_mean_and_inverse_variance():
    checkpoints = [tm.params(seed=i, dtype=np.float64) for i in range(3)]
    anchor = checkpoint_anchor(checkpoints)
    for k in checkpoints[0]:
        stack = np.stack([c[k] for c in checkpoints])
        np.testing.assert_allclose(anchor.center[k], stack.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(anchor.precision[k], 1 / (stack.var(axis=0) + 1e-6), rtol=1e-9)
    same = checkpoint_anchor([checkpoints[0]] * 2)
    np.testing.assert_allclose(same.precision["inner"], 1e6)


def refuse(kind, ref):
    batch, draw = tm.batch_and_draw(tm.arrays(2))
    objective = anchored(neggrad(SCHEDULE), kind)
    return jax.eval_shape(lambda p: objective(tm.predict, p, batch, draw, ref_params=ref)[0], tm.params())


def zero_fisher():
    a = tm.arrays(2)
    draw = Draw(jnp.asarray(a["t"]), jnp.zeros(2), jnp.asarray(a["eps"]), jnp.asarray(a["u"]))
    return fisher_precision([squared_gradients(tm.predict, tm.params(), Example(jnp.asarray(a["x0"])), draw, SCHEDULE)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vdu_style(SCHEDULE, anchor="ewc"), "unknown anchor 'ewc'; known: l2, fisher, checkpoint_var"),
        (lambda: anchored(vdu_style(SCHEDULE)), "has an anchor already"),
        (lambda: refuse("fisher", tm.params()), r"needs ref_params=Anchor\(params, fisher_precision"),
        (lambda: refuse("checkpoint_var", tm.params()), r"needs ref_params=checkpoint_anchor"),
        (
            lambda: refuse("l2", Anchor(tm.params(), tm.params())),
            "needs ref_params=the starting parameters, got Anchor",
        ),
        (lambda: refuse("l2", None), "needs ref_params: pass TrainState"),
        (lambda: checkpoint_anchor([tm.params()]), "two or more checkpoints for a variance, got 1"),
        (lambda: checkpoint_anchor([tm.params()] * 2, floor=0.0), "floor must be positive"),
        (lambda: fisher_precision([]), "at least one tree"),
        (zero_fisher, "must be finite and positive, got 0.0"),
    ],
)
def test_bad_anchors_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
