"""Convolution, dense layer, group normalisation and attention, each in a fast form and in the textbook form.

Shapes: B batch, H, W, C height, width, channels (channels last), N = H W tokens, D channels per head. Parameters are
float32 (or whatever is handed in); ``dtype`` is the type of the computation. Normalisations and the softmax are
computed in float32 at least, float64 stays float64.

The fast forms compute the same numbers with a different order of rounding:

* Sums over pixels are products with a vector of ones. XLA's CPU reductions over the spatial axes are slow, its matrix
  products are not. This holds for the two sums of a group normalisation, for those of its backward pass, and for the
  gradient of every bias. On other backends ordinary sums are used.
* Attention divides by the row sum at the very end; the row sum is one more column of the values. The backward pass
  starts from the saved exponentials.

They are ``custom_vjp`` functions: ``jit``, ``grad``, ``vmap`` and ``shard_map`` work, **forward mode (jvp, linearize,
hessian by forward over reverse) does not**. The textbook forms (``fast=False``) work under all transformations.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from jaxunlearn.types import Array

ATTENTION_IMPLS = ("auto", "folded", "xla", "cudnn")


def at_least_float32(dtype):
    """The dtype of normalisations and of the softmax."""
    return jnp.promote_types(dtype, jnp.float32)


def _varying_axes(x: Array) -> frozenset[str]:
    """The mesh axes of an enclosing ``shard_map`` along which x differs; the attribute's name depends on jax's version."""
    aval = jax.typeof(x)
    if hasattr(aval, "vma"):
        return aval.vma
    return getattr(getattr(aval, "manual_axis_type", None), "varying", frozenset())


def varying_like(x: Array, *references: Array) -> Array:
    """Inside ``shard_map``: marks x as different on the mesh axes on which a reference is.

    A custom backward pass returns the gradient of this device; the transpose of the mark adds them up over devices.
    Outside of ``shard_map`` nothing happens.
    """
    axes = frozenset().union(*map(_varying_axes, references)) - _varying_axes(x)
    return lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def sum_pixels(x: Array) -> Array:
    """``[B,N,C] -> [B,C]``, the sum over N. On CPU two matrix products with ones, one after the other.

    Two short sums (of about sqrt(N) numbers each) are faster than one long one, and lose fewer bits.
    """
    if jax.default_backend() != "cpu":
        return jnp.sum(x, axis=1)
    batch, count, channels = x.shape
    rows = max(d for d in range(1, math.isqrt(max(count, 1)) + 1) if count % d == 0)
    for shape in ((batch * rows, count // rows, channels), (batch, rows, channels)):
        x = x.reshape(shape)
        ones = varying_like(jnp.ones(shape[:2], x.dtype), x)
        x = lax.dot_general(ones, x, (((1,), (1,)), ((0,), (0,))), precision=lax.Precision.HIGHEST)
    return x


# ---------------------------------------------------------------------------------------------------------------- bias


@jax.custom_vjp
def _add_bias(x: Array, bias: Array) -> Array:
    return x + bias


def _add_bias_forward(x, bias):
    return x + bias, None


def _add_bias_backward(_, dy):
    # Per example first: the batch axis may be divided over devices, and stays so.
    wide = dy.reshape(dy.shape[0], -1, dy.shape[-1]).astype(at_least_float32(dy.dtype))
    return dy, sum_pixels(wide).sum(0).astype(dy.dtype)


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def add_bias(x: Array, bias: Array) -> Array:
    """``x [B,...,C] + bias [C]``, both of one dtype; the gradient of the bias is a product with a vector of ones."""
    return _add_bias(x, varying_like(bias, x))


# ------------------------------------------------------------------------------------------------- group normalisation


def _group_mean(sums: Array, groups: int, count: int) -> Array:
    """Sums per channel [B,C] -> mean per group [B,C], repeated over the channels of the group."""
    grouped = sums.reshape(sums.shape[0], groups, -1)
    mean = grouped.sum(-1, keepdims=True) / (count * grouped.shape[-1])
    return jnp.broadcast_to(mean, grouped.shape).reshape(sums.shape)


def _moments(x: Array, groups: int, eps: float) -> tuple[Array, Array]:
    """Mean and 1 / sqrt(variance + eps) per group of ``x [B,N,C]``, each [B,C]; centred before it is squared."""
    mean = _group_mean(sum_pixels(x), groups, x.shape[1])
    centred = x - mean[:, None]
    variance = _group_mean(sum_pixels(centred * centred), groups, x.shape[1])
    return mean, lax.rsqrt(variance + eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _group_norm(x: Array, scale: Array, bias: Array, groups: int, eps: float) -> Array:
    return _group_norm_forward(x, scale, bias, groups, eps)[0]


def _group_norm_forward(x, scale, bias, groups, eps):
    wide = x.astype(at_least_float32(x.dtype))
    mean, inverse = _moments(wide, groups, eps)
    y = (wide - mean[:, None]) * (inverse * scale)[:, None] + bias
    return y.astype(x.dtype), (x, scale, mean, inverse)


def _group_norm_backward(groups, eps, residuals, dy):
    x, scale, mean, inverse = residuals
    wide = at_least_float32(x.dtype)
    centred = x.astype(wide) - mean[:, None]
    dy = dy.astype(wide)
    sum_dy = sum_pixels(dy)
    sum_dy_x = sum_pixels(dy * centred) * inverse
    # dx = inverse * (scale dy - mean(scale dy) - x_hat mean(scale dy x_hat)), the means over a group.
    mean_dy = _group_mean(scale * sum_dy, groups, x.shape[1])
    mean_dy_x = _group_mean(scale * sum_dy_x, groups, x.shape[1])
    per_dy = (inverse * scale)[:, None]
    dx = dy * per_dy - centred * (inverse * inverse * mean_dy_x)[:, None] - (inverse * mean_dy)[:, None]
    return dx.astype(x.dtype), sum_dy_x.sum(0), sum_dy.sum(0)


_group_norm.defvjp(_group_norm_forward, _group_norm_backward)


def group_norm(x: Array, scale: Array, bias: Array, groups: int, eps: float, fast: bool = True) -> Array:
    """Normalises every group of neighbouring channels over all pixels, then applies ``scale`` and ``bias``.

    Args:
      x: [B,...,C], any number of pixel axes.
      scale, bias: [C].
      groups: divides C.
      eps: added to the (biased) variance.
      fast: one affine map per example and channel, its sums as matrix products; no forward mode.

    Returns:
      [B,...,C] of x's dtype; moments in float32 at least.

    Source: Wu and He 2018, "Group Normalization", Eq. 1 to 3.
    """
    shape = x.shape
    wide = at_least_float32(x.dtype)
    scale, bias = scale.astype(wide), bias.astype(wide)
    if fast:
        scale, bias = varying_like(scale, x), varying_like(bias, x)
        return _group_norm(x.reshape(shape[0], -1, shape[-1]), scale, bias, groups, float(eps)).reshape(shape)
    grouped = x.astype(wide).reshape(shape[0], -1, groups, shape[-1] // groups)
    mean = grouped.mean((1, 3), keepdims=True)
    variance = jnp.square(grouped - mean).mean((1, 3), keepdims=True)
    return (((grouped - mean) * lax.rsqrt(variance + eps)).reshape(shape) * scale + bias).astype(x.dtype)


# ----------------------------------------------------------------------------------------------------------- attention


def _scores(q: Array, k: Array) -> Array:
    return jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=at_least_float32(q.dtype))


@jax.custom_vjp
def _folded(q: Array, k: Array, v: Array) -> Array:
    return _folded_forward(q, k, v)[0]


def _folded_forward(q, k, v):
    wide = at_least_float32(q.dtype)
    factor = 1 / np.sqrt(q.shape[-1])
    scores = _scores((q * factor).astype(q.dtype), k)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True)).astype(q.dtype)
    v1 = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)
    sums = jnp.einsum("bhqk,bkhd->bqhd", weights, v1, preferred_element_type=wide)
    total = sums[..., -1:]
    out = (sums[..., :-1] / total).astype(q.dtype)
    return out, (q, k, v1, weights, out, total)


def _folded_backward(residuals, d_out):
    q, k, v1, weights, out, total = residuals
    wide = at_least_float32(q.dtype)
    factor = 1 / np.sqrt(q.shape[-1])
    d_out = d_out.astype(wide) / total
    # One product gives (d_out . v - sum(d_out * out)) / total: the last column of v1 is one.
    d_sums = jnp.concatenate([d_out, -(d_out * out).sum(-1, keepdims=True)], -1)
    d_scores = weights * jnp.einsum("bqhd,bkhd->bhqk", d_sums.astype(q.dtype), v1, preferred_element_type=wide)
    d_scores = d_scores.astype(q.dtype)
    dv = jnp.einsum("bhqk,bqhd->bkhd", weights, d_out.astype(q.dtype), preferred_element_type=wide)
    dq = jnp.einsum("bhqk,bkhd->bqhd", d_scores, k, preferred_element_type=wide) * factor
    dk = jnp.einsum("bhqk,bqhd->bkhd", d_scores, q, preferred_element_type=wide) * factor
    return dq.astype(q.dtype), dk.astype(q.dtype), dv.astype(q.dtype)


_folded.defvjp(_folded_forward, _folded_backward)


def attention(q: Array, k: Array, v: Array, impl: str = "auto", fast: bool = True) -> Array:
    """``softmax(q k^T / sqrt(D)) v`` per head.

    Args:
      q: [B,N,heads,D].
      k, v: [B,M,heads,D] of q's dtype; M = N in self-attention.
      impl: "folded" (own backward pass from the saved exponentials, the fastest on CPU), "xla" or "cudnn" (those of
        ``jax.nn.dot_product_attention``; cudnn needs a GPU, float16 or bfloat16, and D at most 128), or "auto": folded
        on CPU, cudnn on a GPU where it can be used, xla otherwise.
      fast: False is the textbook form whatever ``impl`` says.

    Returns:
      [B,N,heads,D] of q's dtype.

    Raises:
      ValueError: an unknown ``impl``.

    Source: Vaswani et al. 2017, Eq. 1.
    """
    if impl not in ATTENTION_IMPLS:
        raise ValueError(f"attention_impl must be one of {', '.join(ATTENTION_IMPLS)}, got {impl!r}")
    if not fast:
        weights = jax.nn.softmax(_scores(q, k) / np.sqrt(q.shape[-1]), axis=-1).astype(q.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    if impl == "auto":
        backend = jax.default_backend()
        half = q.dtype in (jnp.bfloat16, jnp.float16)
        flash = backend == "gpu" and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
        impl = "folded" if backend == "cpu" else "cudnn" if flash else "xla"
    if impl == "folded":
        return _folded(*(varying_like(x, q, k, v) for x in (q, k, v)))
    return jax.nn.dot_product_attention(q, k, v, implementation=impl)


# ------------------------------------------------------------------------------------------------------------- modules


def _uniform(fan_in: int):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what torch gives a new convolution or linear layer, weight and bias alike."""
    bound = 1 / np.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class Conv(nn.Module):
    """2-D convolution with bias, [B,H,W,C] -> [B,H',W',features]; kernel [K,K,C,features].

    ``padding`` is the number of zeros (before, after) on both spatial axes.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)
    dtype: jnp.dtype = jnp.float32
    fast: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        k, channels = self.kernel_size, x.shape[-1]
        init = _uniform(k * k * channels)
        kernel = self.param("kernel", init, (k, k, channels, self.features)).astype(self.dtype)
        bias = self.param("bias", init, (self.features,)).astype(self.dtype)
        y = lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel,
            (self.stride, self.stride),
            (self.padding, self.padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return add_bias(y, bias) if self.fast else y + bias


class Dense(nn.Module):
    """Linear layer, with bias unless ``use_bias`` is False, [...,C] -> [...,features]; kernel [C,features]."""

    features: int
    dtype: jnp.dtype = jnp.float32
    fast: bool = True
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = _uniform(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], self.features)).astype(self.dtype)
        y = x.astype(self.dtype) @ kernel
        if not self.use_bias:
            return y
        bias = self.param("bias", init, (self.features,)).astype(self.dtype)
        return add_bias(y, bias) if self.fast else y + bias


class GroupNorm(nn.Module):
    """:func:`group_norm` with parameters ``scale`` and ``bias``."""

    groups: int
    eps: float
    fast: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return group_norm(x, scale, bias, self.groups, self.eps, self.fast)


class SelfAttention(nn.Module):
    """Residual self-attention over the pixels, as in diffusers' ``Attention`` of a ``UNet2DModel``.

    ``(x + to_out(attention(to_q(n), to_k(n), to_v(n)))) / scale_factor`` with ``n = group_norm(x)``; without
    normalisation where ``groups`` is None. The number of heads is ``C // head_dim``; their total width may be less
    than C.
    """

    head_dim: int
    groups: int | None
    eps: float
    scale_factor: float = 1.0
    dtype: jnp.dtype = jnp.float32
    fast: bool = True
    attention_impl: str = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, height, width, channels = x.shape
        heads = channels // self.head_dim
        n = x if self.groups is None else GroupNorm(self.groups, self.eps, self.fast, name="group_norm")(x)
        n = n.reshape(batch, height * width, channels)

        def dense(features, name):
            return Dense(features, self.dtype, self.fast, name=name)

        q, k, v = (dense(heads * self.head_dim, name)(n) for name in ("to_q", "to_k", "to_v"))
        q, k, v = (y.reshape(batch, -1, heads, self.head_dim) for y in (q, k, v))
        out = attention(q, k, v, self.attention_impl, self.fast).reshape(batch, -1, heads * self.head_dim)
        out = x + dense(channels, "to_out_0")(out).reshape(x.shape)
        return out if self.scale_factor == 1 else out / self.scale_factor
