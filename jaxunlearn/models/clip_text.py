"""The text encoder of CLIP (Radford et al. 2021) as transformers' ``CLIPTextModel`` defines it.

The parameter tree carries transformers' names (:mod:`jaxunlearn.models.convert`). B prompts, N tokens, D width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxunlearn.models.clip_text_config import CLIPTextConfig
from jaxunlearn.models.layer_norm import LayerNorm
from jaxunlearn.models.layers import Dense
from jaxunlearn.types import Array

__all__ = ["CLIPText", "CLIPTextConfig", "causal_attention", "example_inputs", "quick_gelu"]


def quick_gelu(x: Array) -> Array:
    """``x sigmoid(1.702 x)``, elementwise.

    >>> float(quick_gelu(jnp.float32(0.0)))
    0.0
    """
    return x * jax.nn.sigmoid(1.702 * x)


_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": functools.partial(jax.nn.gelu, approximate=False)}


def causal_attention(q: Array, k: Array, v: Array) -> Array:
    """``softmax(q k^T / sqrt(d)) v`` per head, where a token sees itself and those before it.

    Args:
      q, k, v: [B,N,heads,d] of one dtype.

    Returns:
      [B,N,heads,d] of q's dtype; the softmax is computed in float32 at least.

    Source: Vaswani et al. 2017, Eq. 1 and section 3.2.3.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=wide) / np.sqrt(q.shape[-1])
    seen = np.tri(q.shape[1], dtype=bool)
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(q.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


class _Part(nn.Module):
    """What all parts share."""

    config: CLIPTextConfig
    dtype: jnp.dtype = jnp.float32
    fast: bool = True

    @property
    def settings(self) -> dict:
        """Keyword arguments for a part inside this one."""
        return dict(config=self.config, dtype=self.dtype, fast=self.fast)

    def dense(self, features: int, name: str) -> Dense:
        return Dense(features, self.dtype, self.fast, name=name)

    def norm(self, name: str) -> LayerNorm:
        return LayerNorm(self.config.layer_norm_eps, self.fast, name=name)


class _Table(nn.Module):
    """A learned vector for every row."""

    rows: int
    features: int

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        table = self.param("embedding", nn.initializers.normal(0.02), (self.rows, self.features))
        return jnp.asarray(table)[ids]  # a numpy table cannot be indexed by a traced array


class _Embeddings(_Part):
    """Token plus position embedding, int [B,N] -> [B,N,D]."""

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        config = self.config
        tokens = _Table(config.vocab_size, config.hidden_size, name="token_embedding")(ids)
        position = _Table(config.max_position_embeddings, config.hidden_size, name="position_embedding")
        return (tokens + position(np.arange(ids.shape[1]))).astype(self.dtype)


class _Attention(_Part):
    """Causal self-attention with four linear layers, [B,N,D] -> [B,N,D]."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        heads, width = self.config.num_attention_heads, self.config.hidden_size
        split = (*x.shape[:2], heads, width // heads)
        q, k, v = (self.dense(width, name)(x).reshape(split) for name in ("q_proj", "k_proj", "v_proj"))
        return self.dense(width, "out_proj")(causal_attention(q, k, v).reshape(x.shape))


class _FeedForward(_Part):
    """Linear, activation, linear: [B,N,D] -> [B,N,D]."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = _ACTIVATIONS[self.config.hidden_act](self.dense(self.config.intermediate_size, "fc1")(x))
        return self.dense(self.config.hidden_size, "fc2")(x)


class _Layer(_Part):
    """Attention and feed-forward part, each normalised before and added to its input."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x + _Attention(**self.settings, name="self_attn")(self.norm("layer_norm1")(x))
        return x + _FeedForward(**self.settings, name="mlp")(self.norm("layer_norm2")(x))


class _Encoder(_Part):
    """All layers."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.config.num_hidden_layers):
            x = _Layer(**self.settings, name=f"layers_{i}")(x)
        return x


class CLIPText(_Part):
    """``input_ids int [B,N] -> last_hidden_state [B,N,hidden_size]``.

    Attributes:
      config: what it is made of.
      dtype: of the computation and of the result; parameters stay as they are. Normalisations and the softmax use
        float32 at least.
      fast: the fast forms of :mod:`jaxunlearn.models.layers` and :mod:`jaxunlearn.models.layer_norm`, without
        forward-mode differentiation.
    """

    @nn.compact
    def __call__(self, input_ids: Array) -> Array:
        """Applies the model. Padding is not masked, as in Stable Diffusion: only the causal mask is used.

        Args:
          input_ids: [B,N], integers below ``config.vocab_size``, N at most ``config.max_position_embeddings``.

        Returns:
          [B,N,hidden_size], after the final normalisation.

        Raises:
          ValueError: a shape or dtype that does not fit; ids outside the vocabulary where their values are known (under
            ``jit`` they are not).
        """
        check_ids(self.config, input_ids)
        x = _Embeddings(**self.settings, name="embeddings")(jnp.asarray(input_ids))
        x = _Encoder(**self.settings, name="encoder")(x)
        return self.norm("final_layer_norm")(x)


def check_ids(config: CLIPTextConfig, input_ids: Array) -> None:
    """Raises ValueError for token ids that the model cannot take; see :class:`CLIPText`."""
    shape, longest = jnp.shape(input_ids), config.max_position_embeddings
    if len(shape) != 2 or not jnp.issubdtype(jnp.result_type(input_ids), jnp.integer):
        raise ValueError(
            f"input_ids must be integers [B,N], got {jnp.result_type(input_ids)} {shape}; see jaxunlearn.io.tokenizer"
        )
    if not 1 <= shape[1] <= longest:
        raise ValueError(f"input_ids must have 1 to {longest} tokens a prompt, got {shape[1]}; truncate the prompts")
    if isinstance(input_ids, jax.core.Tracer):
        return
    values = np.asarray(input_ids)
    bad = np.unique(values[(values < 0) | (values >= config.vocab_size)])
    if bad.size:
        raise ValueError(
            f"input_ids must be in 0..{config.vocab_size - 1}, got {', '.join(map(str, bad[:5]))}; are tokenizer and text "
            "encoder of one model?"
        )


def example_inputs(config: CLIPTextConfig) -> tuple:
    """Shapes of the arguments of a call, the smallest that the model takes."""
    del config
    return (jax.ShapeDtypeStruct((1, 1), jnp.int32),)
