"""The oracle's network in JAX, and small batches: what the tests of the core train."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import Batch, Draw, Example, erasediff, filtered, low_pass, mean_squares, sum_squares, weighted, window
from jaxunlearn import methods as library
from jaxunlearn.objectives import Anchor
from jaxunlearn.schedule import linear
from tests import oracle

SCHEDULE = linear(1000)
NOISE = erasediff(SCHEDULE).draw_extra

METHOD_OPTIONS = {
    "mirrored": {"cap": 20.0},
    "clamped": {"cap": np.linspace(60.0, 10.0, 1000)},
    "npo": {"level": 2.0},
    "simnpo": {"level": 6.0, "delta": 0.5},
    "dpo": {"beta": 0.8},
    "kto": {"beta": 0.6},
}
"""What these methods need here: caps that clamp nothing, and levels and betas at which the losses of this network (errors
per pixel about 1) neither vanish nor saturate."""
PER_PIXEL = ("mirrored", "clamped", "npo", "simnpo", "dpo", "kto")
"""Methods whose default error is the mean over pixels."""


def _selected(error):
    return {
        "none": None,
        "window": weighted(error, window(250, 750)),
        "filter": filtered(error, low_pass(0.5)),
        "both": weighted(filtered(error, low_pass(0.5)), window(250, 750)),
    }


SELECTIONS = _selected(sum_squares)
SELECTIONS_PER_PIXEL = _selected(mean_squares)


def make_objective(name, selection="none", **options):
    """The method's objective with what it needs here, the forget term selected in time and frequency."""
    error = (SELECTIONS_PER_PIXEL if name in PER_PIXEL else SELECTIONS)[selection]
    options = METHOD_OPTIONS.get(name, {}) | options
    return library.make_objective(name, SCHEDULE, **options, **({} if error is None else {"forget_error": error}))


def ref_params(name, channels=1, dtype=np.float32, hidden=4):
    """What the method compares with: other parameters, as an Anchor where it has one; None where it has none."""
    if not make_objective(name).needs_ref:
        return None
    other = params(channels, 5, dtype, hidden)
    if name in ("vdu_style", "fisher_anchor"):
        rng = np.random.default_rng(6)
        return Anchor(other, {k: rng.uniform(0.5, 1.5, v.shape).astype(dtype) for k, v in other.items()})
    return other


@pytest.fixture(scope="module")
def quick_compilation():
    """For programs that are large for what they compute: XLA need not polish them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def predict(params, x, t, cond=None):
    """The oracle's network; a condition [B], where given, shifts the time feature."""
    mean = jnp.broadcast_to(x.mean(axis=(1, 2), keepdims=True), x.shape)
    time = jnp.sin(t.astype(x.dtype) / 100)
    if cond is not None:
        time = time + cond
    time = jnp.broadcast_to(time[:, None, None, None], (*x.shape[:3], 1))
    features = jnp.concatenate([x, mean, time, jnp.ones_like(time)], axis=-1)
    return jnp.tanh(features @ params["inner"]) @ params["outer"]


def params(channels=1, seed=0, dtype=np.float32, hidden=4):
    """Parameters of the network as numpy arrays."""
    return {k: v.astype(dtype) for k, v in oracle.net_params(seed, channels, hidden).items()}


def arrays(count, shape=(8, 8, 1), seed=0, dtype=np.float32, t=None):
    """Arguments of the oracle: x0, a0, t, eps, u, noise, neighbours, surrogate.

    Strongly non-uniform: each row has its own scale and mean.
    """
    rng = np.random.default_rng(seed)
    scale = np.linspace(0.05, 1.0, count).reshape(-1, 1, 1, 1)
    mean = np.linspace(-0.8, 0.8, count).reshape(-1, 1, 1, 1)
    x0 = np.clip(mean + 0.4 * scale * rng.normal(size=(count, *shape)), -1, 1)
    a0 = np.clip(-mean[::-1] + 0.6 * scale * rng.normal(size=(count, *shape)), -1, 1)
    out = {
        "x0": x0,
        "a0": a0,
        "t": rng.integers(0, 1000, count) if t is None else np.asarray(t),
        "eps": rng.normal(size=(count, *shape)),
        "u": (np.arange(count) * 0.37 + 0.11) % 1.0,
        "noise": rng.uniform(size=(count, *shape)),
    }
    # So near to the forget image that at most t several neighbours have a weight.
    near = rng.normal(size=(count, 3, *shape)) / np.sqrt(np.prod(shape))
    out["neighbours"] = a0[:, None] + near * np.linspace(0.5, 3, 3)[:, None, None, None]
    out["surrogate"] = np.clip(a0 + 0.3 * rng.normal(size=(count, *shape)), -1, 1)
    return {k: v.astype(np.int32 if k == "t" else dtype) for k, v in out.items()}


def batch_and_draw(a):
    """The library's containers of :func:`arrays`."""
    a = {k: jnp.asarray(v) for k, v in a.items()}
    ones = jnp.asarray(np.ones(a["t"].shape, a["eps"].dtype))
    batch = Batch(Example(a["x0"]), Example(a["a0"]), {k: a[k] for k in ("neighbours", "surrogate") if k in a})
    return batch, Draw(a["t"], ones, a["eps"], a["u"], {"noise": a["noise"]})


def evaluate(function, *args):
    """The results as numpy arrays, from one program: many small eager operations would each be compiled."""
    return jax.tree.map(np.asarray, jax.jit(function)(*args))


def close(got, want, tolerance):
    """Whether trees agree, each leaf relative to its own largest entry."""

    def check(x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * max(np.abs(y).max(), 1e-30))

    jax.tree.map(check, got, want)


def cheap_draw(key, batch):
    """A draw that compiles fast: the true ones have their own test for many devices."""
    count = batch.keep.x0.shape[0]
    seed = (jax.random.key_data(key) % 10_007).astype(jnp.float32).sum()
    noise = lambda shift: jnp.sin(jnp.arange(batch.keep.x0.size) * 78.233 + seed + shift).reshape(batch.keep.x0.shape)  # noqa: E731
    u = jnp.abs(jnp.sin(jnp.arange(count) * 12.9898 + seed))
    t = (jnp.arange(count) * 367 + seed.astype(jnp.int32)) % 1000
    return Draw(t, jnp.ones(count), 1.4 * noise(0.0), 0.999 * u, {"noise": jnp.abs(noise(1.0))})


class Together(NamedTuple):
    """The state of several steps that run as one program: one compilation serves many cases."""

    step: Any
    states: tuple


def together(steps):
    """One step of all the given steps on the same batch and draw."""

    def step(state, batch, draw, *, axis_name=None):
        out = [each(own, batch, draw, axis_name=axis_name) for each, own in zip(steps, state.states)]
        return Together(state.step + 1, tuple(s for s, _ in out)), tuple(m for _, m in out)

    return step
