"""Folders of diffusers with a ``UNet2DModel``: in and out, without torch, diffusers or a network.

A model leaves as it came: the same layout, files, JSON bytes, dtypes, variant and shards, with other weights. Writing
is the task of :mod:`jaxunlearn.io.diffusers_export`; :func:`save` is found here as well.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxunlearn.io.diffusers_export import Source, check_params, save
from jaxunlearn.io.schedulers import complete_scheduler_config, read_scheduler
from jaxunlearn.io.weights import inspect_weights, read_weights
from jaxunlearn.models.convert import to_flax
from jaxunlearn.models.unet2d_config import UNet2DConfig
from jaxunlearn.predictors import from_linen, to_eps
from jaxunlearn.sampling import SamplerConfig
from jaxunlearn.schedule import Schedule
from jaxunlearn.types import Predict, PyTree

__all__ = ["DiffusersModel", "Source", "load", "new", "save"]

_LATENT_PARTS = ("vae", "vqvae", "movq")


@dataclasses.dataclass(frozen=True, eq=False)
class DiffusersModel:
    """A model with everything that is needed to run it and to write it back.

    Attributes:
      config: architecture of the UNet.
      params: float32 parameter tree of :class:`jaxunlearn.models.unet2d.UNet2D`.
      schedule: noise schedule.
      sampler: how its scheduler samples.
      prediction_type: "epsilon", "v_prediction" or "sample": what the UNet itself returns.
      scheduler_json: content of ``scheduler_config.json``, with all keys.
      source: the folder it was loaded from, or None for a new model.
      notes: one line for each thing about loading that a report should say.
    """

    config: UNet2DConfig
    params: PyTree
    schedule: Schedule
    sampler: SamplerConfig
    prediction_type: str
    scheduler_json: Mapping[str, Any]
    source: Source | None = None
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def module(self) -> Any:
        """The Flax module, ``UNet2D(config)``."""
        from jaxunlearn.models.unet2d import UNet2D

        return UNet2D(self.config)

    @functools.cached_property
    def predict_raw(self) -> Predict:
        """``(params, x_t, t, cond)`` -> what the UNet returns, see ``prediction_type``."""
        return from_linen(self.module)

    @functools.cached_property
    def predict(self) -> Predict:
        """``(params, x_t, t, cond) -> eps_hat``, whatever ``prediction_type`` is. The same object at every access."""
        return to_eps(self.predict_raw, self.prediction_type, self.schedule)

    @property
    def num_params(self) -> int:
        """Number of scalars in ``params``."""
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.params))

    def with_params(self, params: PyTree) -> DiffusersModel:
        """The same model with other parameters.

        Raises:
          ValueError: names or shapes differ from those of the config.
        """
        check_params(self.config, params)
        return dataclasses.replace(self, params=params)


def new(config: UNet2DConfig, params: PyTree, schedule_config: Mapping[str, Any]) -> DiffusersModel:
    """A model that does not come from a folder. It is saved as a nested pipeline folder.

    Args:
      config: architecture.
      params: its parameters.
      schedule_config: keys of a ``scheduler_config.json``, for example ``{"num_train_timesteps": 200}``; missing keys
        take diffusers' defaults. See also :func:`jaxunlearn.io.schedulers.scheduler_config`.

    Raises:
      ValueError: parameters that do not fit, refused scheduler values.
    """
    check_params(config, params)
    complete = complete_scheduler_config(schedule_config)
    return DiffusersModel(config, params, *read_scheduler(complete), scheduler_json=complete)


def load(
    path: str | os.PathLike, variant: str | None = None, *, default_scheduler: Mapping[str, Any] | None = None
) -> DiffusersModel:
    """Loads a folder: a pipeline (nested or flat) or a UNet's folder alone.

    Where ``unet_ema/`` stands beside ``unet/``, the weights are those of ``unet_ema/``; :func:`save` writes both.

    Args:
      path: the folder. Nothing in it is changed, and nothing is ever downloaded.
      variant: of the weight files, for example "fp16"; None reads the files without a variant.
      default_scheduler: keys of a ``scheduler_config.json``, used if the folder has none; ``{}`` takes diffusers' defaults.

    Returns:
      The model; parameters are float32 numpy arrays, whatever the files hold.

    Raises:
      ValueError: not a folder, or one line for every problem with what it holds.
    """
    root = _folder(path)
    problems: list[str] = []
    model_index = _read_json(root, "model_index.json", problems)
    folders = _unet_folders(root)
    if not folders:
        problems.append(
            "config.json: neither the folder nor its unet/ has one; give a folder that diffusers' save_pretrained wrote"
        )
    configs, files = {}, {}
    for folder in folders:
        content = _read_json(root, f"{folder}/config.json".lstrip("/"), problems)
        if content is not None:
            configs[folder] = _collect(problems, f"{folder}/config.json".lstrip("/"), UNet2DConfig.from_dict, content)
        files[folder] = _collect(problems, folder, inspect_weights, root / folder, variant)
    if len(folders) == 2 and None not in configs.values() and len(set(configs.values())) == 2:
        problems.append("unet_ema/config.json: another architecture than unet/config.json; remove one of the folders")
    names = [set(found.weight_map) for found in files.values() if found is not None]
    if len(names) == 2 and names[0] != names[1]:
        problems.append("unet_ema: other tensor names than in unet; remove one of the folders")
    scheduler_json, read = _scheduler(root, model_index or {}, default_scheduler, problems)

    params = None
    if folders and configs.get(folders[0]) is not None and files[folders[0]] is not None:
        params = _collect(problems, folders[0], _params, root / folders[0], files[folders[0]], configs[folders[0]])
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ValueError(f"{root} cannot be loaded ({count}):\n" + "\n".join(problems))

    notes = []
    if len(folders) == 2:
        notes.append("the weights are those of unet_ema; an export writes them into unet_ema and unet")
    json_files = {name: (root / name).read_bytes() for name in _json_names(folders) if (root / name).is_file()}
    source = Source(root.resolve(), variant, files, json_files, _other_parts(model_index or {}))
    latent = [part for part in source.parts if part in _LATENT_PARTS]
    if latent:
        notes.append(f"the pipeline has a part {latent[0]!r}: the UNet works on latents, not on images")
        warnings.warn(f"{root}: {notes[-1]}; encode the images first", stacklevel=2)
    return DiffusersModel(configs[folders[0]], params, *read, scheduler_json, source, tuple(notes))


def _folder(path: str | os.PathLike) -> pathlib.Path:
    root = pathlib.Path(path).expanduser()
    if root.is_dir():
        return root
    if root.exists():
        raise ValueError(f"{root} is a single file; convert it to a diffusers folder first and give that folder")
    name = str(path)
    raise ValueError(
        f"{name!r} is not a folder on this machine, and nothing is ever downloaded. Fetch the model first, for example"
        f" with `hf download {name} --local-dir {root.name}`, and give that folder"
    )


def _unet_folders(root: pathlib.Path) -> list[str]:
    """Folders of the UNet below root ("" is root itself), the one to read first."""
    nested = [name for name in ("unet_ema", "unet") if (root / name / "config.json").is_file()]
    if nested or (root / "unet").is_dir():
        return nested or ["unet"]
    return [""] if (root / "config.json").is_file() else []


def _json_names(folders: list[str]) -> list[str]:
    """The JSON files that say what the model is."""
    schedulers = ["scheduler/scheduler_config.json", "scheduler_config.json"]
    return ["model_index.json", *schedulers, *(f"{folder}/config.json".lstrip("/") for folder in folders)]


def _other_parts(model_index: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the pipeline's other components: entries ``[library, class]`` of ``model_index.json``."""
    used = ("unet", "unet_ema", "scheduler")
    parts = (k for k, v in model_index.items() if isinstance(v, list) and len(v) == 2 and v[1] is not None)
    return tuple(sorted(name for name in parts if name not in used and pathlib.PurePath(name).name == name))


def _read_json(root: pathlib.Path, name: str, problems: list[str]) -> dict[str, Any] | None:
    """Content of a JSON file, None if there is no such file or it is broken (which is a problem)."""
    if not (root / name).is_file():
        if name != "model_index.json":
            problems.append(f"{name}: is not there; copy it as well")
        return None
    try:
        content = json.loads((root / name).read_bytes())
    except ValueError as error:
        problems.append(f"{name}: is not JSON ({error}); copy it again")
        return None
    if not isinstance(content, dict):
        problems.append(f"{name}: must hold an object, not a {type(content).__name__}")
        return None
    return content


def _collect(problems: list[str], where: str, function: Any, *args: Any) -> Any:
    """``function(*args)``; its ValueError becomes lines of ``problems``, and the result None."""
    prefix = f"{where}: " if where else ""
    try:
        return function(*args)
    except ValueError as error:
        problems.extend(f"{prefix}{line}" for line in str(error).splitlines())
        return None


def _scheduler(
    root: pathlib.Path, model_index: Mapping[str, Any], given: Mapping[str, Any] | None, problems: list[str]
):
    """The scheduler's JSON and what it says; problems are added to the list."""
    places = [name for name in ("scheduler/scheduler_config.json", "scheduler_config.json") if (root / name).is_file()]
    if not places and given is None:
        problems.append(
            "scheduler_config.json: is not there; give the scheduler's keys"
            " (load(path, default_scheduler={...}); {} takes diffusers' defaults)"
        )
        return None, None
    content = _read_json(root, places[0], problems) if places else dict(given)
    if content is None:
        return None, None
    entry = model_index.get("scheduler")
    class_name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    if model_index.get("_class_name") == "DDIMPipeline":
        class_name = "DDIMScheduler"  # That pipeline converts whatever scheduler it finds.
    where = places[0] if places else "scheduler"
    return content, _collect(problems, where, read_scheduler, content, class_name)


def _params(folder: pathlib.Path, files: Any, config: UNet2DConfig) -> PyTree:
    from jaxunlearn.models.parameters import abstract_params

    params = to_flax(read_weights(folder, files), abstract_params(config))
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
