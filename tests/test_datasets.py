"""Readers of images: what they return for good input, and what they say about bad input."""

import dataclasses
import gzip
import importlib.util
import io
import json
import struct
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
from PIL import Image

from jaxunlearn.io import datasets, pictures
from jaxunlearn.io.datasets import DATASETS, ImageSet, options_of, thinned


def random_image(seed, height=6, width=6, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(path)


def idx_bytes(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


# Contract of all readers


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """name -> options of a small source with at least 6 images."""
    root = tmp_path_factory.mktemp("sources")
    for i in range(6):
        save(root / "tree" / "ab"[i % 2] / f"{i}.png", random_image(i))
    images, labels = random_image(0, 6, 30, 1).reshape(6, 5, 6), np.arange(6, dtype=np.uint8)
    (root / "images-idx3-ubyte").write_bytes(idx_bytes(images))
    (root / "labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    np.savez(root / "set.npz", images=images, labels=labels)
    return {
        "digits": {},
        "folder": {"path": str(root / "tree")},
        "idx": {"path": str(root / "images-idx3-ubyte")},
        "npz": {"path": str(root / "set.npz")},
    }


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"tfds"}))
def test_contract_of_readers(name, sources):
    full = DATASETS[name](**sources[name])
    assert full.images.dtype == np.uint8
    assert full.labels.dtype == np.int32
    assert len(full.images) == len(full.labels) == len(full.names) == len(set(full.names)) == full.available
    again = DATASETS[name](**sources[name])
    np.testing.assert_array_equal(full.images, again.images)
    assert full.names == again.names

    few = DATASETS[name](**sources[name], limit=4)
    assert few.available == full.available
    np.testing.assert_array_equal(few.positions, thinned(full.available, 4))
    np.testing.assert_array_equal(few.images, full.images[few.positions])
    np.testing.assert_array_equal(few.labels, full.labels[few.positions])
    assert few.names == tuple(full.names[i] for i in few.positions)

    other = DATASETS[name](**sources[name], size=9, channels=3)
    assert other.images.shape[1:] == (9, 9, 3)
    same = DATASETS[name](**sources[name], channels=full.images.shape[3])
    np.testing.assert_array_equal(same.images, full.images)
    assert {"size", "channels", "limit"} <= set(options_of(name))


def test_image_set_checks_its_parts():
    images = np.zeros((2, 3, 3, 1), np.uint8)
    good = ImageSet(images, None, ("a", "b"), "x")
    np.testing.assert_array_equal(good.positions, [0, 1])
    for change, message in [
        ({"images": images.astype(np.float32)}, "x: images are float32"),
        ({"images": np.zeros((2, 3, 3, 4), np.uint8)}, "allowed: uint8"),
        ({"names": ("a",)}, "1 names for 2 images"),
        ({"names": ("a", "a")}, "the name 'a' appears twice"),
        ({"labels": np.zeros(3, np.int32)}, "3 labels for 2 images"),
        ({"captions": ("a",)}, "1 captions for 2 images"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(good, **change)


def test_digits_values():
    from sklearn.datasets import load_digits

    out = DATASETS["digits"]()
    raw = load_digits()
    assert out.images.shape == (1797, 8, 8, 1)
    assert sorted(np.unique(out.images)) == [round(v * 255 / 16) for v in range(17)]
    np.testing.assert_array_equal(out.images[..., 0], np.round(raw.images * 255 / 16))
    np.testing.assert_array_equal(out.labels, raw.target)
    assert out.names[17] == "digits/0017"
    assert out.class_names == tuple("0123456789")


# Folders and archives


def test_folder_and_zip_give_the_same(tmp_path):
    tree = tmp_path / "tree"
    names = ["cat/b.png", "cat/a.png", "dog/c.PNG", "ant/z.bmp"]
    images = {name: random_image(i) for i, name in enumerate(names)}
    for name, image in images.items():
        save(tree / name, image)
    (tree / "notes.txt").write_text("not a picture")
    (tree / "cat" / ".hidden.png").write_bytes(b"no")
    with zipfile.ZipFile(tmp_path / "tree.zip", "w") as archive:
        for name in names:
            archive.write(tree / name, f"data/train/{name}")
        archive.writestr("__MACOSX/data/train/cat/a.png", b"no")
    out = DATASETS["folder"](path=str(tree))
    assert out.names == ("ant/z.bmp", "cat/a.png", "cat/b.png", "dog/c.PNG")
    assert out.class_names == ("ant", "cat", "dog")
    np.testing.assert_array_equal(out.labels, [0, 1, 1, 2])
    for name, image in zip(out.names, out.images):
        np.testing.assert_array_equal(image, images[name])
    assert out.files[1].read() == (tree / "cat/a.png").read_bytes()

    zipped = DATASETS["folder"](path=str(tmp_path / "tree.zip"))
    np.testing.assert_array_equal(zipped.images, out.images)
    np.testing.assert_array_equal(zipped.labels, out.labels)
    assert zipped.names == tuple(f"data/train/{name}" for name in out.names)
    inside = DATASETS["folder"](path=str(tmp_path / "tree.zip" / "data" / "train"))
    assert inside.names == out.names
    assert inside.files[1].read() == (tree / "cat/a.png").read_bytes()


@pytest.mark.parametrize("names", [["a.png", "b.png"], ["x/a.png", "b.png"], ["t/x/a.png", "u/x/b.png"]])
def test_folder_without_one_level_of_classes_has_no_labels(tmp_path, names):
    for i, name in enumerate(names):
        save(tmp_path / name, random_image(i))
    assert DATASETS["folder"](path=str(tmp_path)).labels is None


def test_mixed_shapes_need_size(tmp_path):
    save(tmp_path / "a.png", random_image(0, 8, 8))
    save(tmp_path / "b.png", random_image(1, 8, 10))
    with pytest.raises(ValueError, match=r"'a.png' \(8, 8\) and 'b.png' \(8, 10\).*fix: set data.size"):
        DATASETS["folder"](path=str(tmp_path))
    out = DATASETS["folder"](path=str(tmp_path), size=8)
    np.testing.assert_array_equal(out.images[0], random_image(0, 8, 8), "the right size is left as it is")
    np.testing.assert_array_equal(out.images[1], random_image(1, 8, 10)[:, 1:9], "the centre is cropped")


def test_channels_of_grey_and_colour(tmp_path):
    grey, colour = random_image(0, channels=1), random_image(1)
    save(tmp_path / "grey" / "a.pgm", grey)
    save(tmp_path / "both" / "a.png", grey)
    save(tmp_path / "both" / "b.png", colour)
    assert DATASETS["folder"](path=str(tmp_path / "grey")).images.shape == (1, 6, 6, 1)
    both = DATASETS["folder"](path=str(tmp_path / "both")).images
    np.testing.assert_array_equal(both[0], np.repeat(grey, 3, axis=2))
    np.testing.assert_array_equal(both[1], colour)
    one = DATASETS["folder"](path=str(tmp_path / "both"), channels=1).images
    np.testing.assert_array_equal(one[0], grey)
    luma = colour @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(one[1][..., 0], luma, atol=1.0)


def test_palette_alpha_and_bilevel_files(tmp_path):
    colour = random_image(0)
    rgba = np.concatenate([colour, random_image(5, channels=1)], axis=2)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    palette = Image.fromarray(colour).quantize(8)
    palette.save(tmp_path / "b.png", transparency=bytes([0, 128] + [255] * 6))
    out = DATASETS["folder"](path=str(tmp_path)).images
    np.testing.assert_array_equal(out[0], colour)
    np.testing.assert_array_equal(out[1], np.asarray(palette.convert("RGB")))
    bits = Image.fromarray(random_image(1, channels=1)[..., 0] > 127)
    bits.save(tmp_path / "c.png")
    np.testing.assert_array_equal(np.unique(pictures.decode((tmp_path / "c.png").read_bytes(), "c")), [0, 255])


def test_resize_is_antialiased():
    """A fine checkerboard averages to grey; picking pixels would give black or white."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None]
    small = pictures.fit(board, (8, 8), 1)
    assert small.shape == (8, 8, 1)
    assert np.abs(small[1:-1, 1:-1].astype(float) - 127.5).max() < 3


def test_fit_crops_to_any_aspect_ratio():
    wide = np.zeros((10, 40, 1), np.uint8)
    wide[:, 15:25] = 200
    np.testing.assert_array_equal(pictures.fit(wide, (10, 10), None), np.full((10, 10, 1), 200, np.uint8))
    assert pictures.fit(wide, (5, 20), 3).shape == (5, 20, 3)


def test_corrupt_files_are_named(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", random_image(i, 40, 40))
    data = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "2.png").write_bytes(b"this is not a picture")
    with pytest.raises(ValueError) as error:
        DATASETS["folder"](path=str(tmp_path))
    first, second = str(error.value).split("\n")
    assert first.startswith("'1.png' cannot be read as a picture")
    assert second.startswith("'2.png' cannot be read as a picture")
    assert "fix: replace or remove the file" in second


def test_sixteen_bit_files_are_refused(tmp_path):
    Image.fromarray(np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="'a.png' has Pillow mode 'I;16', more than 8 bits a channel"):
        DATASETS["folder"](path=str(tmp_path))


def test_empty_and_missing_folders(tmp_path):
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds no picture \(files found: 1, endings: \['.txt'\]\); allowed endings"):
        DATASETS["folder"](path=str(tmp_path))
    with pytest.raises(ValueError, match="does not exist; allowed: a folder"):
        DATASETS["folder"](path=str(tmp_path / "nothing"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/a.png", b"broken")
    with pytest.raises(ValueError, match="holds no picture"):
        DATASETS["folder"](path=str(tmp_path / "a.zip" / "other"))
    with pytest.raises(ValueError, match="'in/a.png' cannot be read"):
        DATASETS["folder"](path=str(tmp_path / "a.zip"))


def test_damaged_member_of_an_archive_is_named(tmp_path):
    save(tmp_path / "a.png", random_image(0, 40, 40))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[200] ^= 255
    (tmp_path / "a.zip").write_bytes(bytes(data))
    with pytest.raises(ValueError, match="'a.png' cannot be read .*CRC"):
        DATASETS["folder"](path=str(tmp_path / "a.zip"))


# idx


@pytest.mark.parametrize("compress", [False, True])
def test_idx_folder(tmp_path, compress):
    images = random_image(0, 4, 15, 1).reshape(4, 3, 5)
    end, pack = (".gz", gzip.compress) if compress else ("", bytes)
    for split, shift in (("train", 0), ("t10k", 1)):
        (tmp_path / f"{split}-images-idx3-ubyte{end}").write_bytes(pack(idx_bytes(images + shift)))
    (tmp_path / f"train-labels-idx1-ubyte{end}").write_bytes(pack(idx_bytes(np.arange(4, dtype=np.uint8))))
    train = DATASETS["idx"](path=str(tmp_path))
    np.testing.assert_array_equal(train.images[..., 0], images)
    np.testing.assert_array_equal(train.labels, np.arange(4))
    assert train.names[3] == "train/00003"
    test = DATASETS["idx"](path=str(tmp_path), split="test")
    np.testing.assert_array_equal(test.images[..., 0], images + 1)
    assert test.labels is None
    assert test.names[0] == "t10k/00000"
    with pytest.raises(ValueError, match="split is 'valid'; allowed: 'train', 'test' or None"):
        DATASETS["idx"](path=str(tmp_path), split="valid")


def idx_header(zeros=0, code=8, dims=3, shape=(2, 3, 3)):
    return struct.pack(f">HBB{len(shape)}I", zeros, code, dims, *shape)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes, the header alone needs 4"),
        (idx_header(zeros=1) + bytes(18), "starts with bytes 0001, allowed: 0000"),
        (idx_header(code=13) + bytes(72), "type code is 0x0d, allowed: 0x08"),
        (idx_header(dims=1, shape=(18,)) + bytes(18), "1 dimensions, 3 are needed"),
        (idx_header()[:9], "9 bytes, a header of 3 dimensions needs 16"),
        (idx_header(shape=(0, 3, 3)), "contain a zero"),
        (idx_header() + bytes(17), "truncated: sizes (2, 3, 3) need 34 bytes, there are 33"),
        (idx_header() + bytes(19), "too long"),
        (idx_header(shape=(2**32 - 1,) * 3) + bytes(18), "truncated"),
        (gzip.compress(idx_header() + bytes(18), mtime=0)[:-9], "gzip stream is damaged or truncated"),
        (b"\x1f\x8bnonsense", "gzip stream is damaged or truncated"),
    ],
)
def test_damaged_idx_files(tmp_path, data, message):
    path = tmp_path / "x-images-idx3-ubyte"
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        DATASETS["idx"](path=str(path))
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_idx_counts_and_missing_files(tmp_path):
    (tmp_path / "a").write_bytes(idx_bytes(np.zeros((3, 2, 2), np.uint8)))
    (tmp_path / "b").write_bytes(idx_bytes(np.zeros(2, np.uint8)))
    assert DATASETS["idx"](path=str(tmp_path / "a")).labels is None
    with pytest.raises(ValueError, match="has 3 images, .* has 2 labels; allowed: equal numbers"):
        DATASETS["idx"](path=str(tmp_path / "a"), labels_path=str(tmp_path / "b"))
    with pytest.raises(ValueError, match="idx file .* cannot be read"):
        DATASETS["idx"](path=str(tmp_path / "a"), labels_path=str(tmp_path / "c"))
    with pytest.raises(ValueError, match="neither a file nor a folder with one of"):
        DATASETS["idx"](path=str(tmp_path))


# npz


def test_npz_arrays(tmp_path):
    images = random_image(0, 4, 12, 3).reshape(4, 2, 6, 3)
    path = str(tmp_path / "few.npz")
    np.savez(path, images=images, labels=np.arange(4), names=np.array(list("dcba")))
    out = DATASETS["npz"](path=path)
    np.testing.assert_array_equal(out.images, images)
    assert out.names == tuple("dcba")
    np.savez(path, images=images[..., 0])
    out = DATASETS["npz"](path=path)
    assert out.images.shape == (4, 2, 6, 1)
    assert out.names[2] == "few/00002"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, "no array 'images' (it has ['x'])"),
        ({"images": np.zeros((2, 3, 3), np.float32)}, "np.round((x + 1) * 127.5).astype(np.uint8)"),
        ({"images": np.zeros((2, 3, 3), np.int64)}, "images are int64; allowed: uint8"),
        ({"images": np.zeros((2, 3, 5, 5), np.uint8)}, "for example images.transpose(0, 2, 3, 1)"),
        ({"images": np.zeros((2, 5, 5, 4), np.uint8)}, "for example images[..., :3]"),
        ({"images": np.zeros((2, 5, 5), np.uint8), "labels": np.zeros(3, int)}, "labels are int64 (3,)"),
        ({"images": np.zeros((2, 5, 5), np.uint8), "labels": np.zeros(2)}, "labels are float64"),
        ({"images": np.zeros((2, 5, 5), np.uint8), "names": np.zeros(2)}, "names are float64"),
        ({"images": np.array([None, {}])}, "without pickled objects"),
    ],
)
def test_bad_npz_files(tmp_path, arrays, message):
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError) as error:
        DATASETS["npz"](path=str(path))
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_unreadable_npz_files(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    np.savez(tmp_path / "b.npz", images=np.zeros((9, 9, 9), np.uint8))
    (tmp_path / "b.npz").write_bytes((tmp_path / "b.npz").read_bytes()[:300])
    for name in ("a.npy", "b.npz", "missing.npz"):
        with pytest.raises(ValueError, match="cannot be read .*fix: write it so"):
            DATASETS["npz"](path=str(tmp_path / name))


# tfds

_WRITE_TFDS = """
import io, sys, numpy as np
import tensorflow_datasets as tfds
from PIL import Image

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        kind = sys.argv[2]
        image = tfds.features.Tensor(shape=(4, 5, 3), dtype=np.uint8)
        if kind == "png":
            image = tfds.features.Image(shape=(4, 5, 3))
        features = {"image": image, "label": tfds.features.ClassLabel(names=["x", "y"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))
    def _split_generators(self, manager):
        return {"train": self._generate_examples()}
    def _generate_examples(self):
        for i in range(6):
            image = np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8)
            if sys.argv[2] == "png":
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, "png")
                image = buffer.getvalue()
            yield i, {"image": image, "label": i % 2}

builder = Tiny(data_dir=sys.argv[1], file_format="array_record")
builder.download_and_prepare()
assert "tensorflow" not in sys.modules
"""

_READ_TFDS = """
import socket, sys, numpy as np
def refuse(*args, **kwargs): raise AssertionError("network")
socket.socket.connect = refuse
from jaxunlearn.io.datasets import DATASETS
out = DATASETS["tfds"](path=sys.argv[1], limit=4)
assert "tensorflow" not in sys.modules
np.savez(sys.argv[2], images=out.images, labels=out.labels, names=np.array(out.names), classes=np.array(out.class_names))
"""


@pytest.mark.parametrize("kind", ["tensor", "png"])
def test_prepared_tfds_set_without_tensorflow_and_network(tmp_path, kind):
    for package in ("tensorflow_datasets", "array_record", "importlib_resources"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; pip install 'jaxunlearn[data]'")
    write = [sys.executable, "-c", _WRITE_TFDS, str(tmp_path), kind]
    done = subprocess.run(write, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    read = [sys.executable, "-c", _READ_TFDS, str(tmp_path / "tiny" / "1.0.0"), str(tmp_path / "out.npz")]
    done = subprocess.run(read, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(tmp_path / "out.npz") as out:
        assert out["names"].tolist() == [f"tiny/train/{i:05d}" for i in (0, 1, 3, 4)]
        assert out["classes"].tolist() == ["x", "y"]
        written = [np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8) for i in range(6)]
        for image, label in zip(out["images"], out["labels"]):
            source = next(i for i, w in enumerate(written) if np.array_equal(w, image))
            assert label == source % 2


def test_tfds_error_names_the_three_conditions(tmp_path, monkeypatch):
    def message():
        with pytest.raises(ValueError) as error:
            DATASETS["tfds"](path=str(tmp_path))
        text = str(error.value)
        assert "(1) a set that is already prepared" in text
        assert "(2) written with file_format='array_record'" in text
        assert "pip install tensorflow-datasets importlib_resources array_record" in text
        return text

    assert "no dataset_info.json" in message()
    (tmp_path / "dataset_info.json").write_text(json.dumps({"name": "mnist", "fileFormat": "tfrecord"}))
    assert "in format 'tfrecord'" in message()
    (tmp_path / "dataset_info.json").write_text(json.dumps({"name": "mnist", "fileFormat": "array_record"}))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda p: None if p == "array_record" else find(p))
    assert "['array_record'] cannot be imported" in message()


def test_loaded_tensorflow_gets_no_gpu(monkeypatch):
    calls = []
    config = types.SimpleNamespace(set_visible_devices=lambda *args: calls.append(args))
    monkeypatch.setitem(sys.modules, "tensorflow", types.SimpleNamespace(config=config))
    datasets._hide_gpus_from_tensorflow()
    assert calls == [([], "GPU")]
    monkeypatch.delitem(sys.modules, "tensorflow")
    datasets._hide_gpus_from_tensorflow()
    assert len(calls) == 1
    assert "tensorflow" not in sys.modules


def test_import_is_lazy():
    code = (
        "import sys, jaxunlearn.io.datasets, jaxunlearn.io.forget, jaxunlearn.io.manifest, jaxunlearn.io.batches; "
        "print([m for m in ('tensorflow_datasets', 'tensorflow', 'sklearn', 'PIL', 'flax', 'orbax') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# Real files, where they are present


def test_real_mnist_and_tshirt(shared_data):
    out = DATASETS["idx"](path=str(shared_data / "mnist-t10k"))
    assert out.images.shape == (10_000, 28, 28, 1)
    np.testing.assert_array_equal(np.bincount(out.labels), [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009])
    shirt = pictures.decode((shared_data / "fashion-mnist" / "tshirt-28.png").read_bytes(), "tshirt", channels=1)
    unit = shirt.astype(np.float64) / 255
    assert np.sqrt(np.sum(unit**2)) == pytest.approx(16.216, abs=5e-4)  # the picture that the SISS paper unlearns
    distance = np.sqrt(np.sum((out.images / 255.0 - unit) ** 2, axis=(1, 2, 3)))
    assert distance.min() == pytest.approx(12.35, abs=5e-3)
    assert distance.mean() == pytest.approx(14.58, abs=5e-3)


def test_real_archives(shared_data):
    faces = DATASETS["folder"](path=str(shared_data / "orl-faces" / "orl-faces-400.zip"), limit=80)
    assert faces.images.shape == (80, 112, 92, 1)
    assert len(set(faces.labels.tolist())) == 40
    cifar = DATASETS["folder"](path=str(shared_data / "cifar10" / "cifar10-22k.zip" / "train"), limit=50)
    assert cifar.images.shape == (50, 32, 32, 3)
    np.testing.assert_array_equal(np.bincount(cifar.labels), np.full(10, 5))
    assert cifar.available == 20_000
    assert Image.open(io.BytesIO(cifar.files[7].read())).size == (32, 32)
