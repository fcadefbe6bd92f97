"""Weights of feature networks: what is read, what is refused, and the one line about a missing file."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxunlearn.io import feature_weights
from jaxunlearn.io.feature_weights import FEATURE_WEIGHTS, FOLDER_VARIABLE, MissingWeights, load_weights, save_weights
from jaxunlearn.metrics import METRICS, NEEDS

PINNED = FEATURE_WEIGHTS["aesthetic"].files[0].sha256
TENSORS = {"weight": np.linspace(-1, 1, 5, dtype=np.float32), "bias": np.array([0.5], np.float16)}


@pytest.fixture
def folder(tmp_path):
    save_weights(tmp_path, "aesthetic", TENSORS, "layers.pth", PINNED)
    return tmp_path


def test_there_and_back(folder, monkeypatch):
    weights = load_weights("aesthetic", folder)
    assert weights.tensors.keys() == TENSORS.keys()
    for name, values in TENSORS.items():
        assert weights.tensors[name].dtype == np.float32
        np.testing.assert_array_equal(weights.tensors[name], values)
    assert (weights.source_sha256, weights.pinned, weights.licence) == (PINNED, True, "Apache-2.0")
    assert weights.record["weights_pinned"] is True
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    assert load_weights("aesthetic").sha256 == weights.sha256


def test_same_tensors_give_the_same_bytes(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    save_weights(other, "aesthetic", dict(reversed(TENSORS.items())), "layers.pth", PINNED)
    for file in ("aesthetic.safetensors", "aesthetic.json"):
        assert (folder / file).read_bytes() == (other / file).read_bytes()


def test_one_flipped_bit_anywhere_is_refused(folder):
    path = folder / "aesthetic.safetensors"
    content = bytearray(path.read_bytes())
    for place in range(len(content)):
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged or changed") as caught:
            load_weights("aesthetic", folder)
        assert not isinstance(caught.value, MissingWeights)
        content[place] ^= 1 << place % 8
    path.write_bytes(content)
    load_weights("aesthetic", folder)


def test_missing_weights_say_in_one_line_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    for name, source in FEATURE_WEIGHTS.items():
        for where in (None, tmp_path):
            with pytest.raises(MissingWeights) as caught:
                load_weights(name, where)
            line = str(caught.value)
            assert "\n" not in line
            command = f"python scripts/convert_weights.py {name} {source.files[0].name}"
            for part in (f"{name}.safetensors", command, source.licence, source.home):
                assert part in line
            assert str(tmp_path) in line if where else FOLDER_VARIABLE in line


def test_another_source_must_be_named(tmp_path):
    save_weights(tmp_path, "aesthetic", TENSORS, "mine.pth", "ab" * 32)
    with pytest.raises(ValueError, match="abab.*none of the known ones.*allow_unpinned"):
        load_weights("aesthetic", tmp_path)
    weights = load_weights("aesthetic", tmp_path, allow_unpinned=True)
    assert not weights.pinned
    assert weights.record["weights_source_sha256"] == "ab" * 32


def test_a_known_conversion_is_held_to_its_fingerprint(folder, monkeypatch):
    source = FEATURE_WEIGHTS["aesthetic"]
    for digest, good in ((load_weights("aesthetic", folder).sha256, True), ("0" * 64, False)):
        file = source.files[0]._replace(converted_sha256=digest)
        monkeypatch.setitem(feature_weights.FEATURE_WEIGHTS, "aesthetic", source._replace(files=(file,)))
        if good:
            load_weights("aesthetic", folder)
        else:
            with pytest.raises(ValueError, match="as every conversion gives"):
                load_weights("aesthetic", folder)


def test_refusals(folder):
    with pytest.raises(ValueError, match="did you mean 'sscd'"):
        load_weights("scsd", folder)
    for suffix in ("safetensors", "json"):
        (folder / f"sscd.{suffix}").write_bytes((folder / f"aesthetic.{suffix}").read_bytes())
    with pytest.raises(ValueError, match="holds the weights of 'aesthetic'"):
        load_weights("sscd", folder)
    (folder / "aesthetic.json").unlink()
    with pytest.raises(ValueError, match=r"aesthetic.json: is not there.*convert again"):
        load_weights("aesthetic", folder)
    with pytest.raises(ValueError, match="bias holds NaN or infinity"):
        save_weights(folder, "aesthetic", {"bias": np.array([np.nan])}, "x", PINNED)


def test_other_weights_are_never_overwritten(folder):
    before = load_weights("aesthetic", folder)
    save_weights(folder, "aesthetic", TENSORS, "layers.pth", PINNED)
    with pytest.raises(FileExistsError, match="move it away"):
        save_weights(folder, "aesthetic", {"bias": np.zeros(1, np.float32)}, "layers.pth", PINNED)
    assert load_weights("aesthetic", folder).sha256 == before.sha256
    assert sorted(path.name for path in folder.iterdir()) == ["aesthetic.json", "aesthetic.safetensors"]


def test_the_sidecar_says_where_the_file_came_from(folder):
    stated = json.loads((folder / "aesthetic.json").read_text())
    assert stated["source_sha256"] == PINNED
    assert stated["source_file"] == "layers.pth"


def test_the_table():
    for name, source in FEATURE_WEIGHTS.items():
        assert source.files[0].sha256 is not None, name
        for file in source.files:
            assert file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32
    needing = {metric for metric, facts in METRICS.items() if "weights" in facts.needs}
    named = {metric for source in FEATURE_WEIGHTS.values() for metric in source.metrics}
    assert needing == named
    assert all(set(facts.needs) <= NEEDS.keys() for facts in METRICS.values())
