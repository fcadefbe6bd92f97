"""Writes diffusers folders, see :mod:`jaxunlearn.io.diffusers`."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxunlearn.io.components import check_params
from jaxunlearn.io.schedulers import DIFFUSERS_VERSION
from jaxunlearn.io.weights import DTYPES, WeightFiles, is_weight_file, json_bytes, single_file, write_weights
from jaxunlearn.models.convert import to_diffusers

if TYPE_CHECKING:
    from jaxunlearn.io.diffusers import DiffusersModel


@dataclasses.dataclass(frozen=True)
class Source:
    """The folder that a model was loaded from.

    Attributes:
      path: the folder.
      variant: of the weight files that were read, or None.
      unets: folder of a UNet below ``path`` ("" is ``path`` itself) -> its weight files; the first was read.
      json_files: name below ``path`` -> content, as it was when the model was loaded, of the files that describe it.
      parts: names of the pipeline's other components, autoencoder, text encoder and tokenizer among them.
    """

    path: pathlib.Path
    variant: str | None
    unets: Mapping[str, WeightFiles]
    json_files: Mapping[str, bytes]
    parts: tuple[str, ...] = ()

    @property
    def layout(self) -> str:
        """ "flat", "nested" or "unet" (a UNet's folder alone)."""
        if "" not in self.unets:
            return "nested"
        return "flat" if (self.path / "model_index.json").is_file() else "unet"


def save(
    path: str | os.PathLike,
    model: DiffusersModel,
    extra_files: Mapping[str, bytes | str] | None = None,
    *,
    dtype: str | None = None,
) -> list[str]:
    """Writes a folder that diffusers opens. Either the whole folder appears under ``path``, or nothing does.

    A loaded model is written as it came: layout, JSON bytes, variant, shards and dtypes; other components of its
    pipeline are copied byte for byte, unless they have new weights (:meth:`Component.with_params`). Left out are further
    weight files of the UNet (other variants, pickles): they hold the old weights. Weights that were read from pickled files
    are written as safetensors. A new model becomes a nested pipeline folder in float32.

    Args:
      path: the new folder; its parents are made.
      model: what to write.
      extra_files: name -> content of further files in the folder's root, for example ``README.md``.
      dtype: "F32", "F16" or "BF16" for all weights; None keeps those of the source.

    Returns:
      One line for each thing that a report should say (what was left out, what was written twice).

    Raises:
      ValueError: ``path`` exists or lies inside the source folder, parameters that do not fit the config or are not
        finite, names of extra files that would replace a part of the model.
    """
    target = pathlib.Path(path).expanduser()
    extra_files = dict(extra_files or {})
    _check_target(target, model, extra_files)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}, or None for those of the source")
    check_params(model.config, model.params)
    tensors = to_diffusers(model.params)

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial-{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    try:
        if model.source is None:
            notes = _write_new(partial, model, tensors, dtype)
        else:
            notes = _write_like_source(partial, model.source, model, tensors, dtype)
        for name, content in extra_files.items():
            file = partial / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.encode() if isinstance(content, str) else content)
        if os.path.lexists(target):
            raise ValueError(f"{target} appeared while the model was being written; give another path")
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return notes


def _check_target(target: pathlib.Path, model: DiffusersModel, extra_files: Mapping[str, Any]) -> None:
    problems = []
    if os.path.lexists(target):
        problems.append(f"{target} exists already; nothing is overwritten: give another path or move it away")
    if model.source is not None and target.resolve().is_relative_to(model.source.path.resolve()):
        problems.append(f"{target} lies inside the source folder {model.source.path}, which is never written to")
    if model.source is not None and not model.source.path.is_dir():
        problems.append(f"{model.source.path}, from where the model was loaded, is gone; its other files are needed")
    kept = {"config.json", "model_index.json", "scheduler_config.json"}
    for name in extra_files:
        pure = pathlib.PurePosixPath(name)
        inside = bool(pure.parts) and not pure.is_absolute() and ".." not in pure.parts
        if not inside or pure.name in kept or is_weight_file(pure.name):
            problems.append(
                f"extra file {name!r}: must be a file inside the folder, and not a part of the model itself"
            )
    if problems:
        raise ValueError("\n".join(problems))


def _write_new(root: pathlib.Path, model: DiffusersModel, tensors: Mapping[str, Any], dtype: str | None) -> list[str]:
    scheduler = dict(model.scheduler_json)
    pipeline = "DDIMPipeline" if scheduler["_class_name"] == "DDIMScheduler" else "DDPMPipeline"
    model_index = {
        "_class_name": pipeline,
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DModel"],
    }
    unet = {"_class_name": "UNet2DModel", "_diffusers_version": DIFFUSERS_VERSION} | model.config.to_dict()
    (root / "unet").mkdir()
    (root / "scheduler").mkdir()
    (root / "model_index.json").write_bytes(json_bytes(model_index))
    (root / "unet" / "config.json").write_bytes(json_bytes(unet))
    (root / "scheduler" / "scheduler_config.json").write_bytes(json_bytes(scheduler))
    write_weights(root / "unet", tensors, single_file(), dtype)
    return []


def _write_like_source(
    root: pathlib.Path, source: Source, model: DiffusersModel, tensors: Mapping[str, Any], dtype: str | None
) -> list[str]:
    changed = [part for part in (model.vae, model.text_encoder) if part is not None and part.changed]
    notes = _copy_rest(root, source, tuple(part.name for part in changed))
    for name, content in source.json_files.items():
        (root / name).write_bytes(content)
    for folder, files in source.unets.items():
        write_weights(root / folder, tensors, files, dtype)
        notes += _renamed(folder, files)
    for part in changed:
        write_weights(root / part.name, part.tensors(), part.files, dtype)
        notes += [f"{part.name}: other weights than those of the source were written", *_renamed(part.name, part.files)]
    if not any(name.endswith("scheduler_config.json") for name in source.json_files):
        notes.append("no scheduler_config.json was written, as the source has none")
    if len(source.unets) > 1:
        notes.append(f"the same new weights were written into {' and '.join(source.unets)}")
    return notes


def _copy_rest(root: pathlib.Path, source: Source, changed: tuple[str, ...]) -> list[str]:
    """Copies everything but the weights that are written anew; returns what was left out."""
    notes = []
    parts = [part for part in source.parts if (source.path / part).is_dir()]
    notes += [f"{part}/ was left out: the source does not have it" for part in source.parts if part not in parts]
    folders = sorted({"", "scheduler", *source.unets})
    for folder in (*folders, *changed):
        written = {*source.unets[folder].metadata, source.unets[folder].index_name} if folder in source.unets else set()
        for file in sorted((source.path / folder).iterdir()) if (source.path / folder).is_dir() else ():
            shown = f"{folder}/{file.name}" if folder else file.name
            if file.is_file() and not is_weight_file(file.name):
                (root / folder).mkdir(exist_ok=True)
                shutil.copyfile(file, root / shown)
            elif file.is_file() and file.name not in written and folder not in changed:
                notes.append(f"{shown} was left out: it holds old weights")
            elif file.is_dir() and folder in changed:
                _copy_tree(file, root / shown)
            elif file.is_dir() and shown not in (*folders, *parts) and not file.name.startswith("."):
                notes.append(f"{shown}/ was left out: it is not a part of the pipeline")
    for part in parts:
        if part not in changed:
            _copy_tree(source.path / part, root / part)
    return notes


def _copy_tree(source: pathlib.Path, target: pathlib.Path, above: tuple[pathlib.Path, ...] = ()) -> None:
    """Copies the bytes of all files; links are followed, unless they lead back to a folder above."""
    real = source.resolve()
    if real in above:
        raise ValueError(f"{source} is a link to a folder above it; remove it")
    target.mkdir(exist_ok=True)
    for entry in sorted(source.iterdir()):
        if entry.is_dir():
            _copy_tree(entry, target / entry.name, (*above, real))
        elif entry.is_file():
            shutil.copyfile(entry, target / entry.name)
        else:
            raise ValueError(f"{entry} is neither a file nor a folder, or a link to nothing; remove it")


def _renamed(folder: str, files: WeightFiles) -> list[str]:
    if not files.pickled:
        return []
    old, new = (", ".join(sorted(found.metadata)) for found in (files, files.as_safetensors()))
    return [f"{folder or 'unet'}: the weights of {old} were written as {new}"]
