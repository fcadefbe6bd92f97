"""The UNet of DDPM (Ho et al. 2020) as diffusers' ``UNet2DModel`` defines it, channels last.

The parameter tree carries diffusers' names (:mod:`jaxunlearn.models.convert`), so models of diffusers run here and
models trained here open there, with the same numbers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxunlearn.models.unet import UNet, check_inputs, example_image_and_labels, sinusoid
from jaxunlearn.models.unet2d_config import UNet2DConfig
from jaxunlearn.types import Array

__all__ = ["UNet2D", "UNet2DConfig", "example_inputs", "sinusoid"]


class UNet2D(UNet):
    """``(x [B,H,W,C], t [B], class_labels) -> [B,H,W,out_channels]``: predicted noise (or v, or x0).

    Attributes:
      config: what it is made of.
      dtype: of the computation; parameters stay as they are. Normalisations and the softmax use float32 at least.
      fast: the fast forms of :mod:`jaxunlearn.models.layers`, without forward-mode differentiation. False: the textbook
        forms, which work under every transformation.
      attention_impl: "auto", "folded", "xla" or "cudnn", see :func:`jaxunlearn.models.layers.attention`.
      remat: saves memory in the backward pass and costs time, see :class:`jaxunlearn.models.blocks.UNetPart`.
    """

    @nn.compact
    def __call__(self, x: Array, t: Array, class_labels: Array | None = None, *, deterministic: bool = True) -> Array:
        """Applies the model.

        Args:
          x: [B,H,W,in_channels], usually in about [-1, 1] plus noise; H and W multiples of ``config.size_divisor``.
          t: [B] or scalar, integer or float; 0 is the cleanest.
          class_labels: int [B] for a learned class embedding, a number [B] for type "timestep", [B,time_dim] for type
            "identity"; None for a model without classes.
          deterministic: False applies ``config.dropout`` and needs ``rngs={"dropout": key}``.

        Returns:
          [B,H,W,out_channels], of x's dtype.

        Raises:
          ValueError: shapes that do not fit, class labels missing or not expected.
        """
        t = jnp.asarray(t)
        check_inputs(self.config, x, t, class_labels, self.attention_impl)
        return self.run(x, t, class_labels, None, deterministic)


def example_inputs(config: UNet2DConfig) -> tuple:
    """Shapes of the arguments of a call, the smallest that the model takes."""
    x, labels = example_image_and_labels(config)
    return x, jax.ShapeDtypeStruct((1,), jnp.int32), labels
