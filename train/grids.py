"""Samples of a model in training, and grids of them as PNG files."""

from __future__ import annotations

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxunlearn import guidance, sampling
from jaxunlearn.images import to_uint8
from jaxunlearn.io.diffusers import DiffusersModel
from jaxunlearn.types import Array, PyTree
from train.examples import Examples, grid_texts


def tile(images: np.ndarray, *, gap: int = 1) -> np.ndarray:
    """uint8 [N,H,W,C] -> one picture, about as wide as high, with a grey gap between the images."""
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    picture = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 128, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        picture[y : y + height, x : x + width] = image
    return picture


def save_grid(path: pathlib.Path, images: Array) -> None:
    """Writes images in [-1, 1], [N,H,W,C] with 1 or 3 channels, as a PNG; small ones are enlarged without smoothing."""
    from PIL import Image

    picture = tile(to_uint8(images))
    scale = max(1, 64 // images.shape[1])
    picture = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(temporary, format="PNG")
    temporary.replace(path)


class GridSampler:
    """Samples of a model for a grid; their noise is the same whenever it is called.

    A model of pixels is sampled with DDIM, all images at once. Latent models and models of text keep the spacing of their
    own scheduler, are sampled in batches, guided (``eval.guidance``) and decoded.
    """

    def __init__(self, config: ConfigDict, model: DiffusersModel, examples: Examples):
        self._examples = examples
        count, seed = config.log.sample_count, config.seed
        self._noise = jax.random.normal(jax.random.key(seed), (count, *examples.shape), jnp.float32)
        self._batch_size = config.latents.batch_size if examples.latents is not None else count
        self._cond = None
        self._space = model.latent_space(config.latents.batch_size) if model.is_latent else None
        predict, sampler = model.predict_raw, sampling.SamplerConfig(kind="ddim", clip_sample=model.sampler.clip_sample)
        if model.is_latent or model.takes_text:
            sampler = model.sampler.with_kind("ddim", model.schedule, config.log.sample_steps)
        if model.takes_text:
            self._cond = examples.condition(grid_texts(config, examples.split))
            predict = guidance.classifier_free(predict, config.eval.guidance, examples.condition([""]))
        steps = sampling.trajectory(model.schedule, sampler, config.log.sample_steps)
        self._sample = jax.jit(
            lambda params, noise, cond: sampling.sample(
                predict,
                params,
                noise,
                None,
                model.schedule,
                sampler,
                steps,
                cond=cond,
                prediction_type=model.prediction_type,
            )
        )

    def __call__(self, params: PyTree) -> np.ndarray:
        """float32 [N,H,W,C], images in about [-1, 1]."""
        count, size = len(self._noise), self._batch_size
        params = jax.device_put(params)
        parts = []
        for start in range(0, count, size):
            # The last batch is filled up with the first rows, so that one program serves all.
            rows = np.arange(start, start + size) % count
            cond = None if self._cond is None else self._cond[rows]
            parts.append(np.asarray(self._sample(params, self._noise[rows], cond))[: count - start])
        samples = np.concatenate(parts)
        return samples if self._space is None else self._space.decode(samples)
