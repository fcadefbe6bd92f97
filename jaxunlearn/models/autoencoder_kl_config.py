"""The configuration of a diffusers ``AutoencoderKL``: its fields, their defaults, and every value that is refused.

Field names and defaults are those of diffusers, so that ``config.json`` of a folder ``vae/`` can be read as it is. A
value that :mod:`jaxunlearn.models.autoencoder_kl` does not implement is refused before anything is built or loaded; all
refusals are reported together, one line each.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from jaxunlearn.models.unet_config_base import ACTIVATIONS, Checks, is_int, is_ints, is_number

LARGEST = 1_000_000
"""Bound of the factors between the latents of the autoencoder and those of the diffusion model."""


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """What an ``AutoencoderKL`` is made of. Immutable and hashable; lists become tuples.

    Attributes:
      in_channels, out_channels: channels of the images that go in and come out.
      down_block_types, up_block_types: one per level; "DownEncoderBlock2D" and "UpDecoderBlock2D" only.
      block_out_channels: channels per level.
      layers_per_block: residual blocks per level of the encoder; the decoder has one more.
      act_fn: activation of the residual blocks.
      latent_channels: channels of the latents.
      norm_num_groups: of every group normalisation.
      sample_size: H = W, or (H, W), of the images it was made for; kept for the round trip, without effect.
      scaling_factor: latents of the diffusion model = ``scaling_factor * (latents of the encoder - shift_factor)``.
      shift_factor: see there; None is 0.
      latents_mean, latents_std: None only.
      force_upcast: kept for the round trip, without effect (computations are in float32 unless asked otherwise).
      use_quant_conv, use_post_quant_conv: whether a 1x1 convolution follows the encoder, and precedes the decoder.
      mid_block_add_attention: whether the middle blocks have attention.

    The properties ``norm_eps`` to ``dropout`` are what :class:`jaxunlearn.models.blocks.Part` asks a configuration
    for; in this architecture they are fixed.

    Raises:
      ValueError: one line for every field that is not implemented or not consistent.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] | None = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: None = None
    latents_std: None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        problems = _problems(self)
        if problems:
            raise ValueError("\n".join(problems))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AutoencoderKLConfig:
        """Reads the content of a ``config.json``. Missing keys take diffusers' defaults.

        Keys that start with an underscore are passed over; other unknown keys give one warning.

        Raises:
          ValueError: one line for every refused value, also for another ``_class_name``.
        """
        problems = []
        class_name = values.get("_class_name", "AutoencoderKL")
        if class_name != "AutoencoderKL":
            problems.append(f"_class_name: {class_name!r} is not supported; allowed: 'AutoencoderKL'; use such a model")
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(k for k in values if k not in names and not k.startswith("_"))
        if unknown:
            warnings.warn(f"unknown keys in the autoencoder config have no effect: {', '.join(unknown)}", stacklevel=2)
        try:
            config = cls(**{k: v for k, v in values.items() if k in names})
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))
        return config

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values (lists, not tuples); :meth:`from_dict` reads them back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @property
    def size_divisor(self) -> int:
        """H and W of images are multiples of it, and it times those of the latents: ``2 ** (levels - 1)``."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def shift(self) -> float:
        """``shift_factor`` as a number."""
        return 0.0 if self.shift_factor is None else float(self.shift_factor)

    @property
    def norm_eps(self) -> float:
        """Of every group normalisation."""
        return 1e-6

    @property
    def downsample_padding(self) -> int:
        """The encoder pads at the bottom and the right only."""
        return 0

    @property
    def attention_head_dim(self) -> None:
        """One head over all channels."""
        return None

    @property
    def resnet_time_scale_shift(self) -> str:
        """There is no time embedding."""
        return "default"

    @property
    def dropout(self) -> float:
        """There is none."""
        return 0.0


def _problems(c: AutoencoderKLConfig) -> list[str]:
    """One line ``key: value is not supported; allowed ...; remedy`` for every refused value."""
    checks = Checks(c)
    check = checks.check
    for key in ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups"):
        check(is_int(getattr(c, key)), key, "an integer >= 1")
    for key in ("force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"):
        check(isinstance(getattr(c, key), bool), key, "true, false")
    size = c.sample_size
    check(size is None or is_int(size) or is_ints(size, 2), "sample_size", "None, an integer or two integers >= 1")
    check(isinstance(c.act_fn, str) and c.act_fn.lower() in ACTIVATIONS, "act_fn", ", ".join(map(repr, ACTIVATIONS)))
    check(
        is_number(c.scaling_factor) and 0 < c.scaling_factor <= LARGEST, "scaling_factor", f"a number in (0, {LARGEST}]"
    )
    good = c.shift_factor is None or (is_number(c.shift_factor) and abs(c.shift_factor) <= LARGEST)
    check(good, "shift_factor", f"None or a number in [-{LARGEST}, {LARGEST}]")
    for key in ("latents_mean", "latents_std"):
        remedy = "normalisation per latent channel is not implemented; use a model that states scaling_factor alone"
        check(getattr(c, key) is None, key, "None", remedy)

    check(is_ints(c.block_out_channels), "block_out_channels", "a non-empty list of integers >= 1")
    remedy = "blocks with attention, cross-attention or skips are not implemented in autoencoders"
    checks.block_types("down_block_types", ("DownEncoderBlock2D",), remedy)
    checks.block_types("up_block_types", ("UpDecoderBlock2D",), remedy)
    if is_ints(c.block_out_channels) and is_int(c.norm_num_groups):
        good = all(channels % c.norm_num_groups == 0 for channels in c.block_out_channels)
        check(good, "norm_num_groups", f"a divisor of every entry of block_out_channels {c.block_out_channels}")
    return checks.lines
