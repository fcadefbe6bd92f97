"""The report as a record: schema, hashes, every single tampering, and what the check of a report says."""

from __future__ import annotations

import copy
import json
import os
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from eval.main import main
from jaxunlearn.io import diffusers
from jaxunlearn.io.hashing import tree_sha256
from jaxunlearn.io.manifest import hmac_file, hmac_pixels
from jaxunlearn.io.report import (
    canonical_sha256,
    read_report,
    record_sha256,
    schema,
    schema_problems,
    write_report,
)
from jaxunlearn.io.report_checks import FAIL, OK, SKIPPED, verify
from tests.report_example import make_columns, make_report


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return make_report(tmp_path_factory.mktemp("report") / "run", retrained=2)


@pytest.fixture
def own(example, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(example.root, tmp_path / "run")
    return example._replace(root=tmp_path / "run", path=tmp_path / "run" / "unlearning_report.json")


def states(example, report=None):
    """name of a check -> state, of everything that can be checked."""
    report = example.report if report is None else report
    root = example.root
    found = verify(
        report,
        root,
        model=root / "models/unlearned",
        base=root / "models/base",
        forget=root / "forget",
        key=example.key,
    )
    return {check.name: check.state for check in found}


def test_the_schema_is_one_and_accepts_the_example(example):
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(schema())
    assert schema_problems(example.report) == []
    assert example.report["record_sha256"] == record_sha256(example.report)
    assert read_report(example.path) == example.report


@pytest.mark.parametrize("key", sorted(schema()["required"]))
def test_every_field_is_required(example, key):
    assert schema_problems({name: value for name, value in example.report.items() if name != key})


def test_empty_lists_and_contradictions_are_refused(example):
    for change in (
        {"limitations": []},
        {"not_tested": []},
        {"lineage": []},
        {"notice": "This is a certificate."},
        {"overall": "forgotten"},
        {"extra": 1},
    ):
        assert schema_problems({**example.report, **change}), change
    report = copy.deepcopy(example.report)
    report["evaluation"]["after"][0]["value"] = None  # status ok without a number
    assert schema_problems(report)
    report["evaluation"]["after"][0] |= {"status": "not_run", "reason": None}  # no number and no reason
    assert schema_problems(report)


def test_canonical_hash_does_not_depend_on_the_order_of_keys(example):
    backwards = json.loads(json.dumps(example.report, sort_keys=True), object_pairs_hook=lambda p: dict(reversed(p)))
    assert canonical_sha256(backwards) == canonical_sha256(example.report)
    assert record_sha256({**example.report, "signature": "signed"}) == example.report["record_sha256"]
    assert record_sha256({**example.report, "headline": "B"}) != example.report["record_sha256"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_sha256({"a": float("nan")})


def test_a_report_with_nan_is_not_written(example, tmp_path):
    report = copy.deepcopy(example.report)
    report["evaluation"]["after"][0]["value"] = float("nan")
    with pytest.raises(ValueError):
        write_report(tmp_path / "r.json", report)
    assert not (tmp_path / "r.json").exists()


def test_a_fresh_report_passes_every_check(example):
    found = states(example)
    assert set(found.values()) == {OK}
    assert len(found) == 14
    bare = {check.name: check.state for check in verify(example.report, example.root.parent)}
    assert {name for name, state in bare.items() if state == SKIPPED} == {
        "unlearned model: parameters",
        "unlearned model: files",
        "original model: parameters",
        "original model: files",
        "file report.html",
        "forget pictures",
    }


def sealed(report):
    """A tampered report whose author also wrote the hash anew."""
    return {**report, "record_sha256": record_sha256(report)}


TAMPERINGS = {
    "a number": (lambda r: r["evaluation"]["after"][0].__setitem__("value", 0.0001), "numbers agree with each other"),
    "a count": (lambda r: r["evaluation"]["before"][0]["protocol"].__setitem__("count", 3), "numbers agree"),
    "an interval": (lambda r: r["evaluation"]["before"][0]["ci"].__setitem__("low", 0.0), "numbers agree"),
    "a quality": (lambda r: r["evaluation"]["after"][4].__setitem__("value", 1.0), "verdicts computed again"),
    "a threshold": (lambda r: r["thresholds"].__setitem__("copies_upper", 0.5), "verdicts"),
    "a verdict's threshold": (lambda r: r["verdicts"][0].__setitem__("threshold", 0.5), "verdicts computed again"),
    "a verdict": (lambda r: r["verdicts"][1].__setitem__("status", "pass"), "verdicts computed again"),
    "a rule": (lambda r: r["verdicts"][1].__setitem__("rule", "anything"), "verdicts computed again"),
    "a dropped verdict": (lambda r: r["verdicts"].pop(), "verdicts computed again"),
    "the result": (lambda r: r.__setitem__("overall", "passed"), "overall verdict"),
    "a hidden model": (lambda r: r["reference"]["models"].pop(), "overall verdict"),
    "disjoint": (lambda r: r["keep_set"].__setitem__("disjoint", False), "forget and keep set are disjoint"),
    "a dropped item": (lambda r: r["forget_set"]["items"].pop(), "root of the forget set"),
    "an hmac": (lambda r: r["forget_set"]["items"][0].__setitem__("hmac_pixels", "0" * 64), "root of the forget set"),
    "the root": (lambda r: r["forget_set"].__setitem__("root", "0" * 64), "root of the forget set"),
    "the method": (lambda r: r["method"]["config"].__setitem__("lam", 0.4), "settings of the method"),
    "a tree hash": (lambda r: r["result_model"].__setitem__("tree_sha256", "0" * 64), "unlearned model: parameters"),
    "the schedule": (lambda r: r["schedule"].__setitem__("alphas_cumprod_sha256", "0" * 64), "original model"),
    "a file's hash": (lambda r: r["base_model"]["files"][0].__setitem__("sha256", "0" * 64), "original model: files"),
    "the page's hash": (lambda r: r["files"].__setitem__("report.html", "0" * 64), "file report.html"),
    "a dropped rate": (lambda r: r["evaluation"]["after"].pop(0), "verdicts computed again"),
    "a dropped bound": (
        lambda r: r["evaluation"]["after"][0]["protocol"].pop("upper_one_sided"),
        "verdicts computed again",
    ),
    "a level": (lambda r: r["evaluation"]["before"][0]["ci"].__setitem__("level", 95), "numbers agree"),
    "the schema": (lambda r: r["verdicts"][0].__setitem__("status", "perfect"), "schema"),
}


@pytest.mark.parametrize("what", TAMPERINGS)
def test_every_single_tampering_is_found(example, what):
    change, name = TAMPERINGS[what]
    report = copy.deepcopy(example.report)
    change(report)
    assert states(example, report)["record_sha256"] == FAIL
    found = states(example, sealed(report))
    assert found["record_sha256"] == OK
    assert {check for check, state in found.items() if state == FAIL and check.startswith(name)}, found


def test_numbers_that_nothing_can_be_computed_from_are_one_line(own, capsys):
    report = copy.deepcopy(own.report)
    report["evaluation"]["before"][0]["ci"]["level"] = 95
    del report["evaluation"]["after"][0]["protocol"]["upper_one_sided"]
    own.path.write_text(json.dumps(sealed(report)))
    assert main(["verify", *own.flags]) == 1
    captured = capsys.readouterr()
    assert captured.err == ""
    (line,) = [line for line in captured.out.splitlines() if "numbers agree with each other" in line]
    assert line.startswith("FAIL     numbers agree with each other: cannot be computed again: ")
    assert "95" in line
    assert "FAIL     verdicts computed again: " in captured.out
    assert "ok       root of the forget set" in captured.out  # the other checks are made all the same


def test_a_headline_is_covered_by_the_hash(example):
    assert states(example, {**example.report, "headline": "All is well."})["record_sha256"] == FAIL


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_changed_weight_file_or_picture_is_found(own, capsys):
    assert main(["verify", *own.flags]) == 0
    out = capsys.readouterr().out
    assert out.count("ok ") >= 14
    assert "FAIL" not in out
    assert "none of 14 checks failed" in out
    weights = next((own.root / "models/unlearned").rglob("*.safetensors"))
    flip_a_bit(weights)
    assert main(["verify", *own.flags]) == 1
    out = capsys.readouterr().out
    assert "FAIL     unlearned model: parameters: the parameters are not those of the report" in out
    assert "FAIL     unlearned model: files" in out
    weights.unlink()
    assert main(["verify", *own.flags]) == 1
    assert "FAIL     unlearned model: parameters" in capsys.readouterr().out
    (own.root / "report.html").write_text("another page")
    os.remove(own.root / "forget" / "0.png")
    assert main(["verify", *own.flags]) == 1
    out = capsys.readouterr().out
    assert "FAIL     file report.html: was changed" in out
    assert "FAIL     forget pictures: 1 of 2 pictures of the report are not in the folder" in out


def test_pictures_are_known_after_another_encoding_and_only_with_the_key(own, capsys):
    image = np.asarray(Image.open(own.root / "forget" / "0.png"))
    Image.fromarray(image).save(own.root / "forget" / "0.bmp")
    data, other = (own.root / "forget" / "0.png").read_bytes(), (own.root / "forget" / "0.bmp").read_bytes()
    assert hmac_file(own.key, data) != hmac_file(own.key, other)
    assert hmac_pixels(own.key, image[:, :, None]) == own.report["forget_set"]["items"][0]["hmac_pixels"]
    os.remove(own.root / "forget" / "0.png")
    assert main(["verify", *own.flags]) == 0
    assert "2 pictures, 1 of them in other files with the same pixels" in capsys.readouterr().out
    assert hmac_pixels(bytes(32), image[:, :, None]) != own.report["forget_set"]["items"][0]["hmac_pixels"]
    (own.root / "commitment.key").write_bytes(bytes(32))
    assert main(["verify", *own.flags]) == 1
    assert "FAIL     forget pictures: 2 of 2" in capsys.readouterr().out


def test_bad_usage_ends_with_2_and_one_line_each(own, capsys):
    missing = str(own.root / "nothing")
    for arguments, lines in (
        ([], 1),
        ([missing], 1),
        ([str(own.path), "--model", missing, "--base", missing], 2),
        ([str(own.path), f"--forget={own.root / 'forget'}"], 1),
        ([str(own.path), f"--forget={own.root / 'forget'}", f"--key={missing}"], 1),
        ([str(own.path), "--modle", missing], 1),
    ):
        assert main(["verify", *arguments]) == 2, arguments
        captured = capsys.readouterr()
        assert len(captured.err.splitlines()) == lines, captured.err
        assert captured.out == ""
    assert main(["verify", "--help"]) == 0
    assert "commitment.key" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "is no unlearning report"),
        ('{"a": 1}', "is no unlearning report"),
        ('{"schema_version": 7, "evaluation": {}}', "has schema_version 7; allowed: 1"),
        ('{"schema_version": 1, "evaluation": NaN}', "is not JSON"),
    ],
)
def test_foreign_and_damaged_reports_have_one_line(tmp_path, capsys, content, words):
    path = tmp_path / "r.json"
    path.write_text(content)
    assert main(["verify", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert main(["compare", str(path), str(tmp_path)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert words in first
    assert "no such file" in second


def test_a_report_of_another_shape_fails_the_schema_and_no_more(tmp_path, capsys):
    path = tmp_path / "r.json"
    path.write_text('{"schema_version": 1, "evaluation": {"before": 3}, "record_sha256": "0"}')
    assert main(["verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith("FAIL     schema: ")
    assert "2 of 2 checks failed" in out


def test_tree_hash_survives_files_and_sharding_and_sees_one_bit(own):
    model = diffusers.load(own.root / "models" / "unlearned")
    expected = own.report["result_model"]["tree_sha256"]
    assert tree_sha256(model.params) == expected
    mesh = jax.make_mesh((len(jax.devices()),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    assert tree_sha256(jax.device_put(model.params, replicated)) == expected
    leaves, structure = jax.tree.flatten(model.params)
    leaves[0] = leaves[0].copy()
    leaves[0].view(np.uint32).flat[0] ^= 1
    assert tree_sha256(jax.tree.unflatten(structure, leaves)) != expected


def test_without_a_reference_a_report_is_never_passed(tmp_path):
    report = make_report(tmp_path / "run", columns=make_columns(0)).report
    assert report["overall"] == "screening_passed"
    by_id = {verdict["id"]: verdict["status"] for verdict in report["verdicts"]}
    assert by_id["copies"] == "pass"
    assert {by_id[name] for name in ("gap", "relearn", "level", "over_forgotten")} == {"not_run"}
