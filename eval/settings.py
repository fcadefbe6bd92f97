"""The ``eval`` section of a run's configuration: defaults, command line overrides and every problem at once."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Mapping
from typing import Any

from jaxunlearn.registry import unknown_name

DEFAULTS = {
    "num_samples": 2000,
    "sampler": "ddim",
    "sampling_steps": 50,
    "batch_size": 500,
    "injection_t": (50, 100, 250, 500),
    "injection_copies": 16,
    "loss_t": (50, 100, 200, 400, 600, 800),
    "loss_noises": 16,
    "loss_images": 200,
    "copy_threshold": None,
    "confidence": 0.95,
    "classifier": {"steps": 600, "batch_size": 128, "min_accuracy": 0.9},
    "seed": 0,
    "include_images": False,
    "guidance": 7.5,
    "prompts": None,
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


def _times(value: Any) -> bool:
    rising = isinstance(value, tuple | list) and len(value) > 0 and all(_whole(0)(t) for t in value)
    return rising and list(value) == sorted(set(value))


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_samples": (_whole(2), "a whole number of at least 2"),
    "sampler": (lambda value: value in ("ddim", "ddpm", "pndm"), "'ddim', 'ddpm' or 'pndm'"),
    "sampling_steps": (_whole(1), "a whole number of at least 1"),
    "batch_size": (_whole(1), "a whole number of at least 1"),
    "injection_t": (_times, "rising timesteps, such as (50, 100, 250)"),
    "injection_copies": (_whole(1), "a whole number of at least 1"),
    "loss_t": (_times, "rising timesteps, such as (50, 100, 200)"),
    "loss_noises": (_whole(1), "a whole number of at least 1"),
    "loss_images": (_whole(2), "a whole number of at least 2"),
    "copy_threshold": (lambda v: v is None or (_number(v) and 0 < v <= 1), "None, or an rms distance in (0, 1]"),
    "confidence": (lambda v: _number(v) and 0 < v < 1, "a number strictly between 0 and 1"),
    "classifier": (lambda v: isinstance(v, Mapping), "a group with steps, batch_size and min_accuracy"),
    "classifier.steps": (_whole(1), "a whole number of at least 1"),
    "classifier.batch_size": (_whole(1), "a whole number of at least 1"),
    "classifier.min_accuracy": (lambda v: _number(v) and 0 <= v <= 1, "a number in [0, 1]"),
    "seed": (_whole(0), "a whole number of at least 0"),
    "include_images": (lambda value: isinstance(value, bool), "True or False"),
    "guidance": (lambda v: _number(v) and 0 <= v < float("inf"), "a number of at least 0; 1 is no guidance"),
    "prompts": (_texts, "None (the captions of the training images), a text, or several different texts"),
}
"""Dotted key -> (is it allowed?, what is allowed)."""


def resolve(section: Mapping[str, Any], overrides: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Defaults, then the section of the run, then the command line.

    Args:
      section: the ``eval`` section; keys may be missing.
      overrides: dotted key below ``eval`` -> text of a Python value.

    Returns:
      The settings, and one line per problem.
    """
    settings, problems = copy.deepcopy(DEFAULTS), []
    if not isinstance(section, Mapping):
        return settings, [f"eval: {section!r}; allowed: a group of settings; fix: restore config.json"]
    flat = {}
    for key, value in section.items():
        inside = isinstance(value, Mapping)
        flat.update({f"{key}.{k}": v for k, v in value.items()} if inside else {key: value})
    for key, text in overrides.items():
        flat[key] = parse(text)
    for key, value in flat.items():
        if key not in RULES:
            problems.append(f"eval.{key}: {unknown_name('setting', key, RULES)}")
        elif not RULES[key][0](value):
            problems.append(f"eval.{key}: {value!r}; allowed: {RULES[key][1]}; fix: --eval.{key}=...")
        elif "." in key:
            group, name = key.split(".")
            settings[group][name] = value
        else:
            settings[key] = tuple(value) if isinstance(value, list) else value
    if isinstance(settings["prompts"], str):
        settings["prompts"] = (settings["prompts"],)
    return settings, problems


def parse(text: str) -> Any:
    """A Python literal, else the text itself: ``256``, ``(50, 100)``, ``50,100``, ``True``, ``ddpm``."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)
