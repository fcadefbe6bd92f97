"""Looking a name up in a registry, with the suggestion that a typing error deserves."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any


def unknown_name(kind: str, name: Any, known: Collection[str]) -> str:
    """The one sentence about a name that is not there: ``unknown method 'sis'; did you mean 'siss'? known: ...``.

    >>> unknown_name("method", "sis", {"naive": 0, "siss": 1})
    "unknown method 'sis'; did you mean 'siss'? known: naive, siss"
    """
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f" did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r};{hint} known: {', '.join(known)}"


def look_up(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    """``known[name]``.

    Raises:
      ValueError: the name is not there; the message suggests the closest one and lists all.
    """
    if name not in known:
        raise ValueError(unknown_name(kind, name, known))
    return known[name]
