"""Runs models: the three compiled programs (sampling, injection, loss) that all columns share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from eval.prompts import Conditions
from eval.spaces import Space
from jaxunlearn import sampling
from jaxunlearn.guidance import classifier_free
from jaxunlearn.images import to_uint8
from jaxunlearn.io.diffusers import DiffusersModel
from jaxunlearn.metrics.denoising_loss import denoising_loss, make_loss_rows
from jaxunlearn.metrics.injection import denoise_injection
from jaxunlearn.types import PyTree

Tick = Callable[[float], None]
"""Called with the finished share, 0 to 1."""

SAMPLING, INJECTION, LOSS = range(3)  # streams of the evaluation's key


class Samples(NamedTuple):
    """Samples as pictures.

    Attributes:
      images: uint8 [N,H,W,C], or None if some are broken.
      broken: how many hold NaN or infinity.
    """

    images: np.ndarray | None
    broken: int


class Runner:
    """Compiled programs of one architecture; parameters are arguments, so models of equal shape share them.

    Attributes:
      space: where the model works.
      takes_text: whether it has conditions.
      conditions: what it is conditioned on; ``conditions.at(rows)`` is the ``cond`` of images with these rows.
      schedule: the noise schedule of the model.
      predict: ``(params, x_t, t [B], cond) -> eps_hat`` as a pure function, not compiled; t may be float where the model
        takes it.
      protocol: how samples are made, for the report.
    """

    def __init__(self, model: DiffusersModel, settings: Mapping[str, Any], space: Space, conditions: Conditions):
        """Args:
        model: gives architecture, schedule and sampler; its parameters are not used.
        settings: the evaluation's settings.
        space: where the model works.
        conditions: what it is conditioned on.
        """
        self._identity = _identity(model)
        self._settings = settings
        self.schedule = model.schedule
        self.space = space
        self.takes_text = conditions.table is not None
        self.conditions = conditions
        self._key = jax.random.key(settings["seed"])
        config = model.sampler.with_kind(settings["sampler"], model.schedule, settings["sampling_steps"])
        steps = sampling.trajectory(model.schedule, config, settings["sampling_steps"])

        def sample(params: PyTree, indices, cond, uncond, shape) -> jax.Array:
            keys = sampling.example_keys(jax.random.fold_in(self._key, SAMPLING), indices)
            pairs = jax.vmap(jax.random.split)(keys)
            start = jax.vmap(lambda key: jax.random.normal(key, shape))(pairs[:, 0])
            predict = model.predict_raw
            if cond is not None:
                predict = classifier_free(predict, settings["guidance"], uncond)
            return sampling.sample(
                predict,
                params,
                start,
                pairs[:, 1],
                model.schedule,
                config,
                steps,
                cond=cond,
                prediction_type=model.prediction_type,
            )

        def predict(params, x_t, t, cond=None):
            return model.predict(params, x_t, t, cond)

        def predict_given(params_and_cond, x_t, t, _):
            # The chain hands its parameters through as they are, so the condition travels with them.
            return model.predict(params_and_cond[0], x_t, t, params_and_cond[1])

        ancestral = model.sampler.with_kind("ddpm", model.schedule, model.schedule.num_steps)
        self._sample = jax.jit(sample, static_argnums=4)
        self._chain = jax.jit(
            sampling.ancestral_chain(predict_given, model.schedule, ancestral, max(settings["injection_t"]))
        )
        self._loss = jax.jit(make_loss_rows(predict, model.schedule))
        self.predict = predict
        self.protocol = {
            "sampler": settings["sampler"],
            "steps": settings["sampling_steps"],
            "clip_sample": config.clip_sample and config.kind != "pndm",
            "timestep_spacing": config.timestep_spacing,
            "seed": settings["seed"],
        }
        if space.latent:
            self.protocol["space"] = "latents, decoded"

    def fits(self, model: DiffusersModel) -> bool:
        """Whether the model can use these programs."""
        return self._identity == _identity(model)

    def sample(
        self, params: PyTree, image_shape: tuple[int, int, int], texts: tuple[str, ...] | None, tick: Tick
    ) -> Samples:
        """``num_samples`` images of the shape [H,W,C]; sample i starts from the same noise for every model and text.

        ``texts`` holds the prompt of each sample, None for a model without text. Latents are decoded.
        """
        total, batch = self._settings["num_samples"], self._settings["batch_size"]
        shape = self.space.shape(image_shape)
        rows, uncond = np.zeros(total, np.int32), None
        if texts is not None:
            rows, uncond = self.conditions.rows(texts), self.conditions.at(self.conditions.rows([""]))
        parts, broken = [], 0
        for start in range(0, total, batch):
            indices = np.arange(start, start + min(batch, total), dtype=np.int32)
            cond = None if texts is None else self.conditions.at(rows[np.minimum(indices, total - 1)])
            made = np.asarray(self._sample(params, indices, cond, uncond, shape))[: total - start]
            images = self.space.decode(made)
            broken += int(np.sum(~np.all(np.isfinite(images), axis=(1, 2, 3))))
            if not broken:
                parts.append(to_uint8(images))
            tick(min(1.0, (start + batch) / total))
        return Samples(None if broken else np.concatenate(parts), broken)

    def inject(self, params: PyTree, a0: np.ndarray, rows: np.ndarray, tick: Tick) -> np.ndarray:
        """Denoising injection of a0 [F,...] in the model's space: [F, len(injection_t), copies, ...], not decoded.

        ``rows`` [F] are the conditions of the images; there is no guidance.
        """
        t, copies = self._settings["injection_t"], self._settings["injection_copies"]
        batch = min(self._settings["batch_size"], len(a0) * copies)
        rows = np.repeat(rows, copies)
        done = 0

        def sample_from(x_t, step, keys):
            nonlocal done
            parts = []
            for start in range(0, len(x_t), batch):
                take = np.minimum(np.arange(start, start + batch), len(x_t) - 1)
                cond = self.conditions.at(rows[take])
                parts.append(np.asarray(self._chain((params, cond), x_t[take], np.int32(step), keys[take])))
            done += step + 1
            tick(done / (sum(t) + len(t)))
            return np.concatenate(parts)[: len(x_t)]

        key = jax.random.fold_in(self._key, INJECTION)
        return denoise_injection(sample_from, a0, self.schedule, key, t, copies)

    def loss(self, params: PyTree, x0: np.ndarray, rows: np.ndarray, tick: Tick) -> np.ndarray:
        """Denoising loss [N, len(loss_t)] of x0 [N,...] in the model's space, under the conditions ``rows`` [N].

        The noises are the same for all images and models.
        """
        settings = self._settings
        calls, done = -(-len(x0) * len(settings["loss_t"]) * settings["loss_noises"] // settings["batch_size"]), 0

        def each():
            nonlocal done
            done += 1
            tick(done / calls)

        return denoising_loss(
            self._loss,
            params,
            x0,
            jax.random.fold_in(self._key, LOSS),
            settings["loss_t"],
            settings["loss_noises"],
            settings["batch_size"],
            each,
            cond=self.conditions.at(rows),
        )


def _identity(model: DiffusersModel) -> tuple:
    return (model.config, model.schedule.alphas_cumprod.tobytes(), model.prediction_type, model.sampler)
