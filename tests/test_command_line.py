"""What a user types, and what the launcher says when it is wrong: one line, exit code 2, nothing written."""

from __future__ import annotations

import json

import pytest

from tests.launching import run

# Typed after `python -m train.main`; what the one line must name.
MISTAKES = {
    "misspelt flag": (["--wrokdir=x"], ["wrokdir", "workdir"]),
    "bad integer": (["--config.seed=1.5"], ["config.seed", "1.5"]),
    "bad float": (["--config.unlearn.optimizer.learning_rate=abc"], ["learning_rate", "abc"]),
    "misspelt key": (["--config.unlearn.optimizer.learning_rat=1"], ["did you mean", "learning_rate"]),
    "unknown key": (["--config.zzz=1"], ["zzz", "config.unlearn.method"]),
    "leaf used as a group": (["--config.seed.x=1"], ["config.seed is a value"]),
    "group used as a leaf": (["--config.unlearn=1"], ["config.unlearn"]),
    "missing config file": (["--config=nowhere.py"], ["nowhere.py", "no such file", "digits.py"]),
    "flag forgotten": (["unlearn.lam=0.3"], ["did you mean --config.unlearn.lam=0.3"]),
    "stray word": (["now"], ["unexpected argument 'now'"]),
    "unknown mode": (["--mode=train"], ["mode", "base", "unlearn"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(case, tmp_path):
    arguments, words = MISTAKES[case]
    workdir = tmp_path / "run"
    done = run("train.main", *arguments, f"--workdir={workdir}")
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert not workdir.exists()


def test_a_broken_config_file_shows_its_own_traceback(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config():\n    return undefined_name\n")
    done = run("train.main", f"--config={broken}")
    assert done.returncode == 2
    assert "undefined_name" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("override", [[], ["--config.seed=1"]])
def test_a_config_file_that_forgets_to_return_is_one_line(tmp_path, override):
    forgetful = tmp_path / "forgetful.py"
    forgetful.write_text("def get_config():\n    config = {}\n")
    done = run("train.main", f"--config={forgetful}", *override)
    assert done.returncode == 2
    assert done.stderr == f"error: --config={forgetful}: get_config() must return a ConfigDict, got NoneType\n"


def test_of_a_key_that_is_set_twice_the_last_value_holds():
    window, seed = "--config.unlearn.select.window", "--config.seed"
    done = run("train.main", f"{window}=(1,2)", f"{seed}=1", f"{window}=(3,4)", f"{seed}=2", "--print_config")
    config = json.loads(done.stdout)
    assert config["unlearn"]["select"]["window"] == [3, 4]
    assert config["seed"] == 2


def test_help_lists_the_configuration_and_exits_0():
    done = run("train.main", "--help")
    assert done.returncode == 0
    for word in ("--workdir", "--dry_run", "--config.unlearn.method='siss'", "train/configs/mnist_tshirt.py"):
        assert word in done.stdout


@pytest.mark.parametrize("program", ["train.main", "train.sweep"])
def test_print_config_is_json(program):
    done = run(program, "--print_config", "--config.unlearn.lam=0.25")
    assert done.returncode == 0
    assert json.loads(done.stdout)["unlearn"]["lam"] == 0.25


def test_all_problems_of_a_configuration_are_listed_at_once(tmp_path):
    workdir = tmp_path / "run"
    done = run(
        "train.main",
        f"--workdir={workdir}",
        "--config.unlearn.method=sis",
        "--config.unlearn.lam=1.5",
        "--config.unlearn.t_min=900",
        "--config.unlearn.t_max=800",
        "--config.eval.loss_t=(5,2000)",
        "--config.data.name=digitz",
        "--config.model.norm_num_groups=7",
    )
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert all(line.startswith("error: config.") for line in lines), done.stderr
    for words in (
        ["unlearn.method", "did you mean 'siss'?"],
        ["unlearn.lam", "1.5", "[0, 1]"],
        ["unlearn.t_max", "800"],
        ["eval.loss_t", "2000"],
        ["data.name", "digits"],
        ["model", "norm_num_groups"],
    ):
        assert any(all(word in line for word in words) for line in lines), (words, done.stderr)
    assert not workdir.exists()
