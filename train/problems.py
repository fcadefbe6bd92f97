"""Collecting what is wrong with a configuration: one line per problem."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from jaxunlearn.registry import unknown_name


class Problems:
    """Collects one line per problem: key, value, what is allowed."""

    def __init__(self, config: ConfigDict):
        self.config = config
        self.lines: list[str] = []

    def value(self, key: str) -> Any:
        """The value of a dotted key."""
        node = self.config
        for part in key.split("."):
            node = node[part]
        return node

    def check(self, key: str, allowed: str, test: Callable[[Any], bool]) -> None:
        """One line unless ``test(value)`` holds and all numbers are finite."""
        value = self.value(key)
        numbers = value if isinstance(value, tuple) else (value,)
        finite = all(not isinstance(n, float) or math.isfinite(n) for n in numbers)
        if not (finite and test(value)):
            self.lines.append(f"config.{key} = {value!r}: must be {allowed}")

    def maybe(self, key: str, allowed: str, test: Callable[[Any], bool]) -> None:
        """As :meth:`check`, for a key that may be None."""
        if self.value(key) is not None:
            self.check(key, allowed + ", or None", test)

    def maybe_name(self, key: str, kind: str, known) -> None:
        """As :meth:`name`, for a key that may be None."""
        if self.value(key) is not None:
            self.name(key, kind, known)

    def name(self, key: str, kind: str, known) -> bool:
        """One line unless the value is a known name; whether it is."""
        value = self.value(key)
        if value in known:
            return True
        self.lines.append(f"config.{key}: {unknown_name(kind, value, dict.fromkeys(known))}")
        return False

    def lines_of(self, key: str, call: Callable[[], Any]) -> None:
        """Runs a check of the library; each line of its ValueError is a problem of ``key``."""
        try:
            call()
        except ValueError as error:
            self.lines.extend(f"config.{key}: {line}" for line in str(error).splitlines() if line.strip())


def whole_numbers(values: Any) -> bool:
    """Whether this is a tuple of whole numbers."""
    return isinstance(values, tuple) and all(isinstance(v, int) and not isinstance(v, bool) for v in values)


def rising(values: tuple[int, ...]) -> bool:
    """Whether each number is larger than the one before."""
    return list(values) == sorted(set(values))


def is_number(value: Any) -> bool:
    """Whether this is an int or a float."""
    return isinstance(value, int | float) and not isinstance(value, bool)
