"""What all UNets share: the time and class embeddings, the way down and up, and the check of the inputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxunlearn.models.blocks import DownLevel, Middle, Part, UNetPart, UpLevel, activation
from jaxunlearn.models.layers import ATTENTION_IMPLS, Dense
from jaxunlearn.models.unet_config_base import UNetConfig
from jaxunlearn.types import Array


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
    """Linear, ``embedding_act_fn`` of the config, linear: [B,E] -> [B,time_dim]."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def dense(name):
            return Dense(self.config.time_dim, self.dtype, self.fast, name=name)

        return dense("linear_2")(activation(self.config.embedding_act_fn)(dense("linear_1")(x)))


class ClassEmbedding(Part):
    """A learned vector for every class: int [B] -> [B,time_dim]."""

    @nn.compact
    def __call__(self, labels: Array) -> Array:
        shape = (self.config.num_class_embeds, self.config.time_dim)
        table = self.param("embedding", nn.initializers.normal(1.0), shape)
        return table.astype(self.dtype)[labels]


class UNet(UNetPart):
    """Base of the models; a subclass checks its inputs and calls :meth:`run` from its compact ``__call__``."""

    def embed(self, t: Array, class_labels: Array | None) -> Array:
        """Time [B], and class labels where the model has classes -> [B,time_dim]."""
        config = self.config

        def wave(values):
            embedding = sinusoid(values, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift)
            return embedding.astype(self.dtype)

        emb = EmbeddingMLP(**self.settings, name="time_embedding")(wave(t))
        if config.class_embed_type == "timestep":
            return emb + EmbeddingMLP(**self.settings, name="class_embedding")(wave(jnp.asarray(class_labels)))
        if config.class_embed_type == "identity":
            return emb + jnp.asarray(class_labels).astype(self.dtype)
        if config.num_class_embeds is not None:
            return emb + ClassEmbedding(**self.settings, name="class_embedding")(jnp.asarray(class_labels))
        return emb

    def run(self, x: Array, t: Array, class_labels: Array | None, context: Array | None, deterministic: bool) -> Array:
        """The whole model on checked inputs; ``context`` [B,N,D] is what transformers see."""
        config, out_dtype = self.config, x.dtype
        x = x.astype(self.dtype)
        if config.center_input_sample:
            x = 2 * x - 1
        emb = self.embed(jnp.broadcast_to(t, x.shape[:1]), class_labels)
        if context is not None:
            context = context.astype(self.dtype)
        last = len(config.block_out_channels) - 1
        x = self.conv(config.block_out_channels[0], "conv_in")(x)
        skips = [x]
        for i, level in enumerate(config.down_levels):
            down = DownLevel(**self.level_settings, level=level, last=i == last, name=f"down_blocks_{i}")
            x, more = down(x, emb, context, deterministic)
            skips += more
        if config.middle is not None:
            x = Middle(**self.level_settings, level=config.middle, name="mid_block")(x, emb, context, deterministic)
        for i, level in enumerate(config.up_levels):
            up = UpLevel(**self.level_settings, level=level, last=i == last, name=f"up_blocks_{i}")
            x = up(x, skips[-level.layers :], emb, context, deterministic)
            skips = skips[: -level.layers]
        x = activation(config.embedding_act_fn)(self.norm("conv_norm_out")(x))
        return self.conv(config.out_channels, "conv_out")(x).astype(out_dtype)


def check_inputs(config: UNetConfig, x: Array, t: Array, labels: Array | None, attention_impl: str) -> None:
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


def example_image_and_labels(config: UNetConfig) -> tuple:
    """Shapes of the smallest x that the model takes, and of its class labels or None."""
    x = jax.ShapeDtypeStruct((1, config.size_divisor, config.size_divisor, config.in_channels), jnp.float32)
    labels = None
    if config.class_embed_type == "identity":
        labels = jax.ShapeDtypeStruct((1, config.time_dim), jnp.float32)
    elif config.has_classes:
        labels = jax.ShapeDtypeStruct((1,), jnp.int32)
    return x, labels
