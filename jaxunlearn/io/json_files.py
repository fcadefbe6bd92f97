"""JSON from folders that other people made: every defect is one ValueError."""

from __future__ import annotations

import collections
import json
import math
import pathlib
from typing import Any

MAX_BYTES = 64 * 2**20
"""No description of a model is longer."""


def parse_json(content: bytes) -> Any:
    """The value of a JSON text. Numbers must be finite, and no key may stand twice in one object.

    Raises:
      ValueError: what is wrong, in a few words.
    """
    try:
        return json.loads(content, object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None


def read_object(root: pathlib.Path, name: str) -> dict[str, Any]:
    """The object in the JSON file ``name`` below ``root``.

    Raises:
      ValueError: one line that begins with ``name``: no such file, not JSON, not an object.
    """
    file = root / name
    if not file.is_file():
        raise ValueError(f"{name}: is not there; copy it as well")
    try:
        content = parse_json(read_bytes(file))
    except ValueError as error:
        raise ValueError(f"{name}: is not JSON ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name}: must hold an object, not a {type(content).__name__}")
    return content


def read_bytes(file: pathlib.Path) -> bytes:
    """The content of a file that describes a model.

    Raises:
      ValueError: it cannot be read, is longer than :data:`MAX_BYTES`, or is a git-lfs pointer.
    """
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"it has {size} bytes, more than {MAX_BYTES}")
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror}") from None
    if content.startswith(b"version https://git-lfs"):
        raise ValueError("it is a git-lfs pointer; run `git lfs pull` in the folder")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:60]!r} stands twice in one object")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return float(text)
