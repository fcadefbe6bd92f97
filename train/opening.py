"""What every launcher does before its first step: checks, images, model, devices, the start of the work directory.

Nothing is written before all checks have passed.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxunlearn.io.diffusers import DiffusersModel
from jaxunlearn.io.forget import Split, open_split
from jaxunlearn.io.manifest import forget_manifest, keep_manifest, write_json
from jaxunlearn.io.workdir import Workdir
from jaxunlearn.parallel import make_mesh
from train import auto_select, distributed
from train.data_summary import model_lines, split_problems, summary
from train.flags_parser import Arguments
from train.log import say
from train.stages import user_model
from train.validate import config_problems, differences

MARKERS = ("DONE", "FAILED", "PREEMPTED")


class Refused(Exception):
    """The run cannot start. ``str`` says why, one line per problem; nothing was written."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """What a run works with.

    Attributes:
      config: the configuration, checked.
      workdir: the work directory; it need not exist yet.
      split: the images.
      source: the user's model, or None.
      mesh: the devices.
    """

    config: ConfigDict
    workdir: Workdir
    split: Split
    source: DiffusersModel | None
    mesh: Mesh


def open_run(arguments: Arguments, problems_of: Callable[[ConfigDict], Sequence[str]] = lambda config: ()) -> Opened:
    """Checks and opens, and says what was found.

    Args:
      arguments: the command line.
      problems_of: what else can be wrong, told together with the problems of the configuration.

    Raises:
      Refused: all problems of a kind at once.
    """
    config, workdir = arguments.config, Workdir(arguments.workdir)
    conflicts = auto_select.conflicts(config, arguments.command)
    replaced = auto_select.clear(config)
    say(f"configuration {config.name}, work directory {workdir.root}")
    if replaced:
        say(replaced)
    available = jax.device_count()
    num_devices = config.get("num_devices") or available
    if num_devices > available:
        raise Refused(f"config.num_devices = {num_devices}: there are {available} devices")
    if num_devices < available and jax.process_count() > 1:
        raise Refused(
            f"config.num_devices = {num_devices}: {jax.process_count()} processes use all of their {available} devices; "
            "set it to 0 (all), or start fewer processes"
        )
    problems = config_problems(config, workdir.root, num_devices) + conflicts
    problems += _workdir_problems(workdir, config)
    problems = problems or list(problems_of(config))
    if problems:
        raise Refused("\n".join(problems))
    try:
        split = open_split(config.data.to_dict(), config.seed)
    except (ValueError, OSError, ImportError) as error:
        lines = str(error).splitlines()
        raise Refused("\n".join(f"config.{line}" if line.startswith("data.") else line for line in lines)) from None
    try:
        source = user_model(config)
    except ValueError as error:
        raise Refused(str(error)) from None
    problems = split_problems(config, split, source)
    if problems:
        raise Refused("\n".join(problems))
    for line in (*summary(split), *model_lines(config, workdir, split, source)):
        say(line)
    return Opened(config, workdir, split, source, make_mesh(jax.devices()[:num_devices]))


def start_workdir(opened: Opened, arguments: Arguments, module: str = "train.main") -> None:
    """Writes what is known before the first step; process 0 does it, the others wait.

    Raises:
      Refused: it cannot be written; in every process.
    """
    distributed.barrier("everything checked")
    problem = ""
    if jax.process_index() == 0:
        try:
            _write_start(opened, arguments, module)
        except OSError as error:
            problem = f"--workdir={opened.workdir.root}: cannot be started ({error}); choose another folder"
    problem = distributed.from_first_text(problem)
    if problem:
        raise Refused(problem)


def _write_start(opened: Opened, arguments: Arguments, module: str) -> None:
    workdir, split = opened.workdir, opened.split
    manifests = {"forget_manifest.json": forget_manifest(split), "keep_manifest.json": keep_manifest(split)}
    workdir.root.mkdir(parents=True, exist_ok=True)
    # First of all files: a folder without it is taken for somebody else's.
    auto_select.write_config(workdir, opened.config)
    for name in MARKERS:
        workdir.marker(name).unlink(missing_ok=True)
    write_json(workdir.root / "environment.json", _environment())
    command = "command.txt" if module == "train.main" else f"{module.removeprefix('train.')}_command.txt"
    (workdir.root / command).write_text(" ".join(["python", "-m", module, *arguments.command[1:]]) + "\n")
    for name, manifest in manifests.items():
        write_json(workdir.root / name, manifest)


def mark(workdir: Workdir, name: str, text: str) -> None:
    """Writes one of :data:`MARKERS` with its reason."""
    if jax.process_index() == 0:
        workdir.marker(name).write_text(text + "\n")


def _workdir_problems(workdir: Workdir, config: ConfigDict) -> list[str]:
    """What stands in the way of using the work directory: another configuration, a damaged file, no right to write."""
    try:
        return _obstacles(workdir, config)
    except OSError as error:
        return [f"--workdir={workdir.root}: cannot be read ({error}); choose another folder"]


def _obstacles(workdir: Workdir, config: ConfigDict) -> list[str]:
    there = next(path for path in (workdir.root, *workdir.root.absolute().parents) if path.exists())
    if not there.is_dir():
        return [f"--workdir={workdir.root}: {'is' if there == workdir.root else f'{there} is'} a file; choose a folder"]
    if not os.access(there, os.W_OK | os.X_OK):
        return [f"--workdir={workdir.root}: {there} may not be written; choose another folder"]
    if not workdir.config.exists():
        # What a start leaves that was killed while it wrote the first file.
        unfinished = f".{workdir.config.name}."
        if workdir.root.is_dir() and not all(path.name.startswith(unfinished) for path in workdir.root.iterdir()):
            return [f"--workdir={workdir.root}: is not empty and holds no config.json; choose another folder"]
        return []
    try:
        saved = json.loads(workdir.config.read_text())
    except ValueError:
        return [f"{workdir.config}: is not JSON; choose another --workdir"]
    saved.pop(auto_select.RESOLVED, None)
    changed = differences(saved, json.loads(config.to_json_best_effort()))
    if changed:
        return [f"--workdir={workdir.root}: holds a run with another configuration; choose another folder", *changed]
    if config.select != auto_select.MANUAL:
        try:
            auto_select.read(workdir)
        except ValueError as error:
            return [str(error)]
    return []


def _environment() -> dict:
    packages = {}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scikit-learn", "jaxunlearn"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    folder = pathlib.Path(__file__).parent
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
        revision = git.stdout.strip() or None
    except OSError:  # no git here
        revision = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "devices": [str(device) for device in jax.devices()],
        "processes": jax.process_count(),
        "packages": packages,
        "git_revision": revision,
        "xla_flags": os.environ.get("XLA_FLAGS"),
    }
