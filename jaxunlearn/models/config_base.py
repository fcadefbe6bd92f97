"""What all model configurations share: reading and writing of ``config.json``, and the wording of what is refused."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Self

ACTIVATIONS = ("silu", "swish", "gelu", "relu", "mish")
"""The activations of diffusers' residual blocks that are implemented."""


class ModelConfig:
    """Base of the frozen dataclasses that say what a model is made of; lists become tuples.

    Attributes:
      class_name: the ``_class_name`` of such a model.
      ignored: keys without effect that are passed over without a warning.
    """

    class_name: ClassVar[str]
    ignored: ClassVar[frozenset[str]] = frozenset()

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
        """What an old or nested file means in today's fields."""
        return values

    @classmethod
    def _of_another_class(cls, values: Mapping[str, Any]) -> list[str]:
        """Lines for a file that belongs to another class of models."""
        name = values.get("_class_name", cls.class_name)
        if name == cls.class_name:
            return []
        return [f"_class_name: {name!r} is not supported; allowed: {cls.class_name!r}; use such a model"]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads the content of a ``config.json``. Missing keys take the defaults of diffusers or transformers.

        Keys that start with an underscore and those without effect are passed over; other unknown keys give one
        warning. What old versions meant by a missing key is respected, with a warning.

        Raises:
          ValueError: one line for every refused value, also for another class of models.
        """
        problems = cls._of_another_class(values)
        values = cls._corrected(dict(values))
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(k for k in values if k not in names and not k.startswith("_") and k not in cls.ignored)
        if unknown:
            shown = ", ".join(unknown)
            warnings.warn(f"unknown keys in the {cls.class_name} config have no effect: {shown}", stacklevel=2)
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

    def __init__(self, config: ModelConfig):
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

    def image_size(self) -> None:
        """``sample_size``, which has no effect."""
        size = self.config.sample_size
        good = size is None or is_int(size) or is_ints(size, 2)
        self.check(good, "sample_size", "None, an integer or two integers >= 1")

    def activation(self) -> None:
        """``act_fn`` of the residual blocks."""
        name = self.config.act_fn
        good = isinstance(name, str) and name.lower() in ACTIVATIONS
        self.check(good, "act_fn", ", ".join(map(repr, ACTIVATIONS)))

    def channels(self) -> None:
        """``block_out_channels``, and ``norm_num_groups``, which divides them."""
        channels, groups = self.config.block_out_channels, self.config.norm_num_groups
        self.check(is_ints(channels), "block_out_channels", "a non-empty list of integers >= 1")
        if is_ints(channels) and is_int(groups) and any(n % groups for n in channels):
            self.check(False, "norm_num_groups", f"a divisor of every entry of block_out_channels {channels}")

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


def strip(name: Any) -> Any:
    """A block type without the prefix ``UNetRes`` of old files."""
    return name[7:] if isinstance(name, str) and name.startswith("UNetRes") else name
