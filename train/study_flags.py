"""What study scripts share of their command lines: `--config.KEY=VALUE`, how models are judged, where models are."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from ml_collections import ConfigDict

CONFIGS = pathlib.Path(__file__).parent / "configs"


def add_flags(parser: argparse.ArgumentParser, *, samples: int, classifier_steps: int = 600) -> None:
    """The flags that every study has."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=pathlib.Path, required=False)
    parser.add_argument("--models", help="folder of finished models, {seed} in it: runs/digits_study/seed{seed}/models")
    parser.add_argument("--samples", type=int, default=samples, help="of each model")
    parser.add_argument("--sampling_steps", type=int, default=25, help="DDIM steps")
    parser.add_argument("--classifier_steps", type=int, default=classifier_steps, help="0: Frechet distance on pixels")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with ``overrides``: key -> value of every ``--config.KEY=VALUE``. Anything else ends the program."""
    arguments, more = parser.parse_known_args(argv)
    arguments.overrides = {}
    for text in more:
        key, equals, value = text.removeprefix("--config.").partition("=")
        if not text.startswith("--config.") or not equals:
            parser.error(f"unknown argument {text!r}; allowed beside the flags: --config.KEY=VALUE")
        try:
            arguments.overrides[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments.overrides[key] = value
    return arguments


def load_config(file: str | pathlib.Path, overrides: Mapping[str, Any]) -> ConfigDict:
    """The configuration of ``FILE`` or ``FILE:VARIANT`` with changed values.

    Raises:
      ValueError: no such file or key, or a value of another type.
    """
    path, _, variant = str(file).partition(":")
    if not pathlib.Path(path).is_file():
        raise ValueError(f"--config={path}: no such file; shipped: {', '.join(p.name for p in CONFIGS.glob('*.py'))}")
    spec = importlib.util.spec_from_file_location("jaxunlearn_study_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(variant) if variant else module.get_config()
    problems = []
    for key, value in overrides.items():
        *groups, leaf = key.split(".")
        node = config
        for group in groups:
            node = node.get(group) if isinstance(node, ConfigDict) else None
        if not isinstance(node, ConfigDict) or leaf not in node or isinstance(node[leaf], ConfigDict):
            problems.append(f"--config.{key}: unknown key; python -m train.main --help lists all keys")
            continue
        try:
            node[leaf] = value
        except (TypeError, ValueError) as error:
            problems.append(f"--config.{key}={value!r}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return config


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a study script; what it refuses (ValueError) is printed in one line, and the exit code is 2."""
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def models_folder(arguments: argparse.Namespace, seed: int) -> pathlib.Path | None:
    """``--models`` for a seed."""
    return pathlib.Path(arguments.models.format(seed=seed)) if arguments.models else None
