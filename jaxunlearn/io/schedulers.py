"""Between diffusers' ``scheduler_config.json`` and (:class:`Schedule`, :class:`SamplerConfig`, prediction type).

``DDPMScheduler``, ``DDIMScheduler`` and ``PNDMScheduler`` are read. Missing keys take diffusers' defaults. The betas are
rounded to float32 as diffusers rounds them, so that a loaded model keeps its own table. Files of Stable Diffusion
pipelines are corrected as diffusers corrects them when it opens the pipeline.
"""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxunlearn.sampling import PREDICTION_TYPES, SPACINGS, VARIANCE_TYPES, SamplerConfig
from jaxunlearn.schedule import Schedule, zero_terminal_snr

DIFFUSERS_VERSION = "0.42.1"
"""The version whose format is read and written; it is written into the files of new models."""

KINDS = {"DDPMScheduler": "ddpm", "DDIMScheduler": "ddim", "PNDMScheduler": "pndm"}
MOST_STEPS = 10**6
"""Of a noise schedule, whose tables are held in memory."""
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

_SHARED = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
_NOT_OF_PNDM = {
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "rescale_betas_zero_snr",
}
DEFAULTS = {
    "DDPMScheduler": _SHARED | {"variance_type": "fixed_small"},
    "DDIMScheduler": _SHARED | {"set_alpha_to_one": True},
    "PNDMScheduler": {key: value for key, value in _SHARED.items() if key not in _NOT_OF_PNDM}
    | {"skip_prk_steps": False, "set_alpha_to_one": False},
}
"""Scheduler class -> key -> default."""

# pndm never clips, but its files may carry these keys, which count once the model is sampled with another kind.
_CARRIED = {"PNDMScheduler": {"clip_sample": False, "clip_sample_range": 1.0}}
# Keys of one scheduler in the file of another, and two that old versions wrote.
_WITHOUT_EFFECT = set().union(*DEFAULTS.values()) | {"timestep_values", "tensor_format"}
# Pipelines whose names begin like those that diffusers corrects, which it does not.
_NOT_CORRECTED = ("StableDiffusionXL", "StableDiffusion3")


class Scheduler(NamedTuple):
    """What a scheduler file says: the noise schedule, the sampler, what the model predicts, and what was corrected."""

    schedule: Schedule
    sampler: SamplerConfig
    prediction_type: str
    notes: tuple[str, ...] = ()


def read_scheduler(config: Mapping[str, Any], class_name: str | None = None, pipeline: str | None = None) -> Scheduler:
    """Reads the content of a ``scheduler_config.json``.

    Args:
      config: its keys. Unknown ones give one warning.
      class_name: the class that ``model_index.json`` names, which wins over ``_class_name`` of the file, as in
        diffusers. Without either the file is read as that of a ``DDPMScheduler``.
      pipeline: the pipeline's class in ``model_index.json``. For Stable Diffusion (names that begin so, without XL and
        3) ``steps_offset`` counts as 1 and ``clip_sample`` as false whatever the file says or leaves out, as in
        diffusers, and ``notes`` has a line for each value that was changed so.

    Raises:
      ValueError: one line for every value that is not supported, with what is allowed and what to do.
    """
    name = class_name or config.get("_class_name") or "DDPMScheduler"
    if name not in DEFAULTS:
        raise ValueError(
            f"_class_name: {name!r} is not supported; allowed: {', '.join(DEFAULTS)};"
            " convert: write the config of any of these with the same betas"
        )
    problems = _problems(config, name)
    if problems:
        raise ValueError("\n".join(problems))
    unknown = [k for k in config if not k.startswith("_") and k not in DEFAULTS[name] and k not in _WITHOUT_EFFECT]
    if unknown:
        warnings.warn(
            f"unknown keys in the scheduler config have no effect: {', '.join(sorted(unknown))}", stacklevel=2
        )
    values = _values(config, name)
    notes = _correct(values, pipeline)
    sampler = SamplerConfig(
        kind=KINDS[name],
        clip_sample=values["clip_sample"],
        clip_sample_range=float(values["clip_sample_range"]),
        variance_type=values.get("variance_type", "fixed_small"),
        timestep_spacing=values["timestep_spacing"],
        steps_offset=values["steps_offset"],
        set_alpha_to_one=values.get("set_alpha_to_one", True),
    )
    return Scheduler(_schedule(values), sampler, values["prediction_type"], notes)


def scheduler_config(schedule: Schedule, sampler: SamplerConfig, prediction_type: str = "epsilon") -> dict[str, Any]:
    """The keys of a ``scheduler_config.json`` for any schedule: its betas are written out as ``trained_betas``.

    ``sampler.eta`` has no place there: diffusers takes it when it samples.

    Raises:
      ValueError: an unknown prediction type, or "sample" with a sampler of kind "pndm".
    """
    alphas = schedule.alphas_cumprod / np.append(1.0, schedule.alphas_cumprod[:-1])
    name = {kind: name for name, kind in KINDS.items()}[sampler.kind]
    config = DEFAULTS[name] | {
        "num_train_timesteps": schedule.num_steps,
        "trained_betas": [float(beta) for beta in (1.0 - alphas).astype(np.float32)],
        "clip_sample": sampler.clip_sample,  # PNDMScheduler keeps these two for schedulers made from it.
        "clip_sample_range": sampler.clip_sample_range,
        "timestep_spacing": sampler.timestep_spacing,
        "steps_offset": sampler.steps_offset,
        "prediction_type": prediction_type,
    }
    if sampler.kind == "ddpm":
        config["variance_type"] = sampler.variance_type
    else:
        config["set_alpha_to_one"] = sampler.set_alpha_to_one
    if sampler.kind == "pndm":
        config["skip_prk_steps"] = True
    config = {"_class_name": name, "_diffusers_version": DIFFUSERS_VERSION} | config
    read_scheduler(config)  # What is written must be readable.
    return config


def complete_scheduler_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The given keys with all defaults written out, as diffusers saves a scheduler.

    Raises:
      ValueError: as :func:`read_scheduler`.
    """
    read_scheduler(config)
    name = config.get("_class_name") or "DDPMScheduler"
    return DEFAULTS[name] | {"_class_name": name, "_diffusers_version": DIFFUSERS_VERSION} | dict(config)


def _values(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Every key that counts for this class, with defaults."""
    defaults = DEFAULTS[name] | _CARRIED.get(name, {})
    return defaults | {key: value for key, value in config.items() if key in defaults}


def _correct(values: dict[str, Any], pipeline: str | None) -> tuple[str, ...]:
    """Changes what diffusers changes when it opens this pipeline; one note for each value."""
    if pipeline is None or not pipeline.startswith("StableDiffusion") or pipeline.startswith(_NOT_CORRECTED):
        return ()
    notes = []
    for key, right in (("steps_offset", 1), ("clip_sample", False)):
        if values[key] != right:
            shown = json.dumps(values[key]), json.dumps(right)
            notes.append(
                f"{key} is {shown[0]} in the scheduler's config: {shown[1]} is used instead, as {pipeline} does"
            )
            values[key] = right
    return tuple(notes)


def _schedule(values: Mapping[str, Any]) -> Schedule:
    num_steps, start, end = values["num_train_timesteps"], values["beta_start"], values["beta_end"]
    if values["trained_betas"] is not None:
        betas = np.asarray(values["trained_betas"], np.float32)
    elif values["beta_schedule"] == "linear":
        betas = np.linspace(start, end, num_steps, dtype=np.float32)
    elif values["beta_schedule"] == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, num_steps, dtype=np.float32) ** 2
    else:
        tau = np.arange(num_steps + 1) / num_steps
        signal = np.cos((tau + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1.0 - signal[1:] / signal[:-1], 0.999).astype(np.float32)
    schedule = Schedule(np.cumprod((np.float32(1.0) - betas).astype(np.float64)))
    return zero_terminal_snr(schedule) if values.get("rescale_betas_zero_snr") else schedule


def _problems(config: Mapping[str, Any], name: str) -> list[str]:
    """One line ``key: value is not supported; allowed ...; remedy`` for every refused value."""
    values = _values(config, name)
    lines = []

    def refuse(key: str, allowed: str, remedy: str):
        shown = repr(values[key])
        lines.append(f"{key}: {shown[:60]} is not supported; allowed: {allowed}; {remedy}")

    def one_of(key: str, allowed: tuple[str, ...], remedy: str):
        if values[key] not in allowed:
            near = difflib.get_close_matches(str(values[key]), allowed, n=1)
            refuse(key, ", ".join(allowed), f"did you mean {near[0]!r}?" if near else remedy)

    one_of("beta_schedule", BETA_SCHEDULES, "write the betas out as trained_betas")
    if name == "PNDMScheduler":
        one_of("prediction_type", ("epsilon", "v_prediction"), "use a DDIMScheduler for a model of the sample")
    else:
        one_of("prediction_type", PREDICTION_TYPES, "say what the model predicts")
    one_of("timestep_spacing", SPACINGS, "choose one of these")
    if name == "DDPMScheduler":
        remedy = "learned variances need twice the output channels; sample with one of these instead"
        one_of("variance_type", VARIANCE_TYPES, remedy)
    else:
        _check(values, ("set_alpha_to_one",), _is_bool, "true, false", "write one of these", refuse)
    if name == "PNDMScheduler":
        if values["skip_prk_steps"] is not True:
            remedy = "set it to true (Stable Diffusion's own), or name a DDIMScheduler with the same betas"
            refuse("skip_prk_steps", "true", remedy)
    else:
        if values["thresholding"] is not False:
            refuse("thresholding", "false", "set it to false; clip_sample keeps the image in range")
        _check(values, ("rescale_betas_zero_snr",), _is_bool, "true, false", "write one of these", refuse)
    _check(values, ("clip_sample",), _is_bool, "true, false", "write one of these", refuse)
    allowed = f"an integer above 0, at most {MOST_STEPS}"
    _check(values, ("num_train_timesteps",), _is_count, allowed, "write the training's number", refuse)
    _check(values, ("clip_sample_range",), _is_positive, "a positive number", "1.0 for images in [-1, 1]", refuse)
    offset_good = isinstance(values["steps_offset"], int) and values["steps_offset"] >= 0
    if not offset_good:
        refuse("steps_offset", "an integer, 0 or larger", "write 0 unless the model was made with another value")
    betas = values["trained_betas"]
    if betas is not None:
        if not isinstance(betas, list | tuple) or not all(_is_number(b) and 0 < b <= 1 for b in betas):
            refuse("trained_betas", "null, or a list of numbers in (0, 1]", "set it to null to use beta_schedule")
        elif len(betas) != values["num_train_timesteps"]:
            wanted = f"as many betas as num_train_timesteps ({values['num_train_timesteps']}), not {len(betas)}"
            refuse("trained_betas", wanted, "correct num_train_timesteps")
    else:
        allowed = "a number between 0 and 1"
        _check(values, ("beta_start", "beta_end"), lambda b: _is_number(b) and 0 < b < 1, allowed, "correct it", refuse)
    return lines


def _check(values, keys, good, allowed, remedy, refuse):
    for key in keys:
        if not good(values[key]):
            refuse(key, allowed, remedy)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_STEPS
