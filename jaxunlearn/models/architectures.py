"""ARCHITECTURES: every model class of diffusers and transformers that is implemented here, under its name there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxunlearn.models import unet2d
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
