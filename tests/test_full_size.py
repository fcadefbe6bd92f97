"""A UNet of Stable Diffusion 1.x in its real size, as a user would load it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.launching import environment


@pytest.mark.slow
def test_a_full_size_unet_loads_and_runs_within_16_gib(repository):
    command = [sys.executable, "scripts/full_size_unet.py", "--limit_gib=16"]
    finished = subprocess.run(command, cwd=repository, env=environment(), capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    result = json.loads(finished.stdout)
    assert result["parameters"] == 859_520_964
    assert result["peak_gib"] < 16
    assert result["output_std"] > 0
