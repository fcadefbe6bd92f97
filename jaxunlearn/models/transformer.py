"""The transformer of latent diffusion (Rombach et al. 2022, Section 3.3), as diffusers' ``Transformer2DModel`` defines it.

Names of submodules are diffusers' names with list indices as suffixes (``net.0`` is ``net_0``), see
:mod:`jaxunlearn.models.convert`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxunlearn.models.layer_norm import LayerNorm
from jaxunlearn.models.layers import Conv, Dense, GroupNorm, attention
from jaxunlearn.types import Array

NORM_EPS = 1e-6
"""Of the group normalisation before a transformer, whatever ``norm_eps`` of the model is."""


class Attention(nn.Module):
    """Attention of tokens [B,N,C] to themselves, or to a context [B,M,D] where one is given -> [B,N,C].

    Queries, keys and values are made without bias. The width of the heads together is C, or somewhat less where the
    number of heads does not divide C.
    """

    heads: int
    dtype: jnp.dtype = jnp.float32
    fast: bool = True
    attention_impl: str = "auto"

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None) -> Array:
        batch, tokens, channels = x.shape
        head_dim = channels // self.heads
        width = self.heads * head_dim
        context = x if context is None else context

        def project(y, name):
            y = Dense(width, self.dtype, self.fast, use_bias=False, name=name)(y)
            return y.reshape(batch, -1, self.heads, head_dim)

        q, k, v = project(x, "to_q"), project(context, "to_k"), project(context, "to_v")
        out = attention(q, k, v, self.attention_impl, self.fast).reshape(batch, tokens, width)
        return Dense(channels, self.dtype, self.fast, name="to_out_0")(out)


class GatedLinear(nn.Module):
    """``value * gelu(gate)`` with ``[value, gate] = Dense(x)`` and the exact gelu: [...,C] -> [...,features].

    Source: Shazeer 2020, "GLU Variants Improve Transformer", Eq. 5 (GEGLU).
    """

    features: int
    dtype: jnp.dtype = jnp.float32
    fast: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        value, gate = jnp.split(Dense(2 * self.features, self.dtype, self.fast, name="proj")(x), 2, -1)
        return value * jax.nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """A gated layer of four times the width, then back to the width: [...,C] -> [...,C]."""

    dtype: jnp.dtype = jnp.float32
    fast: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        x = GatedLinear(4 * channels, self.dtype, self.fast, name="net_0")(x)
        return Dense(channels, self.dtype, self.fast, name="net_2")(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each normalised before and added: [B,N,C] -> [B,N,C]."""

    heads: int
    dtype: jnp.dtype = jnp.float32
    fast: bool = True
    attention_impl: str = "auto"

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        def norm(name):
            return LayerNorm(fast=self.fast, name=name)

        def attend(name):
            return Attention(self.heads, self.dtype, self.fast, self.attention_impl, name=name)

        x = x + attend("attn1")(norm("norm1")(x))
        x = x + attend("attn2")(norm("norm2")(x), context)
        return x + FeedForward(self.dtype, self.fast, name="ff")(norm("norm3")(x))


class Transformer(nn.Module):
    """Residual transformer over the pixels, [B,H,W,C] with a context [B,M,D] -> [B,H,W,C].

    Attributes:
      heads: number of heads; each has ``C // heads`` channels.
      groups: of the group normalisation before it.
      depth: number of blocks.
      linear: the projections before and after the blocks are linear layers, otherwise 1x1 convolutions. The numbers
        are the same, the shapes of the two kernels are not.
      dtype, fast, attention_impl: see :class:`jaxunlearn.models.unet2d_condition.UNet2DCondition`.
    """

    heads: int
    groups: int
    depth: int = 1
    linear: bool = False
    dtype: jnp.dtype = jnp.float32
    fast: bool = True
    attention_impl: str = "auto"

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        batch, height, width, channels = x.shape
        inner = self.heads * (channels // self.heads)

        def project(features, name):
            if self.linear:
                return Dense(features, self.dtype, self.fast, name=name)
            return Conv(features, 1, padding=(0, 0), dtype=self.dtype, fast=self.fast, name=name)

        n = GroupNorm(self.groups, NORM_EPS, self.fast, name="norm")(x)
        n = project(inner, "proj_in")(n).reshape(batch, height * width, inner)
        for i in range(self.depth):
            block = TransformerBlock(
                self.heads, self.dtype, self.fast, self.attention_impl, name=f"transformer_blocks_{i}"
            )
            n = block(n, context)
        return x + project(channels, "proj_out")(n.reshape(batch, height, width, inner))
