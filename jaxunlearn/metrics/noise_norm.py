"""How hard a prompt pulls while an image is sampled: high for prompts whose image was memorised."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxunlearn.sampling import SamplerConfig, Trajectory, coefficients
from jaxunlearn.schedule import Schedule
from jaxunlearn.types import Array, Predict, PyTree


def make_noise_norm(
    predict: Predict, schedule: Schedule, config: SamplerConfig, steps: Trajectory, guidance: float = 7.5
) -> Callable[[PyTree, Array, PyTree, PyTree], Array]:
    """``(params, x_start [B,H,W,C], cond, uncond) -> [B]``: mean over the steps of ``norm(eps_cond - eps_uncond)``.

    The image is sampled with DDIM and classifier-free guidance meanwhile (Wen et al. 2024, "Detecting, Explaining, and
    Mitigating Memorization in Diffusion Models", Eq. 2; their setting: 4 images, 50 steps, guidance 7.5).

    Args:
      predict: the model of noise; it gets a batch twice as large.
      schedule: its noise schedule.
      config: a sampler of kind "ddim" with eta 0.
      steps: from :func:`jaxunlearn.sampling.trajectory`.
      guidance: scale; 1 is none.

    The conditions have one row per example. Jit the result.

    Raises:
      ValueError: a sampler of another kind, or one that adds noise.
    """
    if config.kind != "ddim" or not config.deterministic:
        raise ValueError(f"noise_norm samples with ddim and eta 0, got kind {config.kind!r} and eta {config.eta}")
    table = coefficients(schedule, config, steps)
    names = ("x0_from_x", "x0_from_out", "to_x0", "to_e")

    def rows(params: PyTree, x_start: Array, cond: PyTree, uncond: PyTree) -> Array:
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, uncond)

        def body(carry, scanned):
            x, total = carry
            t, from_x, from_out, to_x0, to_e = scanned
            out = predict(params, jnp.concatenate([x, x]), jnp.full(2 * len(x), t), both)
            following, without = jnp.split(out, 2)
            total += jnp.sqrt(jnp.sum((following - without) ** 2, axis=(1, 2, 3)))
            e = without + guidance * (following - without)
            clean = from_x * x + from_out * e
            if config.clip_sample:
                clean = jnp.clip(clean, -config.clip_sample_range, config.clip_sample_range)
            return (to_x0 * clean + to_e * e, total), None

        scanned = (jnp.asarray(steps.t, jnp.int32), *(jnp.asarray(table[name], x_start.dtype) for name in names))
        (_, total), _ = jax.lax.scan(body, (x_start, jnp.zeros(len(x_start), x_start.dtype)), scanned)
        return total / len(steps.t)

    return rows
