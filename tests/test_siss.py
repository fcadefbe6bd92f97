"""SISS: golden values, identities, statistics and edge cases of the weights and of the objective."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import Batch, Draw, Example, bernoulli, filtered, low_pass, siss, siss_no_is, sum_squares
from jaxunlearn.combine import fixed_norm
from jaxunlearn.objectives import importance_weights, log_ratio, mixture_sample, mixture_weights
from jaxunlearn.schedule import linear
from jaxunlearn.step import term_grads
from jaxunlearn.timesteps import stratified_uniform
from tests import oracle
from tests import tiny_model as tm
from tests.tiny_model import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCHEDULE = linear(1000)

# The worked example at t = 500.
X0 = np.array([[0.5, -0.5], [0.25, 1.0]]).reshape(1, 2, 2, 1)
A0 = np.array([[-1.0, 0.75], [0.0, 0.5]]).reshape(1, 2, 2, 1)
EPS = np.array([[0.1, -0.2], [0.3, -0.4]]).reshape(1, 2, 2, 1)
GOLDEN = [  # from_forget, gap, {lam: (w_keep, w_forget)}
    (False, -0.25386454, {0.5: (1.12625493, 0.87374507), 0.2: (1.04694570, 0.81221721)}),
    (True, 0.09411860, {0.5: (0.95297541, 1.04702459), 0.2: (0.98064404, 1.07742384)}),
]


def golden_row(from_forget, dtype):
    t = jnp.array([500])
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    x0, a0, eps = (jnp.asarray(z, dtype) for z in (X0, A0, EPS))
    return SCHEDULE.add_noise(a0 if from_forget else x0, eps, t), x0, a0, alpha, sigma


def check_golden(dtype, tolerance, wrap):
    for from_forget, gap, by_lam in GOLDEN:
        row = golden_row(from_forget, dtype)
        got = wrap(log_ratio)(*row)
        assert got.dtype == dtype
        np.testing.assert_allclose(got, [gap], atol=tolerance)
        for lam, weights in by_lam.items():
            np.testing.assert_allclose(
                np.ravel(wrap(importance_weights)(*row, lam)), weights, rtol=tolerance, atol=tolerance
            )


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_golden_values_in_float32(wrap):
    check_golden(jnp.float32, 1e-6, wrap)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_golden_values_in_float64(wrap):
    check_golden(jnp.float64, 1e-8, wrap)


@pytest.mark.usefixtures("x64")
def test_golden_target_of_the_other_image():
    """In the forget row the keep target is (m_t - alpha x0) / sigma; a model of zeros returns its squares."""
    batch = Batch(Example(jnp.asarray(X0)), Example(jnp.asarray(A0)))
    draw = Draw(jnp.array([500]), jnp.ones(1), jnp.asarray(EPS), jnp.zeros(1))
    seen = []

    def zeros(params, x, t, cond):
        seen.append(x)
        return jnp.zeros_like(x)

    terms, aux = siss(SCHEDULE, lam=0.5)(zeros, None, batch, draw)
    target = np.array([-0.335671, 0.163059, 0.227388, -0.545224])
    np.testing.assert_allclose(((seen[0] - SCHEDULE.alpha(500) * X0) / SCHEDULE.sigma(500)).ravel(), target, atol=1e-6)
    np.testing.assert_allclose(terms["keep"], 0.95297541 * (target**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(terms["forget"], 1.04702459 * (EPS**2).sum(), rtol=1e-8)
    assert len(seen) == 1  # one forward pass
    assert aux["from_forget"] == 1


def random_rows(count, seed=0, spread=0.3):
    rng = np.random.default_rng(seed)
    x0 = rng.normal(size=(count, 2, 2, 1))
    a0 = x0 + spread * rng.normal(size=x0.shape)
    t = rng.integers(0, 1000, count)
    alpha, sigma = oracle.alpha_sigma(oracle.linear_table(), t)
    z0 = np.where(oracle.col(rng.uniform(size=count) < 0.5), a0, x0)
    return oracle.noised(z0, rng.normal(size=x0.shape), alpha, sigma), x0, a0, alpha, sigma


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("lam", [0.01, 0.2, 0.5, 0.9])
def test_identity_bounds_and_swap(lam):
    m, x0, a0, alpha, sigma = random_rows(500)

    def run(*row):
        m, x0, a0, alpha, sigma = row
        swapped = importance_weights(m, a0, x0, alpha, sigma, 1 - lam)
        return importance_weights(*row, lam), swapped, importance_weights(m, x0, x0, alpha, sigma, lam)

    (w_keep, w_forget), swapped, same = tm.evaluate(run, m, x0, a0, alpha, sigma)
    np.testing.assert_allclose((1 - lam) * w_keep + lam * w_forget, 1, rtol=1e-13)
    assert np.all(w_keep >= 0)
    assert np.all(w_keep <= (1 + 1e-14) / (1 - lam))
    assert np.all(w_forget >= 0)
    assert np.all(w_forget <= (1 + 1e-14) / lam)
    np.testing.assert_allclose(swapped[0], w_forget, rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(swapped[1], w_keep, rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(same, np.ones((2, 500)), rtol=1e-14)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_weights_are_finite_for_every_lam_and_gap(lam, dtype):
    gap = jnp.array([-1e6, -1e4, -3, 0, 3, 1e4, 1e6]).astype(dtype)
    if dtype == jnp.float16:
        gap = jnp.clip(gap, -6e4, 6e4)
    for weights in (mixture_weights(gap, lam), jax.jit(mixture_weights)(gap, lam)):
        for w in weights:
            assert w.dtype == jnp.float32
            assert np.all(np.isfinite(w))
            assert np.all(w >= 0)
    w_keep, w_forget = (np.asarray(w) for w in mixture_weights(jnp.array([-3.0, 0.0, 3.0]), lam))
    want = oracle.mixture_weights(np.array([-3.0, 0.0, 3.0]), lam)
    np.testing.assert_allclose(w_keep, want[0].astype(float), rtol=1e-6)
    np.testing.assert_allclose(w_forget, want[1].astype(float), rtol=1e-6)


WEIGHTS = jax.jit(importance_weights)


def test_accuracy_at_256():
    """float32 weights at 256x256x3 are within 1e-5 of extended precision on the same inputs where they are not one-hot."""
    rng = np.random.default_rng(0)
    t = np.array([900, 933, 966, 999])
    x0 = rng.uniform(-1, 1, size=(4, 256, 256, 3)).astype(np.float32)
    a0 = np.clip(x0 + 0.25 * rng.normal(size=x0.shape), -1, 1).astype(np.float32)
    alpha, sigma = oracle.alpha_sigma(oracle.linear_table(), t)
    eps = rng.normal(size=x0.shape)
    m = oracle.noised(np.where(oracle.col([True, False, True, False]), a0, x0), eps, alpha, sigma).astype(np.float32)
    row = [z.astype(np.float32) for z in (m, x0, a0, alpha, sigma)]
    for lam in (0.2, 0.5):
        gap, *want = oracle.siss_weights(*(np.asarray(z, np.float64) for z in (m, x0, a0)), alpha, sigma, lam)
        assert np.all(np.abs(gap) < 40)
        assert np.sum(np.abs(gap) < 5) >= 2
        got = WEIGHTS(*row, lam)
        for g, w in zip(got, want):
            np.testing.assert_allclose(g, w.astype(float), rtol=1e-5)
    half = tm.evaluate(lambda *z: log_ratio(*(v.astype(jnp.bfloat16) for v in z), *row[3:]), *row[:3])
    assert half.dtype == jnp.float32
    assert np.all(np.isfinite(half))


# Statistics, on one pair of images and many draws, with the tanh network.

COUNT = 60_000


def draws(t, seed=0, count=COUNT):
    """Many draws for one pair of images."""
    rng = np.random.default_rng(seed)
    x0 = np.array([0.5, -0.2, 0.1, 0.8]).reshape(1, 2, 2, 1)
    a0 = np.array([-0.4, 0.3, 0.2, -0.6]).reshape(1, 2, 2, 1)
    low, high = t
    return {
        "x0": np.repeat(x0, count, 0).astype(np.float32),
        "a0": np.repeat(a0, count, 0).astype(np.float32),
        "t": rng.integers(low, high, count).astype(np.int32),
        "eps": rng.normal(size=(count, 2, 2, 1)).astype(np.float32),
        "u": rng.uniform(size=count).astype(np.float32),
        "noise": np.zeros((count, 2, 2, 1), np.float32),
    }


@functools.cache
def gradient_function(make, lam):
    """``arrays -> ({term: [count, parameters]}, aux)``; the forget term is low-pass filtered."""
    options = {} if lam is None else {"lam": lam}
    objective = make(SCHEDULE, forget_error=filtered(sum_squares, low_pass(0.9)), **options)
    flat, rebuild = jax.flatten_util.ravel_pytree(tm.params(hidden=3))

    def one(p, row):
        batch, draw = jax.tree.map(lambda z: z[None], row)
        terms, aux = objective(tm.predict, rebuild(p), batch, draw)
        return {k: v[0] for k, v in terms.items()}, {k: v[0] for k, v in aux.items()}

    mapped = jax.jit(jax.vmap(jax.jacrev(one, has_aux=True), (None, 0)))
    return lambda arrays: jax.tree.map(np.asarray, mapped(flat, tm.batch_and_draw(arrays)))


def same_mean(a, b, sigmas=4.5):
    """Whether paired samples [N, ...] have one mean, judged by the standard error of their difference."""
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    error = difference.std(axis=0) / np.sqrt(len(difference))
    assert np.all(np.abs(difference.mean(axis=0)) <= sigmas * error + 1e-9)
    # The statement has content: the error is small beside what is estimated.
    assert error.max() < 0.06 * np.abs(np.asarray(b).mean(axis=0)).max()


@pytest.mark.parametrize("lam", [0.2, 0.5])
def test_unbiased_for_the_gradients_and_never_more_variance_than_bernoulli(lam):
    for t in ((500, 501), (800, 801), (0, 1000)):
        arrays = draws(t)
        got, aux = gradient_function(siss, lam)(arrays)
        want, _ = gradient_function(siss_no_is, None)(arrays)
        coin, _ = gradient_function(bernoulli, lam)(arrays)
        for name in ("w_keep", "w_forget"):
            w = np.asarray(aux[name], np.float64)
            assert abs(w.mean() - 1) < 4.5 * w.std() / np.sqrt(COUNT) + 1e-6
        for name in ("keep", "forget"):
            same_mean(got[name], want[name])
            same_mean(got[name], coin[name])
            variance = lambda g: np.asarray(g, np.float64).var(axis=0).sum()  # noqa: E731
            assert variance(got[name]) <= variance(coin[name])


def test_naive_subtraction_would_be_biased():
    """The statistics above have teeth: without its weights the mixture gives another mean."""
    arrays = draws((500, 501))
    want, _ = gradient_function(siss_no_is, None)(arrays)
    got, aux = gradient_function(siss, 0.5)(arrays)
    unweighted = got["keep"] / aux["w_keep"][:, None]
    with pytest.raises(AssertionError):
        same_mean(unweighted, want["keep"])


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-24])
@pytest.mark.parametrize("make", [siss, bernoulli])
def test_batches_of_one_component_stay_finite(make, u):
    arrays = tm.arrays(4)
    arrays["u"] = np.full(4, u, np.float32)
    batch, draw = tm.batch_and_draw(arrays)
    grads, terms, _ = jax.jit(lambda p: term_grads(make(SCHEDULE, lam=0.5), tm.predict, p, batch, draw))(tm.params())
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves((grads, terms)))
    if make is bernoulli:
        empty = "keep" if u == 0 else "forget"
        assert all(np.all(g == 0) for g in jax.tree.leaves(grads[empty]))


@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
def test_u_chooses_the_component(lam):
    arrays = tm.arrays(3)
    arrays["u"] = np.array([0.0, lam if lam < 1 else 0.5, 1 - 2.0**-24], np.float32)
    batch, draw = tm.batch_and_draw(arrays)
    m_t, from_forget = mixture_sample(batch, draw, SCHEDULE, lam)
    # u < lam chooses forget: u = lam itself does not; lam = 0 never does, lam = 1 always.
    expected = {0.0: [False, False, False], 0.25: [True, False, False], 1.0: [True, True, True]}[lam]
    assert from_forget.tolist() == expected
    for i, forget in enumerate(expected):
        z0 = batch.forget.x0 if forget else batch.keep.x0
        np.testing.assert_allclose(m_t[i], SCHEDULE.add_noise(z0, draw.eps, draw.t)[i], rtol=1e-6)


@functools.cache
def stratified_draws():
    """[2500, 8] with lam = 1/2."""
    keys = jax.random.split(jax.random.key(0), 2500)
    return np.asarray(jax.jit(jax.vmap(lambda key: stratified_uniform(key, 8, 0.5)))(keys))


def test_stratified_mask_has_the_exact_count_and_the_same_mean():
    u = stratified_draws()
    assert np.all((u >= 0) & (u < 1))
    assert np.all(np.sum(u < 0.5, axis=1) == 4)
    # Each row is in forget with probability lam, and u itself is uniform.
    assert np.all(np.abs((u < 0.5).mean(axis=0) - 0.5) < 4.5 * np.sqrt(0.25 / 2500))
    assert abs(u.mean() - 0.5) < 4.5 * np.sqrt(1 / 12 / u.size)
    lams = (0.0, 0.2, 0.7, 1.0)
    all_u = tm.evaluate(lambda key: [stratified_uniform(key, 8, lam) for lam in lams], jax.random.key(3))
    for lam, u in zip(lams, all_u):
        assert np.sum(u < np.float32(lam)) == round(lam * 8)
        assert np.all((u >= 0) & (u < 1))


def test_stratified_and_plain_masks_estimate_the_same_gradient():
    arrays = draws((600, 601))
    plain, _ = gradient_function(siss, 0.5)(arrays)
    u = np.tile(stratified_draws().ravel(), 3)
    stratified, _ = gradient_function(siss, 0.5)({**arrays, "u": u})
    for name in ("keep", "forget"):
        same_mean(stratified[name], plain[name])


def test_no_is_shares_noise_and_timestep_between_its_branches():
    """From what the network is shown, the noise of each branch can be computed; both must be the draw's."""
    arrays = tm.arrays(5, t=[100, 300, 500, 700, 900])
    batch, draw = tm.batch_and_draw(arrays)

    def run(p):
        seen = []

        def spy(params, x, t, cond):
            seen.append((x, t))
            return tm.predict(params, x, t, cond)

        siss_no_is(SCHEDULE)(spy, p, batch, draw)
        return seen

    (x_t, t_keep), (a_t, t_forget) = tm.evaluate(run, tm.params())
    assert np.array_equal(t_keep, t_forget)
    assert np.array_equal(t_keep, draw.t)
    alpha, sigma = (oracle.col(z) for z in oracle.alpha_sigma(oracle.linear_table(), t_keep))
    eps_keep, eps_forget = (x_t - alpha * arrays["x0"]) / sigma, (a_t - alpha * arrays["a0"]) / sigma
    np.testing.assert_allclose(eps_keep, eps_forget, atol=1e-5)
    np.testing.assert_allclose(eps_keep, arrays["eps"], atol=1e-5)


def test_unequal_conditions_are_refused():
    batch, draw = tm.batch_and_draw(tm.arrays(2))

    def run(objective, batch):
        return jax.eval_shape(lambda p: objective(tm.predict, p, batch, draw)[0], tm.params())

    def with_conditions(keep, forget):
        return Batch(batch.keep._replace(cond=keep), batch.forget._replace(cond=forget))

    labels = np.array([0.1, 0.2], np.float32)
    for make in (siss, bernoulli):
        objective = make(SCHEDULE, lam=0.5)
        with pytest.raises(ValueError, match="must be equal in every row"):
            run(objective, with_conditions(labels, labels + 1))
        with pytest.raises(ValueError, match="same structure"):
            run(objective, with_conditions(labels, None))
        assert run(objective, with_conditions(labels, labels))["keep"].shape == (2,)
    # With a forward pass for each branch, different conditions are sound.
    assert run(siss_no_is(SCHEDULE), with_conditions(labels, labels + 1))["forget"].shape == (2,)


@pytest.mark.parametrize("lam", [-0.1, 1.1, float("nan")])
def test_lam_outside_its_range_is_refused(lam):
    with pytest.raises(ValueError, match="lam"):
        siss(SCHEDULE, lam=lam)
    with pytest.raises(ValueError, match="lam"):
        bernoulli(SCHEDULE, lam=lam)


def test_bernoulli_needs_both_components():
    for lam in (0.0, 1.0):
        with pytest.raises(ValueError, match="0 < lam < 1"):
            bernoulli(SCHEDULE, lam=lam)


def test_a_filter_leaves_the_weights_and_fixed_norm_ignores_constant_factors():
    batch, draw = tm.batch_and_draw(tm.arrays(6, t=[300, 500, 600, 700, 800, 900]))
    p = tm.params()

    def run(forget_error):
        grads, _, aux = term_grads(siss(SCHEDULE, forget_error=forget_error), tm.predict, p, batch, draw)
        return fixed_norm(5.0).apply(grads, (), 0)[0], aux

    errors = [filtered(sum_squares, low_pass(0.6, normalise=n)) for n in ("passband", None)]
    (scaled, aux_scaled), (unscaled, aux), (_, aux_none) = jax.jit(lambda: [run(e) for e in (*errors, None)])()
    tm.close(scaled, unscaled, 1e-5)
    for name in ("w_keep", "w_forget"):
        assert aux[name] == aux_none[name] == aux_scaled[name]


@pytest.mark.parametrize("make", [siss, bernoulli])
def test_lam_may_come_with_the_batch_and_change_without_another_compilation(make):
    batch, draw = tm.batch_and_draw(tm.arrays(6, t=[300, 500, 600, 700, 800, 900]))
    scheduled = make(SCHEDULE, lam="batch")
    run = jax.jit(lambda p, batch: term_grads(scheduled, tm.predict, p, batch, draw))
    traced = jax.jit(lambda p, lam: term_grads(make(SCHEDULE, lam=lam), tm.predict, p, batch, draw))
    for lam in (0.2, 0.5):
        want = jax.jit(lambda p, lam=lam: term_grads(make(SCHEDULE, lam=lam), tm.predict, p, batch, draw))(tm.params())
        filled = batch._replace(extra={"lam": jnp.full(6, lam, jnp.float32)})
        tm.close(run(tm.params(), filled), want, 1e-5)
        tm.close(traced(tm.params(), jnp.float32(lam)), want, 1e-5)
    assert run._cache_size() == traced._cache_size() == 1
    # Rows may differ: each is what a batch of its own lam would hold.
    mixed = batch._replace(extra={"lam": jnp.where(jnp.arange(6) < 3, 0.2, 0.5)})
    got = scheduled(tm.predict, tm.params(), mixed, draw)[0]["forget"]
    parts = [make(SCHEDULE, lam=lam)(tm.predict, tm.params(), batch, draw)[0]["forget"] for lam in (0.2, 0.5)]
    tm.close(got, jnp.where(jnp.arange(6) < 3, *parts), 1e-5)
    for extra in ({}, {"lam": jnp.float32(0.5)}, {"lam": jnp.full(3, 0.5)}):
        with pytest.raises(ValueError, match=r"needs batch.extra\['lam'\] \[B\]"):
            scheduled(tm.predict, tm.params(), batch._replace(extra=extra), draw)
    with pytest.raises(ValueError, match="lam must lie in .* or be 'batch', got 'step'"):
        make(SCHEDULE, lam="step")
