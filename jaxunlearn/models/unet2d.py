"""The UNet of DDPM (Ho et al. 2020) as diffusers' ``UNet2DModel`` defines it, channels last.

The parameter tree carries diffusers' names (:mod:`jaxunlearn.models.convert`), so models of diffusers run here and
models trained here open there, with the same numbers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxunlearn.models.blocks import DownLevel, Middle, Part, UpLevel
from jaxunlearn.models.layers import ATTENTION_IMPLS, Dense
from jaxunlearn.models.unet2d_config import UNet2DConfig
from jaxunlearn.types import Array

__all__ = ["UNet2D", "UNet2DConfig", "example_inputs", "sinusoid"]


def sinusoid(t: Array, dim: int, flip_sin_to_cos: bool, freq_shift: float) -> Array:
    """Sinusoidal embedding of t: ``f_i = 10000 ** (-i / (dim // 2 - freq_shift))``, ``[sin(t f), cos(t f)]``.

    Args:
      t: [B], integer or float.
      dim: width; an odd one gets a zero at the end.
      flip_sin_to_cos: ``[cos, sin]`` instead.

    Returns:
      [B, dim], float32 (float64 for float64 t).

    >>> print(np.asarray(sinusoid(jnp.array([0]), 5, True, 1)))
    [[1. 1. 0. 0. 0.]]
    """
    half = dim // 2
    # float32 in numpy, operation by operation as in diffusers: at t = 1000 the last bit of f is seen in the sine.
    exponent = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half - freq_shift)
    angle = t[:, None].astype(jnp.promote_types(jnp.float32, t.dtype)) * np.exp(exponent)
    parts = [jnp.sin(angle), jnp.cos(angle)]
    embedding = jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, -1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


class EmbeddingMLP(Part):
    """Linear, SiLU (whatever ``act_fn`` is), linear: [B,E] -> [B,time_dim]."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def dense(name):
            return Dense(self.config.time_dim, self.dtype, self.fast, name=name)

        return dense("linear_2")(jax.nn.silu(dense("linear_1")(x)))


class ClassEmbedding(Part):
    """A learned vector for every class: int [B] -> [B,time_dim]."""

    @nn.compact
    def __call__(self, labels: Array) -> Array:
        shape = (self.config.num_class_embeds, self.config.time_dim)
        table = self.param("embedding", nn.initializers.normal(1.0), shape)
        return table.astype(self.dtype)[labels]


class UNet2D(Part):
    """``(x [B,H,W,C], t [B], class_labels) -> [B,H,W,out_channels]``: predicted noise (or v, or x0).

    Attributes:
      config: what it is made of.
      dtype: of the computation; parameters stay as they are. Normalisations and the softmax use float32 at least.
      fast: the fast forms of :mod:`jaxunlearn.models.layers`, without forward-mode differentiation. False: the textbook
        forms, which work under every transformation.
      attention_impl: "auto", "folded", "xla" or "cudnn", see :func:`jaxunlearn.models.layers.attention`.
    """

    @nn.compact
    def __call__(self, x: Array, t: Array, class_labels: Array | None = None, *, deterministic: bool = True) -> Array:
        """Applies the model.

        Args:
          x: [B,H,W,in_channels], usually in about [-1, 1] plus noise; H and W multiples of ``config.size_divisor``.
          t: [B] or scalar, integer or float; 0 is the cleanest.
          class_labels: int [B] for a learned class embedding, a number [B] for type "timestep", [B,time_dim] for type
            "identity"; None for a model without classes.
          deterministic: False applies ``config.dropout`` and needs ``rngs={"dropout": key}``.

        Returns:
          [B,H,W,out_channels], of x's dtype.

        Raises:
          ValueError: shapes that do not fit, class labels missing or not expected.
        """
        config = self.config
        t = jnp.asarray(t)
        _check_inputs(config, x, t, class_labels, self.attention_impl)
        out_dtype = x.dtype
        x = x.astype(self.dtype)
        t = jnp.broadcast_to(t, x.shape[:1])
        if config.center_input_sample:
            x = 2 * x - 1

        def wave(values):
            embedding = sinusoid(values, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift)
            return embedding.astype(self.dtype)

        emb = EmbeddingMLP(**self.settings, name="time_embedding")(wave(t))
        if config.class_embed_type == "timestep":
            emb = emb + EmbeddingMLP(**self.settings, name="class_embedding")(wave(jnp.asarray(class_labels)))
        elif config.class_embed_type == "identity":
            emb = emb + jnp.asarray(class_labels).astype(self.dtype)
        elif config.num_class_embeds is not None:
            emb = emb + ClassEmbedding(**self.settings, name="class_embedding")(jnp.asarray(class_labels))

        channels = config.block_out_channels
        last = len(channels) - 1
        x = self.conv(channels[0], "conv_in")(x)
        skips = [x]
        for i, (block_type, features) in enumerate(zip(config.down_block_types, channels)):
            attention = config.block_type(block_type) == "AttnDownBlock2D"
            settings = dict(**self.settings, features=features, attention=attention, last=i == last)
            x, more = DownLevel(**settings, name=f"down_blocks_{i}")(x, emb, deterministic)
            skips += more
        if config.mid_block_type is not None:
            x = Middle(**self.settings, name="mid_block")(x, emb, deterministic)
        for i, (block_type, features) in enumerate(zip(config.up_block_types, channels[::-1])):
            attention = config.block_type(block_type) == "AttnUpBlock2D"
            settings = dict(**self.settings, features=features, attention=attention, last=i == last)
            taken = config.layers_per_block + 1
            x = UpLevel(**settings, name=f"up_blocks_{i}")(x, skips[-taken:], emb, deterministic)
            skips = skips[:-taken]
        x = jax.nn.silu(self.norm("conv_norm_out")(x))
        return self.conv(config.out_channels, "conv_out")(x).astype(out_dtype)


def _check_inputs(config: UNet2DConfig, x: Array, t: Array, labels: Array | None, attention_impl: str) -> None:
    """Raises ValueError for inputs that the model cannot take."""
    if attention_impl not in ATTENTION_IMPLS:
        raise ValueError(f"attention_impl must be one of {', '.join(ATTENTION_IMPLS)}, got {attention_impl!r}")
    if x.ndim != 4 or x.shape[-1] != config.in_channels:
        raise ValueError(
            f"x must be [B,H,W,{config.in_channels}] (channels last), got shape {x.shape}; transpose or convert the images"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating in about [-1, 1], got {x.dtype}; see jaxunlearn.images.to_model")
    divisor = config.size_divisor
    if any(size % divisor or size == 0 for size in x.shape[1:3]):
        raise ValueError(
            f"height and width must be multiples of {divisor} (2 ** (levels - 1)), got {x.shape[1]}x{x.shape[2]}; pad or "
            "resize the images"
        )
    batch = x.shape[0]
    if t.shape not in ((), (batch,)):
        raise ValueError(f"t must be a scalar or [B] = [{batch}], got shape {t.shape}")
    if not config.has_classes:
        if labels is not None:
            raise ValueError("class_labels were given to a model without classes; pass None")
        return
    if labels is None:
        raise ValueError("class_labels are missing: this model is class-conditional; pass one label per image")
    expected = (batch, config.time_dim) if config.class_embed_type == "identity" else (batch,)
    if jnp.shape(labels) != expected:
        raise ValueError(f"class_labels must have shape {expected}, got {jnp.shape(labels)}")
    if config.class_embed_type is None and not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise ValueError(
            f"class_labels must be integers below {config.num_class_embeds}, got {jnp.result_type(labels)}"
        )


def example_inputs(config: UNet2DConfig) -> tuple:
    """Shapes of the arguments of a call, the smallest that the model takes."""
    x = jax.ShapeDtypeStruct((1, config.size_divisor, config.size_divisor, config.in_channels), jnp.float32)
    labels = None
    if config.class_embed_type == "identity":
        labels = jax.ShapeDtypeStruct((1, config.time_dim), jnp.float32)
    elif config.has_classes:
        labels = jax.ShapeDtypeStruct((1,), jnp.int32)
    return x, jax.ShapeDtypeStruct((1,), jnp.int32), labels
