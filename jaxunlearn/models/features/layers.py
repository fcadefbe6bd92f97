"""Layers of convolutional feature networks: convolution without bias, batch normalisation of inference, pooling.

Images are [B,H,W,C]. Paddings are explicit, because "SAME" is asymmetric at stride 2 and differs from torch. All
products run in full float32: a metric must not depend on a device's short cuts. Parameters always come from a file, so
their initial values are mere zeros and ones.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxunlearn.types import Array


class Convolution(nn.Module):
    """2-D convolution without bias, [B,H,W,C] -> [B,H',W',features]; kernel [KH,KW,C,features].

    Attributes:
      features: channels out.
      kernel_size: (KH, KW).
      stride: of both axes.
      padding: zeros on both sides of each axis, (of H, of W).
    """

    features: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the convolution."""
        kernel = self.param("kernel", nn.initializers.zeros, (*self.kernel_size, x.shape[-1], self.features))
        return lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            [(p, p) for p in self.padding],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=lax.Precision.HIGHEST,
        )


class BatchNorm(nn.Module):
    """Batch normalisation with stored statistics: ``(x - mean) / sqrt(var + eps) * scale + bias``, each [C].

    Source: Ioffe and Szegedy 2015, "Batch Normalization", Algorithm 2 (inference).
    """

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises [B,H,W,C]."""
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.param("mean", nn.initializers.zeros, shape)
        var = self.param("var", nn.initializers.ones, shape)
        return (x - mean) * (scale * lax.rsqrt(var + self.eps)) + bias


class Dense(nn.Module):
    """Linear layer, [B,C] -> [B,features]; kernel [C,features], bias [features], which ``add_bias`` leaves out."""

    features: int
    add_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the layer."""
        kernel = self.param("kernel", nn.initializers.zeros, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        product = jnp.matmul(x, kernel, precision=lax.Precision.HIGHEST)
        return product + bias if self.add_bias else product


def max_pool(x: Array, stride: int, padding: int = 0) -> Array:
    """Maximum over 3x3 windows; outside of the image there is nothing (minus infinity)."""
    return nn.max_pool(x, (3, 3), (stride, stride), [(padding, padding)] * 2)


def mean_pool_inside(x: Array) -> Array:
    """Mean over 3x3 windows at stride 1 of those pixels that lie inside the image: [B,H,W,C] -> [B,H,W,C]."""
    total = lax.reduce_window(x, np.float32(0), lax.add, (1, 3, 3, 1), (1, 1, 1, 1), [(0, 0), (1, 1), (1, 1), (0, 0)])
    inside = [np.minimum(np.arange(n) + 2, n) - np.maximum(np.arange(n) - 1, 0) for n in x.shape[1:3]]
    return total / np.outer(*inside).astype(np.float32)[None, :, :, None]
