"""Everything that can be wrong with a configuration, found in one pass, before anything is written."""

from __future__ import annotations

import pathlib

from ml_collections import ConfigDict

from jaxunlearn.io import hub
from jaxunlearn.io.data_problems import data_problems
from jaxunlearn.io.diffusers import COMPUTE_DTYPES
from jaxunlearn.io.schedulers import read_scheduler
from jaxunlearn.models.unet2d_config import UNet2DConfig
from jaxunlearn.registry import unknown_name
from train import build
from train.auto_select import RULES
from train.configs.defaults import defaults
from train.problems import Problems
from train.validate_eval import check_eval, check_steps
from train.validate_unlearn import check_unlearn


def _key_problems(config: ConfigDict, known: ConfigDict, prefix: str = "config") -> list[str]:
    """One line for each key that is missing, or that a configuration file has added."""
    lines = []
    for key in known:
        if key not in config:
            lines.append(f"{prefix}.{key}: missing; start from train/configs/defaults.py")
        elif isinstance(known[key], ConfigDict) and f"{prefix}.{key}" not in ("config.model", "config.scheduler"):
            lines.extend(_key_problems(config[key], known[key], f"{prefix}.{key}"))
    if not prefix.startswith("config.data"):  # data_problems names those of the data
        lines.extend(f"{prefix}.{key}: {unknown_name('key', key, list(known))}" for key in config if key not in known)
    return lines


def config_problems(config: ConfigDict, workdir: pathlib.Path, num_devices: int) -> list[str]:
    """All problems of the configuration, one line each; empty if there are none.

    Args:
      config: the resolved configuration.
      workdir: where the run would write.
      num_devices: how many devices the step would use.
    """
    of_keys = _key_problems(config, defaults())
    if of_keys:
        return of_keys
    p = Problems(config)
    p.check("seed", "a whole number, 0 or more", lambda v: v >= 0)
    p.name("select", "selection rule", RULES)
    p.check("num_devices", "0 (all) or more", lambda v: v >= 0)
    p.lines.extend("config." + line for line in data_problems(config.data.to_dict()))
    _check_model(p, workdir)
    _check_optimizer(p, "base")
    _check_optimizer(p, "unlearn")
    check_unlearn(p)
    for stage, parts in (("base", 1), ("unlearn", config.unlearn.micro_batches)):
        batch_size = config[stage].batch_size
        if parts >= 1 and batch_size >= 1 and batch_size % (num_devices * parts):
            p.lines.append(
                f"config.{stage}.batch_size = {batch_size}: must be a multiple of {num_devices * parts} "
                f"({num_devices} devices x {parts} micro-batches)"
            )
    p.check("checkpoint.every", "1 or more steps", lambda v: v >= 1)
    p.check("checkpoint.keep", "2 or more, so that a damaged one has a predecessor", lambda v: v >= 2)
    p.check("log.every", "1 or more steps", lambda v: v >= 1)
    p.check("log.sample_every", "0 (only at the end) or more steps", lambda v: v >= 0)
    p.check("log.sample_count", "1 or more", lambda v: v >= 1)
    p.check("log.sample_steps", "1 or more", lambda v: v >= 1)
    check_eval(p)
    check_steps(p)
    p.check("latents.batch_size", "1 or more", lambda v: v >= 1)
    p.name("compute.dtype", "dtype", COMPUTE_DTYPES)
    return p.lines


def _check_model(p: Problems, workdir: pathlib.Path) -> None:
    config = p.config
    if config.latents.cache is not None and pathlib.Path(config.latents.cache).expanduser().is_file():
        p.lines.append(f"config.latents.cache = {config.latents.cache!r}: is a file; give a folder")
    p.lines_of("scheduler", lambda: read_scheduler(build.scheduler_json(config)))
    if config.base.path is None and not len(config.model):
        p.lines.append("config.base.path: give the folder of a trained model, or config.model to train one")
        return
    if config.base.path is None:
        p.lines_of("model", lambda: UNet2DConfig.from_dict(config.model.to_dict()))
        return
    if config.base.path.startswith(hub.PREFIX):
        return  # fetched when it is loaded
    source = pathlib.Path(config.base.path).expanduser()
    if not source.is_dir():
        p.lines.append(
            f"config.base.path = {config.base.path!r}: no such folder; give a diffusers folder (nothing is downloaded), "
            "or None to train a model"
        )
    elif source.resolve() in (workdir.resolve(), *workdir.resolve().parents):
        p.lines.append(f"--workdir={workdir}: lies inside the source model {source}; choose a folder outside of it")
    if config.latents.cache is not None:
        cache = pathlib.Path(config.latents.cache).expanduser()
        if source.resolve() in (cache.resolve(), *cache.resolve().parents):
            p.lines.append(
                f"config.latents.cache = {config.latents.cache!r}: lies inside the source model; choose a folder outside"
            )


def _check_optimizer(p: Problems, stage: str) -> None:
    key = f"{stage}.optimizer."
    p.check(f"{stage}.num_steps", "1 or more", lambda v: v >= 1)
    p.check(f"{stage}.batch_size", "1 or more", lambda v: v >= 1)
    p.check(key + "learning_rate", "positive", lambda v: v > 0)
    p.name(key + "lr_schedule", "schedule", build.LR_SCHEDULES)
    p.check(key + "warmup_steps", "0 or more", lambda v: v >= 0)
    p.check(key + "b1", "in [0, 1)", lambda v: 0 <= v < 1)
    p.check(key + "b2", "in [0, 1)", lambda v: 0 <= v < 1)
    p.check(key + "eps", "positive", lambda v: v > 0)
    p.check(key + "weight_decay", "0 or more", lambda v: v >= 0)
    p.check(key + "clip_norm", "positive", lambda v: v > 0)
    if stage == "base":
        p.check("base.ema_max_decay", "in [0, 1)", lambda v: 0 <= v < 1)


def differences(saved: dict, config: dict, prefix: str = "config") -> list[str]:
    """Keys in which two plain configurations differ, one line each."""
    lines = []
    for key in sorted({*saved, *config}):
        path = f"{prefix}.{key}"
        if key not in saved or key not in config:
            lines.append(f"{path}: only in {'the saved' if key in saved else 'this'} configuration")
        elif isinstance(saved[key], dict) and isinstance(config[key], dict):
            lines.extend(differences(saved[key], config[key], path))
        elif saved[key] != config[key]:
            lines.append(f"{path}: {saved[key]!r} in the work directory, {config[key]!r} now")
    return lines
