"""The autoencoder of latent diffusion (Rombach et al. 2022) as diffusers' ``AutoencoderKL`` defines it, channels last.

The parameter tree carries diffusers' names (:mod:`jaxunlearn.models.convert`). The blocks are those of the UNet without
a time embedding: every group normalisation has eps 1e-6, the middle attention has one head, and the encoder halves its
images with zeros at the bottom and the right only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxunlearn.models.autoencoder_kl_config import AutoencoderKLConfig
from jaxunlearn.models.blocks import DownConv, Part, ResBlock, UpConv
from jaxunlearn.models.layers import ATTENTION_IMPLS, Conv
from jaxunlearn.types import Array

__all__ = ["AutoencoderKL", "AutoencoderKLConfig", "example_inputs"]

LOGVAR_RANGE = (-30.0, 20.0)
"""The log-variance is clipped to it."""


class EncoderLevel(Part):
    """Residual blocks, then half the size unless it is the last level: [B,H,W,C] -> [B,H/2,W/2,features]."""

    features: int = 0
    last: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.config.layers_per_block):
            x = ResBlock(**self.settings, features=self.features, name=f"resnets_{i}")(x)
        return x if self.last else DownConv(**self.settings, name="downsamplers_0")(x)


class DecoderLevel(Part):
    """One residual block more, then twice the size unless it is the last level: [B,H,W,C] -> [B,2H,2W,features]."""

    features: int = 0
    last: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.config.layers_per_block + 1):
            x = ResBlock(**self.settings, features=self.features, name=f"resnets_{i}")(x)
        return x if self.last else UpConv(**self.settings, name="upsamplers_0")(x)


class AutoencoderMiddle(Part):
    """Residual block, one-head attention if the config asks for it, residual block; the shape stays."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        x = ResBlock(**self.settings, features=channels, name="resnets_0")(x)
        if self.config.mid_block_add_attention:
            x = self.self_attention(channels, "attentions_0")(x)
        return ResBlock(**self.settings, features=channels, name="resnets_1")(x)


class Encoder(Part):
    """Images [B,H,W,in_channels] -> [B,h,w,2z], before ``quant_conv``."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = self.config.block_out_channels
        x = self.conv(channels[0], "conv_in")(x)
        for i, features in enumerate(channels):
            last = i == len(channels) - 1
            x = EncoderLevel(**self.settings, features=features, last=last, name=f"down_blocks_{i}")(x)
        x = AutoencoderMiddle(**self.settings, name="mid_block")(x)
        x = jax.nn.silu(self.norm("conv_norm_out")(x))
        return self.conv(2 * self.config.latent_channels, "conv_out")(x)


class Decoder(Part):
    """Latents [B,h,w,z], after ``post_quant_conv`` -> images [B,H,W,out_channels]."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = self.config.block_out_channels[::-1]
        x = self.conv(channels[0], "conv_in")(x)
        x = AutoencoderMiddle(**self.settings, name="mid_block")(x)
        for i, features in enumerate(channels):
            last = i == len(channels) - 1
            x = DecoderLevel(**self.settings, features=features, last=last, name=f"up_blocks_{i}")(x)
        x = jax.nn.silu(self.norm("conv_norm_out")(x))
        return self.conv(self.config.out_channels, "conv_out")(x)


class AutoencoderKL(Part):
    """Images to a normal distribution of latents, and latents to images.

    Latents here are those of the autoencoder; a diffusion model sees them times ``config.scaling_factor``, see
    :class:`jaxunlearn.models.latent_space.LatentSpace`. h = H / ``config.size_divisor``, w likewise, z =
    ``config.latent_channels``.

    Attributes:
      config: an :class:`AutoencoderKLConfig`.
      dtype, fast, attention_impl: as in :class:`jaxunlearn.models.unet2d.UNet2D`.
    """

    def setup(self):
        z = self.config.latent_channels
        one = dict(kernel_size=1, padding=(0, 0), dtype=self.dtype, fast=self.fast)
        self.encoder = Encoder(**self.settings)
        self.decoder = Decoder(**self.settings)
        if self.config.use_quant_conv:
            self.quant_conv = Conv(2 * z, **one)
        if self.config.use_post_quant_conv:
            self.post_quant_conv = Conv(z, **one)

    def encode(self, x: Array) -> tuple[Array, Array]:
        """Mean and log-variance of the latents.

        Args:
          x: [B,H,W,in_channels] in about [-1, 1]; H and W multiples of ``config.size_divisor``.

        Returns:
          (mean, logvar), each [B,h,w,z] of x's dtype; logvar is clipped to [-30, 20]. A sample is
          ``mean + exp(logvar / 2) * eps``.

        Raises:
          ValueError: a shape or dtype that does not fit, an unknown ``attention_impl``.

        Source: Kingma and Welling 2014, "Auto-Encoding Variational Bayes", appendix C.2; Rombach et al. 2022, appendix G.
        """
        _check(x, "x", self.config.in_channels, "images in about [-1, 1]", self.attention_impl)
        divisor = self.config.size_divisor
        if any(size % divisor or size == 0 for size in x.shape[1:3]):
            raise ValueError(
                f"height and width must be multiples of {divisor} (2 ** (levels - 1)), got {x.shape[1]}x{x.shape[2]}; "
                "pad or resize the images"
            )
        h = self.encoder(x.astype(self.dtype))
        if self.config.use_quant_conv:
            h = self.quant_conv(h)
        mean, logvar = jnp.split(h.astype(x.dtype), 2, -1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, z: Array) -> Array:
        """Images of latents.

        Args:
          z: [B,h,w,z], already divided by ``config.scaling_factor``.

        Returns:
          [B,H,W,out_channels] of z's dtype, in about [-1, 1]; not clipped.

        Raises:
          ValueError: a shape or dtype that does not fit, an unknown ``attention_impl``.
        """
        _check(z, "z", self.config.latent_channels, "latents", self.attention_impl)
        h = z.astype(self.dtype)
        if self.config.use_post_quant_conv:
            h = self.post_quant_conv(h)
        return self.decoder(h).astype(z.dtype)

    def __call__(self, x: Array) -> Array:
        """``decode(mean of encode(x))``: [B,H,W,in_channels] -> [B,H,W,out_channels]."""
        return self.decode(self.encode(x)[0])


def _check(x: Array, name: str, channels: int, what: str, attention_impl: str) -> None:
    if attention_impl not in ATTENTION_IMPLS:
        raise ValueError(f"attention_impl must be one of {', '.join(ATTENTION_IMPLS)}, got {attention_impl!r}")
    if x.ndim != 4 or x.shape[-1] != channels or 0 in x.shape[1:3]:
        raise ValueError(
            f"{name} must be {what} [B,H,W,{channels}] (channels last), got shape {x.shape}; transpose or convert them"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating, got {x.dtype}; see jaxunlearn.images.to_model")


def example_inputs(config: AutoencoderKLConfig) -> tuple:
    """Shapes of the arguments of a call, the smallest that the model takes."""
    return (jax.ShapeDtypeStruct((1, config.size_divisor, config.size_divisor, config.in_channels), jnp.float32),)
