"""What all columns share and what is computed when the first one asks for it: features of the data, loaded networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class OncePerRun(Generic[Value]):
    """A value that belongs to one run: made at the first call, and again only for another run.

    The run is known by an object of it (its references, its settings), which must be the same object each time.

    >>> once = OncePerRun()
    >>> run = object()
    >>> [once(run, lambda: "first"), once(run, lambda: "second")]
    ['first', 'first']
    """

    def __init__(self):
        """Nothing is computed yet."""
        self._run: Any = None
        self._value: Value | None = None

    def __call__(self, run: Any, make: Callable[[], Value]) -> Value:
        """The run's value, from ``make`` if it is the first time."""
        if self._run is not run:
            self._run, self._value = None, None  # frees the old one first
            self._value = make()
            self._run = run
        return self._value
