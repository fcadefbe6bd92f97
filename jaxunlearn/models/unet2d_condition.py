"""The UNet of Stable Diffusion (Rombach et al. 2022) as diffusers' ``UNet2DConditionModel`` defines it, channels last.

The parameter tree carries diffusers' names (:mod:`jaxunlearn.models.convert`), so models of diffusers run here and
models trained here open there, with the same numbers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxunlearn.models.unet import UNet, check_inputs, example_image_and_labels
from jaxunlearn.models.unet2d_condition_config import UNet2DConditionConfig
from jaxunlearn.types import Array

__all__ = ["UNet2DCondition", "UNet2DConditionConfig", "example_inputs"]


class UNet2DCondition(UNet):
    """``(x [B,H,W,C], t [B], encoder_hidden_states [B,N,D]) -> [B,H,W,out_channels]``: predicted noise (or v, or x0).

    Attributes:
      config: what it is made of.
      dtype: of the computation; parameters stay as they are. Normalisations and the softmax use float32 at least.
      fast: the fast forms of :mod:`jaxunlearn.models.layers`, without forward-mode differentiation. False: the textbook
        forms, which work under every transformation.
      attention_impl: "auto", "folded", "xla" or "cudnn", see :func:`jaxunlearn.models.layers.attention`.
      remat: saves memory in the backward pass and costs time, see :class:`jaxunlearn.models.blocks.UNetPart`.
    """

    @nn.compact
    def __call__(
        self,
        x: Array,
        t: Array,
        encoder_hidden_states: Array | None = None,
        class_labels: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Array:
        """Applies the model.

        Args:
          x: [B,H,W,in_channels], noised latents; H and W multiples of ``config.size_divisor``.
          t: [B] or scalar, integer or float; 0 is the cleanest.
          encoder_hidden_states: [B,N,D], the condition, with D = ``config.cross_attention_dim``; N is free.
          class_labels: int [B] for a learned class embedding, a number [B] for type "timestep", [B,time_dim] for type
            "identity"; None for a model without classes.
          deterministic: False applies ``config.dropout`` and needs ``rngs={"dropout": key}``.

        Returns:
          [B,H,W,out_channels], of x's dtype.

        Raises:
          ValueError: shapes that do not fit, a missing condition, class labels missing or not expected.
        """
        t = jnp.asarray(t)
        check_inputs(self.config, x, t, class_labels, self.attention_impl)
        context = _checked_context(self.config, encoder_hidden_states, x.shape[0])
        return self.run(x, t, class_labels, context, deterministic)


def _checked_context(config: UNet2DConditionConfig, context: Array | None, batch: int) -> Array:
    width = config.cross_attention_dim
    if context is None:
        raise ValueError(
            f"encoder_hidden_states are missing: this model takes a condition [B,N,{width}]; pass the embedding of a text, "
            "of the empty text for none"
        )
    shape = jnp.shape(context)
    if len(shape) != 3 or shape[0] != batch or shape[1] == 0 or shape[2] != width:
        raise ValueError(
            f"encoder_hidden_states must be [B,N,{width}] with B = {batch}, as many as images, got shape {shape}"
        )
    if not jnp.issubdtype(jnp.result_type(context), jnp.floating):
        raise ValueError(
            f"encoder_hidden_states must be floating, got {jnp.result_type(context)}; pass embeddings, not token ids"
        )
    return jnp.asarray(context)


def example_inputs(config: UNet2DConditionConfig) -> tuple:
    """Shapes of the arguments of a call, the smallest that the model takes."""
    x, labels = example_image_and_labels(config)
    context = jax.ShapeDtypeStruct((1, 1, config.cross_attention_dim), jnp.float32)
    return x, jax.ShapeDtypeStruct((1,), jnp.int32), context, labels
