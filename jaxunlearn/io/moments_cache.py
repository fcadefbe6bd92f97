"""Moments of a data set's features as a file, which is read only for exactly the data, network and resizing of before."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import secrets
import zipfile

import numpy as np

from jaxunlearn.metrics.frechet import Moments


@dataclasses.dataclass(frozen=True)
class MomentsKey:
    """What moments were made of.

    Attributes:
      convention: how pictures were resized and scaled.
      weights_sha256: of the network.
      data_sha256: of the pictures, see :func:`data_sha256`.
    """

    convention: str
    weights_sha256: str
    data_sha256: str

    @property
    def file_name(self) -> str:
        """A name of its own for each key."""
        text = "\0".join(dataclasses.astuple(self))
        return f"moments_{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"


def data_sha256(pictures: np.ndarray, positions: np.ndarray | None = None) -> str:
    """Fingerprint of pictures uint8 [N,H,W,C], or of those at ``positions``; it depends on their order.

    Raises:
      TypeError: not uint8.
    """
    if pictures.dtype != np.uint8:
        raise TypeError(f"pictures must be uint8, got {pictures.dtype}")
    positions = np.arange(len(pictures)) if positions is None else positions
    total = hashlib.sha256(f"{(len(positions), *pictures.shape[1:])}\0".encode())
    for start in range(0, len(positions), 256):  # all at once may be too much memory
        total.update(np.ascontiguousarray(pictures[positions[start : start + 256]]))
    return total.hexdigest()


def save_moments(path: str | os.PathLike, moments: Moments, key: MomentsKey) -> None:
    """Writes moments and what they were made of, atomically; a file of this name is replaced."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, n=moments.n, mean=moments.mean, covariance=moments.covariance, **dataclasses.asdict(key))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_moments(path: str | os.PathLike, key: MomentsKey) -> Moments:
    """Reads moments that were made of exactly ``key``.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it cannot be read, or was made of something else: every difference, one line each.
    """
    path = pathlib.Path(path)
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            stored = {name: file[name] for name in file.files}
        found = MomentsKey(*(str(stored[field.name]) for field in dataclasses.fields(MomentsKey)))
        moments = Moments(int(stored["n"]), stored["mean"], stored["covariance"])
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: are no stored moments ({error}); delete the file") from None
    problems = [
        f"{path}: {name} is {getattr(found, name)}, asked for {value}; delete the file or take another folder"
        for name, value in dataclasses.asdict(key).items()
        if getattr(found, name) != value
    ]
    d = moments.mean.size
    sound = moments.mean.shape == (d,) and moments.covariance.shape == (d, d) and moments.n >= 2
    if not (sound and np.all(np.isfinite(moments.mean)) and np.all(np.isfinite(moments.covariance))):
        problems.append(f"{path}: holds no mean [d] and covariance [d,d] of finite numbers; delete the file")
    if problems:
        raise ValueError("\n".join(problems))
    return moments
