"""Records of the forget and keep sets, keyed hashes, and atomic writing."""

import hashlib
import hmac
import json
import os
import stat
import threading

import numpy as np
import pytest
from PIL import Image

from jaxunlearn.io import manifest
from jaxunlearn.io.forget import open_split
from jaxunlearn.io.manifest import (
    commitment,
    forget_manifest,
    hmac_file,
    hmac_pixels,
    keep_manifest,
    load_or_create_key,
    merkle_root,
    read_key,
    write_json,
)

KEY = bytes(range(32))


@pytest.fixture
def split(tmp_path):
    """Six files, one planted twice, one exact copy and one near duplicate of a forgotten image."""
    images = np.random.default_rng(0).integers(0, 200, (8, 4, 4, 1), dtype=np.uint8)
    images[3] = images[0]
    images[4] = images[0] + 1
    for i, image in enumerate(images):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(image[..., 0]).save(tmp_path / "data" / f"{i}.png")
    section = {
        "name": "folder",
        "path": str(tmp_path / "data"),
        "plant": {"image": "sample:china", "copies": 2},
        "forget": {"planted": True, "indices": (0,)},
    }
    return open_split(section, seed=0)


def test_forget_manifest(split):
    out = forget_manifest(split)
    assert [item["name"] for item in out["items"]] == ["0.png", "3.png", "planted/0000", "planted/0001"]
    assert out["count"] == 4
    assert out["unique"] == 2
    assert out["exact_copies"] == ["3.png"]
    item = out["items"][0]
    with open(split.files[0].path, "rb") as file:
        assert item["sha256_file"] == hashlib.sha256(file.read()).hexdigest()
    pixels = hashlib.sha256(b"4,4,1\0" + split.images[0].tobytes()).hexdigest()
    assert item["sha256_pixels"] == pixels
    assert item["size"] == [4, 4, 1]
    assert item["dtype"] == "uint8"
    assert [item["copies"] for item in out["items"]] == [2, 2, 2, 2]
    assert out["items"][2]["sha256_file"] is None, "the sample picture is not a file of the user"
    near = out["near_duplicates"]
    assert near["found"] == 1
    assert near["action"] == "kept"
    assert near["searched"] == 6
    assert near["pairs"] == [{"name": "4.png", "index": 4, "nearest": "0.png", "rms": pytest.approx(1 / 127.5)}]
    json.dumps(out, allow_nan=False)


def test_archives_are_read_for_file_hashes(tmp_path):
    import zipfile

    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4), dtype=np.uint8)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / "x.png")
            archive.write(tmp_path / "x.png", f"{i}.png")
    section = {"name": "folder", "path": str(tmp_path / "a.zip"), "forget": {"indices": (4,)}}
    out = forget_manifest(open_split(section, seed=0))
    assert out["items"][0]["sha256_file"] == hashlib.sha256((tmp_path / "x.png").read_bytes()).hexdigest()


def test_keep_manifest(split):
    out = keep_manifest(split)
    assert out["count"] == len(split.keep)
    assert out["disjoint"] is True
    hashes = sorted(hashlib.sha256(b"4,4,1\0" + split.images[i].tobytes()).digest() for i in split.keep)
    assert out["hash_of_hashes"] == hashlib.sha256(b"".join(hashes)).hexdigest()
    assert out["held_out"]["count"] == 1
    assert out["held_out"]["fraction"] == 0.1
    json.dumps(out, allow_nan=False)


def test_keep_manifest_sees_an_overlap(split):
    import dataclasses

    overlapping = dataclasses.replace(split, keep=np.append(split.keep, 3))
    assert keep_manifest(overlapping)["disjoint"] is False


def test_keyed_hashes_follow_the_definition():
    image = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    assert hmac_file(KEY, b"abc") == hmac.new(KEY, b"file\0abc", hashlib.sha256).hexdigest()
    assert hmac_pixels(KEY, image) == hmac.new(KEY, b"pixels\0001,2,3\0" + bytes(range(6)), hashlib.sha256).hexdigest()
    assert hmac_pixels(KEY, image) != hmac_pixels(KEY, image.reshape(2, 1, 3)), "the shape is part of the message"
    with pytest.raises(ValueError, match="image is float32; allowed: uint8"):
        hmac_pixels(KEY, image.astype(np.float32))


def test_merkle_root_by_hand():
    leaves = [hashlib.sha256(bytes([i])).digest() for i in range(5)]

    def leaf(x):
        return hashlib.sha256(b"\0" + x).digest()

    def node(a, b):
        return hashlib.sha256(b"\1" + a + b).digest()

    h = [leaf(x) for x in leaves]
    names = [x.hex() for x in leaves]
    assert merkle_root([]) == hashlib.sha256(b"").hexdigest()
    assert merkle_root(names[:1]) == h[0].hex()
    assert merkle_root(names[:2]) == node(h[0], h[1]).hex()
    assert merkle_root(names[:3]) == node(node(h[0], h[1]), h[2]).hex()
    assert merkle_root(names) == node(node(node(h[0], h[1]), node(h[2], h[3])), h[4]).hex()
    assert merkle_root(names[::-1]) != merkle_root(names)


def test_commitment_links_to_nothing_without_the_key(split):
    out = commitment(split, KEY)
    assert out["n"] == 4
    assert out["commitment"] == "merkle-hmac-sha256"
    assert out["items"][0]["hmac_pixels"] == hmac_pixels(KEY, split.images[0])
    with open(split.files[0].path, "rb") as file:
        assert out["items"][0]["hmac_file"] == hmac_file(KEY, file.read())
    assert out["items"][2]["hmac_file"] is None
    assert out["root"] == merkle_root([item["hmac_pixels"] for item in out["items"]])
    assert set(out["near_duplicates"]) == {"method", "threshold", "found", "action", "searched"}
    text = json.dumps(out)
    plain = forget_manifest(split)
    for item in plain["items"]:
        assert item["sha256_pixels"] not in text
        assert item["name"] not in text
        assert item["sha256_file"] is None or item["sha256_file"] not in text
    other = commitment(split, KEY[::-1])
    assert other["root"] != out["root"]


def test_key_is_made_once_and_private(tmp_path):
    key = load_or_create_key(tmp_path / "run")
    path = tmp_path / "run" / manifest.KEY_FILE
    assert len(key) == 32
    assert path.read_bytes() == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_or_create_key(tmp_path / "run") == key
    assert load_or_create_key(tmp_path / "other") != key
    assert os.listdir(tmp_path / "run") == [manifest.KEY_FILE], "no temporary file stays"


def test_key_is_made_where_the_file_system_has_no_hard_links(tmp_path, monkeypatch):
    def no_link(*_, **__):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_link)
    key = load_or_create_key(tmp_path)
    assert (tmp_path / manifest.KEY_FILE).read_bytes() == key
    assert os.listdir(tmp_path) == [manifest.KEY_FILE]


def test_key_of_a_faster_process_wins(tmp_path):
    path = tmp_path / manifest.KEY_FILE
    path.touch(0o600)
    writing = threading.Timer(0.1, path.write_bytes, [KEY])
    writing.start()
    try:
        assert load_or_create_key(tmp_path) == KEY
    finally:
        writing.join()


def test_a_key_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        load_or_create_key(tmp_path)
    assert os.listdir(tmp_path) == []


def test_bad_keys(tmp_path, monkeypatch):
    path = tmp_path / manifest.KEY_FILE
    with pytest.raises(ValueError, match="does not exist"):
        read_key(path)
    path.touch(0o600)
    monkeypatch.setattr(manifest, "_KEY_WAIT_S", 0.02)
    with pytest.raises(ValueError, match="has 0 bytes; allowed: 32"):
        load_or_create_key(tmp_path)
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="has 5 bytes; allowed: 32"):
        load_or_create_key(tmp_path)
    path.write_bytes(KEY)
    path.chmod(0o644)
    with pytest.raises(ValueError, match="has mode 644; allowed: 600; fix: chmod 600"):
        read_key(path)


def test_write_json(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_json(path, {"x": np.float32(0.5), "n": np.int64(3), "v": np.arange(2), "p": tmp_path, "t": (1, None, True)})
    assert json.loads(path.read_text()) == {"x": 0.5, "n": 3, "v": [0, 1], "p": str(tmp_path), "t": [1, None, True]}
    assert os.listdir(path.parent) == ["b.json"]
    before = path.read_text()
    for bad, error in [
        ({"x": float("nan")}, ValueError),
        ({"x": np.float64("inf")}, ValueError),
        ({"x": {1}}, TypeError),
    ]:
        with pytest.raises(error, match="allowed: "):
            write_json(path, bad)
    assert path.read_text() == before


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"x": 2})
    assert json.loads(path.read_text()) == {"x": 1}
    assert os.listdir(tmp_path) == ["a.json"]
