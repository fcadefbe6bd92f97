"""The idx format of the MNIST files: two zero bytes, a type code, the number of dimensions, their sizes, the data."""

from __future__ import annotations

import gzip
import math
import pathlib
import struct
import zlib

import numpy as np

_UBYTE = 0x08


def read_idx(path: str | pathlib.Path, ndim: int) -> np.ndarray:
    """Reads an idx file of unsigned bytes, plain or gzip-compressed (by content, not by name).

    Args:
      path: the file.
      ndim: number of dimensions that it must have: 3 for images, 1 for labels.

    Returns:
      uint8 array of ``ndim`` dimensions.

    Raises:
      ValueError: the file is missing, truncated or too long, or a header field is wrong; the sentence says which.
    """
    path = pathlib.Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"idx file {str(path)!r} cannot be read ({error.strerror}); fix: check the path") from error
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise _broken(path, f"its gzip stream is damaged or truncated ({error})") from error
    if len(data) < 4:
        raise _broken(path, f"it has {len(data)} bytes, the header alone needs 4")
    zeros, code, dims = struct.unpack(">HBB", data[:4])
    if zeros != 0:
        raise _broken(path, f"it starts with bytes {data[:2].hex()}, allowed: 0000")
    if code != _UBYTE:
        raise _broken(path, f"its type code is 0x{code:02x}, allowed: 0x08 (unsigned byte)")
    if dims != ndim:
        raise _broken(path, f"it has {dims} dimensions, {ndim} are needed (images 3, labels 1)")
    header = 4 + 4 * dims
    if len(data) < header:
        raise _broken(path, f"it has {len(data)} bytes, a header of {dims} dimensions needs {header}")
    shape = struct.unpack(f">{dims}I", data[4:header])
    if 0 in shape:
        raise _broken(path, f"its sizes {shape} contain a zero")
    expected = header + math.prod(shape)
    if len(data) != expected:
        kind = "truncated" if len(data) < expected else "too long"
        raise _broken(path, f"it is {kind}: sizes {shape} need {expected} bytes, there are {len(data)}")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def _broken(path: pathlib.Path, why: str) -> ValueError:
    return ValueError(f"{str(path)!r} is not a usable idx file: {why}; fix: download or copy the file again")
