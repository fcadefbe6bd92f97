"""The ``data`` section of a configuration: its defaults, and every problem that can be found without loading images."""

from __future__ import annotations

import difflib
import math
import numbers
import os
import pathlib
from collections.abc import Mapping, Sequence

from jaxunlearn.io.datasets import DATASETS, options_of, unknown_dataset
from jaxunlearn.io.pictures import split_zip

DEFAULTS: dict = {
    "name": "digits",
    "path": None,
    "captions": None,
    "caption": None,
    "labels_path": None,
    "split": None,
    "size": None,
    "channels": None,
    "limit": None,
    "held_out_fraction": 0.1,
    "plant": {"image": None, "copies": 0, "caption": None},
    "forget": {"planted": False, "indices": (), "files": None, "folder": None},
    "near_duplicate_rms": 0.02,
    "near_duplicates": "report",
}
"""All keys of the section and what they are when they are left out."""

READER_OPTIONS = ("path", "captions", "labels_path", "split", "size", "channels", "limit")
"""Keys that are handed to the reader of the data set when they are not None."""

SAMPLES = ("sample:china", "sample:flower")
"""Names of scikit-learn's two photographs, for planting without a file."""

POLICIES = ("report", "forget", "error")


def with_defaults(data: Mapping) -> dict:
    """A plain dict with every key of :data:`DEFAULTS`; the groups ``plant`` and ``forget`` are filled up too.

    Raises:
      ValueError: unknown keys, or a value where a group is needed; one line each.
    """
    problems, full = [], {}
    _check_keys("data", data, DEFAULTS, problems)
    for key, default in DEFAULTS.items():
        value = data.get(key, default)
        if isinstance(default, dict):
            if value is None:
                value = {}
            if not hasattr(value, "get"):
                problems.append(f"data.{key}: {value!r} is a value; allowed: a group with {list(default)}")
                value = {}
            else:
                _check_keys(f"data.{key}", value, default, problems)
            value = {k: value.get(k, d) for k, d in default.items()}
        full[key] = value
    if problems:
        raise ValueError("\n".join(problems))
    return full


def _check_keys(where: str, given: Mapping, known: Mapping, problems: list[str]) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "remove it"
            problems.append(f"{where}.{key}: unknown key; allowed: {', '.join(known)}; fix: {hint}")


def data_problems(data: Mapping) -> list[str]:
    """Every problem of a ``data`` section that shows without loading images.

    Args:
      data: see :data:`DEFAULTS`; keys may be left out.

    Returns:
      One line for each problem: key and value, what is allowed, the fix. Empty if there is none.
    """
    try:
        full = with_defaults(data)
    except ValueError as error:
        return str(error).split("\n")
    found: list[str] = []
    _reader_problems(full, found)
    _number_problems(full, found)
    _text_problem("data.caption", full["caption"], found)
    _text_problem("data.plant.caption", full["plant"]["caption"], found)
    _plant_problems(full["plant"], found)
    _forget_problems(full["forget"], full["plant"], found)
    return found


def _reader_problems(full: dict, found: list[str]) -> None:
    name = full["name"]
    if not isinstance(name, str) or name not in DATASETS:
        found.append(f"data.name: {unknown_dataset(name)}")
        return
    options = options_of(name)
    for key in READER_OPTIONS:
        value = full[key]
        if value is not None and key not in options:
            found.append(
                f"data.{key}: {value!r} is given, but {name!r} takes only {', '.join(options)}; fix: set data.{key}=None"
            )
        elif value is None and options.get(key):
            found.append(f"data.{key}: None; allowed: where the {name!r} data is; fix: --config.data.{key}=...")
        elif value is not None and key in ("path", "captions", "labels_path"):
            _path_problem(f"data.{key}", value, found)


def _number_problems(full: dict, found: list[str]) -> None:
    for key, low, high in (("size", 1, 4096), ("limit", 1, None)):
        value = full[key]
        if value is not None and not (_whole(value) and value >= low and (high is None or value <= high)):
            upper = f" to {high}" if high else " or more"
            found.append(f"data.{key}: {value!r}; allowed: a whole number, {low}{upper}, or None; fix: data.{key}=None")
    if full["channels"] is not None and not (_whole(full["channels"]) and full["channels"] in (1, 3)):
        found.append(
            f"data.channels: {full['channels']!r}; allowed: 1 (grey), 3 (RGB) or None; fix: data.channels=None"
        )
    fraction = full["held_out_fraction"]
    if not _real(fraction) or not 0 <= fraction < 1:
        found.append(f"data.held_out_fraction: {fraction!r}; allowed: 0 or more, below 1; fix: 0.1")
    rms = full["near_duplicate_rms"]
    if not _real(rms) or not 0 <= rms <= 2:
        found.append(f"data.near_duplicate_rms: {rms!r}; allowed: 0 (no search) to 2; fix: 0.02")
    policy = full["near_duplicates"]
    if policy not in POLICIES:
        found.append(f"data.near_duplicates: {policy!r}; allowed: {', '.join(POLICIES)}; fix: 'report'")


def _plant_problems(plant: dict, found: list[str]) -> None:
    image, copies = plant["image"], plant["copies"]
    if not _whole(copies) or copies < 0:
        found.append(f"data.plant.copies: {copies!r}; allowed: a whole number, 0 or more; fix: data.plant.copies=0")
    elif copies > 0 and image is None:
        found.append(
            f"data.plant.image: None with copies={copies}; allowed: a picture file or one of {', '.join(SAMPLES)}; fix: "
            "name the picture, or set data.plant.copies=0"
        )
    if image is None:
        return
    if not isinstance(image, str | os.PathLike):
        found.append(
            f"data.plant.image: {image!r}; allowed: a path or one of {', '.join(SAMPLES)}; fix: name a picture"
        )
    elif str(image).startswith("sample:"):
        if image not in SAMPLES:
            found.append(f"data.plant.image: {image!r}; allowed: {', '.join(SAMPLES)} or a path; fix: {SAMPLES[0]!r}")
    elif not pathlib.Path(image).is_file():
        found.append(f"data.plant.image: {str(image)!r} is not a file; allowed: a picture file; fix: check the path")


def _forget_problems(forget: dict, plant: dict, found: list[str]) -> None:
    if not isinstance(forget["planted"], bool):
        found.append(f"data.forget.planted: {forget['planted']!r}; allowed: True or False; fix: False")
    elif forget["planted"] and _whole(plant["copies"]) and plant["copies"] == 0:
        found.append(
            "data.forget.planted: True, but nothing is planted (data.plant.copies is 0); allowed: True with copies of "
            "at least 1; fix: set data.plant.copies, or data.forget.planted=False"
        )
    indices = forget["indices"]
    if indices is not None:
        if not hasattr(indices, "__len__") or isinstance(indices, str | bytes | Mapping):
            found.append(f"data.forget.indices: {indices!r}; allowed: a sequence of whole numbers; fix: (0, 17)")
        else:
            bad = [i for i in indices if not _whole(i) or i < 0]
            if bad:
                found.append(f"data.forget.indices: {_few(bad)}; allowed: whole numbers, 0 or more; fix: remove them")
    files = forget["files"]
    if files is not None and not isinstance(files, str | os.PathLike):
        found.append(
            f"data.forget.files: {files!r}; allowed: the path of a text file, one name per line; fix: write one"
        )
    elif files is not None and not pathlib.Path(files).is_file():
        found.append(f"data.forget.files: {str(files)!r} is not a file; allowed: a text file; fix: check the path")
    if forget["folder"] is not None:
        _path_problem("data.forget.folder", forget["folder"], found)


def _text_problem(key: str, value: object, found: list[str]) -> None:
    if value is not None and not isinstance(value, str):
        found.append(f"{key}: {value!r}; allowed: a text or None; fix: put it in quotes")


def _path_problem(key: str, value: object, found: list[str]) -> None:
    if not isinstance(value, str | os.PathLike):
        found.append(f"{key}: {value!r}; allowed: a path; fix: give one")
    elif not pathlib.Path(value).exists() and split_zip(value) is None:
        found.append(f"{key}: {str(value)!r} does not exist; allowed: an existing file or folder; fix: check the path")


def _whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _few(values: Sequence, most: int = 10) -> str:
    shown = ", ".join(repr(v) for v in values[:most])
    return shown + (f" and {len(values) - most} more" if len(values) > most else "")
