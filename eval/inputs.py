"""Opens a work directory for evaluation. Everything that is wrong with it is found here, before anything is measured.

The only file that is written here is the key of the report's hashes, and only where nothing is wrong.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from eval.companions import companion_problems
from eval.prompts import Prompts, choose_prompts
from eval.settings import resolve
from jaxunlearn.io.diffusers import DiffusersModel, load
from jaxunlearn.io.forget import Split, open_split
from jaxunlearn.io.manifest import KEY_FILE, load_or_create_key
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
      models: column ("before", "after", "retrained", "retrained_2", ...) -> model, in this order; none or several
        models may be retrained.
        Only "before" has autoencoder and text encoder; they are the same in all columns.
      paths: column -> the folder of the model, or the name under which it was fetched ("hf://...").
      key: of the report's keyed hashes, see :func:`jaxunlearn.io.manifest.load_or_create_key`.
      prompts: the text of each sample, or None for models that take no text.
      companion_batch_size: images or texts that autoencoder and text encoder take at once.
    """

    workdir: Workdir
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    split: Split
    models: Mapping[str, DiffusersModel]
    paths: Mapping[str, pathlib.Path | str]
    key: bytes
    prompts: Prompts | None = None
    companion_batch_size: int = 8


def read_inputs(root: str, overrides: Mapping[str, str], preset: str | None = None) -> Inputs:
    """Opens the work directory ``root``.

    Raises:
      BadInput: with one line per problem.
    """
    workdir = Workdir(pathlib.Path(root).expanduser())
    config = _read_config(workdir)
    problems = [
        f"config.json: has no section {name!r}; fix: restore the file" for name in ("data",) if name not in config
    ]
    settings, found = resolve(config.get("eval", {}), overrides, preset)
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
    problems += _companions(models)
    prompts = None
    if models and split is not None:
        problems += _misfits(models, split, settings)
        if "before" in models and models["before"].takes_text:
            prompts, found = choose_prompts(config, settings, split)
            problems += found
        elif "before" in models and settings["prompts"]:
            problems.append("eval.prompts: the models take no text; fix: --eval.prompts=None")
    key = _key(workdir, problems)
    if problems:
        raise BadInput(problems)
    batch_size = (config.get("latents") or {}).get("batch_size", 8)
    return Inputs(workdir, config, settings, split, models, paths, key, prompts, batch_size)


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


def _key(workdir: Workdir, problems: list[str]) -> bytes:
    """The key of the work directory, which is made where it has none and there is no problem; empty after a problem."""
    path = workdir.root / KEY_FILE
    if problems and not path.exists():
        return b""
    try:
        return load_or_create_key(workdir.root)
    except ValueError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"{path}: cannot be made or read ({error.strerror}); fix: make the work directory writable")
    return b""


def _model_paths(workdir: Workdir, config: Mapping[str, Any], problems: list[str]) -> dict[str, pathlib.Path | str]:
    """Column -> folder; what must be there and is not becomes a problem."""
    base, own = (config.get("base") or {}).get("path"), workdir.model("base")
    paths = {}
    if base:
        paths["before"] = base if base.startswith("hf://") else pathlib.Path(base).expanduser()
    elif own.is_dir():
        paths["before"] = own
    else:
        problems.append(f"{own}: is missing, and base.path names no other model; fix: run the base stage first")
    if workdir.model("unlearned").is_dir():
        paths["after"] = workdir.model("unlearned")
    else:
        problems.append(f"{workdir.model('unlearned')}: is missing; fix: run the unlearning stage first")
    paths |= {folder.name: folder for folder in workdir.retrained()}
    return paths


def _load(path: pathlib.Path | str, column: str, config: Mapping[str, Any]) -> DiffusersModel:
    """A model; the run's own scheduler serves folders of the user that have none."""
    first = column == "before"
    variant = (config.get("base") or {}).get("variant")
    return load(path, variant, default_scheduler=config.get("scheduler"), companions=first)


def _companions(models: Mapping[str, DiffusersModel]) -> list[str]:
    """All columns must have the autoencoder and the text encoder of the first, or neither."""
    if "before" not in models:
        return []
    first = models["before"]
    problems = [
        line
        for column, model in models.items()
        if column != "before"
        for line in companion_problems(first, model, column)
    ]
    if first.takes_text:
        absent = [f"{name}/" for name in ("text_encoder", "tokenizer") if getattr(first, name) is None]
        if absent:
            folders = " and no ".join(absent)
            problems.append(f"before model: takes text, but its folder has no {folders}; fix: give the whole pipeline")
    return problems


def _misfits(models: Mapping[str, DiffusersModel], split: Split, settings: Mapping[str, Any]) -> list[str]:
    """Models that cannot run on the data or with the settings."""
    problems = []
    height, width, channels = split.images.shape[1:]
    vae = models["before"].vae if "before" in models else None
    pixels, divisor = ("", 1) if vae is None else ("with its autoencoder ", vae.config.size_divisor)
    for column, model in models.items():
        config, steps = model.config, model.schedule.num_steps
        outer = config if vae is None else vae.config
        if outer.in_channels != channels or outer.out_channels != channels:
            problems.append(
                f"{column} model: works {pixels}on {outer.in_channels} channels, the images have {channels}"
            )
        sides = divisor * config.size_divisor
        if height % sides or width % sides:
            problems.append(f"{column} model: needs {pixels}sides divisible by {sides}, not {height}x{width}")
        if config.has_classes:
            problems.append(
                f"{column} model: is class-conditional; only models without classes can be evaluated, with or without text"
            )
        for key in ("injection_t", "loss_t"):
            if max(settings[key]) >= steps:
                problems.append(
                    f"eval.{key}: {max(settings[key])}; allowed: below the {steps} steps of the {column} model"
                )
        most = model.schedule.last_step + 1
        if settings["inversion"]["copies"] and settings["inversion"]["steps"] > most:
            problems.append(
                f"eval.inversion.steps: {settings['inversion']['steps']}; allowed: at most the {most} steps of the {column} "
                "model that hold a trace of the image"
            )
        if settings["sampler"] == "pndm" and model.prediction_type == "sample":
            problems.append(
                f"eval.sampler: 'pndm'; allowed: 'ddim' or 'ddpm', as the {column} model predicts the image"
            )
        if settings["sampling_steps"] > steps:
            problems.append(f"eval.sampling_steps: {settings['sampling_steps']}; allowed: at most {steps}")
    return list(dict.fromkeys(problems))
