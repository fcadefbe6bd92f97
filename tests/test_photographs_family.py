"""The report's entries on the look of samples: the library's values, refusals with their reasons, real weights files."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest

from eval.context import Column, Context
from eval.families import FAMILIES, photographs
from eval.settings import resolve
from jaxunlearn.io.feature_weights import FEATURE_WEIGHTS, FOLDER_VARIABLE, save_weights
from jaxunlearn.metrics.aesthetic import aesthetic, clip_inputs
from jaxunlearn.metrics.clip_iqa import clip_iqa
from jaxunlearn.metrics.photographic import MEASURES
from jaxunlearn.models.features import clip_resnet, clip_vit
from scripts import make_golden_clip as golden
from tests.test_clip_towers import drawn, quick_jit

RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small networks in real files, as if converted from the public ones."""
    path = tmp_path_factory.mktemp("weights")
    resnet, vit = drawn(clip_resnet, golden.RESNET), drawn(clip_vit, golden.VIT)
    prompts = RNG.standard_normal((2, 6)).astype(np.float32)
    head = {"weight": RNG.standard_normal(6).astype(np.float32), "bias": np.array([5.0], np.float32)}
    contents = {
        "clip_rn50": clip_resnet.to_flat(resnet) | {"prompts": prompts},
        "clip_vit_l14": clip_vit.to_flat(vit),
        "aesthetic": head,
    }
    for name, tensors in contents.items():
        save_weights(path, name, tensors, "x.pt", FEATURE_WEIGHTS[name].files[0].sha256)
    return SimpleNamespace(path=path, resnet=resnet, vit=vit, prompts=prompts, head=head)


@pytest.fixture
def small_networks(monkeypatch):
    for module, config in ((clip_resnet, golden.RESNET), (clip_vit, golden.VIT)):
        for name in ("from_flat", "embed"):
            monkeypatch.setattr(module, name, functools.partial(getattr(module, name), config=config))
    monkeypatch.setattr(photographs, "clip_inputs", functools.partial(clip_inputs, size=12))


def context_of(size, options=None, channels=3, weights=None):
    keep = np.random.default_rng(size).integers(0, 256, (6, size, size, channels), np.uint8)
    settings, problems = resolve({}, {}, "standard")
    assert not problems
    settings["photographs"] |= {"samples": 5, "keep_images": 4, "batch_size": 3} | (options or {})
    settings["weights"] |= weights or {}
    runner = SimpleNamespace(protocol={"sampler": "ddim"})
    refs = SimpleNamespace(keep=keep)
    return Context("after", {}, None, runner, refs, None, settings, lambda *_: None, None, None)


def measured(context, samples=7):
    shape = context.refs.keep.shape[1:]
    column = Column([], np.random.default_rng(9).integers(0, 256, (samples, *shape), np.uint8))
    photographs.measure(column, context)
    assert [item["metric"] for item in column.entries] == list(photographs.METRICS)
    return column, {item["metric"]: item for item in column.entries}


@pytest.mark.slow
def test_values_are_those_of_the_librarys_functions(folder, small_networks):
    context = context_of(64, weights={"folder": str(folder.path)})
    column, found = measured(context)
    pictures = np.float32(column.samples[:5] / 255)
    wanted = {name: quick_jit(measure)(pictures) for name, measure in MEASURES.items()}
    run = quick_jit(functools.partial(clip_resnet.embed, position=False))
    wanted["clip_iqa"] = quick_jit(clip_iqa)(run(folder.resnet, pictures), folder.prompts)
    vectors = quick_jit(clip_vit.embed)(folder.vit, clip_inputs(column.samples[:5], size=12))
    wanted["aesthetic"] = aesthetic(vectors, folder.head["weight"], folder.head["bias"])
    for name, values in wanted.items():
        np.testing.assert_allclose(column.arrays[name], values, rtol=1e-4, atol=1e-5, err_msg=name)
        entry = found[name]
        assert entry["value"] == pytest.approx(float(np.mean(values)), rel=1e-4, abs=1e-5)
        assert entry["n"] == 5
        assert entry["status"] == "ok"
        assert entry["protocol"]["keep_n"] == 4
        assert entry["ci"]["low"] < entry["value"] < entry["ci"]["high"]
        assert (entry["weights_sha256"] is None) == (name in MEASURES)
    assert found["clip_iqa"]["protocol"]["weights"] == "clip_rn50"
    assert found["aesthetic"]["protocol"]["head_weights"] == "aesthetic"
    assert found["clip_iqa"]["protocol"]["weights_pinned"] is True


def test_the_yardstick_is_the_keep_images():
    context = context_of(8, {"keep_images": 100, "batch_size": 7}, channels=1)
    _, found = measured(context)
    for name, measure in MEASURES.items():
        wanted = float(np.mean(quick_jit(measure)(context.refs.keep)))
        assert found[name]["protocol"]["keep_images"] == pytest.approx(wanted, rel=1e-4)
        assert found[name]["status"] == "ok"


def test_clip_does_not_judge_small_pictures(folder):
    _, found = measured(context_of(63, weights={"folder": str(folder.path)}))
    for name in photographs.NETWORKS:
        assert found[name]["status"] == "not_run"
        assert found[name]["value"] is None
        assert "pictures of 63x63 are none" in found[name]["reason"]
        assert "eval.photographs.force" in found[name]["reason"]


@pytest.mark.parametrize(("size", "force"), [(64, False), (8, True)])
def test_without_weights_it_is_not_run(size, force, tmp_path, monkeypatch):
    """And nothing else takes the name."""
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    for weights, where in (({}, FOLDER_VARIABLE), ({"folder": str(tmp_path)}, str(tmp_path))):
        column, found = measured(context_of(size, {"force": force}, weights=weights))
        for name, file in (("clip_iqa", "clip_rn50"), ("aesthetic", "aesthetic")):
            entry = found[name]
            assert (entry["status"], entry["value"], entry["weights_sha256"]) == ("not_run", None, None)
            assert f"python scripts/convert_weights.py {file} " in entry["reason"]
            assert where in entry["reason"]
            assert name not in column.arrays
        assert all(found[name]["status"] == "ok" for name in MEASURES)


def test_weights_that_are_refused_fail(folder, tmp_path, small_networks):
    for name in ("clip_rn50", "clip_vit_l14", "aesthetic"):
        for suffix in ("safetensors", "json"):
            (tmp_path / f"{name}.{suffix}").write_bytes((folder.path / f"{name}.{suffix}").read_bytes())
    content = bytearray((tmp_path / "clip_vit_l14.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "clip_vit_l14.safetensors").write_bytes(content)
    (tmp_path / "clip_rn50.safetensors").unlink()
    (tmp_path / "clip_rn50.json").unlink()
    save_weights(tmp_path, "clip_rn50", {"prompts": folder.prompts}, "mine.pt", "ef" * 32)
    _, found = measured(context_of(64, weights={"folder": str(tmp_path)}))
    assert [found[name]["status"] for name in photographs.NETWORKS] == ["failed", "failed"]
    assert "none of the known ones" in found["clip_iqa"]["reason"]
    assert "damaged or changed" in found["aesthetic"]["reason"]
    named = {"folder": str(tmp_path), "allow_unpinned": ("clip_rn50",)}
    _, found = measured(context_of(64, weights=named))
    assert "the weights are not those of CLIP RN50" in found["clip_iqa"]["reason"]


def test_broken_samples(folder):
    column = Column([], failed="3 of 5 samples hold NaN or infinity")
    photographs.measure(column, context_of(64))
    assert [item["metric"] for item in column.entries] == list(photographs.METRICS)
    assert {item["status"] for item in column.entries} == {"failed"}


def test_the_family_is_known():
    settings, _ = resolve({}, {})
    assert not FAMILIES["photographs"].enabled(settings)
    for preset, on in (("smoke", False), ("standard", True), ("audit", True)):
        assert FAMILIES["photographs"].enabled(resolve({}, {}, preset)[0]) == on
    names = [item["metric"] for item in photographs.failed_entries(settings)]
    assert names == list(photographs.METRICS)
