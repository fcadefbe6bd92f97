"""Runs models: the three compiled programs (sampling, injection, loss) that all columns share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxunlearn import sampling
from jaxunlearn.io.diffusers import DiffusersModel
from jaxunlearn.metrics.denoising_loss import denoising_loss, make_loss_rows
from jaxunlearn.metrics.injection import denoise_injection
from jaxunlearn.types import PyTree

Tick = Callable[[float], None]
"""Called with the finished share, 0 to 1."""

SAMPLING, INJECTION, LOSS = range(3)  # streams of the evaluation's key


class Runner:
    """Compiled programs of one architecture; parameters are arguments, so models of equal shape share them."""

    def __init__(self, model: DiffusersModel, settings: Mapping[str, Any]):
        """Args:
        model: gives architecture, schedule and sampler; its parameters are not used.
        settings: the evaluation's settings.
        """
        self._identity = _identity(model)
        self._settings = settings
        self._schedule = model.schedule
        self._key = jax.random.key(settings["seed"])
        self._shape = None
        config = _sampler(model, settings["sampler"], settings["sampling_steps"])
        steps = sampling.trajectory(model.schedule, config, settings["sampling_steps"])

        def sample(params: PyTree, indices, shape) -> jax.Array:
            keys = sampling.example_keys(jax.random.fold_in(self._key, SAMPLING), indices)
            pairs = jax.vmap(jax.random.split)(keys)
            start = jax.vmap(lambda key: jax.random.normal(key, shape))(pairs[:, 0])
            return sampling.sample(
                model.predict_raw,
                params,
                start,
                pairs[:, 1],
                model.schedule,
                config,
                steps,
                prediction_type=model.prediction_type,
            )

        def predict(params, x_t, t):
            return model.predict(params, x_t, t, None)

        ancestral = _sampler(model, "ddpm", model.schedule.num_steps)
        self._sample = jax.jit(sample, static_argnums=2)
        self._chain = jax.jit(
            sampling.ancestral_chain(model.predict, model.schedule, ancestral, max(settings["injection_t"]))
        )
        self._loss = jax.jit(make_loss_rows(predict, model.schedule))
        self.protocol = {
            "sampler": settings["sampler"],
            "steps": settings["sampling_steps"],
            "clip_sample": config.clip_sample,
            "timestep_spacing": config.timestep_spacing,
            "seed": settings["seed"],
        }

    def fits(self, model: DiffusersModel) -> bool:
        """Whether the model can use these programs."""
        return self._identity == _identity(model)

    def sample(self, params: PyTree, shape: tuple[int, int, int], tick: Tick) -> np.ndarray:
        """``num_samples`` images [N,H,W,C], about [-1, 1]; sample i starts from the same noise for every model."""
        total, batch = self._settings["num_samples"], self._settings["batch_size"]
        parts = []
        for start in range(0, total, batch):
            indices = np.arange(start, start + min(batch, total), dtype=np.int32)
            parts.append(np.asarray(self._sample(params, indices, shape)))
            tick(min(1.0, (start + batch) / total))
        return np.concatenate(parts)[:total]

    def inject(self, params: PyTree, a0: np.ndarray, tick: Tick) -> np.ndarray:
        """Denoising injection of a0 [F,H,W,C] in [-1, 1]: [F, len(injection_t), copies, H, W, C]."""
        t, copies = self._settings["injection_t"], self._settings["injection_copies"]
        batch = min(self._settings["batch_size"], len(a0) * copies)
        done = 0

        def sample_from(x_t, step, keys):
            nonlocal done
            parts = []
            for start in range(0, len(x_t), batch):
                rows = np.minimum(np.arange(start, start + batch), len(x_t) - 1)
                parts.append(np.asarray(self._chain(params, x_t[rows], np.int32(step), keys[rows])))
            done += step + 1
            tick(done / (sum(t) + len(t)))
            return np.concatenate(parts)[: len(x_t)]

        key = jax.random.fold_in(self._key, INJECTION)
        return denoise_injection(sample_from, a0, self._schedule, key, t, copies)

    def loss(self, params: PyTree, x0: np.ndarray, tick: Tick) -> np.ndarray:
        """Denoising loss [N, len(loss_t)] of x0 [N,H,W,C] in [-1, 1], with the same noises for all images and models."""
        settings = self._settings
        calls, done = -(-len(x0) * len(settings["loss_t"]) * settings["loss_noises"] // settings["batch_size"]), 0

        def each():
            nonlocal done
            done += 1
            tick(done / calls)

        key = jax.random.fold_in(self._key, LOSS)
        batch = settings["batch_size"]
        return denoising_loss(self._loss, params, x0, key, settings["loss_t"], settings["loss_noises"], batch, each)


def _identity(model: DiffusersModel) -> tuple:
    return (model.config, model.schedule.alphas_cumprod.tobytes(), model.prediction_type, model.sampler)


def _sampler(model: DiffusersModel, kind: str, steps: int) -> sampling.SamplerConfig:
    """The model's own sampler (clipping, spacing, ...) of another kind, without random steps for ddim.

    "leading" may start beyond the schedule with an offset and as many steps as the schedule has; then it has no offset.
    """
    own = model.sampler
    offset = own.steps_offset
    gap = model.schedule.num_steps // steps
    if own.timestep_spacing == "leading" and (steps - 1) * gap + offset >= model.schedule.num_steps:
        offset = 0
    return sampling.SamplerConfig(
        kind=kind,
        clip_sample=own.clip_sample,
        clip_sample_range=own.clip_sample_range,
        variance_type=own.variance_type,
        timestep_spacing=own.timestep_spacing,
        steps_offset=offset,
        set_alpha_to_one=own.set_alpha_to_one,
    )
