"""What a work directory holds: retrained models in order, and every copy that an erasure must think of."""

from __future__ import annotations

import json

from jaxunlearn.io.lineage import lineage
from jaxunlearn.io.report import schema
from jaxunlearn.io.workdir import Workdir


def test_retrained_models_are_listed_in_order(tmp_path):
    assert Workdir(tmp_path / "missing").retrained() == []
    for name in ("retrained_10", "retrained", "retrained_2", "retrained_1", "retrained_x", "unlearned"):
        (tmp_path / "models" / name).mkdir(parents=True)
    (tmp_path / "models" / "retrained_3").write_text("a file")
    names = [path.name for path in Workdir(tmp_path).retrained()]
    assert names == ["retrained", "retrained_2", "retrained_10"]


def test_a_first_evaluation_lists_the_original_model_and_what_is_written_after_it(tmp_path):
    original, export, samples = lineage(Workdir(tmp_path), {}, "hf://me/mine")
    assert (original["path"], original["action"]) == ("hf://me/mine", "kept")
    assert (export["copy"], export["path"], export["action"]) == ("export", "export", "updated")
    assert "after the evaluation" in export["reason"]
    assert (samples["copy"], samples["path"], samples["action"]) == ("samples", "evaluation.npz", "kept")
    (tmp_path / "export").mkdir()
    _, export, _ = lineage(Workdir(tmp_path), {}, "hf://me/mine")
    assert "after the evaluation" not in export["reason"]


def test_every_copy_is_found_and_nothing_is_changed(tmp_path):
    root = tmp_path / "run"
    for folder in (
        "models/base",
        "models/unlearned",
        "models/best",
        "models/retrained",
        "checkpoints/base/100",
        "checkpoints/unlearn/20",
        "checkpoints/unlearn/10",
        "checkpoints/retrain_2/100",
        "checkpoints/selected",
        "cache",
        "samples",
        "export",
    ):
        (root / folder).mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (root / "forget_manifest.json").write_text("x")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    found = lineage(Workdir(root), {"latents": {"cache": str(tmp_path / "elsewhere")}}, "models/base")
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    states = {(item["copy"], item["path"]): item["action"] for item in found}
    assert states == {
        ("model", "models/base"): "kept",
        ("model", "models/unlearned"): "updated",
        ("model", "models/best"): "kept",
        ("model", "models/retrained"): "updated",
        ("checkpoint", "checkpoints/base"): "kept",
        ("optimizer", "checkpoints/base"): "kept",
        ("ema", "checkpoints/base"): "kept",
        ("checkpoint", "checkpoints/unlearn"): "kept",
        ("optimizer", "checkpoints/unlearn"): "kept",
        ("checkpoint", "checkpoints/retrain_2"): "updated",
        ("optimizer", "checkpoints/retrain_2"): "updated",
        ("export", "export"): "updated",
        ("feature_cache", "cache"): "kept",
        ("feature_cache", str(tmp_path / "elsewhere")): "kept",
        ("samples", "samples"): "kept",
        ("samples", "evaluation.npz"): "kept",
        ("manifest", "forget_manifest.json"): "kept",
    }
    steps = next(item["reason"] for item in found if item["path"] == "checkpoints/unlearn")
    assert steps.startswith("steps 10, 20: ")
    kinds = schema()["properties"]["lineage"]["items"]["properties"]["copy"]["enum"]
    assert {item["copy"] for item in found} <= set(kinds)
    assert json.loads(json.dumps(found)) == found
