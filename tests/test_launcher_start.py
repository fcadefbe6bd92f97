"""How a run starts and how its evaluation ends: the first files, what stands in their way, signals, failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from jaxunlearn import runtime
from jaxunlearn.io.workdir import Workdir
from scripts import digits_study
from train import loop, opening, stages
from train.configs import digits
from train.flags_parser import Arguments
from train.watch import Watch

MANIFESTS = ("forget_manifest", "keep_manifest")


def obstacles(folder, **changes):
    return opening._workdir_problems(Workdir(folder), configured(**changes))


def configured(**changes):
    config = digits.get_config("smoke")
    for key, value in changes.items():
        config[key] = value
    return config


def arguments(folder, config):
    return Arguments(config, folder, None, False, False, False, ("main.py", "--config.seed=0"))


@pytest.fixture
def begin(monkeypatch):
    """Starts a work directory without looking at images."""
    for name in MANIFESTS:
        monkeypatch.setattr(opening, name, lambda split: {"count": 0})

    def start(folder, module="train.main", **changes):
        config = configured(**changes)
        opened = opening.Opened(config, Workdir(folder), None, None, None)
        opening.start_workdir(opened, arguments(folder, config), module)

    return start


# The first files


def test_a_start_that_is_killed_can_be_repeated(begin, tmp_path, monkeypatch):
    def killed():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(opening, "_environment", killed)
        with pytest.raises(KeyboardInterrupt):
            begin(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
    assert obstacles(tmp_path / "run") == []
    begin(tmp_path / "run")
    names = {"config.json", "command.txt", "environment.json", *(f"{name}.json" for name in MANIFESTS)}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    # Killed while the very first file was written.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".config.json.123.abcd").write_text("{")
    assert obstacles(tmp_path / "other") == []
    (tmp_path / "other" / "thesis.tex").write_text("")
    assert "is not empty" in obstacles(tmp_path / "other")[0]


def test_a_sweep_leaves_the_command_of_the_run_alone(begin, tmp_path):
    begin(tmp_path / "run")
    begin(tmp_path / "run", "train.sweep")
    assert (tmp_path / "run" / "command.txt").read_text() == "python -m train.main --config.seed=0\n"
    assert (tmp_path / "run" / "sweep_command.txt").read_text() == "python -m train.sweep --config.seed=0\n"


def test_a_machine_without_git_has_no_revision(begin, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    begin(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["git_revision"] is None


def test_a_folder_that_cannot_be_made_is_one_line(begin, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (line,) = obstacles(tmp_path / "file")
    assert line.endswith("/file: is a file; choose a folder")
    (line,) = obstacles(tmp_path / "file" / "a" / "run")
    assert line.startswith(f"--workdir={tmp_path / 'file' / 'a' / 'run'}: ")
    assert f"{tmp_path / 'file'} is a file" in line
    # What only writing shows.
    with pytest.raises(opening.Refused) as refused:
        begin(tmp_path / "file" / "run")
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"--workdir={tmp_path / 'file' / 'run'}: cannot be started")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (line,) = obstacles(tmp_path / "new" / "run")
    assert f"{tmp_path} may not be written" in line


def test_a_damaged_selection_is_refused_before_anything_is_written(begin, tmp_path):
    begin(tmp_path / "run", select="auto")
    (tmp_path / "run" / "selection.json").write_text("{")
    (line,) = obstacles(tmp_path / "run", select="auto")
    assert "selection.json: cannot be used" in line
    assert "delete it" in line


def test_several_processes_use_all_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(opening.Refused) as refused:
        opening.open_run(arguments(tmp_path / "run", configured(num_devices=4)))
    (line,) = str(refused.value).splitlines()
    for words in ("config.num_devices = 4", "2 processes", "8 devices", "set it to 0"):
        assert words in line


def test_memory_of_a_gpu_is_left_for_the_evaluation(monkeypatch):
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # no other setting of this process is changed
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    runtime.set_up()
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE")
    runtime.set_up()
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


# The evaluation


@pytest.fixture
def runner(tmp_path):
    with loop.Termination() as stop:
        yield stages.Runner(configured(), Workdir(tmp_path), None, None, stop, None)


def write_report(workdir, failed):
    workdir.report.write_text(json.dumps({"evaluation": {"failed": failed}}))
    workdir.report_html.write_text("")


class Child:
    """A process that is waited for; a signal that reaches the whole group ends it."""

    def __init__(self, code=None):
        self.code, self.terminated = code, False

    def wait(self, timeout=None):
        if self.code is None and not self.terminated:
            raise subprocess.TimeoutExpired("eval.main", timeout)
        if self.code == -signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)
        return -signal.SIGTERM if self.terminated else self.code

    def terminate(self):
        self.terminated = True


def test_an_evaluation_that_dies_of_the_signal_of_the_whole_group_is_stopped_not_failed(runner, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda command: Child(-signal.SIGTERM))
    with pytest.raises(loop.Preempted, match="starts the evaluation again"):
        runner.evaluate()


def test_a_signal_ends_the_evaluation(runner, monkeypatch):
    child = Child()
    monkeypatch.setattr(subprocess, "Popen", lambda command: child)
    signal.raise_signal(signal.SIGUSR1)
    with pytest.raises(loop.Preempted):
        runner.evaluate()
    assert child.terminated


def test_an_evaluation_that_failed_is_not_done_when_the_run_is_started_again(runner, monkeypatch):
    commands = []

    def start(command):
        commands.append(command)
        write_report(runner.workdir, {"after": "1 of the model's 2 parameter arrays hold NaN or infinity"})
        return Child(1)

    monkeypatch.setattr(subprocess, "Popen", start)
    runner.workdir.export.mkdir()
    for _ in range(2):
        with pytest.raises(loop.TrainingFailed, match="exit code 1.*python -m eval.main --workdir="):
            runner.evaluate()
        assert not runner.is_finished
    assert commands == 2 * [[sys.executable, "-m", "eval.main", f"--workdir={runner.workdir.root}"]]
    write_report(runner.workdir, {})
    runner.evaluate()
    assert len(commands) == 2
    assert runner.is_finished
    runner.workdir.report.write_text("{")
    assert not runner.is_finished


@pytest.mark.parametrize("code", [0, 1])
def test_on_a_tpu_the_evaluation_runs_in_the_process_that_holds_it(runner, monkeypatch, code):
    seen = []

    def run_module(name, run_name):
        seen.append((name, run_name, sys.argv[1:]))
        sys.exit(code)

    monkeypatch.setattr(stages.runpy, "run_module", run_module)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    before = sys.argv
    if code:
        with pytest.raises(loop.TrainingFailed, match="exit code 1"):
            runner.evaluate()
    else:
        runner.evaluate()
    assert seen == [("eval.main", "__main__", [f"--workdir={runner.workdir.root}"])]
    assert sys.argv is before


# The loop


def test_a_collapse_without_any_sound_step_gives_back_the_start():
    watch = types.SimpleNamespace(every=1, samples_every=1, warn=1.0, collapse=2.0, returns=None)
    rule = types.SimpleNamespace(target=None, patience=2)
    start = {"w": np.float32(1)}
    watched = Watch(watch, rule, 4, start, lambda params: (3.0, None), has_level=False)
    assert watched.take(watched.look(1, {"w": np.float32(2)})).reason == "collapsed"
    failure = loop.collapsed("collapsed", watched)
    assert (failure.step, failure.params) == (0, start)
    assert "those of the start" in str(failure)


# The study of the default job


def test_the_study_is_told_where_it_writes_and_takes_no_folder_that_is_there(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(digits_study, "one_run", lambda seed, workdir, more: started.append(workdir) or sys.exit())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["digits_study.py", "--out=study", "--seeds", "0", "1"])
    with pytest.raises(SystemExit):
        digits_study.main()
    assert started == [tmp_path / "study" / "seed0"]
    (tmp_path / "study" / "seed1").mkdir(parents=True)
    with pytest.raises(SystemExit, match="seed1 is there already.*another --out"):
        digits_study.main()
    assert len(started) == 1
