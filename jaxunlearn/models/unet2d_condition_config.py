"""The configuration of a diffusers ``UNet2DConditionModel``: its fields, their defaults, and every value that is refused.

Field names and defaults are those of diffusers, so that ``config.json`` of a folder ``unet/`` can be read as it is. A
value that :mod:`jaxunlearn.models.unet2d_condition` does not implement is refused before anything is built or loaded;
all refusals are reported together, one line each.
"""

from __future__ import annotations

import dataclasses

from jaxunlearn.models.config_base import is_int, is_ints, strip
from jaxunlearn.models.unet_config_base import Level, UNetChecks, UNetConfig

DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")
_FIXED = {
    "only_cross_attention": (False, "transformers without self-attention are not implemented"),
    "mid_block_only_cross_attention": (None, "a middle without self-attention is not implemented"),
    "dual_cross_attention": (False, "two conditions at once are not implemented"),
    "cross_attention_norm": (None, "a normalisation of the condition is not implemented"),
    "attention_type": ("default", "gated (GLIGEN) attention is not implemented"),
    "num_attention_heads": (None, "write the number of heads into attention_head_dim, as diffusers does"),
    "reverse_transformer_layers_per_block": (None, "the way up has the depths of the way down"),
    "encoder_hid_dim": (None, "a projection of the condition is not implemented"),
    "encoder_hid_dim_type": (None, "a projection of the condition is not implemented"),
    "addition_embed_type": (None, "further conditions, as in SDXL and Kandinsky, are not implemented"),
    "class_embeddings_concat": (False, "class embeddings are added to the time embedding only"),
    "time_cond_proj_dim": (None, "a second condition of the time embedding is not implemented"),
    "timestep_post_act": (None, "the time embedding ends with its second linear layer"),
    "time_embedding_act_fn": (None, "the time embedding ends with its second linear layer"),
    "resnet_skip_time_act": (False, "residual blocks always activate the time embedding"),
    "resnet_out_scale_factor": (1.0, "outputs of residual blocks are not divided"),
    "conv_in_kernel": (3, "the first convolution is 3x3"),
    "conv_out_kernel": (3, "the last convolution is 3x3"),
}
"""Fields of which only diffusers' default is implemented, and what that means."""


@dataclasses.dataclass(frozen=True)
class UNet2DConditionConfig(UNetConfig):
    """What a ``UNet2DConditionModel`` is made of. Immutable and hashable; lists become tuples.

    Attributes:
      sample_size: H = W, or (H, W), of the latents it was made for; not enforced, the default size of sampling.
      in_channels, out_channels: channels of the input and of the output.
      center_input_sample: the input is mapped by ``x -> 2 x - 1`` first.
      flip_sin_to_cos, freq_shift: form of the sinusoidal embedding, see :func:`jaxunlearn.models.unet.sinusoid`.
      down_block_types, mid_block_type, up_block_types: one block type per level; the middle may be None.
      block_out_channels: channels per level.
      layers_per_block: residual blocks per level on the way down, one number or one per level; one more on the way up.
      downsample_padding: 1 (symmetric) or 0 (one row and column of zeros at the bottom and the right).
      mid_block_scale_factor: the outputs of the middle block's residual blocks are divided by it.
      dropout: rate inside the residual blocks, in [0, 1).
      act_fn: activation of the residual blocks, the time embedding and the output.
      norm_num_groups, norm_eps: of the group normalisations (those of the transformers have eps 1e-6).
      cross_attention_dim: width of the condition.
      transformer_layers_per_block: blocks of each transformer, one number or one per level.
      attention_head_dim: the **number of heads** (diffusers' name is wrong), one number or one per level.
      use_linear_projection: transformers begin and end with linear layers, otherwise with 1x1 convolutions.
      upcast_attention: met by the softmax, which is always computed in float32 at least.
      class_embed_type: None, "timestep" or "identity".
      num_class_embeds: number of classes of a learned class embedding (with ``class_embed_type`` None).
      resnet_time_scale_shift: "default" (the time embedding is added) or "scale_shift" (it scales and shifts).
      time_embedding_type: "positional" only.
      time_embedding_dim: width of the time embedding; None is ``4 * block_out_channels[0]``.
      addition_embed_type_num_heads, addition_time_embed_dim, projection_class_embeddings_input_dim: kept for the round
        trip, without effect.

    Of all other fields only the default is implemented.

    Raises:
      ValueError: one line for every field that is not implemented or not consistent.
    """

    class_name = "UNet2DConditionModel"

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    only_cross_attention: bool = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    reverse_transformer_layers_per_block: None = None
    encoder_hid_dim: None = None
    encoder_hid_dim_type: None = None
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: None = None
    dual_cross_attention: bool = False
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    addition_embed_type: None = None
    addition_time_embed_dim: int | None = None
    num_class_embeds: int | None = None
    upcast_attention: bool = False
    resnet_time_scale_shift: str = "default"
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    time_embedding_act_fn: None = None
    timestep_post_act: None = None
    time_cond_proj_dim: None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    projection_class_embeddings_input_dim: int | None = None
    attention_type: str = "default"
    class_embeddings_concat: bool = False
    mid_block_only_cross_attention: None = None
    cross_attention_norm: None = None
    addition_embed_type_num_heads: int = 64

    @property
    def embedding_act_fn(self) -> str:
        """Activation of the time embedding and before the last convolution."""
        return self.act_fn

    def _per_level(self, key: str) -> tuple[int, ...]:
        value = getattr(self, key)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @property
    def _levels(self) -> tuple[Level, ...]:
        """All levels with transformers, as on the way down."""
        keys = ("layers_per_block", "attention_head_dim", "transformer_layers_per_block")
        rows = zip(self.block_out_channels, *map(self._per_level, keys))
        return tuple(Level(features, layers, "cross", heads, depth) for features, layers, heads, depth in rows)

    @property
    def down_levels(self) -> tuple[Level, ...]:
        """The levels on the way down."""
        kinds = ("cross" if strip(name) == "CrossAttnDownBlock2D" else None for name in self.down_block_types)
        return tuple(level._replace(attention=kind) for level, kind in zip(self._levels, kinds))

    @property
    def middle(self) -> Level | None:
        """The middle block, with two residual blocks; None where there is none."""
        return None if self.mid_block_type is None else self._levels[-1]._replace(layers=2)

    @property
    def up_levels(self) -> tuple[Level, ...]:
        """The levels on the way up; each has one residual block more than its twin on the way down."""
        kinds = ("cross" if strip(name) == "CrossAttnUpBlock2D" else None for name in self.up_block_types)
        rows = zip(self._levels[::-1], kinds)
        return tuple(level._replace(layers=level.layers + 1, attention=kind) for level, kind in rows)

    def _problems(self) -> list[str]:
        checks = UNetChecks(self)
        check = checks.check
        checks.common()
        for key, (value, remedy) in _FIXED.items():
            checks.one_of(key, (value,), remedy)
        checks.one_of("mid_block_type", ("UNetMidBlock2DCrossAttn", None))
        for key in ("use_linear_projection", "upcast_attention"):
            check(isinstance(getattr(self, key), bool), key, "true, false")
        check(is_int(self.cross_attention_dim), "cross_attention_dim", "an integer >= 1, one width for all levels")
        if is_int(self.in_channels) and is_int(self.out_channels) and self.in_channels > self.out_channels:
            remedy = "inpainting, depth and upscaling models take further inputs, which are not implemented"
            check(False, "in_channels", f"at most out_channels, {self.out_channels}", remedy)
        remedy = "simple, resnet-sampling, K, skip and pure self-attention blocks are not implemented"
        good = checks.block_types("down_block_types", DOWN_BLOCKS, remedy)
        good = checks.block_types("up_block_types", UP_BLOCKS, remedy) and good
        channels = self.block_out_channels
        good = good and is_ints(channels)
        count = len(channels) if is_ints(channels) else None
        for key in ("layers_per_block", "attention_head_dim", "transformer_layers_per_block"):
            per_level = getattr(self, key)
            allowed = f"an integer >= 1, or a list of {count or 'them'}, one per level"
            fits = is_int(per_level) or is_ints(per_level, count)
            check(fits, key, allowed)
            good = good and fits
        if not good:
            return checks.lines
        levels = (*self.down_levels, *self.up_levels, *(() if self.middle is None else (self.middle,)))
        narrow = [level.features for level in levels if level.attention and level.heads > level.features]
        if narrow:
            allowed = f"at most {min(narrow)} where a level has {min(narrow)} channels"
            remedy = "it is the number of heads, which share the channels of a level"
            check(False, "attention_head_dim", allowed, remedy)
        return checks.lines
