"""The study of judged models: its work directories, its table of right verdicts, and what it calls a mistake."""

from __future__ import annotations

import json

import pytest

from eval.presets import PRESETS
from jaxunlearn.io.workdir import Workdir
from jaxunlearn.metrics.verdicts import judge
from scripts import judge_study
from tests.launching import TINY
from tests.report_example import make_columns

QUICK = (
    "--eval.num_samples=32",
    "--eval.batch_size=32",
    "--eval.sampling_steps=4",
    "--eval.injection_t=(50,)",
    "--eval.injection_copies=1",
    "--eval.loss_noises=1",
    "--eval.loss_images=16",
    "--eval.quality.classifier=False",
    "--eval.membership.scores=()",
    "--eval.gap.draws=16",
)


def a_run(folder):
    """A work directory whose models are files that say which model they are."""
    for name in ("base", "retrained", "retrained_2", "retrained_3", "unlearned"):
        (folder / "models" / name).mkdir(parents=True)
        (folder / "models" / name / "which").write_text(name)
    for name in ("config.json", "best.json", "metrics.jsonl"):
        (folder / name).write_text("{}")
    return folder


def judged(case, **changes):
    """A result with a right status for every claim, but for the changed ones."""
    verdicts = {
        name: {"status": changes.get(name, right[case][0]), "value": 0.5}
        for name, right in judge_study.EXPECTED.items()
        if changes.get(name) != "absent"
    }
    overall = changes.get("overall", judge_study.OVERALL[case][0])
    return judge_study.Judged(verdicts, overall, 10.0, 20.0, {})


@pytest.mark.parametrize(("case", "model"), judge_study.CASES.items())
def test_a_case_has_the_judged_model_and_the_same_yardstick(tmp_path, case, model):
    run, target = a_run(tmp_path / "run"), tmp_path / case
    judge_study.make_case(run, target, model)
    (target / "models" / "unlearned" / "left over").touch()
    judge_study.make_case(run, target, model)  # made anew
    workdir = Workdir(target)
    assert (workdir.model("unlearned") / "which").read_text() == model
    assert [path.name for path in workdir.model("unlearned").iterdir()] == ["which"]
    assert (workdir.model("base") / "which").read_text() == "base"
    assert [path.name for path in workdir.retrained()] == ["retrained", "retrained_2"]
    assert workdir.config.is_file()
    assert workdir.best.exists() == workdir.metrics.exists() == (case == "unlearned")


def test_the_model_that_never_saw_the_image_is_no_part_of_its_yardstick():
    assert judge_study.CASES["never_saw"] not in judge_study.YARDSTICK


def test_a_run_without_a_model_is_refused(tmp_path):
    run = a_run(tmp_path / "run")
    (run / "models" / "retrained_3" / "which").unlink()
    (run / "models" / "retrained_3").rmdir()
    with pytest.raises(ValueError, match="retrained_3 missing; fix: delete"):
        judge_study.make_case(run, tmp_path / "case", "retrained_3")
    assert not (tmp_path / "case").exists()


def test_every_claim_of_a_report_has_its_right_verdicts():
    assert {verdict["id"] for verdict in judge(make_columns(2), {})} == set(judge_study.EXPECTED)
    for name in ("copies", "gap", "relearn", "level"):
        assert judge_study.EXPECTED[name]["saw"] == ("fail",)
    for right in judge_study.EXPECTED.values():
        assert "fail" not in right["never_saw"]


def test_mistakes_are_named():
    right = {case: judged(case) for case in judge_study.OVERALL}
    assert judge_study.wrong(right) == []
    other = judge_study.Judged({"new": {"status": "pass", "value": None}}, "passed", 1, 1, {})
    assert judge_study.wrong({**right, "unlearned": other}) == []  # nobody knows what is right for it
    saw = judged("saw", copies="pass", gap="absent", overall="passed")
    assert judge_study.wrong({**right, "saw": saw}) == [
        "saw: copies is pass; right: fail",
        "saw: gap is absent; right: fail",
        "saw: overall is passed; right: failed",
    ]
    never = judged("never_saw", relearn="fail")
    assert judge_study.wrong({"never_saw": never}) == ["never_saw: relearn is fail; right: pass or inconclusive"]


def test_the_table_has_a_line_for_each_claim_and_the_seconds():
    rows = judge_study.lines({case: judged(case) for case in judge_study.OVERALL})
    assert rows[0] == ["`copies`", "fail (0.5)", "pass (0.5)"]
    assert len(rows) == len(judge_study.EXPECTED) + 3
    assert rows[-2:] == [["seconds", "10", "10"], ["CPU seconds", "20", "20"]]


def test_the_command_line(tmp_path, capsys):
    arguments, config, own = judge_study.parse(["--eval.seed=1", "--config.base.num_steps=9", "--seed=3"])
    assert (arguments.preset, own, config) == ("standard", ["--eval.seed=1"], ["--config.base.num_steps=9"])
    command = judge_study.training_command(arguments, config, tmp_path)
    assert {"--config.seed=3", "--config.retrain.count=3", "--mode=unlearn", *config} <= set(command)
    with pytest.raises(SystemExit):
        judge_study.parse(["--evil.seed=1"])
    assert "unknown argument '--evil.seed=1'" in capsys.readouterr().err


def test_the_standard_preset_can_pass_the_claim_about_copies():
    """No copy among n samples shows a share below 1 - 0.05^(1/n), which has to be below one in a thousand."""
    assert 1 - 0.05 ** (1 / PRESETS["standard"]["num_samples"]) < 1e-3


@pytest.mark.slow
def test_the_whole_study_at_a_tiny_size(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("XLA_FLAGS", "")
    tiny = [f"--config={TINY[0].removeprefix('--config=')}", *TINY[1:], "--config.base.num_steps=4"]
    code = judge_study.main([f"--out={tmp_path}", "--preset=smoke", "--config.unlearn.num_steps=2", *tiny, *QUICK])
    out = capfd.readouterr().out
    assert code == 1  # models of four steps know nothing, and the preset measures little
    assert "saw: relearn is not_run; right: fail" in out
    assert "| overall |" in (tmp_path / "seed0" / "judge.md").read_text()
    reports = {case: tmp_path / "seed0" / case / "unlearning_report.json" for case in judge_study.CASES}
    hashes = [json.loads(path.read_text())["result_model"]["tree_sha256"] for path in reports.values()]
    assert len(set(hashes)) == 3
