"""The presets of the digits job: one for each method, each a valid configuration that builds its objective and combiner."""

from __future__ import annotations

import pathlib

import pytest

from jaxunlearn.methods import METHODS
from jaxunlearn.schedule import linear
from train import methods, validate
from train.configs import digits


def test_every_method_has_a_preset():
    assert set(digits.PRESETS) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_preset_is_a_valid_configuration(name):
    config = digits.get_config(name)
    assert config.unlearn.method == name
    assert config.name == f"digits-{name}"
    assert validate.config_problems(config, pathlib.Path("runs/none"), 1) == []
    objective = methods.make_objective(config.unlearn, linear(), 1.0 if methods.needs_level(config.unlearn) else None)
    assert methods.make_combine(config.unlearn, objective).forget_sign == METHODS[name].forget_sign


@pytest.mark.parametrize("name", METHODS)
def test_presets_differ_in_nothing_but_the_forgetting(name):
    """Equal steps, batches, data and base models: what is compared are the methods."""
    plain, preset = digits.get_config(), digits.get_config(name)
    for section in ("data", "model", "scheduler", "base", "eval"):
        assert preset[section].to_dict() == plain[section].to_dict()
    assert preset.unlearn.num_steps == plain.unlearn.num_steps
    assert preset.unlearn.batch_size == plain.unlearn.batch_size
    for key, value in digits.PRESETS[name].items():
        node = preset.unlearn
        for part in key.split("."):
            node = node[part]
        assert node == value


def test_an_unknown_variant_is_told():
    with pytest.raises(ValueError, match="no variant 'nop'; it has: smoke, naive, "):
        digits.get_config("nop")
