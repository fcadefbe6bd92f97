"""The configuration of a diffusers ``UNet2DModel``: its fields, their defaults, and every value that is refused.

Field names and defaults are those of diffusers, so that ``config.json`` of a model folder can be read as it is. A value
that :mod:`jaxunlearn.models.unet2d` does not implement is refused before anything is built or loaded; all refusals are
reported together, one line each.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from typing import Any

from jaxunlearn.models.config_base import is_int, is_ints, strip
from jaxunlearn.models.unet_config_base import Level, UNetChecks, UNetConfig

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D")


@dataclasses.dataclass(frozen=True)
class UNet2DConfig(UNetConfig):
    """What a ``UNet2DModel`` is made of. Immutable and hashable; lists become tuples.

    Attributes:
      sample_size: H = W, or (H, W), of the images it was made for; not enforced, the default size of sampling.
      in_channels, out_channels: channels of the input and of the output.
      center_input_sample: the input is mapped by ``x -> 2 x - 1`` first.
      time_embedding_type: "positional" only.
      time_embedding_dim: width of the time embedding; None is ``4 * block_out_channels[0]``.
      freq_shift, flip_sin_to_cos: form of the sinusoidal embedding, see :func:`jaxunlearn.models.unet.sinusoid`.
      down_block_types, mid_block_type, up_block_types: one block type per level; the middle may be None.
      block_out_channels: channels per level.
      layers_per_block: residual blocks per level on the way down; one more on the way up.
      mid_block_scale_factor: the outputs of the middle block's residual parts are divided by it.
      downsample_padding: 1 (symmetric) or 0 (one row and column of zeros at the bottom and the right).
      downsample_type, upsample_type: "conv" or "resnet"; "resnet" has an effect in attention blocks only.
      dropout: rate inside the residual blocks, in [0, 1).
      act_fn: activation of the residual blocks.
      attention_head_dim: channels per head; None is one head over all channels.
      norm_num_groups, norm_eps: of every group normalisation.
      attn_norm_num_groups: groups of the middle attention's normalisation. None: ``norm_num_groups`` where
        ``resnet_time_scale_shift`` is "default", otherwise that attention has no normalisation.
      resnet_time_scale_shift: "default" (the time embedding is added) or "scale_shift" (it scales and shifts).
      add_attention: whether the middle block has attention.
      class_embed_type: None, "timestep" or "identity".
      num_class_embeds: number of classes of a learned class embedding (with ``class_embed_type`` None).
      num_train_timesteps: kept for the round trip, without effect.

    Raises:
      ValueError: one line for every field that is not implemented or not consistent.
    """

    class_name = "UNet2DModel"

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None

    @classmethod
    def _corrected(cls, values: dict[str, Any]) -> dict[str, Any]:
        """diffusers before 0.2 had one head where ``attention_head_dim`` is missing, not the later 8 channels a head."""
        version = str(values.get("_diffusers_version", ""))
        if "attention_head_dim" in values or not _before_0_2(version):
            return values
        warnings.warn(
            f"attention_head_dim is missing and the file is of diffusers {version}: one head over all channels is "
            "used, as that version did; write the key to be rid of this warning",
            stacklevel=3,
        )
        return values | {"attention_head_dim": None}

    @property
    def embedding_act_fn(self) -> str:
        """Activation of the time embedding and before the last convolution: always SiLU, whatever ``act_fn`` is."""
        return "silu"

    @property
    def down_levels(self) -> tuple[Level, ...]:
        """The levels on the way down."""
        kinds = ("self" if strip(name) == "AttnDownBlock2D" else None for name in self.down_block_types)
        return tuple(Level(n, self.layers_per_block, kind) for n, kind in zip(self.block_out_channels, kinds))

    @property
    def middle(self) -> Level | None:
        """The middle block, with two residual blocks; None where there is none."""
        if self.mid_block_type is None:
            return None
        return Level(self.block_out_channels[-1], 2, "self" if self.add_attention else None)

    @property
    def up_levels(self) -> tuple[Level, ...]:
        """The levels on the way up; each has one residual block more than its twin on the way down."""
        kinds = ("self" if strip(name) == "AttnUpBlock2D" else None for name in self.up_block_types)
        return tuple(Level(n, self.layers_per_block + 1, kind) for n, kind in zip(self.block_out_channels[::-1], kinds))

    def _problems(self) -> list[str]:
        checks = UNetChecks(self)
        check, one_of = checks.check, checks.one_of
        checks.common()
        check(is_int(self.layers_per_block), "layers_per_block", "an integer >= 1")
        for key in ("attention_head_dim", "attn_norm_num_groups", "num_train_timesteps"):
            check(getattr(self, key) is None or is_int(getattr(self, key)), key, "None or an integer >= 1")
        check(isinstance(self.add_attention, bool), "add_attention", "true, false")
        one_of("mid_block_type", ("UNetMidBlock2D", None))
        one_of("downsample_type", ("conv", "resnet"))
        one_of("upsample_type", ("conv", "resnet"))
        remedy = "skip, resnet-sampling, K and cross-attention blocks are not implemented"
        good_down = checks.block_types("down_block_types", DOWN_BLOCKS, remedy)
        good_up = checks.block_types("up_block_types", UP_BLOCKS, remedy)
        if not is_ints(self.block_out_channels) or not is_int(self.layers_per_block):
            return checks.lines
        middle = self.mid_block_type is not None and self.add_attention is True
        if is_int(self.attn_norm_num_groups) and middle:
            width = self.block_out_channels[-1]
            allowed = f"a divisor of the last entry of block_out_channels, {width}"
            check(width % self.attn_norm_num_groups == 0, "attn_norm_num_groups", allowed)
        levels = (self.down_levels if good_down else ()) + (self.up_levels if good_up else ())
        widths = [level.features for level in levels if level.attention] + [self.block_out_channels[-1]] * middle
        if is_int(self.attention_head_dim) and widths:
            allowed = f"at most {min(widths)}, the least number of channels with attention, or None for one head"
            check(self.attention_head_dim <= min(widths), "attention_head_dim", allowed)
        return checks.lines


def _before_0_2(version: str) -> bool:
    match = re.match(r"(\d+)\.(\d+)", version)
    return match is not None and (int(match[1]), int(match[2])) < (0, 2)
