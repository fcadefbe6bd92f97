"""Opens a work directory for evaluation. Everything that is wrong with it is found here, before anything is written."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from eval.settings import resolve
from jaxunlearn.io.diffusers import DiffusersModel, load
from jaxunlearn.io.forget import Split, open_split
from jaxunlearn.io.workdir import Workdir


class BadInput(Exception):
    """The work directory or the command line cannot be used; ``problems`` holds one line each."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What an evaluation reads.

    Attributes:
      workdir: the layout of the work directory.
      config: the run's resolved configuration.
      settings: its ``eval`` section with defaults and overrides, see :data:`eval.settings.DEFAULTS`.
      split: the data.
      models: column ("before", "after", "retrained") -> model, in this order; "retrained" only if there is one.
      paths: column -> the folder of the model.
    """

    workdir: Workdir
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    split: Split
    models: Mapping[str, DiffusersModel]
    paths: Mapping[str, pathlib.Path]


def read_inputs(root: str, overrides: Mapping[str, str]) -> Inputs:
    """Opens the work directory ``root``.

    Raises:
      BadInput: with one line per problem.
    """
    workdir = Workdir(pathlib.Path(root).expanduser())
    config = _read_config(workdir)
    problems = [
        f"config.json: has no section {name!r}; fix: restore the file" for name in ("data",) if name not in config
    ]
    settings, found = resolve(config.get("eval", {}), overrides)
    problems += found
    paths = _model_paths(workdir, config, problems)

    split = None
    if "data" in config:
        try:
            split = open_split(config["data"], config.get("seed", 0))
        except (ValueError, OSError) as error:
            problems += str(error).splitlines()
    if split is not None and not len(split.forget):
        problems.append("data.forget: the forget set is empty; an evaluation needs at least one image to forget")

    models = {}
    for column, path in paths.items():
        try:
            models[column] = _load(path, column, config)
        except (ValueError, OSError) as error:
            problems.append(f"{column} model: {'; '.join(str(error).splitlines())}")
    if models and split is not None:
        problems += _misfits(models, split, settings)
    if problems:
        raise BadInput(problems)
    return Inputs(workdir, config, settings, split, models, paths)


def _read_config(workdir: Workdir) -> Mapping[str, Any]:
    if not workdir.root.is_dir():
        raise BadInput([f"--workdir={workdir.root}: no such directory; fix: give the work directory of a finished run"])
    if not workdir.config.is_file():
        raise BadInput([f"{workdir.config}: is missing; fix: give the work directory of a finished run"])
    try:
        config = json.loads(workdir.config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput([f"{workdir.config}: is not JSON ({error}); fix: restore it or run again"]) from error
    if not isinstance(config, Mapping):
        raise BadInput([f"{workdir.config}: must hold an object; fix: restore it or run again"])
    return config


def _model_paths(workdir: Workdir, config: Mapping[str, Any], problems: list[str]) -> dict[str, pathlib.Path]:
    """Column -> folder; what must be there and is not becomes a problem."""
    base, own = (config.get("base") or {}).get("path"), workdir.model("base")
    paths = {}
    if base:
        paths["before"] = pathlib.Path(base).expanduser()
    elif own.is_dir():
        paths["before"] = own
    else:
        problems.append(f"{own}: is missing, and base.path names no other model; fix: run the base stage first")
    if workdir.model("unlearned").is_dir():
        paths["after"] = workdir.model("unlearned")
    else:
        problems.append(f"{workdir.model('unlearned')}: is missing; fix: run the unlearning stage first")
    if workdir.model("retrained").is_dir():
        paths["retrained"] = workdir.model("retrained")
    return paths


def _load(path: pathlib.Path, column: str, config: Mapping[str, Any]) -> DiffusersModel:
    """A model; the run's own scheduler serves folders of the user that have none."""
    if column == "retrained":
        return load(path)
    variant = (config.get("base") or {}).get("variant")
    return load(path, variant, default_scheduler=config.get("scheduler"))


def _misfits(models: Mapping[str, DiffusersModel], split: Split, settings: Mapping[str, Any]) -> list[str]:
    """Models that cannot run on the data or with the settings."""
    problems = []
    height, width, channels = split.images.shape[1:]
    for column, model in models.items():
        config, steps = model.config, model.schedule.num_steps
        if config.in_channels != channels or config.out_channels != channels:
            problems.append(f"{column} model: works on {config.in_channels} channels, the images have {channels}")
        if height % config.size_divisor or width % config.size_divisor:
            problems.append(f"{column} model: needs sides divisible by {config.size_divisor}, not {height}x{width}")
        if config.has_classes:
            problems.append(f"{column} model: is class-conditional; only unconditional models can be evaluated")
        for key in ("injection_t", "loss_t"):
            if max(settings[key]) >= steps:
                problems.append(
                    f"eval.{key}: {max(settings[key])}; allowed: below the {steps} steps of the {column} model"
                )
        if settings["sampling_steps"] > steps:
            problems.append(f"eval.sampling_steps: {settings['sampling_steps']}; allowed: at most {steps}")
    return list(dict.fromkeys(problems))
