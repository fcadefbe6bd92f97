"""The cost of a step of every method: the passes that METHODS states, counted in floating-point operations."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from jaxunlearn import METHODS
from jaxunlearn.methods import make_combine
from jaxunlearn.step import term_grads
from tests import tiny_model as tm

HIDDEN = 256
"""So wide that the network's matrix products outweigh everything that is done once per pixel or parameter. The layers are
smooth: around ``jnp.maximum`` XLA does not see that two forward passes are the same."""


def network():
    """Three layers on single pixels and the timestep."""
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = [(2, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 1)]
    return {str(i): jax.random.normal(k, s) / s[0] ** 0.5 for i, (k, s) in enumerate(zip(keys, sizes))}


def predict(params, x, t, cond=None):
    time = jnp.broadcast_to((t.astype(x.dtype) / 1000)[:, None, None, None], x.shape)
    hidden = jnp.concatenate([x, time], axis=-1)
    for i in range(2):
        hidden = jnp.tanh(hidden @ params[str(i)])
    return hidden @ params["2"]


def flops(function, *args):
    cost = jax.jit(function).lower(*args).compile().cost_analysis()
    return cost["flops"]


@functools.cache
def one_pass():
    """``{"F": ..., "B": ...}`` of one batch."""
    batch, draw = tm.batch_and_draw(tm.arrays(4, (16, 16, 1)))
    forward = flops(predict, network(), batch.keep.x0, draw.t)
    both = flops(jax.grad(lambda p: jnp.sum(predict(p, batch.keep.x0, draw.t) ** 2)), network())
    return {"F": forward, "F'": forward, "B": both - forward}


QUICK = ("naive", "siss", "retrack", "npo", "dpo", "vdu_style")
"""One method of each number of passes; the others run with the slow tests."""


def test_the_quick_methods_cover_all_numbers_of_passes():
    assert {METHODS[m].passes for m in QUICK} == {method.passes for method in METHODS.values()}


@pytest.mark.parametrize("name", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_a_step_costs_the_passes_that_are_stated(name):
    batch, draw = tm.batch_and_draw(tm.arrays(4, (16, 16, 1)))
    objective, combine = tm.make_objective(name), make_combine(name)
    reference = None if tm.ref_params(name) is None else network()
    if "anchor" in objective.terms:
        reference = tm.ref_params(name)._replace(center=network(), precision=network())

    def step(p, ref, batch, draw):
        grads, terms, aux = term_grads(objective, predict, p, batch, draw, ref_params=ref)
        return combine.apply(grads, (), jnp.int32(0)), terms, aux

    stated = re.findall(r"(\d)(F'|F|B)", METHODS[name].passes)
    assert " ".join(n + kind for n, kind in stated) == METHODS[name].passes
    wanted = sum(int(n) * one_pass()[kind] for n, kind in stated)
    counted = flops(step, network(), reference, batch, draw)
    assert 0.9 * wanted < counted < 1.1 * wanted
