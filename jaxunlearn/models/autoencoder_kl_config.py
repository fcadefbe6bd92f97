"""The configuration of a diffusers ``AutoencoderKL``: its fields, their defaults, and every value that is refused.

Field names and defaults are those of diffusers, so that ``config.json`` of a folder ``vae/`` can be read as it is. A
value that :mod:`jaxunlearn.models.autoencoder_kl` does not implement is refused before anything is built or loaded; all
refusals are reported together, one line each.
"""

from __future__ import annotations

import dataclasses

from jaxunlearn.models.config_base import Checks, ModelConfig, is_int, is_number

LARGEST = 1_000_000
"""Bound of the factors between the latents of the autoencoder and those of the diffusion model."""


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig(ModelConfig):
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

    class_name = "AutoencoderKL"

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

    @property
    def size_divisor(self) -> int:
        """H and W of images are multiples of it, and it times those of the latents: ``2 ** (levels - 1)``."""
        return 2 ** (len(self.block_out_channels) - 1)

    def latent_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape (H, W, C) of an image -> (h, w, z) of its latents.

        Raises:
          ValueError: H or W is not a multiple of ``size_divisor``, or C is not ``in_channels``.
        """
        height, width, channels = shape
        divisor = self.size_divisor
        problems = []
        if height % divisor or width % divisor or 0 in (height, width):
            problems.append(
                f"image size {height}x{width} does not suit the autoencoder; height and width must be multiples of "
                f"{divisor}; pad or resize the images"
            )
        if channels != self.in_channels:
            problems.append(
                f"images have {channels} channels, the autoencoder takes {self.in_channels}; convert the images"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return height // divisor, width // divisor, self.latent_channels

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

    def _problems(self) -> list[str]:
        c, checks = self, Checks(self)
        check = checks.check
        for key in ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups"):
            check(is_int(getattr(c, key)), key, "an integer >= 1")
        for key in ("force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"):
            check(isinstance(getattr(c, key), bool), key, "true, false")
        checks.image_size()
        checks.activation()
        check(
            is_number(c.scaling_factor) and 0 < c.scaling_factor <= LARGEST,
            "scaling_factor",
            f"a number in (0, {LARGEST}]",
        )
        good = c.shift_factor is None or (is_number(c.shift_factor) and abs(c.shift_factor) <= LARGEST)
        check(good, "shift_factor", f"None or a number in [-{LARGEST}, {LARGEST}]")
        for key in ("latents_mean", "latents_std"):
            remedy = "normalisation per latent channel is not implemented; use a model that states scaling_factor alone"
            check(getattr(c, key) is None, key, "None", remedy)

        checks.channels()
        remedy = "blocks with attention, cross-attention or skips are not implemented in autoencoders"
        checks.block_types("down_block_types", ("DownEncoderBlock2D",), remedy)
        checks.block_types("up_block_types", ("UpDecoderBlock2D",), remedy)
        return checks.lines
