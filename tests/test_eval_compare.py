"""Comparing runs: the Pareto front, which axes the runs share, names, notes and files."""

from __future__ import annotations

import json
import re

import pytest

from eval.compare import compare
from eval.main import main
from eval.pareto import front, points
from tests.report_example import make_columns, make_report


def level_of(columns):
    """The columns with a forget level in them."""
    from eval.records import entry
    from jaxunlearn.metrics.verdicts import forget_level

    columns["after"].append(entry("forget_level", forget_level(columns), n=1))
    return columns


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Good forgetting, good quality, and one that is worse than the first on both."""
    root = tmp_path_factory.mktemp("compare")
    for name, loss, fd in (("near", 0.5, 6.0), ("sharp", 0.3, 5.0), ("worse", 0.3, 7.0)):
        make_report(root / name, columns=level_of(make_columns(1, loss_forget=loss, fd=fd)))
    return root


def test_front_by_hand():
    assert front([(0, 0), (1, 1)]) == [True, False]
    assert front([(0, 1), (1, 0), (1, 1), (0, 1)]) == [True, True, False, True]
    assert front([]) == []


def test_three_runs_in_one_table(runs, tmp_path, capsys):
    names = ("near", "sharp", "worse")
    assert main(["compare", *(str(runs / name) for name in names), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    made = json.loads((tmp_path / "out" / "compare.json").read_text())
    rows = {row["run"]: row for row in made["rows"]}
    assert (made["x"], made["y"]) == ("forget_level", "fd_pixel")
    assert [rows[name]["front"] for name in names] == [True, True, False]
    # before .1, retrained .5: losses of .5 and .3 are levels of 1 and .5
    assert rows["near"]["x"] == pytest.approx(0.0, abs=1e-12)
    assert rows["sharp"]["x"] == pytest.approx(0.5)
    assert rows["worse"]["y"] == 7.0
    assert rows["near"]["keep_loss_ratio"] == 1.0
    table = (tmp_path / "out" / "compare.md").read_text()
    assert table in out
    assert re.search(r"\| near \| \* \|", table)
    assert re.search(r"\| worse \|  \|", table)
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count(">front<") == 2
    assert "2 of 3 runs are on the Pareto front" in page
    assert "<script" not in page
    assert "http" not in re.sub(r"data:[^\"]*", "", page)
    assert page.count('src="data:image/svg+xml') == 1


def test_without_retrained_models_copies_are_compared(runs, tmp_path):
    plain = make_report(tmp_path / "plain", columns=make_columns(0)).report
    other = json.loads((runs / "near" / "unlearning_report.json").read_text())
    made = compare({"plain": plain, "near": other})
    assert made["x"] == "copy_rate"
    assert any("retrained" in note for note in made["notes"])
    before, after = points(plain, "copy_rate", "fd_pixel")
    assert (before.kind, before.x, before.y) == ("before", 0.05, 5.0)
    assert (after.kind, after.x) == ("after", 0.0)
    assert before.low < before.x < before.high


def test_runs_of_other_models_and_data_are_noted(tmp_path):
    first, second = (make_report(tmp_path / str(seed), seed=seed).report for seed in (0, 1))
    notes = " ".join(compare({"a": first, "b": second})["notes"])
    assert "different original models" in notes
    assert "different keep sets" in notes
    assert "samplers" not in notes


def test_bad_usage(runs, tmp_path, capsys):
    for arguments, lines in (
        ([str(runs / "near")], 1),
        ([str(runs / "near")] * 2, 1),
        ([str(runs / "near"), str(tmp_path)], 1),
        ([str(tmp_path / "a"), str(tmp_path / "b")], 2),
        ([], 1),
        ([str(runs / "near"), str(runs / "worse"), f"--out={runs / 'near' / 'report.html'}"], 1),
    ):
        assert main(["compare", *arguments]) == 2
        assert len(capsys.readouterr().err.splitlines()) == lines, arguments
    assert main(["compare", "--help"]) == 0
