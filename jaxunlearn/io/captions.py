"""Texts of images from a .jsonl file, in the form that Hugging Face's image folders use.

One JSON object a line: ``{"file_name": "cats/0001.png", "text": "a cat on a chair"}``. Names are relative to the folder of
the images; further keys are ignored. An image without a line, or with an empty text, has no caption.
"""

from __future__ import annotations

import difflib
import json
import os
import pathlib
import zipfile
from collections.abc import Sequence

from jaxunlearn.io.pictures import split_zip

METADATA = "metadata.jsonl"
"""Name of the file that is used where it stands in the folder of the images."""

_MOST = 20  # problems that are shown


def read_captions(path: str | os.PathLike) -> dict[str, str]:
    """File name -> text.

    Args:
      path: a .jsonl file, or one inside a zip archive (``images.zip/captions.jsonl``).

    Returns:
      In the order of the file. Names have forward slashes and no leading ``./``.

    Raises:
      ValueError: the file cannot be read, or one line for each line of it that is wrong (at most 20 are shown).
    """
    where = f"captions {str(path)!r}"
    lines = _lines(path, where)
    captions: dict[str, str] = {}
    first: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        entry, problem = _entry(line)
        if problem is None and entry[0] in first:
            problem = f"{entry[0]!r} has a line already, line {first[entry[0]]}; fix: remove one of them"
        if problem is not None:
            problems.append(f"{where}, line {number}: {problem}")
            continue
        captions[entry[0]], first[entry[0]] = entry[1], number
    if problems:
        more = [f"... and {len(problems) - _MOST} more lines of {where}"] if len(problems) > _MOST else []
        raise ValueError("\n".join([*problems[:_MOST], *more]))
    if not captions:
        raise ValueError(f'{where} has no line; allowed: {{"file_name": "a.png", "text": "..."}}; fix: add lines')
    return captions


def has_texts(path: str | os.PathLike) -> bool:
    """Whether a metadata file is meant for captions: some line of it is an object with the key ``text``.

    Such files may hold anything (labels, boxes); only those with texts are read as captions.

    Raises:
      ValueError: the file cannot be read.
    """
    for line in _lines(path, f"captions {str(path)!r}"):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "text" in entry:
            return True
    return False


def find_metadata(path: str | os.PathLike) -> pathlib.Path | None:
    """The ``metadata.jsonl`` of a folder of images, a zip archive or a folder inside one; None if there is none."""
    candidate = pathlib.Path(path) / METADATA
    if candidate.is_file():
        return candidate
    inside = split_zip(path)
    if inside is None:
        return None
    archive, prefix = inside
    member = f"{prefix}/{METADATA}".lstrip("/")
    with zipfile.ZipFile(archive) as opened:
        return archive / member if member in opened.namelist() else None


def captions_of(names: Sequence[str], captions: dict[str, str], path: str | os.PathLike) -> tuple[str, ...]:
    """The texts of images in their order, "" where an image has none.

    Args:
      names: of all images of the source, relative to its folder.
      captions: from :func:`read_captions`.
      path: where they were read, for the error.

    Raises:
      ValueError: captions of names that are not in the data; at most ten are listed.
    """
    known = set(names)
    unknown = [name for name in captions if name not in known]
    if unknown:
        lines = []
        for name in unknown[:10]:
            close = difflib.get_close_matches(name, names, n=1)
            lines.append(f"  {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        raise ValueError(
            f"captions {str(path)!r}: {len(unknown)} of {len(captions)} names are not in the data; allowed: names such as "
            f"{names[0]!r}, relative to data.path; fix or remove these lines:\n" + "\n".join(lines)
        )
    return tuple(captions.get(name, "") for name in names)


def _lines(path: str | os.PathLike, where: str) -> list[str]:
    try:
        inside = None if pathlib.Path(path).is_file() else split_zip(path)
        if inside is None:
            data = pathlib.Path(path).read_bytes()
        else:
            with zipfile.ZipFile(inside[0]) as archive:
                data = archive.read(inside[1])
        # Not splitlines(): JSON strings may hold other line separators of Unicode.
        return data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text ({error}); fix: save it as UTF-8") from error
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{where} cannot be read ({error}); fix: check the path") from error


def _entry(line: str) -> tuple[tuple[str, str], None] | tuple[None, str]:
    """(name, text) of a line, or what is wrong with it."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        return None, f"is not JSON ({error}); fix: one object a line"
    if not isinstance(entry, dict):
        return None, f'is a {type(entry).__name__}; allowed: an object; fix: {{"file_name": "a.png", "text": "..."}}'
    for key in ("file_name", "text"):
        if not isinstance(entry.get(key), str):
            found = f"{key} is {entry[key]!r}" if key in entry else f"has no {key!r} (it has {list(entry)[:5]})"
            return None, f"{found}; allowed: text; fix: give every line file_name and text"
    name = entry["file_name"].replace("\\", "/")
    while name.startswith("./"):
        name = name[2:]
    return (name, entry["text"].strip()), None
