"""The image tower of CLIP ViT-L/14: a vision transformer whose class token is projected into the space of texts.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", Section 2.4, after
Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words". The names of the parameters are those of the published files.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxunlearn.models.clip_text import quick_gelu
from jaxunlearn.models.features import trees
from jaxunlearn.models.features.clip_resnet import MEAN, STD
from jaxunlearn.models.features.layers import Convolution, Dense
from jaxunlearn.models.layer_norm import LayerNorm
from jaxunlearn.types import Array, PyTree

_BLOCK = re.compile(r"resblocks_(\d+)")


@dataclasses.dataclass(frozen=True)
class CLIPViTConfig:
    """Size of the network; the defaults are those of ViT-L/14.

    Attributes:
      layers: transformer blocks.
      width: channels of a token.
      heads: attention heads of a block.
      patch: pixels of a patch's side.
      image_size: of the square images.
      dims: length of an image vector.
    """

    layers: int = 24
    width: int = 1024
    heads: int = 16
    patch: int = 14
    image_size: int = 224
    dims: int = 768


VIT_L14 = CLIPViTConfig()


class SelfAttention(nn.Module):
    """Attention of all tokens to all: [B,N,D] -> [B,N,D]. Queries, keys and values are one linear layer."""

    heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the attention."""
        batch, tokens, width = x.shape
        parts = Dense(3 * width, name="in_proj")(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = (parts[:, :, i] for i in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=lax.Precision.HIGHEST) / np.sqrt(q.shape[-1])
        weights = jax.nn.softmax(scores, axis=-1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision=lax.Precision.HIGHEST)
        return Dense(width, name="out_proj")(mixed.reshape(x.shape))


class FeedForward(nn.Module):
    """Linear layer to four times the width, quick gelu, and back: [B,N,D] -> [B,N,D]."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies both layers."""
        return Dense(x.shape[-1], name="c_proj")(quick_gelu(Dense(4 * x.shape[-1], name="c_fc")(x)))


class Block(nn.Module):
    """Attention and feed-forward part, each normalised before and added to its input."""

    heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the block."""
        x = x + SelfAttention(self.heads, name="attn")(LayerNorm(fast=False, name="ln_1")(x))
        return x + FeedForward(name="mlp")(LayerNorm(fast=False, name="ln_2")(x))


class CLIPViT(nn.Module):
    """The network: normalised images [B,S,S,3] -> image vectors [B,dims], not of unit norm."""

    config: CLIPViTConfig = VIT_L14

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the network."""
        config, normal = self.config, nn.initializers.normal(0.02)
        x = Convolution(config.width, (config.patch, config.patch), config.patch, name="conv1")(x)
        x = x.reshape(x.shape[0], -1, config.width)
        first = self.param("class_embedding", normal, (config.width,))
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, config.width)), x], axis=1)
        x = x + self.param("positional_embedding", normal, (x.shape[1], config.width))
        x = LayerNorm(fast=False, name="ln_pre")(x)
        for i in range(config.layers):
            x = Block(config.heads, name=f"resblocks_{i}")(x)
        x = LayerNorm(fast=False, name="ln_post")(x[:, 0])
        projection = self.param("proj", normal, (config.width, config.dims))
        return jnp.matmul(x, projection, precision=lax.Precision.HIGHEST)


def embed(params: PyTree, images: Array, *, config: CLIPViTConfig = VIT_L14) -> Array:
    """Image vectors of pictures.

    Args:
      params: from :func:`from_state_dict` or :func:`from_flat`.
      images: [N,S,S,3] float32 in [0, 1] with S = ``config.image_size``, already resized and cropped.
      config: size of the network.

    Returns:
      float32 [N,dims], not of unit norm.

    Raises:
      ValueError: images of another shape.
    """
    size = config.image_size
    if images.ndim != 4 or images.shape[1:] != (size, size, 3):
        raise ValueError(
            f"this CLIP transformer takes images [N,{size},{size},3], got shape {images.shape}; resize them"
        )
    normalised = (images - np.float32(MEAN)) / np.float32(STD)
    return CLIPViT(config).apply({"params": params}, normalised)


def torch_name(path: tuple[str, ...]) -> str:
    """Path of a leaf -> its name in the published file.

    >>> torch_name(("resblocks_3", "attn", "in_proj", "kernel"))
    'visual.transformer.resblocks.3.attn.in_proj_weight'
    """
    modules = [_BLOCK.sub(r"transformer.resblocks.\1", part) for part in path[:-1]]
    name = ".".join(["visual", *modules, trees.LEAVES.get(path[-1], path[-1])])
    return name.replace("in_proj.", "in_proj_")


def from_state_dict(state: Mapping[str, np.ndarray], config: CLIPViTConfig = VIT_L14) -> PyTree:
    """State dict of ``ViT-L-14.pt`` -> parameter tree of the image tower; the text tower is passed over.

    Raises:
      ValueError: lists every missing, unexpected or wrongly shaped tensor of the image tower.
    """
    visual = {name: value for name, value in state.items() if name.startswith("visual.")}
    return trees.to_tree(visual, abstract_params(config), torch_name, "CLIP ViT-L/14")


def to_flat(params: PyTree) -> dict[str, np.ndarray]:
    """Parameter tree -> the content of ``clip_vit_l14.safetensors``."""
    return trees.to_flat(params)


def from_flat(flat: Mapping[str, np.ndarray], config: CLIPViTConfig = VIT_L14) -> PyTree:
    """The content of ``clip_vit_l14.safetensors`` -> parameter tree.

    Raises:
      ValueError: lists every missing, unexpected or wrongly shaped array.
    """
    return trees.from_flat(flat, abstract_params(config), "CLIP ViT-L/14")


def abstract_params(config: CLIPViTConfig = VIT_L14) -> PyTree:
    """The parameter tree as shapes."""
    return trees.abstract_params(CLIPViT(config), config.image_size, config.image_size)
