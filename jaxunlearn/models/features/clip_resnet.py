"""The image tower of CLIP RN50: a ResNet-50 with three stem convolutions, mean pools before strides and attention pooling.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", Section 2.4. The
names of the parameters are those of the published files. The position embedding of the pooling fixes the image size;
CLIP-IQA (Wang et al. 2023, Section 3) leaves it out and takes images of any size.
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

from jaxunlearn.models.features import trees
from jaxunlearn.models.features.layers import BatchNorm, Convolution, Dense
from jaxunlearn.types import Array, PyTree

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the channels of images in [0, 1], of all CLIP models."""

_BN_EPS = 1e-5
_EXPANSION = 4
_INDEXED = re.compile(r"(layer\d|downsample)_(\d+)")


@dataclasses.dataclass(frozen=True)
class CLIPResNetConfig:
    """Size of the network; the defaults are those of RN50.

    Attributes:
      blocks: residual blocks of the four stages.
      width: channels after the stem.
      dims: length of an image vector.
      image_size: of the images that the position embedding belongs to.
      head_dim: channels of a head of the attention pooling.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    dims: int = 1024
    image_size: int = 224
    head_dim: int = 64

    @property
    def stride(self) -> int:
        """Pixels of the image to one of the last stage: 4 of the stem, 2 of every stage but the first."""
        return 2 ** (len(self.blocks) + 1)

    @property
    def tokens(self) -> int:
        """Positions of the last stage, and one for their mean."""
        return (self.image_size // self.stride) ** 2 + 1


RN50 = CLIPResNetConfig()


def mean_pool(x: Array, size: int) -> Array:
    """Mean over blocks of ``size`` x ``size`` pixels; rows and columns that fill no block are left out."""
    return x if size == 1 else nn.avg_pool(x, (size, size), (size, size))


class Bottleneck(nn.Module):
    """Residual block whose stride is a mean pool: [B,H,W,C] -> [B,H/stride,W/stride,4 width]."""

    width: int
    stride: int
    project: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the block."""
        y = nn.relu(BatchNorm(_BN_EPS, name="bn1")(Convolution(self.width, name="conv1")(x)))
        y = Convolution(self.width, (3, 3), 1, (1, 1), name="conv2")(y)
        y = mean_pool(nn.relu(BatchNorm(_BN_EPS, name="bn2")(y)), self.stride)
        y = BatchNorm(_BN_EPS, name="bn3")(Convolution(_EXPANSION * self.width, name="conv3")(y))
        if self.project:
            x = Convolution(_EXPANSION * self.width, name="downsample_0")(mean_pool(x, self.stride))
            x = BatchNorm(_BN_EPS, name="downsample_1")(x)
        return nn.relu(x + y)


class AttentionPool(nn.Module):
    """Attention of the mean to all pixels and itself: [B,H,W,C] -> [B,dims].

    Attributes:
      dims: length of the result.
      tokens: rows of the position embedding.
      head_dim: channels of a head.
      position: whether the embedding is added.
    """

    dims: int
    tokens: int
    head_dim: int
    position: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the pooling."""
        channels = x.shape[-1]
        tokens = x.reshape(x.shape[0], -1, channels)
        tokens = jnp.concatenate([tokens.mean(axis=1, keepdims=True), tokens], axis=1)
        table = self.param("positional_embedding", nn.initializers.normal(0.02), (self.tokens, channels))
        if self.position:
            if tokens.shape[1] != self.tokens:
                raise ValueError(
                    f"the position embedding has {self.tokens - 1} places and the image {tokens.shape[1] - 1}; resize it, "
                    "or leave the embedding out as CLIP-IQA does"
                )
            tokens = tokens + table

        def heads(y, name):
            y = Dense(channels, name=name)(y)
            return y.reshape(*y.shape[:-1], channels // self.head_dim, self.head_dim)

        q, k, v = heads(tokens[:, 0], "q_proj"), heads(tokens, "k_proj"), heads(tokens, "v_proj")
        scores = jnp.einsum("bhd,bnhd->bhn", q, k, precision=lax.Precision.HIGHEST) / np.sqrt(self.head_dim)
        weights = jax.nn.softmax(scores, axis=-1)
        mixed = jnp.einsum("bhn,bnhd->bhd", weights, v, precision=lax.Precision.HIGHEST)
        return Dense(self.dims, name="c_proj")(mixed.reshape(x.shape[0], channels))


class CLIPResNet(nn.Module):
    """The network: normalised images [B,H,W,3] -> image vectors [B,dims], not of unit norm.

    Attributes:
      config: its size.
      position: whether the pooling uses its position embedding; then H = W = ``config.image_size``.
    """

    config: CLIPResNetConfig = RN50
    position: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the network."""
        config = self.config
        stem = ((config.width // 2, 2), (config.width // 2, 1), (config.width, 1))
        for index, (channels, stride) in enumerate(stem, 1):
            x = Convolution(channels, (3, 3), stride, (1, 1), name=f"conv{index}")(x)
            x = nn.relu(BatchNorm(_BN_EPS, name=f"bn{index}")(x))
        x = mean_pool(x, 2)
        for stage, count in enumerate(config.blocks):
            width = config.width * 2**stage
            for block in range(count):
                stride = 2 if stage and block == 0 else 1
                project = block == 0
                x = Bottleneck(width, stride, project, name=f"layer{stage + 1}_{block}")(x)
        return AttentionPool(config.dims, config.tokens, config.head_dim, self.position, name="attnpool")(x)


def embed(params: PyTree, images: Array, *, position: bool = True, config: CLIPResNetConfig = RN50) -> Array:
    """Image vectors of pictures.

    Args:
      params: from :func:`from_state_dict` or :func:`from_flat`.
      images: [N,H,W,3] float32 in [0, 1].
      position: False leaves the position embedding out; images may then have any size from ``config.stride`` on.
      config: size of the network.

    Returns:
      float32 [N,dims], not of unit norm.

    Raises:
      ValueError: images of another shape.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or min(images.shape[1:3]) < config.stride:
        raise ValueError(
            f"CLIP RN50 takes images [N,H,W,3] of at least {config.stride} pixels, got shape {images.shape}; repeat a grey "
            "channel three times"
        )
    normalised = (images - np.float32(MEAN)) / np.float32(STD)
    return CLIPResNet(config, position).apply({"params": params}, normalised)


def torch_name(path: tuple[str, ...]) -> str:
    """Path of a leaf -> its name in the published file.

    >>> torch_name(("layer1_0", "downsample_1", "mean"))
    'visual.layer1.0.downsample.1.running_mean'
    """
    modules = [_INDEXED.sub(r"\1.\2", part) for part in path[:-1]]
    return ".".join(["visual", *modules, trees.LEAVES.get(path[-1], path[-1])])


def from_state_dict(state: Mapping[str, np.ndarray], config: CLIPResNetConfig = RN50) -> PyTree:
    """State dict of ``RN50.pt`` -> parameter tree of the image tower; the text tower is passed over.

    Raises:
      ValueError: lists every missing, unexpected or wrongly shaped tensor of the image tower.
    """
    visual = {name: value for name, value in state.items() if name.startswith("visual.")}
    return trees.to_tree(visual, abstract_params(config), torch_name, "CLIP RN50")


def to_flat(params: PyTree) -> dict[str, np.ndarray]:
    """Parameter tree -> dotted path -> array."""
    return trees.to_flat(params)


def from_flat(flat: Mapping[str, np.ndarray], config: CLIPResNetConfig = RN50) -> PyTree:
    """The inverse of :func:`to_flat`.

    Raises:
      ValueError: lists every missing, unexpected or wrongly shaped array.
    """
    return trees.from_flat(flat, abstract_params(config), "CLIP RN50")


def abstract_params(config: CLIPResNetConfig = RN50) -> PyTree:
    """The parameter tree as shapes."""
    return trees.abstract_params(CLIPResNet(config), config.image_size, config.image_size)
