"""The whole way on a tiny Stable Diffusion pipeline: memorised with diffusers, unlearned here, opened by diffusers again."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.launching import environment

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = [pytest.mark.parity, pytest.mark.timeout(1500)]


def test_a_memorised_picture_is_gone_and_diffusers_sees_what_we_see(repository, shared_data, tmp_path):
    faces = shared_data / "orl-faces" / "orl-faces-400.zip"
    command = [sys.executable, "scripts/tiny_stable_diffusion.py", f"--images={faces}", f"--out={tmp_path}", "--small"]
    finished = subprocess.run(command, cwd=repository, env=environment(), capture_output=True, text=True, timeout=1400)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["holds"]
    assert result["before"]["copies"] > result["before"]["of"] // 2
    assert result["after"]["copies"] == 0
    assert max(result[name]["difference"] for name in ("before", "after")) < 1 / 255
    export = tmp_path / "run" / "export"
    assert {"README.md", "unlearning_report.json"} <= {path.name for path in export.iterdir()}
    source = tmp_path / "model" / "pipeline"
    for file in source.rglob("*"):
        if file.is_file() and file.parent.name != "unet":
            assert (export / file.relative_to(source)).read_bytes() == file.read_bytes(), file
