"""Fingerprints of parameters and files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

import jax
import numpy as np

from jaxunlearn.types import PyTree


def tree_sha256(params: PyTree) -> str:
    """SHA-256 of a parameter tree (nested mappings of arrays), as 64 hexadecimal digits.

    Leaves are sorted by their dotted path. The digest of a leaf is the SHA-256 of path, dtype and shape, each followed by
    a zero byte, and of its values in C order and little-endian. The result is the SHA-256 of the digests one after the
    other. It does not depend on sharding, on the file format or on the kind of array; it depends on every bit.

    >>> tree_sha256({"b": {"kernel": np.zeros((1, 2), np.float32)}})[:16]
    '7d5abb49855f6b9a'

    Raises:
      ValueError: a part of a path contains a dot, so that two trees could share one fingerprint.
    """
    total = hashlib.sha256()
    for path, leaf in sorted(_leaves(params), key=lambda pair: pair[0]):
        array = np.asarray(jax.device_get(leaf))
        array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False)).reshape(array.shape)
        shape = ",".join(map(str, array.shape))
        digest = hashlib.sha256(b"".join(part.encode() + b"\0" for part in (path, array.dtype.name, shape)))
        digest.update(array.tobytes())
        total.update(digest.digest())
    return total.hexdigest()


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _leaves(params: PyTree, prefix: str = ""):
    for name, value in params.items():
        if "." in name:
            raise ValueError(f"parameter name {name!r} contains a dot; paths are joined by dots")
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
