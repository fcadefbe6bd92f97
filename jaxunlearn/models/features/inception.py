"""InceptionV3 in the variant of the FID: 1008 classes, no auxiliary head, five differences to the usual network.

The network of the metric is a port of a 2015 graph. Against torchvision's InceptionV3: the mean pooling of (1)
Mixed_5b to 5d, (2) Mixed_6b to 6e and (3) Mixed_7b does not count the padding; (4) Mixed_7c takes the **maximum** where
7b takes the mean (an upstream slip that is part of the metric); (5) batch normalisation has eps 1e-3.

Source: Szegedy et al. 2016, "Rethinking the Inception Architecture"; Heusel et al. 2017 for the FID. The weights are no
part of this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxunlearn.models.features import trees
from jaxunlearn.models.features.layers import BatchNorm, Convolution, Dense, max_pool, mean_pool_inside
from jaxunlearn.types import Array, PyTree

CLASSES, FIRST_WIDTH = 1008, 32
_WHAT = "InceptionV3 of the FID (1008 classes)"


class Outputs(NamedTuple):
    """What the network says of images.

    Attributes:
      features: float32 [N,2048], the spatial mean of Mixed_7c: the features of FID and KID.
      logits: float32 [N,1008] without the bias: those of the Inception Score.
    """

    features: Array
    logits: Array


class Conv(nn.Module):
    """Convolution, batch normalisation and ReLU."""

    features: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> [B,H',W',features]."""
        x = Convolution(self.features, self.kernel_size, self.stride, self.padding, name="conv")(x)
        return nn.relu(BatchNorm(1e-3, name="bn")(x))


class _Mixed(nn.Module):
    """A block of parallel branches; ``divisor`` narrows all of its convolutions."""

    divisor: int = 1

    def conv(self, x: Array, name: str, features: int, *args) -> Array:
        return Conv(features // self.divisor, *args, name=name)(x)

    def row(self, x: Array, name: str, features: int, size: int) -> Array:
        return self.conv(x, name, features, (1, size), 1, (0, size // 2))

    def column(self, x: Array, name: str, features: int, size: int) -> Array:
        return self.conv(x, name, features, (size, 1), 1, (size // 2, 0))


class MixedA(_Mixed):
    """Mixed_5b, 5c, 5d: 1x1, 5x5 and two 3x3 at full resolution."""

    pool_features: int = 64

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> [B,H,W,224 + pool_features]."""
        one = self.conv(x, "branch1x1", 64)
        five = self.conv(self.conv(x, "branch5x5_1", 48), "branch5x5_2", 64, (5, 5), 1, (2, 2))
        three = self.conv(self.conv(x, "branch3x3dbl_1", 64), "branch3x3dbl_2", 96, (3, 3), 1, (1, 1))
        three = self.conv(three, "branch3x3dbl_3", 96, (3, 3), 1, (1, 1))
        pool = self.conv(mean_pool_inside(x), "branch_pool", self.pool_features)
        return jnp.concatenate([one, five, three, pool], -1)


class MixedB(_Mixed):
    """Mixed_6a: halves the resolution."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> [B,H',W',480 + C]."""
        three = self.conv(x, "branch3x3", 384, (3, 3), 2)
        double = self.conv(self.conv(x, "branch3x3dbl_1", 64), "branch3x3dbl_2", 96, (3, 3), 1, (1, 1))
        double = self.conv(double, "branch3x3dbl_3", 96, (3, 3), 2)
        return jnp.concatenate([three, double, max_pool(x, 2)], -1)


class MixedC(_Mixed):
    """Mixed_6b to 6e: 7x7 convolutions as rows and columns."""

    width: int = 128

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> [B,H,W,768]."""
        one = self.conv(x, "branch1x1", 192)
        seven = self.row(self.conv(x, "branch7x7_1", self.width), "branch7x7_2", self.width, 7)
        seven = self.column(seven, "branch7x7_3", 192, 7)
        double = self.column(self.conv(x, "branch7x7dbl_1", self.width), "branch7x7dbl_2", self.width, 7)
        double = self.column(self.row(double, "branch7x7dbl_3", self.width, 7), "branch7x7dbl_4", self.width, 7)
        double = self.row(double, "branch7x7dbl_5", 192, 7)
        pool = self.conv(mean_pool_inside(x), "branch_pool", 192)
        return jnp.concatenate([one, seven, double, pool], -1)


class MixedD(_Mixed):
    """Mixed_7a: halves the resolution."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> [B,H',W',512 + C]."""
        three = self.conv(self.conv(x, "branch3x3_1", 192), "branch3x3_2", 320, (3, 3), 2)
        seven = self.row(self.conv(x, "branch7x7x3_1", 192), "branch7x7x3_2", 192, 7)
        seven = self.conv(self.column(seven, "branch7x7x3_3", 192, 7), "branch7x7x3_4", 192, (3, 3), 2)
        return jnp.concatenate([three, seven, max_pool(x, 2)], -1)


class MixedE(_Mixed):
    """Mixed_7b and 7c; ``max_branch`` is the slip of 7c."""

    max_branch: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B,H,W,C] -> [B,H,W,2048]."""
        one = self.conv(x, "branch1x1", 320)
        three = self.conv(x, "branch3x3_1", 384)
        three = [self.row(three, "branch3x3_2a", 384, 3), self.column(three, "branch3x3_2b", 384, 3)]
        double = self.conv(self.conv(x, "branch3x3dbl_1", 448), "branch3x3dbl_2", 384, (3, 3), 1, (1, 1))
        double = [self.row(double, "branch3x3dbl_3a", 384, 3), self.column(double, "branch3x3dbl_3b", 384, 3)]
        pool = self.conv(max_pool(x, 1, 1) if self.max_branch else mean_pool_inside(x), "branch_pool", 192)
        return jnp.concatenate([one, *three, *double, pool], -1)


class Inception(nn.Module):
    """The network; ``divisor`` narrows all convolutions (tests), 1 is the metric's."""

    divisor: int = 1
    classes: int = CLASSES

    @nn.compact
    def __call__(self, x: Array) -> Outputs:
        """Scaled images [B,H,W,3], 299 pixels in the metric and at least 75 -> :class:`Outputs`."""

        def conv(x, name, features, *args):
            return Conv(features // self.divisor, *args, name=name)(x)

        x = conv(x, "Conv2d_1a_3x3", FIRST_WIDTH, (3, 3), 2)
        x = conv(x, "Conv2d_2a_3x3", 32, (3, 3))
        x = max_pool(conv(x, "Conv2d_2b_3x3", 64, (3, 3), 1, (1, 1)), 2)
        x = conv(x, "Conv2d_3b_1x1", 80)
        x = max_pool(conv(x, "Conv2d_4a_3x3", 192, (3, 3)), 2)
        for name, pool_features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = MixedA(self.divisor, pool_features, name=name)(x)
        x = MixedB(self.divisor, name="Mixed_6a")(x)
        for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = MixedC(self.divisor, width, name=name)(x)
        x = MixedD(self.divisor, name="Mixed_7a")(x)
        x = MixedE(self.divisor, name="Mixed_7b")(x)
        x = MixedE(self.divisor, True, name="Mixed_7c")(x)
        features = x.mean((1, 2))
        return Outputs(features, Dense(self.classes, add_bias=False, name="fc")(features))


def outputs(params: PyTree, x: Array) -> Outputs:
    """Features and logits of scaled images.

    Args:
      params: from :func:`from_state_dict` or :func:`from_flat`.
      x: float32 [N,299,299,3] in about [-1, 1] (:func:`jaxunlearn.metrics.resize.fid_inputs`).

    Raises:
      ValueError: not [N,H,W,3], or smaller than 75 pixels.
    """
    if x.ndim != 4 or x.shape[-1] != 3 or min(x.shape[1:3]) < 75:
        raise ValueError(f"Inception takes images [N,299,299,3], got shape {x.shape}; use metrics.resize.fid_inputs")
    divisor = FIRST_WIDTH // params["Conv2d_1a_3x3"]["conv"]["kernel"].shape[-1]
    return Inception(divisor, params["fc"]["bias"].shape[-1]).apply({"params": params}, x)


def torch_name(path: tuple[str, ...]) -> str:
    """Path of a leaf -> its name in the published file.

    >>> torch_name(("Mixed_5b", "branch5x5_1", "bn", "var"))
    'Mixed_5b.branch5x5_1.bn.running_var'
    """
    return ".".join([*path[:-1], trees.LEAVES[path[-1]]])


def from_state_dict(state: Mapping[str, np.ndarray], divisor: int = 1) -> PyTree:
    """State dict of ``pt_inception-2015-12-05-6726825d.pth`` -> parameter tree.

    Raises:
      ValueError: lists every missing, unexpected or wrongly shaped tensor.
    """
    return trees.to_tree(state, abstract_params(divisor), torch_name, _WHAT)


def to_flat(params: PyTree) -> dict[str, np.ndarray]:
    """Parameter tree -> the content of ``inception.safetensors``."""
    return trees.to_flat(params)


def from_flat(flat: Mapping[str, np.ndarray], divisor: int = 1) -> PyTree:
    """The content of ``inception.safetensors`` -> parameter tree.

    Raises:
      ValueError: lists every missing, unexpected or wrongly shaped array.
    """
    return trees.from_flat(flat, abstract_params(divisor), _WHAT)


def abstract_params(divisor: int = 1) -> PyTree:
    """The parameter tree as shapes."""
    return trees.abstract_params(Inception(divisor), 75, 75)
