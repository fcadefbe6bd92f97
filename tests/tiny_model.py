"""The oracle's network in JAX, and small batches: what the tests of the core train."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import Batch, Draw, Example, erasediff, filtered, low_pass, sum_squares, weighted, window
from jaxunlearn.schedule import linear
from tests import oracle

SCHEDULE = linear(1000)
NOISE = erasediff(SCHEDULE).draw_extra

SELECTIONS = {
    "none": None,
    "window": weighted(sum_squares, window(250, 750)),
    "filter": filtered(sum_squares, low_pass(0.5)),
    "both": weighted(filtered(sum_squares, low_pass(0.5)), window(250, 750)),
}


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
    """Arguments of the oracle: x0, a0, t, eps, u, noise. Strongly non-uniform: each row has its own scale and mean."""
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
    return {k: v.astype(np.int32 if k == "t" else dtype) for k, v in out.items()}


def batch_and_draw(a):
    """The library's containers of :func:`arrays`."""
    a = {k: jnp.asarray(v) for k, v in a.items()}
    ones = jnp.asarray(np.ones(a["t"].shape, a["eps"].dtype))
    return Batch(Example(a["x0"]), Example(a["a0"])), Draw(a["t"], ones, a["eps"], a["u"], {"noise": a["noise"]})


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
