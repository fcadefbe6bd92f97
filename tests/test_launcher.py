"""The launcher as a user runs it: whole runs, killed runs, stopped runs, as processes."""

from __future__ import annotations

import json
import random
import signal
import socket
import time

import pytest

from jaxunlearn.metrics.entries import columns_of
from tests.launching import TINY, run, start


def final_weights(workdir) -> dict[str, bytes]:
    return {
        name: (workdir / "models" / name / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        for name in ("base", "unlearned")
    }


def logged_steps(workdir) -> list[tuple[str, int]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [(record["stage"], record["step"]) for record in map(json.loads, lines)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of all stages, undisturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    done = run("train.main", *TINY, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir, done


@pytest.mark.slow
def test_a_dry_run_says_what_would_happen_and_writes_nothing(tmp_path):
    done = run("train.main", *TINY, "--dry_run", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    for words in ("training set n = 1697", "forget k = 80", "parameters", "step compiled", "nothing was written"):
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_run_leaves_everything_that_it_promises(unbroken):
    workdir, done = unbroken
    assert done.stderr == ""
    for name in (
        "config.json",
        "command.txt",
        "environment.json",
        "forget_manifest.json",
        "keep_manifest.json",
        "metrics.jsonl",
        "models/base/unet/config.json",
        "models/unlearned/model_index.json",
        "samples/base_000020.png",
        "samples/unlearn_000010.png",
        "unlearning_report.json",
        "report.html",
        "export/README.md",
        "export/unlearning_report.json",
        "export/scheduler/scheduler_config.json",
        "export/unet/diffusion_pytorch_model.safetensors",
        "DONE",
    ):
        assert (workdir / name).is_file(), name
    assert list((workdir / "tensorboard" / "unlearn").iterdir())
    assert not (workdir / "FAILED").exists()
    config = json.loads((workdir / "config.json").read_text())
    assert config["unlearn"]["method"] == "siss"


def test_the_log_holds_the_parts_of_the_loss(unbroken):
    workdir, _ = unbroken
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = records[-1]
    assert (last["stage"], last["step"]) == ("unlearn", 10)
    for key in ("loss/keep", "loss/forget", "grad_norm/keep", "grad_norm/forget", "forget_scale", "aux/w_keep"):
        assert isinstance(last[key], float)
    assert last["forget_scale"] == pytest.approx(0.1 * last["grad_norm/keep"] / last["grad_norm/forget"], rel=1e-4)


def test_the_exported_weights_are_the_unlearned_ones(unbroken):
    workdir, _ = unbroken
    exported = (workdir / "export" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    weights = final_weights(workdir)
    assert exported == weights["unlearned"]
    assert exported != weights["base"]


def test_a_finished_run_is_not_repeated(unbroken):
    workdir, _ = unbroken
    before = (workdir / "unlearning_report.json").read_bytes()
    done = run("train.main", *TINY, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done before") == 4
    assert (workdir / "unlearning_report.json").read_bytes() == before
    # Nor does a part of it, which stays a part of a finished run.
    done = run("train.main", *TINY, "--mode=base", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert (workdir / "DONE").exists()


def test_another_configuration_in_the_same_work_directory_is_refused(unbroken):
    workdir, _ = unbroken
    done = run("train.main", *TINY, "--config.unlearn.lam=0.25", f"--workdir={workdir}")
    assert done.returncode == 2
    assert "config.unlearn.lam: 0.5 in the work directory, 0.25 now" in done.stderr


def test_a_foreign_folder_is_refused_as_work_directory(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    done = run("train.main", *TINY, f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert "is not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_a_user_model_is_unlearned_and_its_folder_left_alone(unbroken, tmp_path):
    source = unbroken[0] / "models" / "base"
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    done = run("train.main", *TINY, f"--config.base.path={source}", "--mode=unlearn", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "run" / "models" / "base").exists()
    assert final_weights_of(tmp_path / "run") == final_weights(unbroken[0])["unlearned"]


def final_weights_of(workdir) -> bytes:
    return (workdir / "models" / "unlearned" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda folder: (folder / "unet" / "config.json").unlink(), "config.json"),
        (
            lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 50),
            "safetensors",
        ),
    ],
)
def test_a_broken_model_folder_is_refused(unbroken, tmp_path, break_it, words):
    import shutil

    source = tmp_path / "model"
    shutil.copytree(unbroken[0] / "models" / "base", source)
    break_it(source)
    done = run("train.main", *TINY, f"--config.base.path={source}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_stopped_run_says_so_and_goes_on(unbroken, tmp_path):
    workdir = tmp_path / "run"
    arguments = (*TINY, "--mode=unlearn", f"--workdir={workdir}")
    process = start("train.main", *arguments)
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert (workdir / "PREEMPTED").exists()
    done = run("train.main", *arguments)
    assert done.returncode == 0, done.stderr
    assert not (workdir / "PREEMPTED").exists()
    assert final_weights(workdir) == final_weights(unbroken[0])
    steps = logged_steps(workdir)
    assert len(steps) == len(set(steps))


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bits(unbroken, tmp_path):
    """SIGKILL at random moments, until the run gets through."""
    workdir = tmp_path / "run"
    arguments = (*TINY, "--mode=unlearn", f"--workdir={workdir}")
    chance = random.Random(0)
    kills = 0
    while kills < 60:
        process = start("train.main", *arguments)
        # Later and later, so that the moments cover start-up, compilation, steps, saving and the change of stages.
        deadline = time.monotonic() + chance.uniform(0, 2 + 0.4 * kills)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        if process.poll() is not None:
            out, err = process.communicate()
            assert process.returncode == 0, (out, err)
            break
        process.kill()
        process.communicate()
        kills += 1
    else:
        done = run("train.main", *arguments)
        assert done.returncode == 0, done.stderr
    assert kills >= 5
    assert final_weights(workdir) == final_weights(unbroken[0])
    steps = logged_steps(workdir)
    assert len(steps) == len(set(steps))
    assert steps == logged_steps(unbroken[0])


@pytest.mark.slow
def test_two_processes_equal_one_process_with_two_devices(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = (*TINY, "--mode=unlearn")
    alone = run(
        "train.main",
        *arguments,
        f"--workdir={tmp_path / 'one'}",
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
    assert alone.returncode == 0, alone.stderr
    together = [f"--coordinator_address=localhost:{port}", "--num_processes=2", f"--workdir={tmp_path / 'two'}"]
    processes = [start("train.main", *TINY, *together, f"--process_id={i}") for i in range(2)]
    # The second one leaves when the training has ended: it must not wait for the evaluation, which may take long.
    outputs = [processes[1].communicate(timeout=500)]
    evaluated = (tmp_path / "two" / "unlearning_report.json").exists()
    outputs.append(processes[0].communicate(timeout=500))
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert not evaluated
    assert (tmp_path / "two" / "DONE").exists()
    assert final_weights(tmp_path / "one") == final_weights(tmp_path / "two")
    assert logged_steps(tmp_path / "one") == logged_steps(tmp_path / "two")


@pytest.mark.slow
def test_the_retrained_model_is_a_column_of_the_report(tmp_path):
    workdir = tmp_path / "run"
    done = run("train.main", *TINY, "--config.retrain.enabled=True", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert (workdir / "models" / "retrained" / "model_index.json").is_file()
    report = json.loads((workdir / "unlearning_report.json").read_text())
    measured = {name: [entry["metric"] for entry in entries] for name, entries in columns_of(report).items()}
    assert measured["retrained"]
    assert set(measured["before"]) - set(measured["retrained"]) == set()
    level = next(entry for entry in report["evaluation"]["after"] if entry["metric"] == "forget_level")
    # Models of 20 steps may not differ; then the level says so and gives no number.
    assert level["status"] == "ok" or "does not differ" in level["reason"]
    assert "retrained" in (workdir / "report.html").read_text()


@pytest.mark.slow
def test_the_mnist_tshirt_experiment_takes_its_first_steps(shared_data, tmp_path):
    """The paper's set-up with the full network: the dry run of the real sizes, then three steps of each stage."""
    config = "--config=train/configs/mnist_tshirt.py"
    data = (
        f"--config.data.path={shared_data / 'mnist-t10k'}",
        f"--config.data.plant.image={shared_data / 'fashion-mnist' / 'tshirt-28.png'}",
        "--config.data.plant.copies=101",
        f"--workdir={tmp_path / 'run'}",
    )
    dry = run("train.main", config, *data, "--dry_run", timeout=900)
    assert dry.returncode == 0, dry.stderr
    assert "14,735,745 parameters" in dry.stdout
    assert "forget k = 101" in dry.stdout
    done = run("train.main", f"{config}:smoke", *data, "--mode=unlearn", timeout=900)
    assert done.returncode == 0, done.stderr
    steps = [("base", 1), ("base", 2), ("base", 3), ("unlearn", 0), ("unlearn", 1), ("unlearn", 2), ("unlearn", 3)]
    assert logged_steps(tmp_path / "run") == steps
