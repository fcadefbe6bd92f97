"""Folders of diffusers: in and out, without torch or diffusers.

Pixel models (``DDPMPipeline``, ``DDIMPipeline``), latent models and Stable Diffusion 1 and 2: every pipeline of a
``UNet2DModel`` or ``UNet2DConditionModel`` with, where it has them, an ``AutoencoderKL``, a ``CLIPTextModel`` and its
tokenizer. A model leaves as it came: the same layout, files, JSON bytes, dtypes, variant and shards, with other weights in
its UNet. Writing is the task of :mod:`jaxunlearn.io.diffusers_export`; :func:`save` is found here as well.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxunlearn.io.components import Component, check_params
from jaxunlearn.io.diffusers_export import Source, save
from jaxunlearn.io.pipeline_reader import read_pipeline
from jaxunlearn.io.schedulers import complete_scheduler_config, read_scheduler
from jaxunlearn.models.unet2d_config import UNet2DConfig
from jaxunlearn.predictors import from_linen, to_eps
from jaxunlearn.sampling import SamplerConfig
from jaxunlearn.schedule import Schedule
from jaxunlearn.types import Predict, PyTree

if TYPE_CHECKING:
    from jaxunlearn.io.tokenizer import ClipTokenizer
    from jaxunlearn.models.latent_space import LatentSpace, TextEncoder
    from jaxunlearn.models.unet2d_condition_config import UNet2DConditionConfig

__all__ = ["Component", "DiffusersModel", "Source", "load", "new", "save"]

COMPUTE_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, eq=False)
class DiffusersModel:
    """A model with everything that is needed to run it and to write it back.

    Attributes:
      config: architecture of the UNet.
      params: float32 parameter tree of the UNet.
      schedule: noise schedule.
      sampler: how its scheduler samples.
      prediction_type: "epsilon", "v_prediction" or "sample": what the UNet itself returns.
      scheduler_json: content of ``scheduler_config.json``, with all keys.
      source: the folder it was loaded from, or None for a new model.
      notes: one line for each thing about loading that a report should say.
      vae: the autoencoder of a latent model.
      text_encoder: the text encoder of a model that takes text.
      tokenizer: the tokenizer of the text encoder.
      dtype: what the UNet computes in, "float32" or "bfloat16"; see :meth:`with_compute`.
      remat: whether the UNet's backward pass computes activations again instead of keeping them.
    """

    config: UNet2DConfig | UNet2DConditionConfig
    params: PyTree
    schedule: Schedule
    sampler: SamplerConfig
    prediction_type: str
    scheduler_json: Mapping[str, Any]
    source: Source | None = None
    notes: tuple[str, ...] = ()
    vae: Component | None = None
    text_encoder: Component | None = None
    tokenizer: ClipTokenizer | None = None
    dtype: str = "float32"
    remat: bool = False

    @functools.cached_property
    def module(self) -> Any:
        """The Flax module of the UNet."""
        return self._module()

    def _module(self, **settings) -> Any:
        import jax.numpy as jnp

        from jaxunlearn.models.architectures import architecture_of

        if self.remat:
            settings["remat"] = True
        return architecture_of(self.config).module(self.config, dtype=jnp.dtype(self.dtype), **settings)

    @functools.cached_property
    def predict_raw(self) -> Predict:
        """``(params, x_t, t, cond)`` -> what the UNet returns, see ``prediction_type``."""
        return from_linen(self.module)

    @functools.cached_property
    def predict(self) -> Predict:
        """``(params, x_t, t, cond) -> eps_hat``, whatever ``prediction_type`` is. The same object at every access."""
        return to_eps(self.predict_raw, self.prediction_type, self.schedule)

    @functools.cached_property
    def predict_forward_mode(self) -> Predict:
        """:attr:`predict` from layers that forward-mode differentiation passes through (``jax.jvp``, ``jax.linearize``).

        The same numbers up to rounding; what :mod:`jaxunlearn.likelihood` needs.
        """
        return to_eps(from_linen(self._module(fast=False)), self.prediction_type, self.schedule)

    @property
    def num_params(self) -> int:
        """Number of scalars in ``params``."""
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.params))

    @property
    def is_latent(self) -> bool:
        """Whether the UNet works on latents of an autoencoder that the model has."""
        return self.vae is not None

    @property
    def takes_text(self) -> bool:
        """Whether the UNet is conditioned on text embeddings [B,N,cross_attention_dim]."""
        return not isinstance(self.config, UNet2DConfig)

    def latent_space(self, batch_size: int = 8) -> LatentSpace:
        """The autoencoder as functions between images and latents.

        Raises:
          ValueError: the model has no autoencoder.
        """
        from jaxunlearn.models.latent_space import LatentSpace

        if self.vae is None:
            raise ValueError("the model has no autoencoder (folder vae/); give a pipeline folder that has one")
        return LatentSpace(self.vae.config, self.vae.params, batch_size)

    def text(self, batch_size: int = 8) -> TextEncoder:
        """Tokenizer and text encoder as a function from prompts to embeddings.

        Raises:
          ValueError: the model has no text encoder or no tokenizer.
        """
        from jaxunlearn.models.latent_space import TextEncoder

        absent = [name for name in ("text_encoder", "tokenizer") if getattr(self, name) is None]
        if absent:
            folders = " and ".join(f"{name}/" for name in absent)
            raise ValueError(
                f"the model has no {folders}; give a pipeline folder that has text_encoder/ and tokenizer/"
            )
        return TextEncoder(self.text_encoder.config, self.text_encoder.params, self.tokenizer, batch_size)

    def with_params(self, params: PyTree) -> DiffusersModel:
        """The same model with other parameters of its UNet.

        Raises:
          ValueError: names or shapes differ from those of the config.
        """
        check_params(self.config, params)
        return dataclasses.replace(self, params=params)

    def with_compute(self, dtype: str = "float32", remat: bool = False) -> DiffusersModel:
        """The same model, whose UNet computes otherwise; its parameters stay float32.

        Args:
          dtype: "float32" or "bfloat16" (normalisations and softmax stay in float32).
          remat: less memory for more time in the backward pass, the same numbers.

        Raises:
          ValueError: another dtype.
        """
        if dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"dtype: {dtype!r} is not supported; allowed: {', '.join(COMPUTE_DTYPES)}; use one of these"
            )
        return dataclasses.replace(self, dtype=dtype, remat=bool(remat))


def new(config: UNet2DConfig, params: PyTree, schedule_config: Mapping[str, Any]) -> DiffusersModel:
    """A pixel model that does not come from a folder. It is saved as a nested pipeline folder.

    Args:
      config: architecture.
      params: its parameters.
      schedule_config: keys of a ``scheduler_config.json``, for example ``{"num_train_timesteps": 200}``; missing keys
        take diffusers' defaults. See also :func:`jaxunlearn.io.schedulers.scheduler_config`.

    Raises:
      ValueError: a model that takes text, parameters that do not fit, refused scheduler values.
    """
    if not isinstance(config, UNet2DConfig):
        raise ValueError(
            f"{type(config).__name__}: a model that takes text needs a text encoder, a tokenizer and mostly an"
            " autoencoder; save such a pipeline with diffusers once, and load that folder"
        )
    check_params(config, params)
    complete = complete_scheduler_config(schedule_config)
    read = read_scheduler(complete)
    return DiffusersModel(config, params, read.schedule, read.sampler, read.prediction_type, complete)


def load(
    path: str | os.PathLike,
    variant: str | None = None,
    *,
    default_scheduler: Mapping[str, Any] | None = None,
    companions: bool = True,
) -> DiffusersModel:
    """Loads a folder: a pipeline (nested or flat) or a UNet's folder alone.

    Where ``unet_ema/`` stands beside ``unet/``, the weights are those of ``unet_ema/``; :func:`save` writes both.

    Args:
      path: the folder, in which nothing is changed. Or "hf://owner/name" or "hf://owner/name@revision": it is downloaded
        with huggingface_hub, into its cache. Nothing else is ever downloaded.
      variant: of the weight files, for example "fp16"; None reads the files without a variant. Autoencoder and text
        encoder are read without it if they do not have it.
      default_scheduler: keys of a ``scheduler_config.json``, used if the folder has none; ``{}`` takes diffusers' defaults.
      companions: False does not read autoencoder, text encoder and tokenizer (they are still copied by :func:`save`).

    Returns:
      The model; parameters are float32 numpy arrays, whatever the files hold.

    Raises:
      ValueError: not a folder, or one line for every problem with what it holds.
    """
    root = _folder(path, variant)
    model = DiffusersModel(**read_pipeline(root, variant, default_scheduler, companions))
    if not str(path).startswith("hf://"):
        return model
    return dataclasses.replace(model, notes=(f"{path} is the folder {root} of the download cache", *model.notes))


def _folder(path: str | os.PathLike, variant: str | None) -> pathlib.Path:
    if str(path).startswith("hf://"):
        from jaxunlearn.io.hub import fetch

        return fetch(str(path), variant)
    root = pathlib.Path(path).expanduser()
    if root.is_dir():
        return root
    if os.path.lexists(root):
        raise ValueError(f"{root} is a single file; convert it to a diffusers folder first and give that folder")
    name = str(path)
    raise ValueError(
        f"{name!r} is not a folder on this machine, and nothing is ever downloaded for such a name. Fetch the model first,"
        f" for example with `hf download {name} --local-dir {root.name}`, and give that folder; or give 'hf://{name}'"
    )
