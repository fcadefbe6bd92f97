"""The ``eval`` section of a run's configuration: defaults, command line overrides and every problem at once."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Mapping
from typing import Any

from eval.presets import PRESETS
from jaxunlearn.io.feature_weights import FEATURE_WEIGHTS
from jaxunlearn.metrics import COPY_DETECTORS, MEMBERSHIP_SCORES
from jaxunlearn.metrics.resize import CONVENTIONS, SSCD_CONVENTIONS
from jaxunlearn.registry import unknown_name

DEFAULTS = {
    "preset": None,
    "num_samples": 2000,
    "sampler": "ddim",
    "sampling_steps": 50,
    "batch_size": 500,
    "injection_t": (50, 100, 250, 500),
    "injection_copies": 16,
    "injection_images": 16,
    "loss_t": (50, 100, 200, 400, 600, 800),
    "loss_noises": 16,
    "loss_images": 200,
    "copy_threshold": None,
    "confidence": 0.95,
    "classifier": {"steps": 600, "batch_size": 128, "min_accuracy": 0.9},
    "quality": {
        "classifier": False,
        "inception": False,
        "convention": "clean",
        "rows": 2000,
        "subsets": 100,
        "subset_size": 1000,
        "batch_size": 50,
    },
    "weights": {"folder": None, "allow_unpinned": ()},
    "membership": {"scores": (), "noise_norm_images": 0},
    "extraction": {"detectors": ()},
    "sscd": {
        "enabled": False,
        "variants": False,
        "convention": "short288",
        "batch_size": 16,
        "calibration_images": 2000,
    },
    "photographs": {"enabled": False, "force": False, "samples": 1000, "keep_images": 1000, "batch_size": 16},
    "nll": {
        "draws": 0,
        "images": 8,
        "held_out": 8,
        "probes": None,
        "exact": False,
        "tolerance": 1e-4,
        "max_steps": 4096,
    },
    "inversion": {"copies": 0, "steps": 100, "shares": (0.0, 0.3, 0.6)},
    "gap": {"draws": 0, "replicates": 8, "images": 64},
    "relearn": {
        "keys": 0,
        "budget": 200,
        "every": 5,
        "learning_rate": 1e-4,
        "batch_size": 16,
        "images": 16,
        "benign_steps": 0,
    },
    "seed": 0,
    "include_images": False,
    "guidance": 7.5,
    "prompts": None,
    "request": {"id": None, "received_utc": None, "operator": None, "basis": None},
}
"""Key -> default of the ``eval`` section."""


def _whole(low: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= low


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _texts(value: Any) -> bool:
    """None, one text, or different texts; none of them empty."""
    if value is None or isinstance(value, str):
        return value is None or bool(value.strip())
    full = isinstance(value, tuple | list) and all(isinstance(text, str) and text.strip() for text in value)
    return full and 0 < len(value) == len(set(value))


def _line(value: Any) -> bool:
    return value is None or (isinstance(value, str) and bool(value.strip()))


def _times(value: Any) -> bool:
    rising = isinstance(value, tuple | list) and len(value) > 0 and all(_whole(0)(t) for t in value)
    return rising and list(value) == sorted(set(value))


def _names(known: tuple[str, ...]) -> tuple[Callable[[Any], bool], str]:
    """A rule: some of the known names, each once."""

    def allowed(value: Any) -> bool:
        return isinstance(value, tuple | list) and set(value) <= set(known) and len(set(value)) == len(value)

    return allowed, f"a tuple of {', '.join(known)}; () for none"


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "preset": (lambda value: value is None or value in PRESETS, "None, 'smoke', 'standard' or 'audit'"),
    "num_samples": (_whole(2), "a whole number of at least 2"),
    "sampler": (lambda value: value in ("ddim", "ddpm", "pndm"), "'ddim', 'ddpm' or 'pndm'"),
    "sampling_steps": (_whole(1), "a whole number of at least 1"),
    "batch_size": (_whole(1), "a whole number of at least 1"),
    "injection_t": (_times, "rising timesteps, such as (50, 100, 250)"),
    "injection_copies": (_whole(1), "a whole number of at least 1"),
    "injection_images": (_whole(1), "a whole number of at least 1"),
    "loss_t": (_times, "rising timesteps, such as (50, 100, 200)"),
    "loss_noises": (_whole(1), "a whole number of at least 1"),
    "loss_images": (_whole(2), "a whole number of at least 2"),
    "copy_threshold": (lambda v: v is None or (_number(v) and 0 < v <= 1), "None, or an rms distance in (0, 1]"),
    "confidence": (lambda v: _number(v) and 0.95 <= v < 1, "a number of at least 0.95 and below 1"),
    "classifier": (lambda v: isinstance(v, Mapping), "a group with steps, batch_size and min_accuracy"),
    "classifier.steps": (_whole(1), "a whole number of at least 1"),
    "classifier.batch_size": (_whole(1), "a whole number of at least 1"),
    "classifier.min_accuracy": (lambda v: _number(v) and 0 <= v <= 1, "a number in [0, 1]"),
    "quality": (lambda v: isinstance(v, Mapping), "a group with classifier, inception, convention, rows, ..."),
    "quality.classifier": (lambda value: isinstance(value, bool), "True or False"),
    "quality.inception": (lambda value: isinstance(value, bool), "True or False; needs its weights"),
    "quality.convention": (lambda value: value in CONVENTIONS, f"one of {', '.join(CONVENTIONS)}"),
    "quality.rows": (_whole(20), "a whole number of at least 20: features of each side that are compared one by one"),
    "quality.subsets": (_whole(2), "a whole number of at least 2"),
    "quality.subset_size": (_whole(2), "a whole number of at least 2"),
    "quality.batch_size": (_whole(1), "a whole number of at least 1"),
    "weights": (lambda v: isinstance(v, Mapping), "a group with folder and allow_unpinned"),
    "weights.folder": (_line, "None (JAXUNLEARN_WEIGHTS), or the folder of converted weights"),
    "weights.allow_unpinned": (
        lambda v: isinstance(v, tuple | list) and all(name in FEATURE_WEIGHTS for name in v),
        f"names of weights that may come from another file than the public one: {', '.join(FEATURE_WEIGHTS)}",
    ),
    "sscd": (lambda v: isinstance(v, Mapping), "a group with enabled, variants, convention, batch_size, ..."),
    "sscd.enabled": (lambda value: isinstance(value, bool), "True or False; needs its weights"),
    "sscd.variants": (lambda value: isinstance(value, bool), "True or False; needs the same weights"),
    "sscd.convention": (lambda value: value in SSCD_CONVENTIONS, f"one of {', '.join(SSCD_CONVENTIONS)}"),
    "sscd.batch_size": (_whole(1), "a whole number of at least 1"),
    "sscd.calibration_images": (_whole(1), "a whole number of at least 1"),
    "photographs": (
        lambda v: isinstance(v, Mapping),
        "a group with enabled, force, samples, keep_images and batch_size",
    ),
    "photographs.enabled": (lambda value: isinstance(value, bool), "True or False; two of its measures need weights"),
    "photographs.force": (lambda value: isinstance(value, bool), "True or False"),
    "photographs.samples": (_whole(1), "a whole number of at least 1"),
    "photographs.keep_images": (_whole(1), "a whole number of at least 1"),
    "photographs.batch_size": (_whole(1), "a whole number of at least 1"),
    "membership": (lambda v: isinstance(v, Mapping), "a group with scores and noise_norm_images"),
    "membership.scores": _names(MEMBERSHIP_SCORES),
    "membership.noise_norm_images": (_whole(0), "a whole number of at least 0; models of text only"),
    "extraction": (lambda v: isinstance(v, Mapping), "a group with detectors"),
    "extraction.detectors": _names(COPY_DETECTORS),
    "nll": (lambda v: isinstance(v, Mapping), "a group with draws, images, held_out, probes, exact, tolerance, ..."),
    "nll.draws": (_whole(0), "a whole number of at least 0; dequantisations of each forget image, 0 switches it off"),
    "nll.images": (_whole(1), "a whole number of at least 1"),
    "nll.held_out": (_whole(1), "a whole number of at least 1"),
    "nll.probes": (lambda v: v is None or _whole(1)(v), "None (by the image's size), or a whole number of at least 1"),
    "nll.exact": (lambda value: isinstance(value, bool), "True or False; images of up to 1024 values only"),
    "nll.tolerance": (lambda v: _number(v) and 0 < v < 1, "a number in (0, 1), such as 1e-4"),
    "nll.max_steps": (_whole(1), "a whole number of at least 1"),
    "inversion": (lambda v: isinstance(v, Mapping), "a group with copies, steps and shares"),
    "inversion.copies": (_whole(0), "a whole number of at least 0; 0 switches it off"),
    "inversion.steps": (_whole(2), "a whole number of at least 2"),
    "inversion.shares": (
        lambda v: isinstance(v, tuple | list) and len(v) > 0 and all(_number(x) and 0 <= x <= 1 for x in v),
        "shares of fresh noise in [0, 1], such as (0.0, 0.3)",
    ),
    "gap": (lambda v: isinstance(v, Mapping), "a group with draws, replicates and images"),
    "gap.draws": (_whole(0), "a whole number of at least 0; of each replicate, 0 switches it off"),
    "gap.replicates": (_whole(8), "a whole number of at least 8"),
    "gap.images": (_whole(1), "a whole number of at least 1"),
    "relearn": (lambda v: isinstance(v, Mapping), "a group with keys, budget, every, learning_rate, batch_size, ..."),
    "relearn.keys": (lambda v: _whole(0)(v) and v not in (1, 2), "0 (off), or a whole number of at least 3"),
    "relearn.budget": (_whole(1), "a whole number of at least 1"),
    "relearn.every": (_whole(1), "a whole number of at least 1"),
    "relearn.learning_rate": (lambda v: _number(v) and 0 < v < float("inf"), "a positive number"),
    "relearn.batch_size": (_whole(1), "a whole number of at least 1"),
    "relearn.images": (_whole(1), "a whole number of at least 1"),
    "relearn.benign_steps": (_whole(0), "a whole number of at least 0; 0 switches it off"),
    "seed": (_whole(0), "a whole number of at least 0"),
    "include_images": (lambda value: isinstance(value, bool), "True or False"),
    "guidance": (lambda v: _number(v) and 0 <= v < float("inf"), "a number of at least 0; 1 is no guidance"),
    "request": (lambda v: isinstance(v, Mapping), "a group with id, received_utc, operator and basis"),
    "request.id": (_line, "None, or a text: the number of the request that the report answers"),
    "request.received_utc": (_line, "None, or a text such as '2026-01-31'"),
    "request.operator": (_line, "None, or a text: who is responsible for the run"),
    "request.basis": (_line, "None, or a text: why the images have to go"),
    "prompts": (_texts, "None (the captions of the training images), a text, or several different texts"),
}
"""Dotted key -> (is it allowed?, what is allowed)."""


def resolve(
    section: Mapping[str, Any], overrides: Mapping[str, str], preset: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Defaults, the run's preset, the run's other settings, ``preset``, then the command line: the last one wins.

    A run's configuration holds every key, so those that are equal to the default count as not set.

    Args:
      section: the ``eval`` section; keys may be missing.
      overrides: dotted key below ``eval`` -> text of a Python value.
      preset: the preset of the command line, which wins over the section; None: that of the section.

    Returns:
      The settings, and one line per problem.
    """
    settings, problems = copy.deepcopy(DEFAULTS), []
    if not isinstance(section, Mapping):
        return settings, [f"eval: {section!r}; allowed: a group of settings; fix: restore config.json"]
    defaults, own = _flat(DEFAULTS), _flat(section)
    given = _flat({key: parse(text) for key, text in overrides.items()})
    last = given.pop("preset", preset)
    chosen = own.pop("preset", None) if last is None else last
    if not RULES["preset"][0](chosen):
        problems.append(f"eval.preset: {chosen!r}; allowed: {RULES['preset'][1]}; fix: --preset standard")
        chosen = last = None
    values = PRESETS[chosen] if chosen is not None else {}
    set_by_run = {key: value for key, value in own.items() if key not in values or not _same(value, defaults[key])}
    flat = set_by_run | values if last is not None else values | set_by_run
    for key, value in (flat | given).items():
        if key not in RULES:
            problems.append(f"eval.{key}: {unknown_name('setting', key, RULES)}")
        elif not RULES[key][0](value):
            problems.append(f"eval.{key}: {value!r}; allowed: {RULES[key][1]}; fix: --eval.{key}=...")
        elif "." in key:
            group, name = key.split(".")
            settings[group][name] = tuple(value) if isinstance(value, list) else value
        else:
            settings[key] = tuple(value) if isinstance(value, list) else value
    settings["preset"] = chosen
    if isinstance(settings["prompts"], str):
        settings["prompts"] = (settings["prompts"],)
    return settings, problems


def _flat(section: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value; groups have one level. What stands in place of a single value is left as it is."""
    flat = {}
    for key, value in section.items():
        inside = isinstance(value, Mapping) and isinstance(DEFAULTS.get(key), Mapping)
        flat.update({f"{key}.{k}": v for k, v in value.items()} if inside else {key: value})
    return flat


def _same(value: Any, default: Any) -> bool:
    return (tuple(value) if isinstance(value, list) else value) == default


def parse(text: str) -> Any:
    """A Python literal, else the text itself: ``256``, ``(50, 100)``, ``50,100``, ``True``, ``ddpm``."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)
