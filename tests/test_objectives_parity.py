"""Every objective against the float64 oracle: terms and gradients, in both precisions, at all sizes and timesteps."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import METHODS, filtered, low_pass, mean_squares, sum_squares, weighted, window
from jaxunlearn.methods import make_objective
from jaxunlearn.step import term_grads
from tests import oracle
from tests import tiny_model as tm
from tests.tiny_model import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")

CUTOFF, T1, T2 = 0.55, 250, 750

NEW = [m for m in METHODS if m not in ("naive", "neggrad", "siss", "siss_no_is", "bernoulli", "erasediff")]
CAPS = {"mirrored": {"cap": 0.95}, "clamped": {"cap": np.linspace(1.2, 0.7, 1000)}}  # some rows above, some below


def selected_error(method):
    error = mean_squares if method in tm.PER_PIXEL else sum_squares
    return weighted(filtered(error, low_pass(CUTOFF, "gaussian")), window(T1, T2, 1000))


CASES = {  # name -> (method, options, whether the forget term is selected in time and frequency)
    "naive": ("naive", {}, False),
    "neggrad": ("neggrad", {}, False),
    "siss": ("siss", {"lam": 0.5}, False),
    "siss lam=0.2": ("siss", {"lam": 0.2}, False),
    "siss lam=0": ("siss", {"lam": 0.0}, False),
    "siss lam=1": ("siss", {"lam": 1.0}, False),
    "siss_no_is": ("siss_no_is", {}, False),
    "bernoulli": ("bernoulli", {"lam": 0.3}, False),
    "erasediff": ("erasediff", {}, False),
    "neggrad selected": ("neggrad", {}, True),
    "siss selected": ("siss", {"lam": 0.5}, True),
    "siss_no_is selected": ("siss_no_is", {}, True),
    "bernoulli selected": ("bernoulli", {"lam": 0.3}, True),
    "erasediff selected": ("erasediff", {}, True),
}
for _name in NEW:
    _options = tm.METHOD_OPTIONS.get(_name, {}) | CAPS.get(_name, {})
    CASES[_name] = (_name, _options, False)
    CASES[f"{_name} selected"] = (_name, _options, True)

EVERYWHERE = [0, 1, 100, 300, 500, 700, 900, 999]
SIZES = {  # shape -> timesteps of the batches
    (8, 8, 1): [EVERYWHERE],
    (33, 20, 3): [EVERYWHERE],
    (256, 256, 3): [[0, 500], [740, 999]],
}


def cases_at(shape):
    """The large programs hold what differs in kind: compiling every case at every size would take minutes."""
    if shape == (33, 20, 3):
        return [name for name, (method, _, selected) in CASES.items() if selected or method not in NEW]
    if shape == (256, 256, 3):
        return [name for name, (method, _, selected) in CASES.items() if method not in NEW] + [
            "retrack",
            "npo selected",
        ]
    return list(CASES)


@functools.cache
def compiled(shape, dtype):
    """All cases in one program: one compilation for a size and a precision."""
    objectives, refs = {}, {}
    for name in cases_at(shape):
        method, options, selected = CASES[name]
        extra = {"forget_error": selected_error(method)} if selected else {}
        objectives[name] = make_objective(method, tm.SCHEDULE, **options, **extra)
        refs[name] = tm.ref_params(method, shape[-1], dtype)

    @jax.jit
    def run(params, batch, draw):
        out = {}
        for name, objective in objectives.items():
            terms, _ = objective(tm.predict, params, batch, draw, ref_params=refs[name])
            out[name] = terms, term_grads(objective, tm.predict, params, batch, draw, ref_params=refs[name])[0]
        return out

    return run


@functools.cache
def results(shape, dtype):
    """Pairs (library, oracle), one for each batch of timesteps."""
    pairs = []
    channels = shape[-1]
    with jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext():
        for i, t in enumerate(SIZES[shape]):
            a = tm.arrays(len(t), shape, seed=i, dtype=dtype, t=t)
            params = tm.params(channels, dtype=dtype)
            got = jax.tree.map(np.asarray, compiled(shape, dtype)(params, *tm.batch_and_draw(a)))
            pairs.append((got, wanted(a, params)))
    return pairs


def wanted(a, params):
    dtype = a["x0"].dtype
    a = {k: v if k == "t" else v.astype(np.float64) for k, v in a.items()}
    params = {k: v.astype(np.float64) for k, v in params.items()}
    selection = {
        "m": oracle.mask("gaussian", CUTOFF, *a["x0"].shape[1:3]),
        "time_weight": ((a["t"] >= T1) & (a["t"] < T2)) * (1000 / (T2 - T1)),
    }
    out = {}
    for name in cases_at(a["x0"].shape[1:]):
        method, options, selected = CASES[name]
        args = (params, a["x0"], a["a0"], a["t"], a["eps"], a["u"], oracle.linear_table())
        ref = jax.tree.map(np.float64, tm.ref_params(method, a["x0"].shape[-1], dtype))
        extra = {k: a[k] for k in ("noise", "neighbours", "surrogate")} | (selection if selected else {})
        out[name] = oracle.objective(method, *args, **options, **extra, ref=ref)
    return out


def check(shape, dtype, name, tolerance):
    for got, want in results(shape, dtype):
        for g, w in zip(got[name], want[name]):
            assert set(g) == set(w)
            for term in w:
                for x, y, scale in zip(
                    *map(jax.tree.leaves, (g[term], w[term], scales(name, want, w[term], np.prod(shape))))
                ):
                    assert x.dtype == dtype
                    assert np.all(np.isfinite(x))
                    # Relative to the largest entry; importance weights of e^-100 are not distinguished from zero.
                    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * max(scale, 1e-6))


def scales(name, want, tree, size):
    """The largest entry of each leaf. The two halves of a pair almost cancel: there that of one half, at the slope beta/4."""
    if not name.startswith("dpo") or not isinstance(tree, dict):
        return jax.tree.map(lambda y: np.abs(y).max(), tree)
    half = want[name.replace("dpo", "siss_no_is")][1]["forget"]
    return jax.tree.map(lambda y: np.abs(y).max() * tm.METHOD_OPTIONS["dpo"]["beta"] / 4 / size, half)


@pytest.mark.parametrize(("shape", "name"), [(shape, name) for shape in SIZES for name in cases_at(shape)], ids=str)
def test_float32_equals_the_oracle_to_1e_5(shape, name):
    check(shape, np.float32, name, 1e-5)


@pytest.mark.parametrize(("shape", "name"), [(shape, name) for shape in SIZES for name in cases_at(shape)], ids=str)
def test_float64_equals_the_oracle_to_1e_12(shape, name):
    check(shape, np.float64, name, 1e-12)


def test_every_method_has_a_case():
    assert {method for method, _, _ in CASES.values()} == set(METHODS)


def test_the_batches_hold_mixed_and_one_hot_weights():
    """The comparison covers what matters: weights near 1 at large t, and rows of both components."""
    a = tm.arrays(8, (8, 8, 1), t=EVERYWHERE)
    alpha, sigma = oracle.alpha_sigma(oracle.linear_table(), a["t"])
    a = {k: v.astype(np.float64) for k, v in a.items()}
    m = oracle.noised(np.where(oracle.col(a["u"] < 0.5), a["a0"], a["x0"]), a["eps"], alpha, sigma)
    gap, w_keep, _ = oracle.siss_weights(m, a["x0"], a["a0"], alpha, sigma, 0.5)
    assert 0 < np.sum(a["u"] < 0.5) < 8
    assert np.sum(np.abs(gap) < 5) >= 2
    assert np.sum(np.abs(gap) > 100) >= 2
    assert w_keep.min() < 1e-30


def test_a_condition_reaches_the_network():
    batch, draw = tm.batch_and_draw(tm.arrays(3))
    cond = jnp.array([0.5, -0.2, 0.1])
    batch = batch._replace(keep=batch.keep._replace(cond=cond), forget=batch.forget._replace(cond=cond))
    for name in METHODS:
        objective, ref = tm.make_objective(name), tm.ref_params(name)
        seen = []

        def spy(params, x, t, cond=None, seen=seen):
            seen.append(cond)
            return tm.predict(params, x, t, cond)

        jax.eval_shape(lambda p, o=objective, spy=spy, r=ref: o(spy, p, batch, draw, ref_params=r)[0], tm.params())
        assert seen
        assert all(np.array_equal(c, cond) for c in seen)


def test_missing_inputs_are_refused():
    batch, draw = tm.batch_and_draw(tm.arrays(2))
    p = tm.params()
    for name, method in METHODS.items():
        objective = tm.make_objective(name)
        if method.forget_sign == 0:
            alone = batch._replace(forget=None)
            assert set(jax.eval_shape(lambda p, o=objective, b=alone: o(tm.predict, p, b, draw)[0], p)) == {"keep"}
            with pytest.raises(ValueError, match="no forget term"):
                make_objective(name, tm.SCHEDULE, forget_error=sum_squares)
            continue
        with pytest.raises(ValueError, match="needs batch.forget"):
            objective(tm.predict, p, batch._replace(forget=None), draw)
        other = batch._replace(forget=batch.forget._replace(x0=jnp.zeros((2, 4, 4, 1))))
        with pytest.raises(ValueError, match="same shape"):
            objective(tm.predict, p, other, draw)
        other = batch._replace(forget=batch.forget._replace(x0=batch.forget.x0.astype(jnp.bfloat16)))
        with pytest.raises(ValueError, match="same type, got float32 and bfloat16"):
            objective(tm.predict, p, other, draw)
        other = batch._replace(forget=batch.forget._replace(cond=jnp.zeros(2)))
        with pytest.raises(ValueError, match="same structure"):
            objective(tm.predict, p, other, draw)
        for key, axes in objective.batch_extra.items():
            for value, got in ((None, "nothing"), (jnp.zeros((2, 8, 8)), r"\[2,8,8\]")):
                extra = {} if value is None else {key: value}
                message = rf"{name} needs batch.extra\['{key}'\] {axes}, got {got}".replace("[B", r"\[B").replace(
                    "C]", r"C\]"
                )
                with pytest.raises(ValueError, match=message):
                    objective(tm.predict, p, batch._replace(extra=extra), draw)
        if objective.needs_ref:
            with pytest.raises(ValueError, match=f"{name}.* needs ref_params"):
                objective(tm.predict, p, batch, draw)
    noise = draw.extra["noise"]
    for extra, got in (
        ({}, "nothing"),
        ({"noise": noise[:1]}, r"\[1, 8, 8, 1\]"),
        ({"noise": noise[..., 0]}, r"\[2, 8, 8\]"),
    ):
        message = rf"erasediff needs draw.extra\['noise'\] of the shape \[2, 8, 8, 1\] of the images, got {got}"
        with pytest.raises(ValueError, match=message):
            make_objective("erasediff", tm.SCHEDULE)(tm.predict, p, batch, draw._replace(extra=extra))
    with pytest.raises(ValueError, match="unknown noise 'gauss'"):
        make_objective("erasediff", tm.SCHEDULE, noise="gauss")
    with pytest.raises(ValueError, match="did you mean 'siss'"):
        make_objective("sis", tm.SCHEDULE)
    with pytest.raises(ValueError, match="has no option"):
        make_objective("siss", tm.SCHEDULE, lambd=0.5)


def test_erasediff_noise_distributions():
    """uniform01: mean 1/2, variance 1/12; uniform: 0, 1/3; normal: 0, 1. The same key gives the same noise."""
    for noise, (mean, variance) in {"uniform01": (0.5, 1 / 12), "uniform": (0, 1 / 3), "normal": (0, 1)}.items():
        make = make_objective("erasediff", tm.SCHEDULE, noise=noise).draw_extra["noise"]
        v = np.asarray(make(jax.random.key(0), (4, 32, 32, 3)))
        assert abs(v.mean() - mean) < 4.5 * np.sqrt(variance / v.size)
        np.testing.assert_allclose(v.var(), variance, rtol=0.04)
        assert np.array_equal(v, make(jax.random.key(0), (4, 32, 32, 3)))


def test_the_loss_of_keep_follows_from_those_of_all_and_forget():
    """L_keep = n/(n-k) L_X - k/(n-k) L_forget on a finite set of n = 7 images with k = 2 to be unlearned."""
    n, k = 7, 2
    a = tm.arrays(n, t=[10, 200, 400, 500, 600, 800, 950])
    batch, draw = tm.batch_and_draw(a)
    losses = np.asarray(
        make_objective("naive", tm.SCHEDULE)(tm.predict, tm.params(), batch, draw)[0]["keep"], np.float64
    )
    l_all, l_forget, l_keep = losses.mean(), losses[:k].mean(), losses[k:].mean()
    np.testing.assert_allclose(l_keep, n / (n - k) * l_all - k / (n - k) * l_forget, rtol=1e-12)
