"""Settings of an evaluation: presets, what wins over what, and that presets say nothing that is not allowed."""

from __future__ import annotations

import jax
import pytest

from eval.families import FAMILIES, family_key, lookup, switched_off
from eval.presets import PRESETS
from eval.settings import DEFAULTS, RULES, resolve
from jaxunlearn.metrics import METRICS
from train.configs import digits
from train.validate import config_problems


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_allowed_and_rise(name):
    settings, problems = resolve({}, {}, name)
    assert problems == []
    assert settings["preset"] == name
    for key, value in PRESETS[name].items():
        assert lookup(settings, key) == value
        assert RULES[key][0](value)
    for key in ("num_samples", "injection_copies", "loss_noises", "loss_images"):
        assert PRESETS["smoke"][key] <= PRESETS["standard"][key] <= PRESETS["audit"][key]


def test_the_command_line_wins_over_the_preset_and_the_preset_over_the_run():
    run = {**DEFAULTS, "num_samples": 500, "loss_noises": DEFAULTS["loss_noises"]}
    settings, problems = resolve(run, {"injection_copies": "7"}, "standard")
    assert problems == []
    assert settings["num_samples"] == PRESETS["standard"]["num_samples"]
    assert settings["injection_copies"] == 7
    # A preset in the run's own configuration replaces what stands at its default, and nothing that the run set.
    settings, problems = resolve({**run, "preset": "smoke"}, {})
    assert problems == []
    assert settings["num_samples"] == 500
    assert settings["loss_noises"] == PRESETS["smoke"]["loss_noises"]
    assert settings["preset"] == "smoke"
    assert resolve(run, {"preset": "audit"})[0]["num_samples"] == PRESETS["audit"]["num_samples"]
    assert resolve(run, {})[0]["preset"] is None


def test_an_unknown_preset_is_one_problem():
    (problem,) = resolve({}, {}, "quick")[1]
    assert "eval.preset: 'quick'; allowed: None, 'smoke', 'standard' or 'audit'" in problem
    (problem,) = resolve({"preset": "quick"}, {})[1]
    assert "'quick'" in problem


@pytest.mark.parametrize(
    ("value", "allowed"), [("0.95", 1), ("0.999", 1), ("0.949", 0), ("0.5", 0), ("1.0", 0), ("'x'", 0)]
)
def test_the_confidence_cannot_be_lowered(value, allowed):
    """Verdicts ask for bounds: at a confidence of 0.5 every one of them would be easy."""
    settings, problems = resolve({}, {"confidence": value})
    assert len(problems) == 1 - allowed
    if problems:
        assert "allowed: a number of at least 0.95 and below 1" in problems[0]
    else:
        assert settings["confidence"] == float(value)


@pytest.mark.parametrize(("value", "allowed"), [(0.95, True), (0.999, True), (0.949, False), (1.0, False)])
def test_a_run_refuses_the_same_confidence_before_it_starts(tmp_path, value, allowed):
    config = digits.get_config()
    config.eval.confidence = value
    found = config_problems(config, tmp_path / "run", 1)
    assert len(found) == (0 if allowed else 1)
    assert all("eval.confidence" in line and "[0.95, 1)" in line for line in found)


def test_every_family_names_its_metrics_and_its_switch():
    settings, _ = resolve({}, {})
    for name, family in FAMILIES.items():
        names = {item["metric"] for item in family.module.failed_entries(settings)}
        assert names <= set(METRICS), name
        assert names, name
        assert names <= set(family.metrics(settings)), name
        if family.switch is not None:
            assert family.switch in RULES, name
            for item in switched_off(name, settings):
                assert item["status"] == "not_run"
                assert f"eval.{family.switch}" in item["reason"]
    assert len({tuple(jax.random.key_data(family_key(name, 0)).tolist()) for name in FAMILIES}) == len(FAMILIES)
