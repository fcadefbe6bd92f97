"""What was forgotten and what was kept, as records: plain hashes for the work directory, keyed ones for reports.

A plain hash of a known picture can be linked to it, so :func:`forget_manifest` stays in the work directory. What leaves it
carries :func:`commitment`: HMAC-SHA256 under a key of 32 random bytes that stays with the user. Whoever has the key and the
pictures can verify every line; without the key nothing can be guessed.
"""

from __future__ import annotations

import collections
import hashlib
import hmac
import json
import os
import pathlib
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxunlearn.io.duplicates import pixel_message
from jaxunlearn.io.forget import Split
from jaxunlearn.io.pictures import PictureFile, reading

KEY_FILE = "commitment.key"
"""Name of the key in the work directory."""

_KEY_BYTES = 32
_KEY_WAIT_S = 2.0


def forget_manifest(split: Split) -> dict:
    """The forget set item by item, with plain hashes; for the work directory only.

    Returns:
      ``count``, ``unique`` (different pictures), ``exact_copies`` (names that were added because their pixels equal a
      named image), ``unmatched`` (forget images that the data does not hold), ``near_duplicates``, and ``items``. An item
      holds ``name``, ``caption`` (only where the data have texts), ``index``, ``sha256_file`` (of the stored bytes; null
      where an image has no file of its own), ``sha256_pixels`` (of shape as decimals, NUL, uint8 bytes), ``size``
      ([H, W, C]), ``dtype`` and ``copies`` (forget images with these pixels).
    """
    hashes = [split.digests[i].tobytes().hex() for i in split.forget]
    copies = collections.Counter(hashes)
    file_hashes = {file: hashlib.sha256(data).hexdigest() for file, data in _file_bytes(split)}
    items = [
        {
            "name": split.names[i],
            **({} if split.captions is None else {"caption": split.captions[i]}),
            "index": int(i),
            "sha256_file": file_hashes.get(_file(split, i)),
            "sha256_pixels": pixels,
            "size": [int(n) for n in split.images.shape[1:]],
            "dtype": str(split.images.dtype),
            "copies": copies[pixels],
        }
        for i, pixels in zip(split.forget, hashes)
    ]
    near = split.near_duplicates
    pairs = [
        {"name": split.names[i], "index": int(i), "nearest": split.names[j], "rms": float(r)}
        for i, j, r in zip(near.index, near.nearest, near.rms)
    ]
    return {
        "count": len(items),
        "unique": len(copies),
        "source": split.source,
        "exact_copies": [split.names[i] for i in split.exact_copies],
        "unmatched": list(split.unmatched),
        "near_duplicates": {**near_duplicate_summary(split), "pairs": pairs},
        "items": items,
    }


def keep_manifest(split: Split) -> dict:
    """The keep and the held-out set as counts and hashes of hashes, and whether they share an image with the forget set.

    A hash of hashes is the SHA-256 of the sorted pixel hashes, so it does not depend on the order of the images.
    """
    forget = {split.digests[i].tobytes() for i in split.forget}
    keep = [split.digests[i].tobytes() for i in split.keep]
    held_out = [split.digests[i].tobytes() for i in split.held_out]
    return {
        "rule": "every image of the source that is neither forgotten nor held out",
        "sampling": "one permutation of the kept images per epoch, each image once per epoch",
        "source": split.source,
        "count": len(keep),
        "hash_of_hashes": _hash_of_hashes(keep),
        "disjoint": forget.isdisjoint(keep) and forget.isdisjoint(held_out) and set(keep).isdisjoint(held_out),
        "held_out": {
            "rule": "a fixed random choice among images without an exact copy, by seed, never trained on",
            "fraction": split.held_out_fraction,
            "seed": split.seed,
            "count": len(held_out),
            "hash_of_hashes": _hash_of_hashes(held_out),
        },
    }


def near_duplicate_summary(split: Split) -> dict:
    """The search for near duplicates in the form of the report: method, threshold, found, action, searched."""
    return {
        "method": "root mean square pixel difference on the [-1, 1] scale, exact search",
        "threshold": split.near_duplicate_rms,
        "found": len(split.near_duplicates),
        "action": "moved" if split.near_duplicate_policy == "forget" else "kept",
        "searched": split.searched,
    }


def load_or_create_key(workdir: str | os.PathLike) -> bytes:
    """The key of a work directory: 32 random bytes in ``commitment.key``, readable by its owner only.

    It is made on the first call and read on every later one; two processes that start together get the same key.

    Raises:
      ValueError: the file has another length, or others may read it.
      OSError: it cannot be made or read.
    """
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / KEY_FILE
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:  # an empty one is being written by another process: its key counts
        deadline = time.monotonic() + _KEY_WAIT_S
        while path.is_file() and not path.stat().st_size and time.monotonic() < deadline:
            time.sleep(0.01)
        return read_key(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return read_key(path)


def read_key(path: str | os.PathLike) -> bytes:
    """Reads a key file.

    Raises:
      ValueError: it is missing, has another length than 32 bytes, or others than its owner may read it.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"key file {str(path)!r} does not exist; fix: copy it from the work directory of the run")
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise ValueError(
            f"key file {str(path)!r} has {len(key)} bytes; allowed: {_KEY_BYTES}; fix: restore it, the hashes of earlier "
            "reports cannot be verified without it"
        )
    mode = path.stat().st_mode & 0o777
    if os.name == "posix" and mode & 0o077:
        raise ValueError(f"key file {str(path)!r} has mode {mode:o}; allowed: 600; fix: chmod 600 {path}")
    return key


def hmac_file(key: bytes, data: bytes) -> str:
    """Hex HMAC-SHA256 of ``"file"``, NUL, the bytes of a file."""
    return hmac.new(key, b"file\0" + data, hashlib.sha256).hexdigest()


def hmac_pixels(key: bytes, image: np.ndarray) -> str:
    """Hex HMAC-SHA256 of ``"pixels"``, NUL, shape as decimals with commas, NUL, uint8 bytes of an image [H, W, C]."""
    return hmac.new(key, b"pixels\0" + pixel_message(image), hashlib.sha256).hexdigest()


def merkle_root(leaves: Sequence[str]) -> str:
    """Hex root of a Merkle tree over hex hashes, in their order.

    leaf = SHA-256(00, bytes), node = SHA-256(01, left, right); the left part holds the largest power of two of leaves
    that is smaller than their number (the tree of RFC 6962). No leaves: SHA-256 of nothing.
    """

    def root(level: list[bytes]) -> bytes:
        if len(level) == 1:
            return hashlib.sha256(b"\0" + level[0]).digest()
        half = 1 << ((len(level) - 1).bit_length() - 1)
        return hashlib.sha256(b"\1" + root(level[:half]) + root(level[half:])).digest()

    return (root([bytes.fromhex(h) for h in leaves]) if leaves else hashlib.sha256(b"").digest()).hex()


def commitment(split: Split, key: bytes) -> dict:
    """The ``forget_set`` block of a report: keyed hashes only, no name and no plain hash.

    Returns:
      ``n``, ``commitment`` (the method), ``root`` over ``hmac_pixels`` in the order of ``items``, ``items`` with
      ``hmac_file`` (null where an image has no file) and ``hmac_pixels``, and ``near_duplicates``.
    """
    file_hashes = {file: hmac_file(key, data) for file, data in _file_bytes(split)}
    items = [
        {"hmac_file": file_hashes.get(_file(split, i)), "hmac_pixels": hmac_pixels(key, split.images[i])}
        for i in split.forget
    ]
    return {
        "n": len(items),
        "commitment": "merkle-hmac-sha256",
        "root": merkle_root([item["hmac_pixels"] for item in items]),
        "items": items,
        "near_duplicates": near_duplicate_summary(split),
    }


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Writes JSON atomically: to a temporary file beside it, which then takes its name. Folders are made.

    NumPy numbers and arrays and paths are converted.

    Raises:
      ValueError: a number is not finite (JSON has no word for it; write None and a reason).
      TypeError: a type that JSON does not know.
    """
    path = pathlib.Path(path)
    try:
        text = json.dumps(obj, indent=2, allow_nan=False, default=_plain) + "\n"
    except ValueError as error:
        raise ValueError(
            f"{path.name}: {error}; allowed: finite numbers; fix: store None and the reason instead of NaN or infinity"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON; allowed: numbers, text, lists, dicts, None")


def _hash_of_hashes(digests: list[bytes]) -> str:
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _file(split: Split, index: int) -> PictureFile | None:
    return None if split.files is None else split.files[index]


def _file_bytes(split: Split) -> Iterator[tuple[PictureFile, bytes]]:
    """Every different file of the forget set with its bytes; the copies of one planted picture are read once."""
    files = [f for f in dict.fromkeys(_file(split, i) for i in split.forget) if f is not None]
    with reading(files) as read:
        for file in files:
            yield file, read(file)
