"""Autoencoder, text encoder and tokenizer of a pipeline: read once, for they must be the same in all columns."""

from __future__ import annotations

import filecmp
import pathlib

from jaxunlearn.io.diffusers import DiffusersModel, load

COMPONENTS = {"vae": "autoencoder", "text_encoder": "text encoder"}
REMEDY = "fix: restore the folder, or run the stage again"


def companion_problems(first: DiffusersModel, other: DiffusersModel, column: str) -> list[str]:
    """One line for each part of the pipeline in which another column differs from the first.

    Files are compared byte by byte. Only where they differ the parameters are read, which decide.

    Args:
      first: the model with its companions.
      other: a model that was loaded without them.
      column: its name.
    """
    problems, read = [], None
    for name, title in COMPONENTS.items():
        component = getattr(first, name)
        if (component is not None) != (name in other.source.parts):
            having = "before" if component is not None else column
            problems.append(f"{column} model: {title} ({name}/): only the {having} model has one; {REMEDY}")
        elif component is not None:
            files = ["config.json", *component.files.metadata]
            if _same_files(first.source.path / name, other.source.path / name, files):
                continue
            try:
                read = read or load(other.source.path, other.source.variant)
            except ValueError as error:
                return [f"{column} model: {'; '.join(str(error).splitlines())}"]
            found = getattr(read, name)
            if found.config != component.config or found.sha256 != component.sha256:
                problems.append(f"{column} model: has another {title} ({name}/) than the before model; {REMEDY}")
    if first.tokenizer is not None:
        folder = first.source.path / "tokenizer"
        files = sorted(file.name for file in folder.iterdir() if file.is_file())
        if not _same_files(folder, other.source.path / "tokenizer", files):
            problems.append(f"{column} model: has another tokenizer (tokenizer/) than the before model; {REMEDY}")
    return problems


def _same_files(first: pathlib.Path, other: pathlib.Path, names: list[str]) -> bool:
    return all((other / name).is_file() and filecmp.cmp(first / name, other / name, shallow=False) for name in names)
