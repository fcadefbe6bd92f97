"""The evaluation on a work directory that the test makes: report, page, exit codes, what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from typing import NamedTuple

import numpy as np
import pytest

from eval import output
from eval.context import Column
from eval.families import FAMILIES, copy_detector
from eval.inputs import read_inputs
from eval.main import main
from eval.records import entry
from eval.settings import DEFAULTS, resolve
from jaxunlearn.io import diffusers
from jaxunlearn.io.model_card import markdown_table, model_card
from jaxunlearn.io.report import schema_problems
from jaxunlearn.io.report_checks import OK, verify
from jaxunlearn.metrics import METRICS
from jaxunlearn.metrics.entries import columns_of
from jaxunlearn.metrics.statistics import Interval
from jaxunlearn.models.parameters import init_params
from jaxunlearn.models.unet2d import UNet2DConfig
from tests.tiny_model import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETTINGS = {
    "num_samples": 64,
    "batch_size": 48,
    "sampling_steps": 3,
    "injection_t": [2, 5],
    "injection_copies": 3,
    "loss_t": [2, 40],
    "loss_noises": 2,
    "loss_images": 10,
    "classifier": {"steps": 40, "batch_size": 64, "min_accuracy": 0.0},
}
UNET = UNet2DConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(8,),
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    layers_per_block=1,
    norm_num_groups=4,
    add_attention=False,
)
SENTENCE = "This is not a legal certificate; it does not prove the absence of influence."


def config(**changes):
    data = {
        "name": "digits",
        "limit": 400,
        "plant": {"image": "sample:china", "copies": 20},
        "forget": {"planted": True},
    }
    return {
        "seed": 0,
        "data": data | changes.pop("data", {}),
        "base": {"path": None},
        "unlearn": {"method": "siss", "lam": 0.5},
        "eval": SETTINGS | changes.pop("eval", {}),
        **changes,
    }


def write_model(path, seed):
    diffusers.save(path, diffusers.new(UNET, init_params(UNET, seed), {"num_train_timesteps": 50, "beta_end": 0.2}))


def break_model(path):
    """Weights so large that every sample is NaN; a NaN in the file itself would be refused when it is opened."""
    from safetensors.numpy import load_file, save_file

    file = next(path.rglob("*.safetensors"))
    tensors = load_file(file)
    tensors[min(tensors)] = np.full_like(tensors[min(tensors)], 3e38)
    save_file(tensors, file)


def make_workdir(path, settings, *, retrained=False):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(settings))
    names = ("base", "unlearned", "retrained") if retrained else ("base", "unlearned")
    for seed, name in enumerate(names):
        write_model(path / "models" / name, seed)
    rows = [{"stage": "unlearn", "step": s, "loss/keep": 1.0 / (s + 1), "loss/forget": 2.0 + s} for s in range(10)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "unl')
    return path


class Done(NamedTuple):
    """What a run of ``python -m eval.main`` left: as a process would, but without its start."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def workdir(quick_compilation, tmp_path_factory):  # noqa: F811
    made = make_workdir(tmp_path_factory.mktemp("eval") / "run", config(), retrained=True)
    chosen = {"rule": "auto", "summary": "t in [10, 20)", "reasons": ["It is <there>."], "num_steps": 50, "curves": {}}
    (made / "selection.json").write_text(json.dumps(chosen))
    return made


@pytest.fixture(scope="module")
def done(workdir):
    return run("--workdir", workdir)


@pytest.fixture(scope="module")
def report(done, workdir):
    assert done.returncode == 0, done.stderr
    return json.loads((workdir / "unlearning_report.json").read_text())


def test_report_has_its_parts(report):
    assert report["schema_version"] == 1
    assert report["notice"] == SENTENCE
    assert re.fullmatch(r"[0-9a-f]{64}", report["config_sha256"])
    assert report["base_model"]["tree_sha256"] != report["result_model"]["tree_sha256"]
    assert report["reference"]["kind"] == "retrained"
    assert report["forget_set"]["n"] == 20
    assert report["forget_set"]["unique"] == 1
    assert len(report["forget_set"]["items"]) == 20
    assert report["overall"] in ("passed", "failed", "incomplete", "screening_passed")
    assert report["not_tested"]
    assert report["limitations"]
    assert "The forget image was" in report["headline"]
    assert set(report["files"]) == {"report.html", "evaluation.npz", "config.json"}
    assert report["evaluation"]["preset"] is None
    assert any("metrics.jsonl" in line for line in report["limitations"])  # the half line is not passed over in silence


def test_every_entry_is_complete(report):
    fields = {"metric", "value", "unit", "n", "ci", "target", "floor", "protocol", "weights_sha256", "seed_key"}
    fields |= {"status", "reason"}
    columns = columns_of(report)
    for name in ("before", "after", "retrained"):
        entries = columns[name]
        found = {item["metric"] for item in entries}
        for family in FAMILIES.values():
            if family.measure is not None:
                assert found >= {item["metric"] for item in family.module.failed_entries(report["settings"])}, name
        for item in entries:
            assert set(item) - {"model"} == fields
            assert item["unit"] == METRICS[item["metric"]].unit
            assert item["status"] != "ok" or item["seed_key"].startswith("seed 0, ")
            assert item["status"] in ("ok", "not_run", "failed")
            if item["status"] == "ok":
                assert np.isfinite(item["value"])
                assert item["n"] >= 1
            else:
                assert item["value"] is None
                assert item["reason"]
            if item["ci"] is not None:
                assert item["ci"]["low"] <= item["value"] + 1e-9
                assert item["value"] <= item["ci"]["high"] + 1e-9
                assert item["ci"]["level"] == 0.95
                assert item["ci"]["method"]
    assert {item["metric"] for item in report["evaluation"]["after"]} >= {"forget_level"}
    assert {item["metric"] for item in report["evaluation"]["control"]} >= {"nearest_keep_min", "inception_score"}


def test_copy_rate_carries_count_bound_and_threshold(report):
    for name in ("before", "after", "retrained"):
        item = next(e for e in columns_of(report)[name] if e["metric"] == "copy_rate")
        assert item["n"] == 64
        assert item["value"] == item["protocol"]["count"] / 64
        assert item["protocol"]["upper_one_sided"] >= item["value"]
        assert "Clopper-Pearson" in item["ci"]["method"]
    closest, threshold, strict = (
        report["calibration"][k][0] for k in ("closest_other_image", "threshold", "strict_threshold")
    )
    assert threshold == pytest.approx(0.85 * closest, abs=1e-5)
    assert strict == pytest.approx(0.5 * closest, abs=1e-5)


def test_the_report_is_complete_and_checks_out(report, workdir):
    assert schema_problems(report) == []
    checked = verify(report, workdir, model=workdir / "models" / "unlearned", base=workdir / "models" / "base")
    assert {check.name for check in checked if check.state != OK} == {"forget pictures"}
    kinds = {(item["copy"], item["path"]) for item in report["lineage"]}
    assert {("model", "models/base"), ("model", "models/unlearned"), ("model", "models/retrained")} <= kinds
    assert {("samples", "evaluation.npz"), ("export", "export")} <= kinds  # written after the report was made
    assert report["method"]["steps"] == 9
    assert report["method"]["objective"] == "siss"
    assert report["reference"]["models"][0]["model"] == "retrained"
    assert report["selection"]["summary"] == "t in [10, 20)"
    by_id = {verdict["id"]: verdict for verdict in report["verdicts"]}
    assert by_id["gap"]["status"] == by_id["level"]["status"] == "not_run"
    assert report["overall"] != "passed"
    assert report["request"]["completed_utc"] == report["created_utc"]


def test_the_page_shows_the_run_and_what_is_left(workdir, report):
    page = (workdir / "report.html").read_text()
    for words in (
        "The run in pictures",
        "Copies that remain",
        "Which timesteps and frequencies",
        "It is &lt;there&gt;.",
    ):
        assert words in page, words
    for title in ("Extraction: what samples show", "Denoising injection", "Denoising loss", "Quality of samples"):
        assert title in page, title
    switched_off = [family for family in FAMILIES.values() if not family.enabled(report["settings"])]
    assert page.count("switches it on") >= min(1, len(switched_off))
    assert ("Not part of this evaluation" in page) == bool(switched_off)


def test_nothing_plain_about_the_forget_set_leaves(report, workdir):
    from jaxunlearn.io.forget import open_split

    split = open_split(config()["data"], 0)
    text = json.dumps(report) + (workdir / "report.html").read_text()
    for index in split.forget:
        assert split.digests[index].tobytes().hex() not in text
        assert split.names[index] not in text
    assert "evaluation.npz" in report["files"]


def test_page_is_self_contained_and_says_what_it_does_not_show(workdir, report):
    page = (workdir / "report.html").read_text()
    assert page.count(SENTENCE) == 2
    assert report["headline"].split("(")[0] in page.replace("&nbsp;", " ")
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert len(sources) >= 8
    assert all(source.startswith("data:image/") for source in sources)
    assert "What this does not show" in page
    assert "viewport" in page
    assert " nan" not in page.lower().replace("nan or", "")


@pytest.mark.slow
def test_same_directory_gives_the_same_numbers(workdir, report, tmp_path):
    copy = tmp_path / "again"
    shutil.copytree(workdir, copy)
    again = run("--workdir", copy, "--eval.batch_size=64")
    assert again.returncode == 0, again.stderr
    other = json.loads((copy / "unlearning_report.json").read_text())
    for name in ("before", "after"):
        first = {json.dumps([e["metric"], e["protocol"].get("t")]): e["value"] for e in report["evaluation"][name]}
        second = {json.dumps([e["metric"], e["protocol"].get("t")]): e["value"] for e in other["evaluation"][name]}
        assert first.keys() == second.keys()
        for key, value in first.items():
            if value is not None:
                assert second[key] == pytest.approx(value, rel=0.05, abs=1e-4), key


def test_card_and_table_are_made_from_the_report(report):
    table = markdown_table(report)
    assert table.startswith("| metric | before | after | retrained |\n|---|---|---|---|\n")
    assert "of 64)" in table
    card = model_card(config(), report)
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert SENTENCE in card
    assert "No licence is stated" in card
    assert report["result_model"]["tree_sha256"] in card
    licensed = model_card({**config(), "export": {"license": "mit", "base_model": "me/mine"}}, None)
    assert 'license: "mit"' in licensed
    assert 'base_model: "me/mine"' in licensed
    assert "No licence" not in licensed
    assert "not evaluated" in licensed
    assert "pipeline_tag: unconditional-image-generation" in licensed


def test_the_card_of_a_text_model_keeps_the_prompt_to_itself():
    card = model_card({"unlearn": {"method": "siss", "prompt": "a picture of s07"}}, None, takes_text=True)
    assert "pipeline_tag: text-to-image" in card
    assert 'pipeline("a prompt", num_inference_steps=50)' in card
    assert "s07" not in card
    assert '"method": "siss"' in card


def test_a_model_with_broken_samples_has_no_calibrated_similarity():
    settings, _ = resolve({}, {"injection_t": "(2, 5)"}, "standard")
    after = Column([])
    after.failed = "8 of 8 samples hold NaN or infinity"
    copy_detector.compare({"before": Column([]), "after": after}, {}, settings)
    found = [(item["metric"], item["protocol"]["t"], item["status"], item["reason"]) for item in after.entries]
    assert found == [("sscd_calibrated", t, "failed", after.failed) for t in (2, 5)]


EVERY_FAMILY = [
    "--preset=standard",
    "--eval.sampling_steps=3",
    "--eval.injection_t=(2,)",
    "--eval.injection_copies=1",
    "--eval.loss_t=(2,)",
    "--eval.loss_noises=1",
    "--eval.loss_images=10",
    "--eval.nll.draws=1",
    "--eval.nll.images=1",
    "--eval.nll.held_out=1",
    "--eval.nll.tolerance=0.1",
    "--eval.nll.max_steps=32",
    "--eval.inversion.copies=1",
    "--eval.inversion.steps=2",
    "--eval.quality.rows=20",
    "--eval.membership.scores=('loss_t',)",
]
"""The families of the standard preset, each with as little work as it takes."""


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], EVERY_FAMILY], ids=["own settings", "standard"])
def test_broken_model_and_unlabelled_data_have_reasons(tmp_path, more):
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    data = {
        "name": "npz",
        "path": str(tmp_path / "images.npz"),
        "limit": None,
        "plant": {},
        "forget": {"indices": [3, 7]},
    }
    data["held_out_fraction"] = 0
    work = make_workdir(tmp_path / "run", config(data=data))
    break_model(work / "models" / "unlearned")
    done = run("--workdir", work, *more, "--eval.num_samples=8")
    assert done.returncode == 1, done.stderr
    report = json.loads((work / "unlearning_report.json").read_text())
    assert report["overall"] == "failed"
    assert "NaN" in report["headline"]
    after = report["evaluation"]["after"]
    assert all(item["status"] in ("failed", "not_run") and item["reason"] for item in after)
    before = {item["metric"]: item for item in report["evaluation"]["before"]}
    assert before["copy_rate"]["status"] == "ok"
    assert before["fd_pixel"]["status"] == "ok"
    assert before["loss_held_out"]["status"] == "not_run"
    for name in ("fd_classifier", "inception_score"):
        assert before[name]["status"] == "not_run"
        assert "labels" in before[name]["reason"]
    assert "NaN" in (work / "report.html").read_text()


def test_bad_usage_and_damaged_directories_end_with_2_and_one_line_each(tmp_path):
    work = make_workdir(tmp_path / "run", config(data={"forget": {}}, eval={"num_samples": 1, "sampler": "euler"}))
    shutil.rmtree(work / "models" / "unlearned")
    before = sorted(p.name for p in work.rglob("*"))
    done = run("--workdir", work, "--eval.lossnoises=3", "eval.seed=1")
    lines = done.stderr.splitlines()
    assert done.returncode == 2
    assert len(lines) == 1
    assert "did you mean --eval.seed=1" in lines[0]
    done = run("--workdir", work, "--eval.lossnoises=3")
    lines = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 5, lines
    for part in (
        "eval.num_samples: 1",
        "'euler'",
        "did you mean 'loss_noises'",
        "forget set is empty",
        "unlearned: is missing",
    ):
        assert sum(part in line for line in lines) == 1, (part, lines)
    assert sorted(p.name for p in work.rglob("*")) == before


def test_what_would_end_an_evaluation_is_found_before_it_begins(tmp_path, monkeypatch):
    work = make_workdir(tmp_path / "run", config())
    before = sorted(work.rglob("*"))

    def refused(*arguments):
        done = run("--workdir", work, *arguments)
        assert done.returncode == 2, done.stderr
        assert sorted(work.rglob("*")) == before
        return done.stderr.splitlines()

    probe = ("--eval.inversion.copies=1", "--eval.inversion.steps=51")
    lines = refused(*probe)
    allowed = "eval.inversion.steps: 51; allowed: at most the 50 steps of the {} model that hold a trace of the image"
    assert [line.removeprefix("eval.main: ") for line in lines] == [allowed.format("before"), allowed.format("after")]
    with monkeypatch.context() as patch:
        patch.setattr("eval.inputs.load_or_create_key", lambda root: (root / "missing").read_bytes())
        (line,) = refused()
        assert "commitment.key: cannot be made or read (No such file or directory); fix: " in line
    key = work / "commitment.key"
    key.write_bytes(bytes(32))
    key.chmod(0o644)
    before.append(key)
    before.sort()
    assert len(refused(*probe)) == 3
    (line,) = refused()
    assert "has mode 644; allowed: 600; fix: chmod 600" in line
    key.chmod(0o600)
    inputs = read_inputs(str(work), {"inversion.steps": "51"})  # the probe is off, so its steps are not used
    assert inputs.key == bytes(32)
    key.unlink()
    assert read_inputs(str(work), {}).key == key.read_bytes()


def test_a_whole_group_on_the_command_line_is_checked_key_by_key():
    settings, problems = resolve({}, {"request": "{'id': '17'}", "quality": "{'rows': 50}", "quality.subsets": "3"})
    assert problems == []
    assert settings["request"] == DEFAULTS["request"] | {"id": "17"}
    assert settings["quality"] == DEFAULTS["quality"] | {"rows": 50, "subsets": 3}
    for group, words in (
        ("{'id': 17}", "eval.request.id: 17; allowed: None, or a text"),
        ("{'name': 'x'}", "eval.request.name: "),
        ("17", "eval.request: 17; allowed: a group with id"),
    ):
        (problem,) = resolve({}, {"request": group})[1]
        assert words in problem
    (problem,) = resolve({}, {"num_samples": "{}"})[1]
    assert "eval.num_samples: {}; allowed: a whole number" in problem


def test_numbers_that_are_not_finite_become_null_everywhere():
    nan, inf = float("nan"), float("inf")
    protocol = {"a": nan, "b": {"c": [1.5, -inf, (np.float64(inf), "x")]}, "n": 3, "no": False}
    broken = entry("gap_kl_forget", nan, floor=nan, ci=Interval(nan, nan, 0.95, "Student t"), protocol=protocol)
    assert broken["protocol"] == {"a": None, "b": {"c": [1.5, None, (None, "x")]}, "n": 3, "no": False}
    assert (broken["status"], broken["value"], broken["floor"], broken["ci"]) == ("failed", None, None, None)
    sound = entry("gap_kl_forget", 1.0, ci=Interval(0.5, inf, 0.95, "Student t"), protocol={"standard_error": inf})
    assert (sound["status"], sound["ci"], sound["protocol"]) == ("ok", None, {"standard_error": None})
    json.dumps([broken, sound], allow_nan=False)


def test_a_report_that_cannot_be_written_leaves_the_files_of_before(workdir, report, tmp_path, monkeypatch):
    work = tmp_path / "run"
    shutil.copytree(workdir, work)
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    monkeypatch.setattr(output, "render", lambda *_: "another page")
    inputs = read_inputs(str(work), {})
    for broken in ({"calibration": {"unit": float("nan")}}, {"overall": "forgotten"}):
        with pytest.raises(ValueError, match="forgotten|not JSON compliant"):
            output.write(inputs, {**report, **broken}, {}, None)
        assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == before
    written = output.write(inputs, report, {}, None)
    assert {path.name for path in written} == {"evaluation.npz", "report.html", "unlearning_report.json"}
    checks = verify(json.loads((work / "unlearning_report.json").read_text()), work)
    assert {check.name: check.state for check in checks}["file report.html"] == OK
    assert {check.name: check.state for check in checks}["file evaluation.npz"] == OK


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda root: None, ["--workdir", "{root}/missing"], "no such directory"),
        (lambda root: None, [], "--workdir"),
        (lambda root: (root / "config.json").write_text("{"), ["--workdir", "{root}"], "not JSON"),
        (lambda root: None, ["--workdir", "{root}"], "config.json: is missing"),
    ],
)
def test_unusable_arguments_end_with_2(tmp_path, make, arguments, message):
    make(tmp_path)
    done = run(*[text.format(root=tmp_path) for text in arguments])
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


def test_help_lists_the_settings():
    done = run("--help")
    assert done.returncode == 0
    assert "num_samples" in done.stdout
    assert "classifier.steps" in done.stdout
