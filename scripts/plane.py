"""What the two-dimensional studies share: a small network as a plain function, training as one scan, samples, a distance.

A point of the plane is an image of one pixel with two channels, [1,1,2].
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxunlearn as ju
from jaxunlearn.sampling import SamplerConfig, sample, trajectory
from jaxunlearn.schedule import Schedule
from jaxunlearn.timesteps import uniform
from jaxunlearn.types import Combine, Objective, Predict, PyTree


def init(key: jax.Array, width: int) -> dict[str, jax.Array]:
    """Parameters of the network."""
    sizes = {"in": (2 + 32, width), "middle": (width, width), "more": (width, width), "out": (width, 2)}
    keys = jax.random.split(key, len(sizes))
    return {k: jax.random.normal(r, s) / np.sqrt(s[0]) for (k, s), r in zip(sizes.items(), keys)}


def make_predict(schedule: Schedule) -> Predict:
    """A network of four layers that takes the noise level as sines and cosines."""

    def predict(params, x_t, t, cond):
        level = schedule.log_snr(t)[:, None] * jnp.asarray(2.0 ** np.arange(-4, 4) / 2)
        time_features = jnp.concatenate([jnp.sin(level), jnp.cos(level), jnp.tanh(level), level / 50], axis=1)
        h = jnp.concatenate([x_t.reshape(-1, 2), time_features], axis=1)
        for name in ("in", "middle", "more"):
            h = jax.nn.silu(h @ params[name])
        return (h @ params["out"]).reshape(x_t.shape)

    return predict


def train(
    predict: Predict,
    objective: Objective,
    combine: Combine,
    tx: optax.GradientTransformation,
    params: PyTree,
    keep: jax.Array,
    forget: jax.Array,
    steps: int,
    batch_size: int,
    key: jax.Array,
    *,
    num_steps: int = 1000,
) -> PyTree:
    """``steps`` training steps as one scan; returns the parameters.

    Rows of keep [N,1,1,2] and forget [M,1,1,2] are drawn with replacement; t is uniform in ``num_steps``.
    """
    step, draw_fn = ju.make_train_step(objective, combine, predict, tx), uniform(num_steps)

    def body(state, i):
        pick, draw_key = jax.random.split(jax.random.fold_in(key, i))
        pick_keep, pick_forget = jax.random.split(pick)
        keep_rows = jax.random.randint(pick_keep, (batch_size,), 0, len(keep))
        forget_rows = jax.random.randint(pick_forget, (batch_size,), 0, len(forget))
        batch = ju.Batch(ju.Example(keep[keep_rows]), ju.Example(forget[forget_rows]))
        state, _ = step(state, batch, draw_fn(draw_key, batch))
        return state, None

    state = ju.init_state(params, tx, combine, ref=objective.needs_ref)
    state, _ = jax.lax.scan(body, state, jnp.arange(steps))
    return state.params


def make_sampler(
    predict: Predict, schedule: Schedule, key: jax.Array, count: int, steps: int = 50
) -> Callable[[PyTree], jax.Array]:
    """``params -> samples [count, 2]`` by ``steps`` steps of DDIM from the same noise."""
    config = SamplerConfig("ddim", clip_sample=False)
    path = trajectory(schedule, config, steps)
    start = jax.random.normal(key, (count, 1, 1, 2))
    return jax.jit(lambda params: sample(predict, params, start, None, schedule, config, path).reshape(-1, 2))


def sliced_distance(a: np.ndarray, b: np.ndarray, directions: int = 64) -> float:
    """Mean over directions of the one-dimensional Wasserstein-1 distance of two point sets [n, 2]."""
    angle = np.pi * np.arange(directions) / directions
    levels = (np.arange(500) + 0.5) / 500
    a, b = (np.quantile(x @ np.stack([np.cos(angle), np.sin(angle)]), levels, axis=0) for x in (a, b))
    return float(np.mean(np.abs(a - b)))
