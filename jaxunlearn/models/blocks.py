"""The parts between the layers and the UNet: residual block, resampling, and the blocks of one level.

Names of submodules are diffusers' names with list indices as suffixes (``resnets.1`` is ``resnets_1``), see
:mod:`jaxunlearn.models.convert`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxunlearn.models.layers import Conv, Dense, GroupNorm, SelfAttention
from jaxunlearn.models.unet2d_config import UNet2DConfig
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
    """What all parts of a UNet share: its config, compute dtype and the choice of the forms of the layers."""

    config: UNet2DConfig
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

    def self_attention(self, channels: int, name: str, **kwargs) -> SelfAttention:
        """An attention of this model; ``attention_head_dim`` None is one head."""
        kwargs = dict(groups=self.config.norm_num_groups) | kwargs
        return SelfAttention(
            self.config.attention_head_dim or channels,
            eps=self.config.norm_eps,
            dtype=self.dtype,
            fast=self.fast,
            attention_impl=self.attention_impl,
            name=name,
            **kwargs,
        )


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


class DownLevel(Part):
    """One level on the way down: residual blocks, attention if asked for, then half the size unless it is the last.

    Returns the output and the list of all skip connections of the level.
    """

    features: int = 0
    attention: bool = False
    last: bool = False

    @nn.compact
    def __call__(self, x: Array, emb: Array, deterministic: bool = True) -> tuple[Array, list[Array]]:
        skips = []
        for i in range(self.config.layers_per_block):
            x = ResBlock(**self.settings, features=self.features, name=f"resnets_{i}")(x, emb, deterministic)
            if self.attention:
                x = self.self_attention(self.features, f"attentions_{i}")(x)
            skips.append(x)
        if not self.last:
            if self.attention and self.config.downsample_type == "resnet":
                down = ResBlock(**self.settings, features=self.features, resample="down", name="downsamplers_0")
                x = down(x, emb, deterministic)
            else:
                x = DownConv(**self.settings, name="downsamplers_0")(x)
            skips.append(x)
        return x, skips


class UpLevel(Part):
    """One level on the way up: takes its skips from the end of the list, then twice the size unless it is the last."""

    features: int = 0
    attention: bool = False
    last: bool = False

    @nn.compact
    def __call__(self, x: Array, skips: list[Array], emb: Array, deterministic: bool = True) -> Array:
        for i in range(self.config.layers_per_block + 1):
            x = jnp.concatenate([x, skips.pop()], -1)
            x = ResBlock(**self.settings, features=self.features, name=f"resnets_{i}")(x, emb, deterministic)
            if self.attention:
                x = self.self_attention(self.features, f"attentions_{i}")(x)
        if self.last:
            return x
        if self.attention and self.config.upsample_type == "resnet":
            up = ResBlock(**self.settings, features=self.features, resample="up", name="upsamplers_0")
            return up(x, emb, deterministic)
        return UpConv(**self.settings, name="upsamplers_0")(x)


class Middle(Part):
    """Residual block, attention if the config asks for it, residual block."""

    @nn.compact
    def __call__(self, x: Array, emb: Array, deterministic: bool = True) -> Array:
        config, channels = self.config, x.shape[-1]
        common = dict(**self.settings, features=channels, scale_factor=config.mid_block_scale_factor)
        x = ResBlock(**common, name="resnets_0")(x, emb, deterministic)
        if config.add_attention:
            groups = config.attn_norm_num_groups
            if groups is None and config.resnet_time_scale_shift == "default":
                groups = config.norm_num_groups
            factor = config.mid_block_scale_factor
            x = self.self_attention(channels, "attentions_0", groups=groups, scale_factor=factor)(x)
        return ResBlock(**common, name="resnets_1")(x, emb, deterministic)
