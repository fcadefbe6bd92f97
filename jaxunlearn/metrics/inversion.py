"""The inversion probe: how wide the valley is that leads to a forget image.

DDIM runs backwards as well (Song et al. 2021, arXiv 2010.02502, section 4.3): the image becomes the noise z* that the model
makes it from. Such noise of a memorised image is no ordinary one (too short, or too long), so it is scaled to the length of
fresh noise, sqrt(D), and mixed with it, ``z = sqrt(1 - share^2) z* + share xi``. Sampled again, a memorised image comes back
from far around z*; one that was never seen does not.

The measure is the distance between the image and what comes back, against that of retrained models. Scaling and mixture are
our own design.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.schedule import Schedule
from jaxunlearn.types import Array, Predict, PyTree

Probe = Callable[..., Array]
"""``(params, a0 [F,H,W,C], key, cond) -> [F, shares, copies, H, W, C]``, from :func:`make_inversion_probe`."""


def levels(schedule: Schedule, steps: int) -> np.ndarray:
    """Timesteps evenly spaced in log_snr, int32 and rising, from 0 to the last with a trace of the image.

    Evenly spaced in t the steps at small t, where a memorised image is decided, would be too long to go up and come back.
    Equal timesteps are dropped, so there may be fewer than ``steps``.

    Raises:
      ValueError: fewer than 2 steps, or more than the schedule has.
    """
    if not 2 <= steps <= schedule.last_step + 1:
        raise ValueError(f"steps must be between 2 and the schedule's {schedule.last_step + 1}, got {steps}")
    table = schedule.alphas_cumprod[: schedule.last_step + 1]
    rising = np.log1p(-table) - np.log(table)
    even = np.linspace(rising[0], rising[-1], steps)
    return np.unique(np.round(np.interp(even, rising, np.arange(len(table)))).astype(np.int32))


def make_inversion_probe(
    predict: Predict,
    schedule: Schedule,
    *,
    steps: int = 100,
    shares: Sequence[float] = (0.0, 0.3, 0.6),
    copies: int = 4,
) -> Probe:
    """The probe as one function, to be jitted once and used for all models. The noises are the same for all of them.

    Args:
      predict: the model.
      schedule: its noise schedule.
      steps: noise levels on the way up, and again on the way down, see :func:`levels`.
      shares: of fresh noise in the starting noise, in [0, 1]; 0 comes back the same for all copies.
      copies: fresh noises for each image and share.

    Raises:
      ValueError: shares outside [0, 1], no share, no copies, or as :func:`levels`.
    """
    if not len(shares) or copies < 1 or not all(0 <= share <= 1 for share in shares):
        raise ValueError(
            f"the probe needs copies >= 1 and shares in [0, 1], got {copies} copies, shares {tuple(shares)}"
        )
    t = levels(schedule, steps)
    ratio = np.sqrt(1 / schedule.alphas_cumprod[t] - 1)  # sigma / alpha
    alpha = np.sqrt(schedule.alphas_cumprod[t])

    def move(params, y, cond, order, start, targets):
        """Walks ``y = x / alpha`` along ``order``; the model is asked where each step begins."""

        def body(carry, i_and_target):
            y, at = carry
            i, target = i_and_target
            x = jnp.asarray(alpha, y.dtype)[i] * y
            eps_hat = predict(params, x, jnp.full(len(x), jnp.asarray(t)[i], jnp.int32), cond)
            return (y + (target - at) * eps_hat, target), None

        scanned = (jnp.asarray(order), jnp.asarray(targets, y.dtype))
        return jax.lax.scan(body, (y, jnp.asarray(start, y.dtype)), scanned)[0][0]

    def probe(params: PyTree, a0: Array, key: Array, cond: PyTree = None) -> Array:
        count, last = len(a0), len(t) - 1
        # Up: the eps of each level leads to the next; the image itself is taken for the first level.
        y = move(params, a0, cond, np.concatenate([[0], np.arange(last)]), 0.0, ratio)
        z = y / jnp.sqrt(jnp.mean(y**2, axis=tuple(range(1, y.ndim)), keepdims=True))
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))
        fresh = jax.vmap(lambda k: jax.random.normal(k, (copies, *a0.shape[1:]), a0.dtype))(keys)
        share = jnp.asarray(shares, a0.dtype).reshape(-1, *(1,) * a0.ndim)
        mixed = jnp.sqrt(1 - share**2) * z[:, None, None] + share * fresh[:, None]
        rows = mixed.reshape(-1, *a0.shape[1:])
        each = None if cond is None else jax.tree.map(lambda c: jnp.repeat(c, len(shares) * copies, axis=0), cond)
        down = np.arange(last, -1, -1)
        back = move(params, rows * ratio[-1], each, down, ratio[-1], np.concatenate([ratio[:-1][::-1], [0.0]]))
        return back.reshape(mixed.shape)

    return probe
