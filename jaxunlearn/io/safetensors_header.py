"""The header of a safetensors file, read without the tensors and checked against the file's size."""

from __future__ import annotations

import math
import pathlib
from typing import Any, NamedTuple

from jaxunlearn.io.json_files import parse_json

MAX_HEADER = 100_000_000
"""Bytes; the format allows no longer header."""

_BYTES = dict.fromkeys(("F64", "I64", "U64", "C64"), 8) | dict.fromkeys(("F32", "I32", "U32"), 4)
_BYTES |= dict.fromkeys(("F16", "BF16", "I16", "U16"), 2) | dict.fromkeys(("I8", "U8", "BOOL"), 1)


class TensorEntry(NamedTuple):
    """What is known of a tensor without reading it: the name of its dtype as in safetensors, and its shape."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: pathlib.Path) -> tuple[dict[str, TensorEntry], dict[str, str] | None]:
    """The tensors of a safetensors file, and its metadata.

    Raises:
      ValueError: one line: not such a file, a damaged one, one cut short, a git-lfs pointer.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start == b"version ":
                raise ValueError(
                    f"{path.name}: is a git-lfs pointer, not the weights; run `git lfs pull` in the folder"
                )
            length = int.from_bytes(start, "little")
            content = file.read(length) if length <= min(size - 8, MAX_HEADER) else b""
    except OSError as error:
        raise ValueError(f"{path.name}: cannot be read: {error.strerror}") from None
    try:
        header = parse_json(content)
        metadata = header.pop("__metadata__", None)
        _check_metadata(metadata)
        entries = {name: _entry(entry) for name, entry in header.items()}
        end = _check_places(header)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error) if isinstance(error, _Damage) else "its header cannot be read"
        raise ValueError(f"{path.name}: is not a safetensors file, or is damaged ({reason}); copy it again") from None
    if 8 + length + end != size:
        raise ValueError(f"{path.name}: has {size} bytes but should have {8 + length + end}; copy it again")
    return entries, metadata


class _Damage(ValueError):
    """A defect with words of its own."""


def _check_metadata(metadata: Any) -> None:
    good = metadata is None or (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values()))
    if not good:
        raise _Damage("its __metadata__ is not a table of texts")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _entry(entry: dict[str, Any]) -> TensorEntry:
    dtype, shape = entry["dtype"], entry["shape"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise _Damage("a dtype or shape in its header is malformed")
    return TensorEntry(dtype, tuple(shape))


def _check_places(header: dict[str, Any]) -> int:
    """Number of bytes of all tensors, which must lie one after the other without gaps."""
    places = []
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        if not _is_count(start) or not _is_count(end):
            raise _Damage(f"the place of {name[:100]} is malformed")
        needed = _BYTES.get(entry["dtype"], 0) * math.prod(entry["shape"])
        if entry["dtype"] in _BYTES and end - start != needed:
            raise _Damage(f"{name[:100]} needs {needed} bytes but has {end - start}")
        places.append((start, end, name))
    last = 0
    for start, end, name in sorted(places):
        if start != last:
            raise _Damage(f"{name[:100]} begins at byte {start}, not at {last}")
        last = end
    return last
