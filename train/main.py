"""``python -m train.main``: train or load a diffusion model, unlearn the forget set, evaluate, report, export.

Exit codes: 0 done; 1 failed while running; 2 bad usage, configuration or model folder (nothing was written); 75 stopped by
a signal with everything saved: run the same command again.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import platform
import sys
import time
from collections.abc import Sequence

from train.flags_parser import FLAGS, Arguments, UsageError, help_text, parse

DONE, FAILED, USAGE, PREEMPTED = 0, 1, 2, 75


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    try:
        arguments = parse(argv)
    except UsageError as error:
        return _refuse(str(error))
    if arguments.help:
        print(help_text(arguments.config))
        return DONE
    if arguments.print_config:
        print(arguments.config.to_json_best_effort(indent=2))
        return DONE
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file at lower levels
    from jaxunlearn import runtime
    from train import distributed

    runtime.set_up()
    try:
        distributed.join(FLAGS.distributed, FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id)
    except ValueError as error:
        return _refuse(str(error))
    return _run(arguments)


def _refuse(message: str) -> int:
    for line in message.splitlines():
        if line.strip():
            print(f"error: {line.strip()}", file=sys.stderr)
    return USAGE


def _run(arguments: Arguments) -> int:
    """Everything after parsing: checks, then stages."""
    import jax

    from jaxunlearn.io.forget import open_split
    from jaxunlearn.io.workdir import Workdir
    from jaxunlearn.parallel import make_mesh
    from train import distributed
    from train.data_summary import model_lines, split_problems, summary
    from train.dry_run import dry_run
    from train.log import say
    from train.loop import Preempted, Termination, TrainingFailed
    from train.stages import Runner, user_model
    from train.validate import config_problems

    config, workdir = arguments.config, Workdir(arguments.workdir)
    say(f"configuration {config.name}, work directory {workdir.root}")
    available = jax.device_count()
    num_devices = config.get("num_devices") or available
    if num_devices > available:
        return _refuse(f"config.num_devices = {num_devices}: there are {available} devices")
    problems = config_problems(config, workdir.root, num_devices) + _workdir_problems(workdir, config)
    if problems:
        return _refuse("\n".join(problems))
    try:
        split = open_split(config.data.to_dict(), config.seed)
    except (ValueError, OSError, ImportError) as error:
        return _refuse(
            "\n".join(f"config.{line}" if line.startswith("data.") else line for line in str(error).splitlines())
        )
    try:
        source = user_model(config)
    except ValueError as error:
        return _refuse(str(error))
    problems = split_problems(config, split, source)
    if problems:
        return _refuse("\n".join(problems))
    for line in (*summary(split), *model_lines(config, workdir, split, source)):
        say(line)
    mesh = make_mesh(jax.devices()[:num_devices])
    if arguments.dry_run:
        say(dry_run(config, split, mesh, source))
        return DONE
    distributed.barrier("everything checked")
    if jax.process_index() == 0:
        _start_workdir(workdir, config, arguments, split)
    distributed.barrier("work directory started")
    with Termination() as stop:
        runner = Runner(config, workdir, split, mesh, stop, source)
        stages = {"base": runner.base, "unlearn": runner.unlearn, "retrain": runner.retrain}
        stages |= {"eval": runner.evaluate, "export": runner.export}
        try:
            for name, run_stage in stages.items():
                started = time.monotonic()
                run_stage()
                if time.monotonic() - started > 1:
                    say(f"{name}: {time.monotonic() - started:.0f} s")
                if stop.came():
                    raise Preempted(f"stopped after stage {name}; the same command goes on from there")
                if name == arguments.mode:
                    return DONE
        except Preempted as reason:
            _mark(workdir, "PREEMPTED", str(reason))
            say(str(reason))
            return PREEMPTED
        except (TrainingFailed, ValueError, OSError) as reason:
            _mark(workdir, "FAILED", str(reason))
            for line in str(reason).splitlines():
                print(f"error: {line}", file=sys.stderr)
            return FAILED
    if jax.process_index() == 0:
        _mark(workdir, "DONE", "")
        _say_results(workdir)
    return DONE


def _workdir_problems(workdir, config) -> list[str]:
    """What stands in the way of using the work directory: another configuration, or a file of that name."""
    from train.validate import differences

    if workdir.root.exists() and not workdir.root.is_dir():
        return [f"--workdir={workdir.root}: is a file; choose a folder"]
    if not workdir.config.exists():
        if workdir.root.is_dir() and any(workdir.root.iterdir()):
            return [f"--workdir={workdir.root}: is not empty and holds no config.json; choose another folder"]
        return []
    try:
        saved = json.loads(workdir.config.read_text())
    except ValueError:
        return [f"{workdir.config}: is not JSON; choose another --workdir"]
    changed = differences(saved, json.loads(config.to_json_best_effort()))
    if changed:
        return [f"--workdir={workdir.root}: holds a run with another configuration; choose another folder", *changed]
    return []


def _start_workdir(workdir, config, arguments: Arguments, split) -> None:
    """Writes what is known before the first step."""
    from jaxunlearn.io.manifest import forget_manifest, keep_manifest, write_json

    workdir.root.mkdir(parents=True, exist_ok=True)
    for name in ("DONE", "FAILED", "PREEMPTED"):
        workdir.marker(name).unlink(missing_ok=True)
    write_json(workdir.root / "environment.json", _environment())
    (workdir.root / "command.txt").write_text(" ".join(["python", "-m", "train.main", *arguments.command[1:]]) + "\n")
    write_json(workdir.root / "forget_manifest.json", forget_manifest(split))
    write_json(workdir.root / "keep_manifest.json", keep_manifest(split))
    write_json(workdir.config, json.loads(config.to_json_best_effort()))


def _environment() -> dict:
    import importlib.metadata
    import subprocess

    import jax

    packages = {}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scikit-learn", "jaxunlearn"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    folder = pathlib.Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "devices": [str(device) for device in jax.devices()],
        "processes": jax.process_count(),
        "packages": packages,
        "git_revision": git.stdout.strip() or None,
        "xla_flags": os.environ.get("XLA_FLAGS"),
    }


def _mark(workdir, name: str, text: str) -> None:
    import jax

    if jax.process_index() == 0:
        workdir.marker(name).write_text(text + "\n")


def _say_results(workdir) -> None:
    from train.log import say

    report = json.loads(workdir.report.read_text())
    say(report.get("headline", ""))
    say(f"report: {workdir.report_html}")
    say(f"model:  {workdir.export}")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
