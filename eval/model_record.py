"""The models of a report: parameters and files by their hashes, the noise schedule, the retrained models."""

from __future__ import annotations

import pathlib
from typing import Any

from eval.inputs import Inputs
from jaxunlearn.io.diffusers import DiffusersModel
from jaxunlearn.io.hashing import file_sha256, tree_sha256
from jaxunlearn.io.report_checks import alphas_sha256
from jaxunlearn.metrics.entries import references


def model_record(inputs: Inputs, name: str) -> dict[str, Any]:
    """One model of a work directory; a path in it is relative to it.

    ``ema`` says whether its weights are a moving average: of a model that was trained here the configuration says so; of
    another one it is not known, null.
    """
    model, path, root = inputs.models[name], inputs.paths[name], inputs.workdir.root
    if isinstance(path, pathlib.Path) and path.is_relative_to(root):
        path = path.relative_to(root)
    base = inputs.config.get("base") or {}
    trained_here = not base.get("path") and name != "after"
    return {
        "path": str(path),
        "format": "diffusers",
        "variant": model.source.variant,
        "tree_sha256": tree_sha256(model.params),
        "params": model.num_params,
        "ema": bool(base.get("ema")) if trained_here else None if name != "after" else False,
        "files": _files(model),
        "prediction_type": model.prediction_type,
        "train_timesteps": model.schedule.num_steps,
        "notes": list(model.notes),
    }


def reference_record(inputs: Inputs) -> dict[str, Any]:
    """The retrained models: the recipe of the base model without the forget set, each with a seed of its own."""
    config, models = inputs.config, []
    base = config.get("base") or {}
    for place, name in enumerate(references(inputs.models)):
        about = {
            "seed": config.get("seed", 0) + place,
            "steps": base.get("num_steps"),
            "same_recipe": not base.get("path"),
        }
        models.append({"model": name, **model_record(inputs, name), **about})
    return {"kind": "retrained" if models else "none", "models": models}


def schedule_record(model: DiffusersModel) -> dict[str, Any]:
    """Number of steps and hash of the table."""
    table = model.schedule.alphas_cumprod
    return {"T": model.schedule.num_steps, "alphas_cumprod_sha256": alphas_sha256(table)}


def _files(model: DiffusersModel) -> list[dict[str, Any]]:
    """Every file of the folder that the model was read from, with those of its other parts."""
    source = model.source
    names = {name for name in source.json_files if (source.path / name).is_file()}
    for folder, weights in source.unets.items():
        names |= {str(pathlib.PurePosixPath(folder, name)) for name in weights.weight_map.values()}
        if weights.index_name:
            names.add(str(pathlib.PurePosixPath(folder, weights.index_name)))
    for part in source.parts:
        below = sorted((source.path / part).rglob("*"))
        names |= {path.relative_to(source.path).as_posix() for path in below if path.is_file()}
    paths = {name: source.path / name for name in sorted(names)}
    return [{"path": n, "sha256": file_sha256(p), "bytes": p.stat().st_size} for n, p in paths.items() if p.is_file()]
