"""ARCHITECTURES: every model class of diffusers and transformers that is implemented here, under its name there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxunlearn.models import autoencoder_kl, clip_text, unet2d, unet2d_condition
from jaxunlearn.models.autoencoder_kl_config import AutoencoderKLConfig
from jaxunlearn.models.clip_text_config import CLIPTextConfig
from jaxunlearn.models.unet2d_condition_config import UNet2DConditionConfig
from jaxunlearn.models.unet2d_config import UNet2DConfig


class Architecture(NamedTuple):
    """What belongs to one class of models.

    Attributes:
      config: its frozen configuration, with ``from_dict`` and ``to_dict``.
      module: ``(config, **settings) -> flax.linen.Module``; settings are ``dtype``, ``fast`` and so on.
      example_inputs: ``config -> `` shapes of the arguments of a call, from which the parameters' shapes follow.
    """

    config: type
    module: Callable[..., Any]
    example_inputs: Callable[[Any], tuple]


ARCHITECTURES: dict[str, Architecture] = {
    "UNet2DModel": Architecture(UNet2DConfig, unet2d.UNet2D, unet2d.example_inputs),
    "UNet2DConditionModel": Architecture(
        UNet2DConditionConfig, unet2d_condition.UNet2DCondition, unet2d_condition.example_inputs
    ),
    "AutoencoderKL": Architecture(AutoencoderKLConfig, autoencoder_kl.AutoencoderKL, autoencoder_kl.example_inputs),
    "CLIPTextModel": Architecture(CLIPTextConfig, clip_text.CLIPText, clip_text.example_inputs),
}
"""``_class_name`` of a ``config.json`` -> :class:`Architecture`."""


def architecture_of(config: Any) -> Architecture:
    """The architecture that a configuration belongs to.

    Raises:
      TypeError: it is the configuration of none of them.
    """
    for architecture in ARCHITECTURES.values():
        if type(config) is architecture.config:
            return architecture
    known = ", ".join(architecture.config.__name__ for architecture in ARCHITECTURES.values())
    raise TypeError(f"{type(config).__name__} is not the configuration of a model; known: {known}")
