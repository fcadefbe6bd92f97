"""Preference losses: their limits, fixed values and units, and that the reference model is only compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxunlearn import dpo, init_state, kto, make_train_step, mean_squares, npo, simnpo, sum_squares
from jaxunlearn.methods import make_combine
from jaxunlearn.objectives import dpo_loss, kto_loss, npo_loss, probe_levels
from jaxunlearn.step import term_grads
from jaxunlearn.types import Example
from tests import oracle
from tests import tiny_model as tm
from tests.tiny_model import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCHEDULE = tm.SCHEDULE
D = np.array([-40.0, -3.0, -0.4, 0.0, 0.7, 5.0, 60.0])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("beta", [0.3, 1.0, 8.0])
def test_functions_equal_the_oracle_in_value_and_slope(beta):
    other = D[::-1] + 0.3

    def run(d, other):
        def both(f):
            return f(d), jax.vmap(jax.grad(lambda z: jnp.sum(f(z))))(d)

        return {
            "npo": both(lambda z: npo_loss(z, beta)),
            "dpo": (dpo_loss(d, other, beta), jax.grad(lambda z: dpo_loss(z, other, beta).sum())(d)),
            "kto keep": both(lambda z: kto_loss(z, True, beta)),
            "kto forget": both(lambda z: kto_loss(z, False, beta)),
        }

    got = tm.evaluate(run, D, other)
    want = {
        "npo": oracle.npo(D, beta),
        "dpo": oracle.dpo(D, other, beta),
        "kto keep": oracle.kto(D, +1, beta),
        "kto forget": oracle.kto(D, -1, beta),
    }
    for name in want:
        for x, y in zip(got[name], want[name]):
            np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-15, err_msg=name)


@pytest.mark.parametrize(("d", "weight"), [(-1.0, 1.46), (0.0, 1.0), (1.0, 0.54), (5.0, 0.013)])
def test_the_weight_of_npo_fades(d, weight):
    np.testing.assert_allclose(-jax.grad(npo_loss)(d, 1.0), weight, rtol=0.03)


@pytest.mark.usefixtures("x64")
def test_limits_and_fixed_values():
    d = jnp.asarray(D[1:6])
    # Plain ascent for beta -> 0: the loss is (2/beta) log 2 - d, its slope -1.
    np.testing.assert_allclose(npo_loss(d, 1e-6) - 2e6 * np.log(2), -d, atol=1e-5)
    zero = jnp.zeros(())
    np.testing.assert_allclose(npo_loss(zero, 4.0), 0.5 * np.log(2), rtol=1e-12)
    np.testing.assert_allclose(dpo_loss(zero, zero, 5000.0), np.log(2), rtol=1e-12)
    # Only the loser, twice the beta: NPO times beta / 2.
    for beta in (0.5, 3.0):
        np.testing.assert_allclose(dpo_loss(zero, d, 2 * beta), beta / 2 * npo_loss(d, beta), rtol=1e-12)
    for wanted in (True, False):
        np.testing.assert_allclose(kto_loss(zero, wanted, 7.0), 0.5)
    assert jax.grad(kto_loss)(0.0, False, 7.0) < 0 < jax.grad(kto_loss)(0.0, True, 7.0)
    # z shifts the point of reference for both alike.
    np.testing.assert_allclose(kto_loss(d, True, 2.0, 0.5), kto_loss(d + 0.5, True, 2.0))
    # DUO leaves the half out: its beta 500 is 1000 here.
    z = jnp.asarray(D[1:6] / 500)
    np.testing.assert_allclose(dpo_loss(z, -z, 1000.0), oracle.softplus(500.0 * np.asarray(2 * z)), rtol=1e-12)


def test_saturated_losses_and_slopes_are_finite_in_float32():
    d = jnp.array([-1e30, -1e6, 1e6, 1e30], jnp.float32)
    for f in (lambda z: npo_loss(z, 1e3), lambda z: kto_loss(z, True, 1e3), lambda z: dpo_loss(z, 0.0, 5e3)):
        assert np.all(np.isfinite(jax.vmap(jax.grad(f))(d)))


OBJECTIVES = {
    "npo": npo(SCHEDULE, beta=0.7, level=1.0),
    "dpo": dpo(SCHEDULE, beta=1.5),
    "kto": kto(SCHEDULE, beta=1.5),
}


def test_at_the_reference_the_losses_are_their_constants_and_it_gets_no_gradient():
    batch, draw = tm.batch_and_draw(tm.arrays(4))
    start = tm.params()

    def run(p, ref):
        out = {}
        for name, objective in OBJECTIVES.items():
            terms, aux = objective(tm.predict, p, batch, draw, ref_params=ref)
            total = lambda r, o=objective: sum(map(jnp.sum, o(tm.predict, p, batch, draw, ref_params=r)[0].values()))  # noqa: E731
            out[name] = terms, aux, jax.grad(total)(ref)
        return out

    same = tm.evaluate(run, start, start)
    np.testing.assert_allclose(same["npo"][0]["forget"], 2 / 0.7 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(same["dpo"][0]["forget"], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(same["kto"][0]["keep"], 0.5)
    np.testing.assert_allclose(same["kto"][0]["forget"], 0.5)
    other = tm.evaluate(run, start, tm.params(seed=5))
    for out in (same, other):
        for terms, aux, gradient in out.values():
            assert all(np.all(g == 0) for g in jax.tree.leaves(gradient))
            assert terms["forget"].shape == aux["d_forget"].shape == (4,)
    assert all(np.all(aux["d_forget"] == 0) for _, aux, _ in same.values())
    assert all(np.all(aux["d_forget"] != 0) for _, aux, _ in other.values())


def test_simnpo_is_npo_whose_reference_error_is_delta():
    batch, draw = tm.batch_and_draw(tm.arrays(4))

    def run(p):
        terms, aux = simnpo(SCHEDULE, beta=0.7, level=1.0, delta=0.4)(tm.predict, p, batch, draw)
        return terms["forget"], npo_loss(aux["m_forget"] - 0.4, 0.7)

    tm.close(*tm.evaluate(run, tm.params()), 1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make", [npo, simnpo])
def test_in_units_of_the_loss_sums_and_means_give_one_update(make):
    """After Adam the scale of a loss is gone; beta must not know it either."""
    batch, draw = tm.batch_and_draw(tm.arrays(6, dtype=np.float64))
    start, ref = tm.params(dtype=np.float64), tm.params(seed=5, dtype=np.float64)
    combine, tx = make_combine("npo"), optax.adamw(1e-2, eps=1e-20)

    def run(error, beta_unit):
        example = Example(batch.forget.x0)
        level = float(probe_levels(tm.predict, ref, example, SCHEDULE, jax.random.key(1), error=error, count=4).mean())
        objective = make(SCHEDULE, beta=2.0, beta_unit=beta_unit, level=level, error=error)
        step = jax.jit(make_train_step(objective, combine, tm.predict, tx))
        state = init_state(start, tx, combine)._replace(ref_params=ref)
        for _ in range(3):
            state, _ = step(state, batch, draw)
        return state.params

    sums, means = run(sum_squares, "loss"), run(mean_squares, "loss")
    tm.close(sums, means, 1e-9)
    raw = run(sum_squares, "raw")
    assert max(np.abs(raw[k] - means[k]).max() for k in raw) > 1e-4


def test_kto_mixes_no_examples_unless_asked():
    batch, draw = tm.batch_and_draw(tm.arrays(4))
    changed = batch._replace(forget=batch.forget._replace(x0=batch.forget.x0.at[2].mul(0.2)))
    p, ref = tm.params(seed=5), tm.params()

    def run(p, ref):
        pairs = [(z, b) for z in (0.0, "batch") for b in (batch, changed)]
        return [kto(SCHEDULE, beta=2.0, z=z)(tm.predict, p, b, draw, ref_params=ref)[0] for z, b in pairs]

    alone, alone_changed, mixed, mixed_changed = tm.evaluate(run, p, ref)
    for term in ("keep", "forget"):
        assert np.array_equal(np.delete(alone[term], 2), np.delete(alone_changed[term], 2))
    # The mean is positive for these models, so it acts; and it knows the changed row.
    assert np.all(mixed["keep"] > alone["keep"])
    assert np.all(mixed["keep"] != mixed_changed["keep"])
    # Where the mean of -d is negative the clamp gives z = 0.
    forward = tm.evaluate(lambda p, r: run(p, r), ref, p)
    tm.close(forward[2], forward[0], 1e-7)


def test_the_pair_may_be_won_by_a_surrogate_and_further_terms_be_added():
    batch, draw = tm.batch_and_draw(tm.arrays(4))
    cond = jnp.array([0.1, 0.2, 0.3, 0.4])
    batch = batch._replace(forget=batch.forget._replace(cond=cond), keep=batch.keep._replace(cond=cond - 1))
    p, ref = tm.params(), tm.params(seed=5)
    objective = dpo(SCHEDULE, beta=1.5, winner="surrogate", keep_term=True, prior_term=True)
    assert objective.terms == ("keep", "forget", "prior")

    def run(p, ref):
        # The surrogate takes the keep image's place in the pair, and is shown with the forget image's condition.
        swapped = batch._replace(keep=Example(batch.extra["surrogate"], cond))
        t = jnp.full(4, 999)
        prior = mean_squares(tm.predict(p, draw.eps, t, cond) - tm.predict(ref, draw.eps, t, cond), t)
        want = {
            "keep": npo(SCHEDULE, level=1.0)(tm.predict, p, batch, draw, ref_params=ref)[0]["keep"],
            "forget": dpo(SCHEDULE, beta=1.5)(tm.predict, p, swapped, draw, ref_params=ref)[0]["forget"],
            "prior": prior,
        }
        return objective(tm.predict, p, batch, draw, ref_params=ref)[0], want

    tm.close(*tm.evaluate(run, p, ref), 1e-6)
    combine = make_combine("dpo", keep=0.5, prior=2.0)
    grads, _, _ = jax.jit(lambda p, r: term_grads(objective, tm.predict, p, batch, draw, ref_params=r))(p, ref)
    got, _, _ = combine.apply(grads, (), 0)
    tm.close(got, jax.tree.map(lambda k, f, q: 0.5 * k + f + 2 * q, *(grads[t] for t in objective.terms)), 1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: npo(SCHEDULE), "npo: beta_unit='loss' needs level=.*beta_unit='raw'"),
        (lambda: simnpo(SCHEDULE), "simnpo: beta_unit='loss' needs level="),
        (lambda: npo(SCHEDULE, level=0.0), "level must be finite and positive, got 0.0"),
        (lambda: npo(SCHEDULE, beta=-1.0, beta_unit="raw"), "beta must be finite and positive, got -1.0"),
        (lambda: npo(SCHEDULE, beta_unit="mean"), "unknown beta_unit 'mean'; known: loss, raw"),
        (lambda: simnpo(SCHEDULE, beta_unit="raw", delta=np.inf), "delta must be finite"),
        (lambda: dpo(SCHEDULE, beta=0.0), "dpo: beta must be"),
        (lambda: dpo(SCHEDULE, winner="retain"), "unknown winner 'retain'; known: keep, surrogate"),
        (lambda: kto(SCHEDULE, beta=np.nan), "kto: beta must be"),
        (lambda: kto(SCHEDULE, z=-1.0), "z must be 'batch' or a finite number"),
        (lambda: kto(SCHEDULE, z="mean"), "z must be 'batch' or a finite number"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
