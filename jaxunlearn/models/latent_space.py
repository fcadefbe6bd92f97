"""From images to the latents that a latent diffusion model is trained on and back, and from prompts to its condition.

Both work on host arrays of any length in batches of one size, so that each is compiled once per image size.

Latents here are **scaled**: ``config.scaling_factor`` times those of the autoencoder (less its ``shift_factor``), which
is what the diffusion model sees (Rombach et al. 2022, appendix D.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.images import to_model
from jaxunlearn.models.autoencoder_kl import AutoencoderKL
from jaxunlearn.models.autoencoder_kl_config import AutoencoderKLConfig
from jaxunlearn.models.clip_text import CLIPText
from jaxunlearn.models.clip_text_config import CLIPTextConfig
from jaxunlearn.types import Array, PyTree


class LatentSpace:
    """An autoencoder with its parameters.

    Attributes:
      config: of the autoencoder.
      params: its parameters, on the device.
      batch_size: images per call of the model.
    """

    def __init__(self, config: AutoencoderKLConfig, params: PyTree, batch_size: int = 8):
        """Takes parameters as arrays of any kind; they are put on the device once.

        Raises:
          ValueError: ``batch_size`` is not a positive integer.
        """
        self.config = config
        self.batch_size = _checked_batch_size(batch_size)
        self.params = jax.tree.map(jnp.asarray, params)
        module = AutoencoderKL(config)

        def encode(params: PyTree, images: Array) -> tuple[Array, Array]:
            mean, logvar = module.apply({"params": params}, to_model(images), method="encode")
            return (mean - config.shift) * config.scaling_factor, jnp.exp(0.5 * logvar) * config.scaling_factor

        def decode(params: PyTree, latents: Array) -> Array:
            return module.apply({"params": params}, latents / config.scaling_factor + config.shift, method="decode")

        self._encode, self._decode = jax.jit(encode), jax.jit(decode)

    def latent_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape (H, W, C) of an image -> (h, w, z) of its latents.

        Raises:
          ValueError: H or W is not a multiple of ``config.size_divisor``, or C is not ``config.in_channels``.
        """
        return self.config.latent_shape(shape)

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the scaled latents; a draw is ``mean + std * eps``.

        Args:
          images: [N,H,W,C], uint8 in 0..255 or floating in [-1, 1].

        Returns:
          (mean, std), each float32 [N,h,w,z], both in units of the scaled latents.

        Raises:
          ValueError: a shape that does not suit, see :meth:`latent_shape`.
          TypeError: integers other than uint8.
        """
        images = _rank_4(images, "images", "[N,H,W,C]")
        if images.dtype != np.uint8:
            if not np.issubdtype(images.dtype, np.floating):
                raise TypeError(f"images must be uint8 in 0..255 or floating in [-1, 1], got {images.dtype}")
            images = images.astype(np.float32)
        shape = self.latent_shape(images.shape[1:])
        return _in_batches(lambda x: self._encode(self.params, x), images, self.batch_size, (shape, shape))

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Images of scaled latents.

        Args:
          latents: [N,h,w,z], floating, scaled.

        Returns:
          float32 [N,H,W,C] in about [-1, 1], not clipped; see :func:`jaxunlearn.images.to_unit`.

        Raises:
          ValueError: the number of channels is not ``config.latent_channels``, or an axis is missing or empty.
          TypeError: the latents are not floating.
        """
        latents = _rank_4(latents, "latents", "[N,h,w,z]")
        height, width, channels = latents.shape[1:]
        if channels != self.config.latent_channels or 0 in (height, width):
            raise ValueError(
                f"latents must be [N,h,w,{self.config.latent_channels}] (channels last), got shape {latents.shape}"
            )
        if not np.issubdtype(latents.dtype, np.floating):
            raise TypeError(f"latents must be floating, got {latents.dtype}; are they images?")
        divisor = self.config.size_divisor
        shape = (height * divisor, width * divisor, self.config.out_channels)
        latents = latents.astype(np.float32)
        return _in_batches(lambda x: (self._decode(self.params, x),), latents, self.batch_size, (shape,))[0]


class TextEncoder:
    """A text encoder with its parameters and its tokenizer.

    Attributes:
      config: of the text encoder.
      params: its parameters, on the device.
      tokenizer: ``prompts -> int32 [N, length]``, see :class:`jaxunlearn.io.tokenizer.ClipTokenizer`.
      batch_size: prompts per call of the model.
    """

    def __init__(
        self,
        config: CLIPTextConfig,
        params: PyTree,
        tokenizer: Callable[[Sequence[str]], np.ndarray],
        batch_size: int = 8,
    ):
        """Takes parameters as arrays of any kind; they are put on the device once.

        Raises:
          ValueError: ``batch_size`` is not a positive integer, or the tokenizer does not suit the text encoder.
        """
        self.config = config
        self.batch_size = _checked_batch_size(batch_size)
        self.tokenizer = tokenizer
        self.params = jax.tree.map(jnp.asarray, params)
        problems = []
        for name, limit in (("model_max_length", "max_position_embeddings"), ("vocab_size", "vocab_size")):
            value, most = getattr(tokenizer, name, None), getattr(config, limit)
            if value is not None and value > most:
                problems.append(
                    f"the tokenizer's {name} is {value}, the text encoder allows at most {most} ({limit}); take both from "
                    "one model"
                )
        if problems:
            raise ValueError("\n".join(problems))
        module = CLIPText(config)
        self._apply = jax.jit(lambda params, ids: module.apply({"params": params}, ids))

    def embed(self, prompts: Sequence[str]) -> np.ndarray:
        """The condition of each prompt; every distinct prompt is encoded once.

        Args:
          prompts: texts; "" is the empty prompt of classifier-free guidance.

        Returns:
          float32 [N, length, hidden_size]; length is the tokenizer's.

        Raises:
          ValueError: prompts that are not texts, token ids outside of the vocabulary.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts must be a sequence of texts, got the text {prompts!r}; put it into a list")
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        ids = np.asarray(self.tokenizer(list(distinct)))
        bad = np.unique(ids[(ids < 0) | (ids >= self.config.vocab_size)])
        if bad.size:
            raise ValueError(
                f"token ids must be in 0..{self.config.vocab_size - 1}, got {', '.join(map(str, bad[:5]))}; take tokenizer "
                "and text encoder from one model"
            )
        shape = (ids.shape[1], self.config.hidden_size)
        table = _in_batches(lambda x: (self._apply(self.params, x),), ids, self.batch_size, (shape,))[0]
        return table if len(distinct) == len(prompts) else table[[distinct[prompt] for prompt in prompts]]


def _checked_batch_size(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"batch_size must be an integer >= 1, got {value!r}")
    return int(value)


def _rank_4(x: np.ndarray, name: str, axes: str) -> np.ndarray:
    x = np.asarray(x)
    if x.ndim != 4:
        raise ValueError(f"{name} must be {axes}, got shape {x.shape}; add or remove axes")
    return x


def _in_batches(
    apply: Callable, x: np.ndarray, batch_size: int, shapes: Sequence[tuple[int, ...]]
) -> tuple[np.ndarray, ...]:
    """``apply`` over rows of x in batches of one size (zeros fill up the last one) -> float32 arrays of these shapes."""
    outputs = tuple(np.empty((len(x), *shape), np.float32) for shape in shapes)
    for start in range(0, len(x), batch_size):
        batch = x[start : start + batch_size]
        count = len(batch)
        if count < batch_size:
            batch = np.concatenate([batch, np.zeros((batch_size - count, *x.shape[1:]), x.dtype)])
        for output, part in zip(outputs, apply(batch)):
            output[start : start + count] = np.asarray(part)[:count]
    return outputs
