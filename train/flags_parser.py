"""Command-line parsing: absl flags and an ml_collections config file, with every mistake told in one line.

absl and ml_collections stop with exit code 1, tracebacks or silence for several kinds of mistakes; here each becomes a
:class:`UsageError`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import pathlib
import traceback
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

DEFAULT_CONFIG = pathlib.Path(__file__).parent / "configs" / "digits.py"
STAGES = ("base", "unlearn", "eval", "export")

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Configuration file; FILE:VARIANT passes an argument to it.")
flags.DEFINE_string("workdir", None, "Where everything is written; runs/<config name> by default.")
flags.DEFINE_enum("mode", None, STAGES, "Stop after this stage; by default all stages whose result is missing are run.")
flags.DEFINE_bool("dry_run", False, "Check everything, compile one step, write nothing.")
flags.DEFINE_bool("print_config", False, "Print the resolved configuration and exit.")
flags.DEFINE_enum("distributed", "auto", ("auto", "on", "off"), "Whether this is one of several processes.")
flags.DEFINE_string("coordinator_address", None, "host:port of process 0, where it is not found by itself.")
flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator_address.")
flags.DEFINE_integer("process_id", None, "Number of this process, with --coordinator_address.")


class UsageError(Exception):
    """The command line is wrong. ``str`` is what to tell the user: one line per problem."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What was asked for."""

    config: ConfigDict
    workdir: pathlib.Path
    mode: str | None
    dry_run: bool
    print_config: bool
    help: bool
    command: tuple[str, ...]


def _flat_keys(config: ConfigDict, prefix: str = "config") -> list[str]:
    keys = []
    for key in config:
        path = f"{prefix}.{key}"
        keys.extend(_flat_keys(config[key], path) if isinstance(config[key], ConfigDict) else [path])
    return keys


def _config_of(argv: Sequence[str]) -> tuple[pathlib.Path, str]:
    """The config file that is asked for and its variant, without executing it."""
    value = str(DEFAULT_CONFIG)
    for i, argument in enumerate(argv):
        if argument in ("--config", "-config") and i + 1 < len(argv):
            value = argv[i + 1]
        elif argument.startswith(("--config=", "-config=")):
            value = argument.split("=", 1)[1]
    path, _, variant = value.partition(":")
    return pathlib.Path(path), variant


def _override_problem(argv: Sequence[str], config: ConfigDict) -> str | None:
    """What is wrong with the first ``--config.a.b=value`` whose key does not exist."""
    known = _flat_keys(config)
    for argument in argv:
        if not argument.startswith("--config.") and not argument.startswith("--noconfig."):
            continue
        key = argument.lstrip("-").split("=", 1)[0].removeprefix("no")
        if key in known:
            continue
        parents = [".".join(key.split(".")[:i]) for i in range(2, key.count(".") + 1)]
        for parent in parents:
            if parent in known:
                return f"--{key}: {parent} is a value, not a group"
        if any(path.startswith(key + ".") for path in known):
            members = ", ".join(path for path in known if path.startswith(key + "."))
            return f"--{key} is a group, not a value; it holds {members}"
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        hint = f"did you mean --{close[0]}?" if close else "known: " + ", ".join(known)
        return f"unknown key --{key}; {hint}"
    return None


def _last_of_each(argv: Sequence[str]) -> list[str]:
    """Of a key that is set twice the last value holds; ml_collections would join the values of a tuple."""
    last = {a.split("=", 1)[0]: i for i, a in enumerate(argv) if a.startswith("--config.") and "=" in a}
    return [a for i, a in enumerate(argv) if last.get(a.split("=", 1)[0], i) == i]


def parse(argv: Sequence[str]) -> Arguments:
    """Reads the command line ``argv`` (with the program's name first).

    Raises:
      UsageError: anything that does not parse.
    """
    wants_help = any(a in ("--help", "-h", "-help", "--helpfull", "--helpshort") for a in argv[1:])
    argv = _last_of_each([a for a in argv if a not in ("--help", "-h", "-help", "--helpfull", "--helpshort")])
    if not any(a.lstrip("-") == "config" or a.lstrip("-").startswith("config=") for a in argv[1:] if a.startswith("-")):
        # Not the flag's default: ml_collections would read that file, with the overrides, while this module is imported.
        argv.insert(1, f"--config={DEFAULT_CONFIG}")
    path, _ = _config_of(argv)
    if not path.is_file():
        raise UsageError(f"--config={path}: no such file; shipped: {', '.join(_shipped_configs())}")
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            rest = FLAGS(list(argv))
        _ = list(FLAGS.config)
    except flags.Error as error:
        raise UsageError(str(error)) from None
    except Exception as error:
        problem = _override_problem(argv, _load_plain(path, argv))
        if problem is None:
            raise
        raise UsageError(problem) from error
    config = _checked(FLAGS.config, path)
    if len(rest) > 1:
        first = rest[1]
        key = "config." + first.split("=", 1)[0].removeprefix("config.")
        hint = f"; did you mean --{key}={first.split('=', 1)[1]}?" if "=" in first else ""
        raise UsageError(f"unexpected argument {first!r}{hint}")
    workdir = (
        pathlib.Path(FLAGS.workdir) if FLAGS.workdir else pathlib.Path("runs") / str(config.get("name", path.stem))
    )
    return Arguments(
        config=config,
        workdir=workdir,
        mode=FLAGS.mode,
        dry_run=FLAGS.dry_run,
        print_config=FLAGS.print_config,
        help=wants_help,
        command=tuple(argv),
    )


def _load_plain(path: pathlib.Path, argv: Sequence[str]) -> ConfigDict:
    """The config without overrides, to say which keys there are.

    Raises:
      UsageError: the file itself fails; its traceback has been printed.
    """
    spec = importlib.util.spec_from_file_location("jaxunlearn_config", path)
    module = importlib.util.module_from_spec(spec)
    variant = _config_of(argv)[1]
    try:
        spec.loader.exec_module(module)
        config = module.get_config(variant) if variant else module.get_config()
    except Exception as error:
        traceback.print_exc()
        raise UsageError(f"--config={path}: {type(error).__name__}: {error}") from None
    return _checked(config, path)


def _checked(config: Any, path: pathlib.Path) -> ConfigDict:
    if not isinstance(config, ConfigDict):
        raise UsageError(f"--config={path}: get_config() must return a ConfigDict, got {type(config).__name__}")
    return config


def _shipped_configs() -> list[str]:
    folder = DEFAULT_CONFIG.parent
    return [f"train/configs/{p.name}" for p in sorted(folder.glob("*.py")) if p.stem not in ("__init__", "defaults")]


def help_text(config: ConfigDict) -> str:
    """Usage, flags and the configuration tree with its present values."""
    lines = [
        "python -m train.main [--config=FILE[:VARIANT]] [--workdir=DIR] [--config.KEY=VALUE ...]",
        "",
        "Trains or loads a diffusion model, unlearns the forget set, evaluates, reports, exports. Stages whose result is",
        "already in the work directory are skipped; the same command resumes.",
        "",
    ]
    for name in (
        "workdir",
        "mode",
        "dry_run",
        "print_config",
        "distributed",
        "coordinator_address",
        "num_processes",
        "process_id",
    ):
        flag = FLAGS[name]
        lines.append(f"  --{name:20} {flag.help}")
    return "\n".join([*lines, "", keys_text(config)])


def keys_text(config: ConfigDict) -> str:
    """The shipped configurations, and the keys of this one with their values."""
    lines = [f"Configurations: {', '.join(_shipped_configs())}", "", "Keys of this configuration and their values:", ""]
    return "\n".join([*lines, *(f"  --{key}={_value(config, key)!r}" for key in _flat_keys(config))])


def _value(config: ConfigDict, key: str):
    for part in key.split(".")[1:]:
        config = config[part]
    return config
