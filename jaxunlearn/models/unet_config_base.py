"""What the configurations of all UNets share: reading and writing, derived sizes, and the checks of common fields."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

ACTIVATIONS = ("silu", "swish", "gelu", "relu", "mish")
_EMA_KEYS = frozenset(
    ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
)


class Level(NamedTuple):
    """One level of a UNet.

    Attributes:
      features: output channels.
      layers: number of residual blocks.
      attention: after each of them None, "self" (over the pixels) or "cross" (a transformer that also sees the condition).
      heads: of a transformer.
      depth: blocks of a transformer.
    """

    features: int
    layers: int
    attention: str | None = None
    heads: int = 1
    depth: int = 1


class UNetConfig:
    """Base of the frozen dataclasses :class:`UNet2DConfig` and :class:`UNet2DConditionConfig`."""

    class_name: ClassVar[str]
    """The ``_class_name`` of such a model in diffusers."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        problems = self._problems()
        if problems:
            raise ValueError("\n".join(problems))

    def _problems(self) -> list[str]:
        """One line ``key: value is not supported; allowed ...; remedy`` for every refused value."""
        raise NotImplementedError

    @classmethod
    def _corrected(cls, values: dict[str, Any]) -> dict[str, Any]:
        """What an old file means in today's fields."""
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads the content of a ``config.json``. Missing keys take diffusers' defaults.

        Keys that start with an underscore and those of diffusers' EMA folders are passed over; other unknown keys give
        one warning. What old versions of diffusers meant by a missing key is respected, with a warning.

        Raises:
          ValueError: one line for every refused value, also for another ``_class_name``.
        """
        values = cls._corrected(dict(values))
        problems = []
        class_name = values.get("_class_name", cls.class_name)
        if class_name != cls.class_name:
            problems.append(
                f"_class_name: {class_name!r} is not supported; allowed: {cls.class_name!r}; use such a model"
            )
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


def strip(name: Any) -> Any:
    """A block type without the prefix ``UNetRes`` of old files."""
    return name[7:] if isinstance(name, str) and name.startswith("UNetRes") else name


def is_int(value: Any, least: int = 1) -> bool:
    """Whether it is an integer of at least ``least``; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_ints(value: Any, count: int | None = None) -> bool:
    """Whether it is a non-empty tuple of integers >= 1, of ``count`` entries where that is given."""
    return isinstance(value, tuple) and len(value) > 0 and all(map(is_int, value)) and count in (None, len(value))


def is_number(value: Any) -> bool:
    """Whether it is an integer or a float; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


class Checks:
    """Collects one line for every value of a configuration that is refused.

    Attributes:
      lines: ``key: value is not supported; allowed: ...; remedy``.
    """

    def __init__(self, config: UNetConfig):
        self.config = config
        self.lines: list[str] = []

    def check(
        self,
        good: bool,
        key: str,
        allowed: str,
        remedy: str = "change the value",
        value: Any = dataclasses.MISSING,
    ) -> None:
        """Adds a line unless ``good``; ``value`` is shown where it is not the whole field."""
        if not good:
            shown = getattr(self.config, key) if value is dataclasses.MISSING else value
            self.lines.append(f"{key}: {shown!r} is not supported; allowed: {allowed}; {remedy}")

    def one_of(self, key: str, allowed: tuple, remedy: str = "use a model with one of these") -> None:
        """The field must be one of ``allowed``."""
        self.check(getattr(self.config, key) in allowed, key, ", ".join(map(repr, allowed)), remedy)

    def common(self) -> None:
        """The fields that all UNets have, except for the lists per level."""
        c, check = self.config, self.check
        size = c.sample_size
        check(size is None or is_int(size) or is_ints(size, 2), "sample_size", "None, an integer or two integers >= 1")
        for key in ("in_channels", "out_channels", "norm_num_groups"):
            check(is_int(getattr(c, key)), key, "an integer >= 1")
        check(c.num_class_embeds is None or is_int(c.num_class_embeds), "num_class_embeds", "None or an integer >= 1")
        good = c.time_embedding_dim is None or is_int(c.time_embedding_dim, 0)
        check(good, "time_embedding_dim", "None or an integer")
        for key in ("center_input_sample", "flip_sin_to_cos"):
            check(isinstance(getattr(c, key), bool), key, "true, false")
        self.one_of("time_embedding_type", ("positional",), "fourier and learned time embeddings are not implemented")
        self.one_of("resnet_time_scale_shift", ("default", "scale_shift"))
        self.one_of("class_embed_type", (None, "timestep", "identity"))
        self.one_of("downsample_padding", (0, 1))
        good = isinstance(c.act_fn, str) and c.act_fn.lower() in ACTIVATIONS
        check(good, "act_fn", ", ".join(map(repr, ACTIVATIONS)))
        check(is_number(c.dropout) and 0 <= c.dropout < 1, "dropout", "a number in [0, 1)")
        check(is_number(c.norm_eps) and c.norm_eps > 0, "norm_eps", "a number > 0")
        good = is_number(c.mid_block_scale_factor) and c.mid_block_scale_factor != 0
        check(good, "mid_block_scale_factor", "not 0")
        check(is_ints(c.block_out_channels), "block_out_channels", "a non-empty list of integers >= 1")
        if is_ints(c.block_out_channels):
            half = c.block_out_channels[0] // 2
            good = is_number(c.freq_shift) and half > 0 and c.freq_shift != half
            check(good, "freq_shift", f"a number other than {half}")
            if is_int(c.norm_num_groups) and any(n % c.norm_num_groups for n in c.block_out_channels):
                allowed = f"a divisor of every entry of block_out_channels {c.block_out_channels}"
                check(False, "norm_num_groups", allowed)

    def block_types(self, key: str, allowed: tuple[str, ...], remedy: str) -> bool:
        """One allowed type per level; returns whether the list is good."""
        types, channels, before = getattr(self.config, key), self.config.block_out_channels, len(self.lines)
        if not isinstance(types, tuple):
            self.check(False, key, "a list of block types")
            return False
        for i, name in enumerate(types):
            self.check(strip(name) in allowed, f"{key}[{i}]", ", ".join(allowed), remedy, name)
        if is_ints(channels) and len(types) != len(channels):
            wanted = f"{len(channels)} block types, as many as block_out_channels"
            self.check(False, key, wanted, "make the lists equally long")
        return len(self.lines) == before
