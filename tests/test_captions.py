"""Texts of images: reading the file, and joining it to the images of folders and archives."""

import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from jaxunlearn.io.captions import captions_of, find_metadata, has_texts, read_captions
from jaxunlearn.io.datasets import DATASETS
from jaxunlearn.io.forget import open_split
from jaxunlearn.io.manifest import forget_manifest

NAMES = ("a/0.png", "a/1.png", "b/2.png", "b/3.png")


def lines(*entries) -> str:
    return "".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries)


@pytest.fixture
def tree(tmp_path):
    for i, name in enumerate(NAMES):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(path)
    return tmp_path / "tree"


def test_names_are_normalised_and_other_keys_ignored(tmp_path):
    file = tmp_path / "x.jsonl"
    text = lines(
        {"file_name": "./a/0.png", "text": "  a cat\u2028on a chair ", "label": 3},
        "",
        {"file_name": "a\\1.png", "text": ""},
    )
    file.write_text("\ufeff" + text, encoding="utf-8")
    assert read_captions(file) == {"a/0.png": "a cat\u2028on a chair", "a/1.png": ""}
    file.write_text(
        json.dumps({"file_name": "a", "text": "raw \u2028 separator"}, ensure_ascii=False), encoding="utf-8"
    )
    assert read_captions(file) == {"a": "raw \u2028 separator"}


def test_every_wrong_line_is_listed_with_its_number(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text(
        lines(
            {"file_name": "a.png", "text": "good"},
            "{not json",
            ["a.png", "text"],
            {"file_name": "b.png", "caption": "wrong key"},
            {"file_name": 3, "text": "t"},
            {"file_name": "b.png", "text": None},
            {"file_name": "./a.png", "text": "again"},
        )
    )
    with pytest.raises(ValueError) as error:
        read_captions(file)
    found = str(error.value).splitlines()
    assert len(found) == 6
    for number, words in ((2, "is not JSON"), (3, "is a list"), (4, "has no 'text'"), (5, "file_name is 3")):
        assert any(f"line {number}: {words}" in line for line in found)
    assert "line 6: text is None" in found[4]
    assert "line 7: 'a.png' has a line already, line 1" in found[5]

    file.write_text("x\n" * 30)
    with pytest.raises(ValueError, match="and 10 more lines") as error:
        read_captions(file)
    assert len(str(error.value).splitlines()) == 21


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_captions(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"file_name": "a", "text": "caf\xe9"}')
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_captions(tmp_path / "latin.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="has no line"):
        read_captions(tmp_path / "empty.jsonl")


def test_captions_of_names_that_are_not_there_are_listed():
    assert captions_of(NAMES, {"b/2.png": "two"}, "x") == ("", "", "two", "")
    strange = {f"c/{i}.png": "t" for i in range(12)} | {"a/0.png": "zero"}
    with pytest.raises(ValueError, match="12 of 13 names are not in the data") as error:
        captions_of(NAMES, strange, "x")
    found = str(error.value).splitlines()
    assert len(found) == 11
    assert "did you mean 'a/0.png'" in found[1]


def test_folders_and_archives_find_their_metadata(tree, tmp_path):
    content = lines({"file_name": "a/1.png", "text": "one"}, {"file_name": "b/3.png", "text": "three"})
    assert find_metadata(tree) is None
    assert DATASETS["folder"](path=str(tree)).captions is None
    (tree / "metadata.jsonl").write_text(content)
    expected = ("", "one", "", "three")
    out = DATASETS["folder"](path=str(tree))
    assert out.captions == expected
    assert out.names == NAMES
    assert DATASETS["folder"](path=str(tree), limit=2).captions == ("", "")
    assert DATASETS["folder"](path=str(tree), limit=3).captions == ("", "one", "")
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        for name in (*NAMES, "metadata.jsonl"):
            archive.write(tree / name, f"train/{name}")
    zipped = DATASETS["folder"](path=str(tmp_path / "t.zip" / "train"))
    assert zipped.captions == expected
    assert zipped.labels.tolist() == [0, 0, 1, 1]
    inside = str(tmp_path / "t.zip" / "train" / "metadata.jsonl")
    assert DATASETS["folder"](path=str(tree), captions=inside).captions == expected


def test_metadata_without_texts_is_no_caption_file(tree):
    (tree / "metadata.jsonl").write_text(lines({"file_name": "a/1.png", "label": 1}, "no json", {"file_name": "zzz"}))
    assert not has_texts(tree / "metadata.jsonl")
    assert DATASETS["folder"](path=str(tree)).captions is None
    with pytest.raises(ValueError, match="line 1: has no 'text'"):
        DATASETS["folder"](path=str(tree), captions=str(tree / "metadata.jsonl"))


def test_a_forget_manifest_names_the_captions(tree):
    section = {"name": "folder", "path": str(tree), "held_out_fraction": 0, "forget": {"indices": (1,)}}
    assert "caption" not in forget_manifest(open_split(section, seed=0))["items"][0]
    captioned = open_split({**section, "caption": "a picture"}, seed=0)
    assert forget_manifest(captioned)["items"][0]["caption"] == "a picture"
