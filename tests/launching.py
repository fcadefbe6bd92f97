"""Starting the launchers as a user does: as processes, in an environment without the test suite's settings."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

TINY = (
    "--config=train/configs/digits.py:smoke",
    "--config.model.block_out_channels=(8,8)",
    "--config.model.norm_num_groups=4",
    "--config.model.attention_head_dim=4",
    "--config.base.batch_size=16",
    "--config.unlearn.batch_size=16",
)
"""A run of seconds with every stage in it."""


def environment(**changes: str) -> dict[str, str]:
    """The environment of a launcher: one CPU device, the suite's compilation cache."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return {**env, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **changes}


def start(module: str, *arguments: str, **env: str) -> subprocess.Popen:
    """``python -m module arguments`` in the repository."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=REPOSITORY,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(module: str, *arguments: str, timeout: float = 280, **env: str) -> subprocess.CompletedProcess:
    """Runs to the end."""
    process = start(module, *arguments, **env)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
