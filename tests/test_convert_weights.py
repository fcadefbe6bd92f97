"""The conversion of published weights: fingerprints first, the same bytes twice, numbers as the original gives them."""

from __future__ import annotations

import numpy as np
import pytest

from jaxunlearn.io import feature_weights
from jaxunlearn.io.feature_weights import FEATURE_WEIGHTS, load_weights
from jaxunlearn.models.features import clip_prompts, clip_resnet, clip_vit, sscd
from scripts import convert_weights
from scripts import make_golden_clip as golden
from tests.test_clip_towers import published_shapes
from tests.torch_files import torch_file

SIZES = (768, 1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)  # the dropouts between the layers have numbers of their own


def layers(seed=0):
    rng = np.random.default_rng(seed)
    state = {}
    for place, size, out in zip(PLACES, SIZES, SIZES[1:]):
        state[f"layers.{place}.weight"] = (rng.standard_normal((out, size)) / np.sqrt(size)).astype(np.float32)
        state[f"layers.{place}.bias"] = rng.standard_normal(out).astype(np.float32)
    return state


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "sac+logos+ava1-l14-linearMSE.pth"
    path.write_bytes(torch_file(layers()))
    return path


def test_a_file_of_unknown_fingerprint_is_refused(file, tmp_path, capsys):
    assert convert_weights.main(["aesthetic", str(file), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert FEATURE_WEIGHTS["aesthetic"].files[0].sha256 in error
    assert "--allow-unpinned" in error
    assert not (tmp_path / "out").exists()


def test_the_same_file_gives_the_same_bytes(file, tmp_path, capsys, monkeypatch):
    contents = []
    for out in ("a", "b"):
        monkeypatch.setenv(feature_weights.FOLDER_VARIABLE, str(tmp_path / out))
        assert convert_weights.main(["aesthetic", str(file), "--allow-unpinned"]) == 0
        contents.append({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()})
    assert contents[0] == contents[1]
    assert contents[0].keys() == {"aesthetic.safetensors", "aesthetic.json"}
    printed = capsys.readouterr().out
    weights = load_weights("aesthetic", tmp_path / "a", allow_unpinned=True)
    assert weights.sha256 in printed
    assert weights.source_sha256 in printed
    assert "--eval.weights.allow_unpinned=aesthetic" in printed


def test_the_affine_map_is_that_of_the_layers(file):
    tensors = convert_weights.convert_aesthetic(layers(), file)
    x = np.random.default_rng(1).standard_normal((7, 768))
    wanted = x
    for place in PLACES:
        wanted = wanted @ layers()[f"layers.{place}.weight"].T.astype(np.float64) + layers()[f"layers.{place}.bias"]
    np.testing.assert_allclose(x @ tensors["weight"] + tensors["bias"], wanted[:, 0], atol=1e-5)


def test_refused_layers(file):
    for change, message in (
        ({"layers.2.weight": np.zeros((128, 1000))}, r"layer 2 has the shapes .* after 1024 numbers"),
        ({"head.weight": np.zeros(3)}, "unexpected: head.weight"),
        ({"layers.7.weight": np.zeros((2, 16)), "layers.7.bias": np.zeros(2)}, "end in 2 numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_weights.convert_aesthetic(layers() | change, file)


def test_clip_rn50_holds_the_tower_and_the_prompts(file):
    text = golden.text_shapes() | {"token_embedding.weight": (49408, golden.TEXT["width"])}
    state = golden.state(published_shapes(clip_resnet, golden.RESNET) | text)
    state["visual.bn1.num_batches_tracked"] = np.array(3)
    state |= {"logit_scale": np.array(4.6), "input_resolution": np.array(224)}
    tensors = convert_weights.convert_clip_rn50(state, file, golden.RESNET, text_head_dim=8)
    np.testing.assert_array_equal(tensors.pop("prompts"), clip_prompts.prompt_vectors(state, 8))
    params = clip_resnet.from_flat(tensors, golden.RESNET)
    np.testing.assert_array_equal(params["conv1"]["kernel"], state["visual.conv1.weight"].transpose(2, 3, 1, 0))
    with pytest.raises(ValueError, match="the weights are not those of CLIP ViT-L/14"):
        convert_weights.convert_clip_vit_l14(state, file, golden.VIT)


def test_clip_vit_holds_the_tower(file):
    state = golden.state(published_shapes(clip_vit, golden.VIT) | golden.text_shapes())
    tensors = convert_weights.convert_clip_vit_l14(state, file, golden.VIT)
    np.testing.assert_array_equal(tensors["proj"], state["visual.proj"])
    np.testing.assert_array_equal(
        tensors["resblocks_1.attn.in_proj.kernel"], state["visual.transformer.resblocks.1.attn.in_proj_weight"].T
    )


def test_sscd_of_foreign_names_needs_proof(file, monkeypatch):
    """The order of the tensors is only believed if the file's own descriptor agrees."""
    small = sscd.SSCDConfig(blocks=(1, 1, 1, 1), width=4, dims=6)
    shapes = sscd._torch_shapes(small)
    state = golden.state(shapes)
    for name in ("from_state_dict", "by_order"):
        original = getattr(sscd, name)
        monkeypatch.setattr(sscd, name, lambda tensors, original=original: original(tensors, small))
    wanted = convert_weights.convert_sscd(state, file)
    foreign = {f"embeddings.{i}": state[name] for i, name in enumerate(shapes)}
    for difference in (0.0, 0.5):
        monkeypatch.setattr(convert_weights, "_descriptor_difference", lambda *_, d=difference: d)
        if difference:
            with pytest.raises(ValueError, match=r"other descriptors \(difference 5.0e-01\)"):
                convert_weights.convert_sscd(foreign, file)
        else:
            found = convert_weights.convert_sscd(foreign, file)
            assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(ValueError, match="missing: bn1.bias"):
        convert_weights.convert_sscd({"embeddings.0": np.zeros(3)}, file)


def test_half_precision_only_where_nothing_is_lost():
    tensors = {"half": np.array([0.5, 1e-3], np.float16).astype(np.float32), "full": np.array([1e-3, 1e6], np.float32)}
    found = convert_weights.narrow(tensors)
    assert {name: values.dtype for name, values in found.items()} == {"half": np.float16, "full": np.float32}
    assert all(np.array_equal(np.float32(found[name]), tensors[name]) for name in tensors)


def test_refused_arguments(file, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(feature_weights.FOLDER_VARIABLE, raising=False)
    out = ["--out", str(tmp_path), "--allow-unpinned"]
    for arguments, message in (
        (["scsd", str(file), *out], "did you mean 'sscd'"),
        (["aesthetic", str(file)], "no folder to write to"),
        (["aesthetic", str(tmp_path / "none.pth"), *out], "No such file"),
        (["inception", str(file), *out], "missing: Conv2d_1a_3x3.conv.weight"),
    ):
        assert convert_weights.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
