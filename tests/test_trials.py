"""Runs without files, and the rows that studies keep of them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxunlearn import timesteps
from jaxunlearn.io import diffusers
from jaxunlearn.objectives.probes import strata
from jaxunlearn.parallel import make_mesh
from jaxunlearn.types import TrainState
from tests.launching import REPOSITORY, TINY, environment, run
from tests.tiny_model import quick_compilation  # noqa: F401
from train import studies, study_tables
from train.loop import StageRun
from train.stages import new_model
from train.studies import Judging, SeedStudy
from train.study_flags import CONFIGS, load_config
from train.study_models import TRAINED_WITH, StudyModels, study_models
from train.trials import measured_start, run_steps, run_trial

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = {
    "model.block_out_channels": (8, 8),
    "model.norm_num_groups": 4,
    "model.attention_head_dim": 4,
    "unlearn.batch_size": 8,
    "unlearn.num_steps": 3,
}
JUDGING = Judging(num_samples=4, sampling_steps=2, batch_size=4, classifier_steps=0)


def configured(**changes):
    return load_config(f"{CONFIGS / 'digits.py'}:smoke", SMALL | {k.replace("__", "."): v for k, v in changes.items()})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Untrained models in the place of trained ones."""
    folder = tmp_path_factory.mktemp("models")
    config = configured()
    for seed, name in ((0, "base"), (1, "retrained")):
        config.seed = seed
        diffusers.save(folder / "seed0" / name, new_model(config))
    return study_models(configured(), 0, folder, make_mesh(jax.devices()[:1]))


def leaves(tree):
    return jax.tree.leaves(jax.tree.map(np.asarray, tree))


@pytest.fixture(scope="module")
def first_run(models):
    seen = []
    config = configured()
    trial = run_trial(
        config,
        models.base,
        models.examples,
        models.mesh,
        measured_start(config, models.base, models.examples),
        on_step=lambda step, state: seen.append((step, int(state.step))),
    )
    return trial, seen


@pytest.mark.slow
def test_a_trial_takes_every_step_and_logs_it(first_run, models):
    trial, seen = first_run
    assert seen == [(1, 1), (2, 2), (3, 3)]
    assert trial.broken_step is None
    assert all(values.shape == (3,) for values in trial.log.values())
    assert {"loss/keep", "loss/forget", "update_norm"} <= set(trial.log)
    assert np.isnan(trial.step_seconds)  # three steps are all warm-up
    # The starting model is left alone, and the result is another one.
    apart = [np.abs(a - b).max() for a, b in zip(leaves(trial.params), leaves(models.base.params))]
    assert 0 < max(apart) < 0.1


@pytest.mark.slow
def test_a_broken_step_ends_a_run(models):
    """Steps without a model: the loss of step n is n, until it is not a number."""

    def step(state, key, batch):
        loss = np.nan if int(state.step) == 4 else float(state.step)
        return state._replace(step=state.step + 1), {"loss/keep": loss, "finite": 1.0}

    state = TrainState(np.int32(0), {"w": np.zeros(2)}, ())
    stage = StageRun("unlearn", step, state, lambda step: np.zeros((1, 1)), jax.random.key(0), 9, 9, 0, {})
    trial = run_steps(stage, models.mesh)
    assert trial.broken_step == 5
    np.testing.assert_array_equal(trial.log["loss/keep"], [0, 1, 2, 3, np.nan])
    assert trial.step_seconds > 0
    whole = run_steps(dataclasses.replace(stage, num_steps=4), models.mesh)
    assert whole.broken_step is None
    assert run_steps(dataclasses.replace(stage, num_steps=0), models.mesh).log == {}


@pytest.mark.slow
def test_a_row_is_kept_and_made_anew_for_other_settings(models, tmp_path, monkeypatch, first_run):
    monkeypatch.setattr(studies, "run_trial", lambda *_: first_run[0])
    study = SeedStudy(models, tmp_path, JUDGING)
    row = study.row("siss", configured())
    assert json.loads((tmp_path / "seed0_siss.json").read_text())["row"]["copies"] == row["copies"]
    assert row["keep_ratio"] == pytest.approx(row["keep_loss"] / study.before["keep_loss"])
    assert row["steps"] == 3

    def never(*_):
        raise AssertionError("not kept")

    monkeypatch.setattr(studies, "run_trial", never)
    again = SeedStudy(models, tmp_path, JUDGING)
    again.__dict__["evaluation"] = None  # nothing is judged again either
    assert again.row("siss", configured()) == row
    with pytest.raises(AssertionError, match="not kept"):
        SeedStudy(models, tmp_path, JUDGING).row("siss", configured(unlearn__combine__rho=0.2))


@pytest.mark.slow
def test_levels_are_zero_before_and_one_after_retraining(models, tmp_path):
    study = SeedStudy(models, tmp_path, JUDGING)
    # Two untrained models may have the forget images at the same loss, so the target is lifted above the start.
    lifted = study.base_losses._replace(forget=study.base_losses.forget + 1)
    study.__dict__["retrained_losses"] = lifted
    assert study.before["forget_level"] == pytest.approx(0)
    assert study.before["copies"] >= 0
    cap = study.cap(configured().unlearn)
    at = strata(1000, 16)
    expected = lifted.forget.mean(axis=(0, 2)) * np.asarray(timesteps.window(250, 750, num_steps=1000)(at))
    np.testing.assert_allclose(cap[at], np.maximum(expected, 1e-6), rtol=1e-6)
    assert study.start(configured(unlearn__method="clamped")).cap is not None
    with pytest.raises(ValueError, match="set unlearn.cap"):
        study.cap(configured(unlearn__select__filter="low_pass").unlearn)


@pytest.mark.parametrize("stage", ["base", "retrained"])
def test_models_of_another_configuration_are_not_used_again(tmp_path, monkeypatch, stage):
    trained = []

    def train(self, stage, target):
        trained.append(target.name)
        diffusers.save(target, new_model(self.config))

    monkeypatch.setattr(StudyModels, "_train", train)
    first = study_models(configured(), 0, tmp_path)
    getattr(first, stage)
    again = study_models(configured(unlearn__num_steps=9), 0, tmp_path)  # the models do not depend on it
    getattr(again, stage)
    assert trained == {"base": ["base"], "retrained": ["retrained", "base"]}[stage]
    for change in ({"base__num_steps": 21}, {"data__held_out_fraction": 0.2}, {"compute__dtype": "bfloat16"}):
        other = study_models(configured(**change), 0, tmp_path)
        with pytest.raises(ValueError, match=r"seed0: .* another configuration \(\w+\); choose another --out"):
            getattr(other, stage)
    # Models from before that file, and those of a work directory, are taken as they are.
    (tmp_path / "seed0" / TRAINED_WITH).unlink()
    getattr(study_models(configured(base__num_steps=21), 0, tmp_path), stage)
    getattr(study_models(configured(), 0, tmp_path / "new", source=tmp_path / "seed0"), stage)
    assert len(trained) == {"base": 1, "retrained": 2}[stage]
    assert not (tmp_path / "new").exists()


def test_a_row_depends_on_all_that_changes_it(tmp_path):
    mesh = make_mesh(jax.devices()[:1])
    kept = {"copies": 0, "samples": 1, "fd": 1.0, "fd_name": "fd_pixel"}

    def made(config, split_seed=0) -> bool:
        calls = []
        study = SeedStudy(StudyModels(config, tmp_path, mesh, split_seed=split_seed), tmp_path / "rows", JUDGING)
        study._kept("a", {}, lambda: calls.append(1) or kept)
        return bool(calls)

    assert made(configured())
    assert not made(configured())
    # The hash of rows that were made before these three counted.
    key = json.loads((tmp_path / "rows" / "seed0_a.json").read_text())["key"]
    config = configured()
    sections = {name: config[name].to_dict() for name in ("data", "model", "scheduler", "base")}
    old = {**sections, "judging": dataclasses.asdict(JUDGING), "seed": 0, "source": "None"}
    assert key == studies._hash(old)
    assert made(configured(eval__copy_threshold=0.1))
    assert made(configured(compute__dtype="bfloat16"))
    assert made(configured(), split_seed=1)
    assert made(configured())


def test_verdicts_follow_from_the_figures():
    good = {"copies": 10, "copies_before": 100, "broken_step": None, "broken": 0, "fd_ratio": 1.5, "keep_ratio": 1.0}
    assert study_tables.verdict(good) == "works"
    for change, expected in (
        ({"copies": 11}, "too weak"),
        ({"fd_ratio": 1.51}, "poor samples"),
        ({"copies": 11, "fd_ratio": 2.0}, "too weak, poor samples"),
        ({"keep_ratio": 1.5}, "collapsed"),
        ({"broken": 1}, "collapsed"),
        ({"broken_step": 7}, "collapsed"),
        ({"fd_ratio": None}, "collapsed"),
        ({"copies_before": 0, "copies": 0}, "no copies before"),
    ):
        assert study_tables.verdict({**good, **change}) == expected
    several = [good, {**good, "copies": 50}, good]
    assert study_tables.joint_verdict(several) == "works (2 of 3); too weak (1 of 3)"


def test_steps_are_timed_in_turns():
    calls = []
    times = study_tables.timed_in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, 3)
    assert calls == ["a", "a", "b", "b"] + ["a", "b"] * 3
    assert set(times) == {"a", "b"}


def test_a_study_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="no such file; shipped: .*digits.py"):
        load_config("nowhere.py", {})
    with pytest.raises(ValueError, match="--config.unlearn.nothing: unknown key\\S*.*\n--config.seed='x': "):
        load_config(CONFIGS / "digits.py", {"unlearn.nothing": 1, "seed": "x"})


@pytest.mark.slow
def test_a_trial_is_the_launchers_run(tmp_path):
    """The same configuration and seed give the same parameters with checkpoints and without."""
    result = run("train.main", *TINY, f"--workdir={tmp_path / 'run'}", "--mode=unlearn", "--config.num_devices=1")
    assert result.returncode == 0, result.stderr
    overrides = {arg.removeprefix("--config.").split("=")[0]: eval(arg.split("=")[1]) for arg in TINY[1:]}
    config = load_config(f"{CONFIGS / 'digits.py'}:smoke", overrides)
    models = study_models(config, 0, tmp_path, make_mesh(jax.devices()[:1]), source=tmp_path / "run" / "models")
    trial = run_trial(config, models.base, models.examples, models.mesh)
    expected = diffusers.load(tmp_path / "run" / "models" / "unlearned").params
    for mine, theirs in zip(leaves(trial.params), leaves(expected)):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def script(name, *arguments):
    return subprocess.run(
        [sys.executable, f"scripts/{name}.py", *map(str, arguments)],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


TINY_STUDY = (
    *(arg for arg in TINY if not arg.startswith("--config=")),
    "--seeds=0",
    "--samples=8",
    "--sampling_steps=2",
    "--classifier_steps=0",
    "--config.base.num_steps=4",
    "--config.unlearn.num_steps=2",
)


@pytest.mark.slow
def test_the_table_of_methods_goes_on_where_it_was(tmp_path):
    arguments = (*TINY_STUDY, "--methods", "naive", "clamped", "vdu_style", "retrack", "--rounds=2", "--out", tmp_path)
    result = script("methods_table", *arguments)
    assert result.returncode == 0, result.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    assert set(table["rows"]) == {"before", "retrained", "naive", "clamped", "vdu_style", "retrack"}
    assert set(table["step_seconds"]) == {"naive", "clamped", "vdu_style", "retrack"}
    assert "| `naive` |" in (tmp_path / "table.md").read_text()
    again = script("methods_table", *arguments)
    assert "training base" not in again.stdout
    assert "copies of" not in again.stdout


@pytest.mark.slow
def test_the_study_of_selections_compares_with_the_grid(tmp_path):
    arguments = (*TINY_STUDY, "--methods", "siss", "--strengths", "siss=0.1,0.2", "--out", tmp_path)
    result = script("selection_study", *arguments)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "selection.json").read_text())
    assert list(record["rows"]["siss"]) == ["none", "window", "low_pass", "window + low_pass", "auto"]
    assert record["against_the_grid"]["siss"][0]["rule"] == "auto"
