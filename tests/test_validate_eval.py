"""The launcher refuses what the evaluation would refuse hours later, key by key."""

from __future__ import annotations

import pytest
from ml_collections import ConfigDict

from eval.presets import PRESETS
from eval.settings import DEFAULTS, RULES
from train import validate_eval
from train.configs.defaults import defaults
from train.problems import Problems

NUMBERS = (-1, 0, 1, 2, 3, 7, 8, 19, 20, 1000, -0.5, 0.0, 0.5, 1.0, 1.5)
TUPLES = (
    (),
    ("sima",),
    ("sima", "sima"),
    ("nothing",),
    ("ratio",),
    ("sscd",),
    (0.0, 0.3),
    (0.5, 1.5),
    (50, 100),
    (100, 50),
)
TEXTS = ("", " ", "a text", "ddim", "pndm", "clean", "short288", "smoke")


def groups() -> list[str]:
    return [key for key in RULES if not isinstance(_default(key), dict)]


def _default(key: str):
    value = DEFAULTS
    for part in key.split("."):
        value = value[part]
    return value


def refused(key: str, value) -> bool | None:
    """Whether the launcher refuses the value; None where the key cannot hold it."""
    config = defaults()
    node = config.eval
    *parents, leaf = key.split(".")
    for part in parents:
        node = node[part]
    try:
        node[leaf] = value
    except (TypeError, ValueError):
        return None
    found = Problems(config)
    validate_eval.check_eval(found)
    return bool(found.lines)


def test_the_configuration_has_the_keys_and_defaults_of_the_evaluation():
    assert ConfigDict(DEFAULTS).to_dict() == defaults().eval.to_dict()


@pytest.mark.parametrize("key", groups())
def test_the_launcher_and_the_evaluation_refuse_the_same(key):
    allowed = RULES[key][0]
    values = [*NUMBERS, *TUPLES, *TEXTS]
    compared = 0
    for value in values:
        if isinstance(value, int) and isinstance(_default(key), float):
            continue  # the launcher makes a float of it
        answer = refused(key, value)
        if answer is not None and not isinstance(_default(key), bool):
            assert answer == (not allowed(value)), (key, value)
            compared += 1
    assert compared or isinstance(_default(key), bool), key


def test_the_presets_are_known():
    assert set(validate_eval.PRESETS) == set(PRESETS)
