"""The examples run, are short, and train: one model of each library with SISS and with a filtered objective."""

from __future__ import annotations

import ast
import math
import runpy
import sys

import pytest

from tests.tiny_model import quick_compilation  # noqa: F401

EXAMPLES = ("linen", "nnx", "equinox_model", "plain_function")
QUICK = ("plain_function",)


def test_these_are_all(repository):
    assert {p.stem for p in (repository / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in EXAMPLES])
def test_examples_run_and_are_short(name, repository, capsys, monkeypatch):
    path = repository / "examples" / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 40
    # As a program, from its own folder: a file called linen.py or nnx.py must not hide the library of that name.
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    runpy.run_path(str(path), run_name="__main__")
    siss, npo = (ast.literal_eval(line) for line in capsys.readouterr().out.splitlines())
    for losses in (siss, npo):
        assert set(losses) == {"loss/keep", "loss/forget"}
        assert all(math.isfinite(v) and v > 0 for v in losses.values())
