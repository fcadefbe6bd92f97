"""The configuration of a diffusers ``UNet2DModel``: its fields, their defaults, and every value that is refused.

Field names and defaults are those of diffusers, so that ``config.json`` of a model folder can be read as it is. A value
that :mod:`jaxunlearn.models.unet2d` does not implement is refused before anything is built or loaded; all refusals are
reported together, one line each.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import Any

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D")
ACTIVATIONS = ("silu", "swish", "gelu", "relu", "mish")
_EMA_KEYS = frozenset(
    ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
)


@dataclasses.dataclass(frozen=True)
class UNet2DConfig:
    """What a ``UNet2DModel`` is made of. Immutable and hashable; lists become tuples.

    Attributes:
      sample_size: H = W, or (H, W), of the images it was made for; not enforced, the default size of sampling.
      in_channels, out_channels: channels of the input and of the output.
      center_input_sample: the input is mapped by ``x -> 2 x - 1`` first.
      time_embedding_type: "positional" only.
      time_embedding_dim: width of the time embedding; None is ``4 * block_out_channels[0]``.
      freq_shift, flip_sin_to_cos: form of the sinusoidal embedding, see :func:`jaxunlearn.models.unet2d.sinusoid`.
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

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        problems = _problems(self)
        if problems:
            raise ValueError("\n".join(problems))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UNet2DConfig:
        """Reads the content of a ``config.json``. Missing keys take diffusers' defaults.

        Keys that start with an underscore and those of diffusers' EMA folders are passed over; other unknown keys give
        one warning. A file of diffusers before 0.2 without ``attention_head_dim`` means one head, not the later
        default of 8 channels a head; this too gives a warning.

        Raises:
          ValueError: one line for every refused value, also for another ``_class_name``.
        """
        values = dict(values)
        problems = []
        class_name = values.get("_class_name", "UNet2DModel")
        if class_name != "UNet2DModel":
            problems.append(f"_class_name: {class_name!r} is not supported; allowed: 'UNet2DModel'; use such a model")
        version = str(values.get("_diffusers_version", ""))
        if "attention_head_dim" not in values and _before_0_2(version):
            warnings.warn(
                f"attention_head_dim is missing and the file is of diffusers {version}: one head over all channels is "
                "used, as that version did; write the key to be rid of this warning",
                stacklevel=2,
            )
            values["attention_head_dim"] = None
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(k for k in values if k not in names and not k.startswith("_") and k not in _EMA_KEYS)
        if unknown:
            warnings.warn(f"unknown keys in the model config have no effect: {', '.join(unknown)}", stacklevel=2)
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
    def time_dim(self) -> int:
        """Width of the time embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def has_classes(self) -> bool:
        """Whether the model takes ``class_labels``."""
        return self.class_embed_type is not None or self.num_class_embeds is not None

    @property
    def size_divisor(self) -> int:
        """H and W must be multiples of it: ``2 ** (levels - 1)``."""
        return 2 ** (len(self.block_out_channels) - 1)

    def block_type(self, name: str) -> str:
        """A block type without the prefix ``UNetRes`` of old files."""
        return _strip(name)


def _strip(name: Any) -> Any:
    return name[7:] if isinstance(name, str) and name.startswith("UNetRes") else name


def _before_0_2(version: str) -> bool:
    match = re.match(r"(\d+)\.(\d+)", version)
    return match is not None and (int(match[1]), int(match[2])) < (0, 2)


def _is_int(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _problems(c: UNet2DConfig) -> list[str]:
    """One line ``key: value is not supported; allowed ...; remedy`` for every refused value."""
    lines = []

    def check(good: bool, key: str, allowed: str, remedy: str = "change the value", value: Any = dataclasses.MISSING):
        if not good:
            shown = getattr(c, key) if value is dataclasses.MISSING else value
            lines.append(f"{key}: {shown!r} is not supported; allowed: {allowed}; {remedy}")

    def one_of(key: str, allowed: tuple, remedy: str = "use a model with one of these"):
        check(getattr(c, key) in allowed, key, ", ".join(map(repr, allowed)), remedy)

    size = c.sample_size
    pair = isinstance(size, tuple) and len(size) == 2 and all(map(_is_int, size))
    check(size is None or _is_int(size) or pair, "sample_size", "None, an integer or two integers >= 1")
    for key in ("in_channels", "out_channels", "layers_per_block", "norm_num_groups"):
        check(_is_int(getattr(c, key)), key, "an integer >= 1")
    for key in ("attention_head_dim", "attn_norm_num_groups", "num_class_embeds", "num_train_timesteps"):
        check(getattr(c, key) is None or _is_int(getattr(c, key)), key, "None or an integer >= 1")
    check(c.time_embedding_dim is None or _is_int(c.time_embedding_dim, 0), "time_embedding_dim", "None or an integer")
    for key in ("center_input_sample", "flip_sin_to_cos", "add_attention"):
        check(isinstance(getattr(c, key), bool), key, "true, false")
    one_of("time_embedding_type", ("positional",), "fourier and learned time embeddings are not implemented")
    one_of("mid_block_type", ("UNetMidBlock2D", None))
    one_of("resnet_time_scale_shift", ("default", "scale_shift"))
    one_of("class_embed_type", (None, "timestep", "identity"))
    one_of("downsample_padding", (0, 1))
    one_of("downsample_type", ("conv", "resnet"))
    one_of("upsample_type", ("conv", "resnet"))
    check(isinstance(c.act_fn, str) and c.act_fn.lower() in ACTIVATIONS, "act_fn", ", ".join(map(repr, ACTIVATIONS)))
    check(_is_number(c.dropout) and 0 <= c.dropout < 1, "dropout", "a number in [0, 1)")
    check(_is_number(c.norm_eps) and c.norm_eps > 0, "norm_eps", "a number > 0")
    check(_is_number(c.mid_block_scale_factor) and c.mid_block_scale_factor != 0, "mid_block_scale_factor", "not 0")

    channels = c.block_out_channels
    good_channels = isinstance(channels, tuple) and len(channels) > 0 and all(map(_is_int, channels))
    check(good_channels, "block_out_channels", "a non-empty list of integers >= 1")
    attention = []
    for key, allowed in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        types = getattr(c, key)
        if not isinstance(types, tuple):
            check(False, key, "a list of block types")
            continue
        for i, name in enumerate(types):
            remedy = "skip, resnet-sampling, K and cross-attention blocks are not implemented"
            check(_strip(name) in allowed, f"{key}[{i}]", ", ".join(allowed), remedy, name)
        if good_channels and len(types) != len(channels):
            check(
                False, key, f"{len(channels)} block types, as many as block_out_channels", "make the lists equally long"
            )
        elif good_channels:
            levels = channels if key == "down_block_types" else channels[::-1]
            attention += [n for n, name in zip(levels, types) if str(_strip(name)).startswith("Attn")]
    if good_channels:
        half = channels[0] // 2
        check(
            _is_number(c.freq_shift) and half > 0 and c.freq_shift != half, "freq_shift", f"a number other than {half}"
        )
        if c.mid_block_type is not None and c.add_attention:
            attention.append(channels[-1])
        if _is_int(c.norm_num_groups) and any(n % c.norm_num_groups for n in channels):
            check(False, "norm_num_groups", f"a divisor of every entry of block_out_channels {channels}")
        if _is_int(c.attn_norm_num_groups) and c.mid_block_type is not None and c.add_attention:
            good = channels[-1] % c.attn_norm_num_groups == 0
            check(good, "attn_norm_num_groups", f"a divisor of the last entry of block_out_channels, {channels[-1]}")
        if _is_int(c.attention_head_dim) and attention and c.attention_head_dim > min(attention):
            allowed = f"at most {min(attention)}, the least number of channels with attention, or None for one head"
            check(False, "attention_head_dim", allowed)
    return lines
