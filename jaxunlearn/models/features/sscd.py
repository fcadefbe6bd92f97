"""SSCD, the copy detector: a ResNet-50 with GeM pooling whose unit descriptors are close for copies of one picture.

Source: Pizzi et al. 2022, "A Self-Supervised Descriptor for Image Copy Detection"; the network is He et al. 2016 with
the stride on the 3x3 convolution. Its weights are no part of this package. A cosine above 0.75 means a copy with 90 %
precision on the web photos of DISC; for other pictures a threshold must be calibrated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxunlearn.models.features import trees
from jaxunlearn.models.features.layers import BatchNorm, Convolution, Dense, max_pool
from jaxunlearn.types import Array, PyTree

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the channels of images in [0, 1]."""

COPY_COSINE = 0.75
"""Cosine above which two web photos are copies with 90 % precision."""

_BN_EPS, _GEM_POWER, _GEM_TINY, _NORM_TINY = 1e-5, 3.0, 1e-6, 1e-12


@dataclasses.dataclass(frozen=True)
class SSCDConfig:
    """Size of the network; the defaults are those of the published weights.

    Attributes:
      blocks: residual blocks of the four stages.
      width: channels of the first convolution; stage k works on ``width * 2**k`` and gives four times as many.
      dims: length of a descriptor.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    dims: int = 512


class Bottleneck(nn.Module):
    """Residual block: 1x1, 3x3 (with the stride) and 1x1 convolutions; [B,H,W,C] -> [B,H',W',4 width]."""

    width: int
    stride: int
    project: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the block."""
        y = nn.relu(BatchNorm(_BN_EPS, name="bn1")(Convolution(self.width, name="conv1")(x)))
        y = Convolution(self.width, (3, 3), self.stride, (1, 1), name="conv2")(y)
        y = nn.relu(BatchNorm(_BN_EPS, name="bn2")(y))
        y = BatchNorm(_BN_EPS, name="bn3")(Convolution(4 * self.width, name="conv3")(y))
        if self.project:
            x = Convolution(4 * self.width, stride=self.stride, name="downsample_0")(x)
            x = BatchNorm(_BN_EPS, name="downsample_1")(x)
        return nn.relu(x + y)


class SSCD(nn.Module):
    """The network: normalised images [B,H,W,3] -> unit descriptors [B,dims]. Any size from about 32 pixels."""

    config: SSCDConfig = SSCDConfig()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the network to images that are already normalised."""
        x = Convolution(self.config.width, (7, 7), 2, (3, 3), name="conv1")(x)
        x = max_pool(nn.relu(BatchNorm(_BN_EPS, name="bn1")(x)), 2, 1)
        for stage, count in enumerate(self.config.blocks):
            for block in range(count):
                first = block == 0
                stride = 2 if first and stage else 1
                x = Bottleneck(self.config.width * 2**stage, stride, first, name=f"layer{stage + 1}_{block}")(x)
        x = jnp.mean(jnp.maximum(x, _GEM_TINY) ** _GEM_POWER, axis=(1, 2)) ** (1 / _GEM_POWER)
        x = Dense(self.config.dims, name="fc")(x)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), _NORM_TINY)


def embed(params: PyTree, images: Array) -> Array:
    """Descriptors of pictures.

    Args:
      params: from :func:`from_state_dict` or :func:`from_flat`.
      images: [N,H,W,3] float32 in [0, 1], already resized (:func:`jaxunlearn.metrics.resize.sscd_inputs`).

    Returns:
      float32 [N,dims], each of norm 1; their products are cosines.

    Raises:
      ValueError: not [N,H,W,3].
    """
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"SSCD takes images [N,H,W,3], got shape {images.shape}; repeat a grey channel three times")
    normalised = (images - np.float32(MEAN)) / np.float32(STD)
    return SSCD(_config_of(params)).apply({"params": params}, normalised)


def torch_name(path: tuple[str, ...]) -> str:
    """Path of a leaf -> its name in torchvision's ResNet.

    >>> torch_name(("layer1_0", "downsample_1", "mean"))
    'layer1.0.downsample.1.running_mean'
    """
    modules = [part.replace("_", ".") for part in path[:-1]]
    return ".".join([*modules, trees.LEAVES[path[-1]]])


def from_state_dict(state: Mapping[str, np.ndarray], config: SSCDConfig | None = None) -> PyTree:
    """State dict of ``sscd_disc_mixup.torchvision.pt`` -> parameter tree.

    Names may begin with "backbone." (as published) or not.

    Raises:
      ValueError: lists every missing, unexpected or wrongly shaped tensor.
    """
    state = {name.removeprefix("backbone."): value for name, value in state.items()}
    return trees.to_tree(state, abstract_params(config), torch_name, "SSCD (ResNet-50, 512 numbers)")


def by_order(state: Mapping[str, np.ndarray], config: SSCDConfig | None = None) -> dict[str, np.ndarray]:
    """Gives the tensors of a state dict with foreign names torchvision's names, by their position.

    For a file whose names are not known. Position and shape do not prove the mapping: accept it only if a descriptor of
    the network agrees with one of the original.

    Raises:
      ValueError: another number of tensors, or the first position at which a shape differs.
    """
    tensors = [(n, np.asarray(v)) for n, v in state.items() if not n.endswith(trees.COUNTER)]
    shapes = _torch_shapes(config)
    if len(tensors) != len(shapes):
        raise ValueError(f"SSCD has {len(shapes)} tensors without counters, the file {len(tensors)}")
    for (theirs, tensor), (ours, shape) in zip(tensors, shapes.items()):
        if tensor.shape != shape:
            raise ValueError(f"in the order of the file {theirs} {tensor.shape} stands where {ours} {shape} should")
    return {ours: tensor for (_, tensor), ours in zip(tensors, shapes)}


def to_flat(params: PyTree) -> dict[str, np.ndarray]:
    """Parameter tree -> the content of ``sscd.safetensors``."""
    return trees.to_flat(params)


def from_flat(flat: Mapping[str, np.ndarray], config: SSCDConfig | None = None) -> PyTree:
    """The content of ``sscd.safetensors`` -> parameter tree.

    Raises:
      ValueError: lists every missing, unexpected or wrongly shaped array.
    """
    return trees.from_flat(flat, abstract_params(config), "SSCD (ResNet-50, 512 numbers)")


def abstract_params(config: SSCDConfig | None = None) -> PyTree:
    """The parameter tree as shapes."""
    return trees.abstract_params(SSCD(config or SSCDConfig()), 64, 64)


def _config_of(params: PyTree) -> SSCDConfig:
    stages = [name.split("_")[0] for name in params if name.startswith("layer")]
    blocks = tuple(stages.count(f"layer{stage + 1}") for stage in range(len(set(stages))))
    return SSCDConfig(blocks, params["conv1"]["kernel"].shape[-1], params["fc"]["bias"].shape[-1])


def _torch_shapes(config: SSCDConfig | None) -> dict[str, tuple[int, ...]]:
    """Name -> shape in the order in which torch registers them: convolution before its norm, downsample last."""
    flat = trees.paths(abstract_params(config))
    order = {"kernel": 0, "scale": 0, "bias": 1, "mean": 2, "var": 3}
    steps = {"conv1": 0, "bn1": 1, "conv2": 2, "bn2": 3, "conv3": 4, "bn3": 5, "downsample_0": 6, "downsample_1": 7}

    def place(path):
        if path[0].startswith("layer"):
            stage, block = path[0].removeprefix("layer").split("_")
            return (1, int(stage), int(block), steps[path[1]], order[path[-1]])
        return (2 if path[0] == "fc" else 0, 0, 0, steps.get(path[0], 0), order[path[-1]])

    out = {}
    for path in sorted(flat, key=place):
        shape = tuple(flat[path].shape)
        torch_axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(shape)) if path[-1] == "kernel" else None
        out[torch_name(path)] = shape if torch_axes is None else tuple(shape[i] for i in torch_axes)
    return out
