"""Layer normalisation over the channels of a token, in a fast form and in the textbook form.

The fast form is a ``custom_vjp`` function, like those of :mod:`jaxunlearn.models.layers`: no forward mode. It keeps the
input and two numbers per token for the backward pass, and the gradients of scale and bias are products with a vector of
ones.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from jaxunlearn.models.layers import at_least_float32, sum_pixels, varying_like
from jaxunlearn.types import Array


def _normalised(wide: Array, eps: float) -> tuple[Array, Array, Array]:
    """``x [...,C]`` with mean 0 and variance 1, the means and 1 / sqrt(variance + eps), both [...,1]."""
    mean = wide.mean(-1, keepdims=True)
    centred = wide - mean
    inverse = lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return centred * inverse, mean, inverse


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    return _layer_norm_forward(x, scale, bias, eps)[0]


def _layer_norm_forward(x, scale, bias, eps):
    normal, mean, inverse = _normalised(x.astype(at_least_float32(x.dtype)), eps)
    return (normal * scale + bias).astype(x.dtype), (x, scale, mean, inverse)


def _layer_norm_backward(eps, residuals, dy):
    x, scale, mean, inverse = residuals
    wide = at_least_float32(x.dtype)
    normal = (x.astype(wide) - mean) * inverse
    dy = dy.astype(wide)
    d_normal = dy * scale
    # dx = inverse * (d - mean(d) - x_hat mean(d x_hat)) with d = scale dy, the means over the channels.
    along = (d_normal * normal).mean(-1, keepdims=True)
    dx = inverse * (d_normal - d_normal.mean(-1, keepdims=True) - normal * along)
    return dx.astype(x.dtype), sum_pixels(dy * normal).sum(0), sum_pixels(dy).sum(0)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def layer_norm(x: Array, scale: Array, bias: Array, eps: float, fast: bool = True) -> Array:
    """Normalises every token over its channels, then applies ``scale`` and ``bias``.

    Args:
      x: [B,...,C].
      scale, bias: [C].
      eps: added to the (biased) variance.
      fast: own backward pass; no forward mode.

    Returns:
      [B,...,C] of x's dtype; moments in float32 at least.

    Source: Ba, Kiros and Hinton 2016, "Layer Normalization", Eq. 3 and 4.
    """
    wide = at_least_float32(x.dtype)
    scale, bias = scale.astype(wide), bias.astype(wide)
    if fast:
        scale, bias = varying_like(scale, x), varying_like(bias, x)
        return _layer_norm(x.reshape(x.shape[0], -1, x.shape[-1]), scale, bias, float(eps)).reshape(x.shape)
    return (_normalised(x.astype(wide), eps)[0] * scale + bias).astype(x.dtype)


class LayerNorm(nn.Module):
    """:func:`layer_norm` with parameters ``scale`` and ``bias``."""

    eps: float = 1e-5
    fast: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return layer_norm(x, scale, bias, self.eps, self.fast)
