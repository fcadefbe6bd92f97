"""The parts between the layers and the UNet: residual block, resampling, and the blocks of one level.

Names of submodules are diffusers' names with list indices as suffixes (``resnets.1`` is ``resnets_1``), see
:mod:`jaxunlearn.models.convert`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxunlearn.models.layers import Conv, Dense, GroupNorm, SelfAttention
from jaxunlearn.models.transformer import Transformer
from jaxunlearn.models.unet_config_base import Level
from jaxunlearn.types import Array


def activation(name: str):
    """The elementwise function of diffusers' ``act_fn`` (case does not matter); gelu is the exact one."""
    return {
        "silu": jax.nn.silu,
        "swish": jax.nn.silu,
        "gelu": functools.partial(jax.nn.gelu, approximate=False),
        "relu": jax.nn.relu,
        "mish": jax.nn.mish,
    }[name.lower()]


def double(x: Array) -> Array:
    """Nearest-neighbour enlargement, [B,H,W,C] -> [B,2H,2W,C]."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def halve(x: Array) -> Array:
    """Mean of 2x2 pixels, [B,H,W,C] -> [B,H/2,W/2,C]."""
    b, h, w, c = x.shape
    return (
        x.reshape(b, h // 2, 2, w // 2, 2, c)
        .mean((2, 4), dtype=jnp.promote_types(x.dtype, jnp.float32))
        .astype(x.dtype)
    )


class Part(nn.Module):
    """What all parts of a model share: its config, compute dtype and the choice of the forms of the layers."""

    config: Any
    dtype: jnp.dtype = jnp.float32
    fast: bool = True
    attention_impl: str = "auto"

    @property
    def settings(self) -> dict:
        """Keyword arguments for a part inside this one."""
        return dict(config=self.config, dtype=self.dtype, fast=self.fast, attention_impl=self.attention_impl)

    def conv(self, features: int, name: str, **kwargs) -> Conv:
        """A convolution of this model."""
        return Conv(features, dtype=self.dtype, fast=self.fast, name=name, **kwargs)

    def norm(self, name: str) -> GroupNorm:
        """A group normalisation of this model."""
        return GroupNorm(self.config.norm_num_groups, self.config.norm_eps, self.fast, name=name)

    def self_attention_settings(self, channels: int) -> dict:
        """Keyword arguments for an attention of this model; ``attention_head_dim`` None is one head."""
        return dict(
            head_dim=self.config.attention_head_dim or channels,
            groups=self.config.norm_num_groups,
            eps=self.config.norm_eps,
            dtype=self.dtype,
            fast=self.fast,
            attention_impl=self.attention_impl,
        )

    def self_attention(self, channels: int, name: str) -> SelfAttention:
        """An attention of this model."""
        return SelfAttention(**self.self_attention_settings(channels), name=name)


class ResBlock(Part):
    """Residual block, [B,H,W,C] -> [B,H,W,features]; halves or doubles H and W if asked to.

    ``emb`` is the time embedding [B,E]; with None (autoencoders) the block has no such input and no parameters for it.

    Attributes:
      features: output channels.
      resample: None, "down" (mean of 2x2) or "up" (nearest), applied to the input and before the first convolution.
      scale_factor: divisor of the output.
    """

    features: int = 0
    resample: str | None = None
    scale_factor: float = 1.0

    @nn.compact
    def __call__(self, x: Array, emb: Array | None = None, deterministic: bool = True) -> Array:
        act = activation(self.config.act_fn)
        h = act(self.norm("norm1")(x))
        if self.resample is not None:
            resample = {"down": halve, "up": double}[self.resample]
            x, h = resample(x), resample(h)
        h = self.conv(self.features, "conv1")(h)
        if emb is None:
            h = self.norm("norm2")(h)
        else:
            modulated = self.config.resnet_time_scale_shift == "scale_shift"
            width = self.features * (2 if modulated else 1)
            e = Dense(width, self.dtype, self.fast, name="time_emb_proj")(act(emb))[:, None, None, :]
            if modulated:
                scale, shift = jnp.split(e, 2, -1)
                h = self.norm("norm2")(h) * (1 + scale) + shift
            else:
                h = self.norm("norm2")(h + e)
        h = nn.Dropout(self.config.dropout)(act(h), deterministic=deterministic)
        h = self.conv(self.features, "conv2")(h)
        if x.shape[-1] != self.features:
            x = self.conv(self.features, "conv_shortcut", kernel_size=1, padding=(0, 0))(x)
        return x + h if self.scale_factor == 1 else (x + h) / self.scale_factor


class DownConv(Part):
    """Stride-2 3x3 convolution; padding 0 means zeros at the bottom and the right only."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        padding = (1, 1) if self.config.downsample_padding == 1 else (0, 1)
        return self.conv(x.shape[-1], "conv", stride=2, padding=padding)(x)


class UpConv(Part):
    """Nearest-neighbour enlargement, then a 3x3 convolution."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return self.conv(x.shape[-1], "conv")(double(x))


class UNetPart(Part):
    """What the levels of a UNet share.

    Attributes:
      remat: the backward pass computes the inside of residual blocks, attentions and transformers anew instead of
        keeping it (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"): the same numbers, less memory,
        about a third more time. XLA's default schedule on CPU spends the saved memory again; the compiler option
        ``xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED`` keeps it.
    """

    remat: bool = False

    @property
    def level_settings(self) -> dict:
        """Keyword arguments for a level inside this part."""
        return self.settings | dict(remat=self.remat)

    def _kept_or_not(self, module: type[nn.Module], **kwargs) -> type[nn.Module]:
        return nn.remat(module, **kwargs) if self.remat else module

    def residual(self, x: Array, emb: Array, deterministic: bool, name: str, **kwargs) -> Array:
        """Applies a :class:`ResBlock`."""
        block = self._kept_or_not(ResBlock, static_argnums=(3,))
        return block(**self.settings, name=name, **kwargs)(x, emb, deterministic)

    def attend(self, x: Array, context: Array | None, level: Level, name: str, **kwargs) -> Array:
        """Applies the attention or the transformer of a level, if it has one; ``kwargs`` are for the attention."""
        if level.attention == "self":
            return self._kept_or_not(SelfAttention)(**self.self_attention_settings(level.features) | kwargs, name=name)(
                x
            )
        if level.attention == "cross":
            transformer = self._kept_or_not(Transformer)(
                level.heads,
                self.config.norm_num_groups,
                level.depth,
                self.config.use_linear_projection,
                self.dtype,
                self.fast,
                self.attention_impl,
                name=name,
            )
            return transformer(x, context)
        return x


class DownLevel(UNetPart):
    """One level on the way down: its residual blocks and attentions, then half the size unless it is the last.

    Returns the output and the list of all skip connections of the level. ``context`` is what transformers see.
    """

    level: Level = Level(0, 0)
    last: bool = False

    @nn.compact
    def __call__(self, x: Array, emb: Array, context: Array | None = None, deterministic: bool = True):
        features, skips = self.level.features, []
        for i in range(self.level.layers):
            x = self.residual(x, emb, deterministic, f"resnets_{i}", features=features)
            x = self.attend(x, context, self.level, f"attentions_{i}")
            skips.append(x)
        if not self.last:
            if self.level.attention == "self" and self.config.downsample_type == "resnet":
                x = self.residual(x, emb, deterministic, "downsamplers_0", features=features, resample="down")
            else:
                x = DownConv(**self.settings, name="downsamplers_0")(x)
            skips.append(x)
        return x, skips


class UpLevel(UNetPart):
    """One level on the way up: takes its skips from the end of the list, then twice the size unless it is the last."""

    level: Level = Level(0, 0)
    last: bool = False

    @nn.compact
    def __call__(
        self, x: Array, skips: list[Array], emb: Array, context: Array | None = None, deterministic: bool = True
    ) -> Array:
        features = self.level.features
        for i in range(self.level.layers):
            x = jnp.concatenate([x, skips.pop()], -1)
            x = self.residual(x, emb, deterministic, f"resnets_{i}", features=features)
            x = self.attend(x, context, self.level, f"attentions_{i}")
        if self.last:
            return x
        if self.level.attention == "self" and self.config.upsample_type == "resnet":
            return self.residual(x, emb, deterministic, "upsamplers_0", features=features, resample="up")
        return UpConv(**self.settings, name="upsamplers_0")(x)


class Middle(UNetPart):
    """Residual block, attention or transformer if the level has one, residual block.

    The scale factor of the config divides the outputs of the residual blocks and of self-attention, not of a
    transformer.
    """

    level: Level = Level(0, 0)

    @nn.compact
    def __call__(self, x: Array, emb: Array, context: Array | None = None, deterministic: bool = True) -> Array:
        config = self.config
        common = dict(features=self.level.features, scale_factor=config.mid_block_scale_factor)
        x = self.residual(x, emb, deterministic, "resnets_0", **common)
        special = {}
        if self.level.attention == "self":
            groups = config.attn_norm_num_groups
            if groups is None and config.resnet_time_scale_shift == "default":
                groups = config.norm_num_groups
            special = dict(groups=groups, scale_factor=config.mid_block_scale_factor)
        x = self.attend(x, context, self.level, "attentions_0", **special)
        return self.residual(x, emb, deterministic, "resnets_1", **common)
