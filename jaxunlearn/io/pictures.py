"""Picture files: finding them in a folder or a zip archive, decoding them, and bringing them to one size.

One rule for every picture, so that the same file always gives the same pixels, wherever it is read from:

1. the first frame is decoded; orientation tags are ignored, as torchvision's and diffusers' loaders do;
2. colours are converted to grey ("L", ITU-R 601) or RGB; transparency is dropped;
3. if another size is asked for, the centre is cropped to its aspect ratio and resized with Pillow's antialiased bicubic
   filter. A picture that already has the size is left as it is, byte for byte.
"""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".pgm", ".ppm", ".tif", ".tiff")
"""File name endings that count as pictures (in any case of letters)."""

_GREY_MODES = ("1", "L", "LA")


class PictureFile(NamedTuple):
    """Where the bytes of a picture are.

    Attributes:
      path: a file, or the zip archive that holds it.
      member: name inside the archive, None for a plain file.
    """

    path: str
    member: str | None = None

    def read(self) -> bytes:
        """The stored bytes, undecoded."""
        if self.member is None:
            return pathlib.Path(self.path).read_bytes()
        with zipfile.ZipFile(self.path) as archive:
            return archive.read(self.member)


def split_zip(path: str | os.PathLike) -> tuple[pathlib.Path, str] | None:
    """``a/b.zip/train`` -> (``a/b.zip``, ``train``); None if no part of the path is a zip file."""
    path = pathlib.Path(path)
    for candidate in (path, *path.parents):
        if candidate.is_file():
            if not zipfile.is_zipfile(candidate):
                return None
            return candidate, "" if candidate == path else path.relative_to(candidate).as_posix()
    return None


def list_pictures(path: str | os.PathLike) -> dict[str, PictureFile]:
    """All pictures below ``path``, sorted by name.

    Args:
      path: a folder, a .zip file, a folder inside a .zip file (``x.zip/train``), or one picture file.

    Returns:
      relative name with forward slashes -> where it is. Hidden files and the resource forks of macOS are left out.

    Raises:
      ValueError: nothing is there, or it holds no picture.
    """
    root = pathlib.Path(path)
    inside = split_zip(root)
    if inside is not None:
        archive_path, prefix = inside
        prefix = prefix + "/" if prefix else ""
        with zipfile.ZipFile(archive_path) as archive:
            members = [info.filename for info in archive.infolist() if not info.is_dir()]
        found = {m[len(prefix) :]: PictureFile(str(archive_path), m) for m in members if m.startswith(prefix)}
    elif root.is_dir():
        found = {}
        for folder, _, files in os.walk(root):
            for file in files:
                full = pathlib.Path(folder, file)
                found[full.relative_to(root).as_posix()] = PictureFile(str(full))
    elif root.is_file():
        found = {root.name: PictureFile(str(root))}
    else:
        raise ValueError(
            f"{str(path)!r} does not exist; allowed: a folder of pictures, a .zip file, or a folder inside a .zip file; "
            "fix: check the path"
        )
    visible = {n: f for n, f in found.items() if not any(p.startswith(".") or p == "__MACOSX" for p in n.split("/"))}
    pictures = {name: visible[name] for name in sorted(visible) if name.lower().endswith(EXTENSIONS)}
    if not pictures:
        endings = sorted({pathlib.PurePosixPath(name).suffix or "(no ending)" for name in visible})
        raise ValueError(
            f"{str(path)!r} holds no picture (files found: {len(visible)}, endings: {endings[:8]}); "
            f"allowed endings: {', '.join(EXTENSIONS)}; fix: point to the folder that holds the pictures"
        )
    return pictures


@contextlib.contextmanager
def reading(files: Iterable[PictureFile]) -> Iterator[Callable[[PictureFile], bytes]]:
    """Context that gives a function file -> stored bytes and opens every archive only once, for many files."""
    with contextlib.ExitStack() as stack:
        paths = {f.path for f in files if f.member is not None}
        archives = {path: stack.enter_context(zipfile.ZipFile(path)) for path in paths}

        def read(file: PictureFile) -> bytes:
            return file.read() if file.member is None else archives[file.path].read(file.member)

        yield read


def fit(image: np.ndarray, size: tuple[int, int] | None, channels: int | None) -> np.ndarray:
    """Brings one decoded image to a size and a number of channels by the rule of this module.

    Args:
      image: uint8 [H, W, C], C 1 or 3.
      size: (height, width), or None to leave it.
      channels: 1, 3, or None to leave them.

    Returns:
      uint8 [height, width, channels].
    """
    same_size = size is None or image.shape[:2] == tuple(size)
    if same_size and channels in (None, image.shape[2]):
        return image
    from PIL import Image

    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    return _to_array(picture, size, channels)


def _to_array(picture, size: tuple[int, int] | None, channels: int | None) -> np.ndarray:
    """Pillow picture -> uint8 [H, W, C]: steps 2 and 3 of the module's rule."""
    from PIL import Image

    if channels is None:
        channels = 1 if picture.mode in _GREY_MODES else 3
    if picture.mode == "P":
        picture = picture.convert("RGBA")  # a palette with transparent entries is converted without a warning this way
    picture = picture.convert("L" if channels == 1 else "RGB")
    if size is not None and (picture.height, picture.width) != tuple(size):
        height, width = size
        scale = min(picture.width / width, picture.height / height)
        crop_w, crop_h = max(1, round(width * scale)), max(1, round(height * scale))
        left, top = (picture.width - crop_w) // 2, (picture.height - crop_h) // 2
        picture = picture.crop((left, top, left + crop_w, top + crop_h))
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    array = np.array(picture, dtype=np.uint8)
    return array[:, :, None] if channels == 1 else array


def decode(data: bytes, name: str, size: tuple[int, int] | None = None, channels: int | None = None) -> np.ndarray:
    """Decodes the bytes of one picture file.

    Args:
      data: the file's bytes.
      name: said in errors.
      size: (height, width) to crop and resize to, None keeps the stored size.
      channels: 1, 3, or None: 1 for a grey file, else 3.

    Returns:
      uint8 [H, W, channels].

    Raises:
      ValueError: not a readable picture, or one with more than 8 bits a channel (its range is not known).
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            if picture.mode.startswith(("I", "F")):
                raise ValueError(
                    f"{name!r} has Pillow mode {picture.mode!r}, more than 8 bits a channel; allowed: 8-bit grey or "
                    "colour; fix: convert it to 8 bits, so that the scaling is your decision"
                )
            return _to_array(picture, size, channels)
    except (OSError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{name!r} cannot be read as a picture ({error}); allowed: complete files of the types "
            f"{', '.join(EXTENSIONS)}; fix: replace or remove the file"
        ) from error


def decode_all(files: dict[str, PictureFile], size: int | None, channels: int | None) -> list[np.ndarray]:
    """Decodes many files with a few threads (Pillow releases the interpreter lock), in order.

    Args:
      files: name -> file.
      size: side of the square to crop and resize to, None keeps the stored sizes.
      channels: 1, 3, or None: 1 where all files are grey, else 3 (grey files are repeated).

    Returns:
      list of uint8 [H, W, C], the same C for all.

    Raises:
      ValueError: one line per unreadable file (at most five are shown).
    """
    target = None if size is None else (size, size)

    with reading(files.values()) as read:

        def one(item: tuple[str, PictureFile]) -> np.ndarray | ValueError:
            name, file = item
            try:
                data = read(file)
            except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
                return ValueError(f"{name!r} cannot be read ({error}); fix: replace or remove the file")
            try:
                return decode(data, name, target, channels)
            except ValueError as error:
                return error

        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            results = list(pool.map(one, files.items(), chunksize=16))
    bad = [r for r in results if isinstance(r, ValueError)]
    if bad:
        more = f"\n... and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError("\n".join(str(e) for e in bad[:5]) + more)
    if any(r.shape[2] == 3 for r in results):
        results = [np.repeat(r, 3, axis=2) if r.shape[2] == 1 else r for r in results]
    return results


def stack_equal(arrays: list[np.ndarray], names: list[str], what: str) -> np.ndarray:
    """Stacks images of one shape.

    Args:
      arrays: uint8 [H, W, C] each.
      names: their names, for the error.
      what: where they came from, for the error.

    Returns:
      uint8 [N, H, W, C].

    Raises:
      ValueError: the shapes differ; two examples are named.
    """
    first = arrays[0].shape
    for array, name in zip(arrays, names):
        if array.shape != first:
            raise ValueError(
                f"{what}: the pictures have different shapes, for example {names[0]!r} {first[:2]} and {name!r} "
                f"{array.shape[:2]} (height, width); allowed: one shape; fix: set data.size, and every picture is "
                "cropped to its centre square and resized"
            )
    return np.stack(arrays)
