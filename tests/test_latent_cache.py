"""Encoded images and texts: what is stored, when it is found again, and the noise of drawn latents."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from jaxunlearn.io.duplicates import pixel_digests
from jaxunlearn.io.latent_cache import LatentCache, Latents, normal_rows


@dataclasses.dataclass(frozen=True)
class Config:
    scaling: float = 0.5

    def to_dict(self):
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Component:
    config: Config = Config()
    sha256: str = "weights"


class Model:
    """A model whose autoencoder averages pairs of pixels and whose text encoder counts letters; both count their work."""

    def __init__(self, vae=Component(), text_encoder=Component(), tokens=4):
        self.vae, self.text_encoder, self.tokens = vae, text_encoder, tokens
        self.encoded, self.embedded = 0, 0

    def latent_space(self, batch_size):
        return self

    def text(self, batch_size):
        return self

    def latent_shape(self, shape):
        return shape[0] // 2, shape[1] // 2, 2

    def encode(self, images):
        self.encoded += len(images)
        halves = images.reshape(len(images), images.shape[1] // 2, 2, images.shape[2] // 2, 2, -1).mean(axis=(2, 4, 5))
        mean = np.stack([halves, -halves], axis=-1).astype(np.float32)
        return mean, np.abs(mean) / 10 + 1

    def tokenizer(self, prompts):
        return np.array([[len(p), *p.encode()[: self.tokens - 1].ljust(self.tokens - 1)] for p in prompts], np.int32)

    def embed(self, prompts):
        self.embedded += len(prompts)
        return self.tokenizer(prompts).astype(np.float32)[..., None].repeat(3, axis=2)


@pytest.fixture
def images():
    x = np.random.default_rng(0).integers(0, 256, (20, 4, 6, 3), dtype=np.uint8)
    x[7] = x[3]
    x[19] = x[3]
    return x


def cache(folder, said=None, **settings):
    return LatentCache(folder, batch_size=2, say=(said if said is not None else []).append, **settings)


def test_images_are_encoded_once_and_equal_ones_share_a_row(tmp_path, images):
    model, said = Model(), []
    out = cache(tmp_path / "c", said).latents(model, images, pixel_digests(images))
    assert model.encoded == 18
    assert out.shape == (2, 3, 2)
    mean, std = model.encode(images)
    np.testing.assert_array_equal(out.mean[out.row], mean)
    np.testing.assert_array_equal(out.std[out.row], std)
    assert out.row[7] == out.row[3] == out.row[19]
    assert said == ["latents: 20 images encoded in 0 s"]
    (weights,), (words,) = (tmp_path / "c").glob("*.safetensors"), (tmp_path / "c").glob("*.json")
    assert words.stem == weights.stem
    described = json.loads(words.read_text())
    assert described["shape"] == [18, 4, 6, 3]
    assert described["arrays"]["std"] == [18, 2, 3, 2]


def test_a_second_run_finds_them_whatever_the_order_and_the_copies(tmp_path, images):
    first = cache(tmp_path).latents(Model(), images, pixel_digests(images))
    model, said = Model(), []
    other = np.concatenate([images[::-1], images[:5]])
    again = cache(tmp_path, said).latents(model, other, pixel_digests(other))
    assert model.encoded == 0
    assert said == ["latents: 25 images from the cache"]
    np.testing.assert_array_equal(again.mean[again.row[:20]], first.mean[first.row[::-1]])


@pytest.mark.parametrize(
    "change",
    [
        {"vae": Component(sha256="others")},
        {"vae": Component(config=Config(scaling=0.25))},
    ],
)
def test_another_autoencoder_or_other_images_are_encoded_again(tmp_path, images, change):
    cache(tmp_path).latents(Model(), images, pixel_digests(images))
    model = Model(**change)
    cache(tmp_path).latents(model, images, pixel_digests(images))
    assert model.encoded == 18
    model = Model()
    changed = images.copy()
    changed[0, 0, 0, 0] ^= 1
    cache(tmp_path).latents(model, changed, pixel_digests(changed))
    assert model.encoded == 18
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "emptied"])
def test_a_damaged_file_is_encoded_again(tmp_path, images, damage):
    first = cache(tmp_path).latents(Model(), images, pixel_digests(images))
    (path,) = tmp_path.glob("*.safetensors")
    good = path.read_bytes()
    if damage == "foreign":
        cache(tmp_path / "other").latents(Model(), images[:5], pixel_digests(images[:5]))
        bad = next((tmp_path / "other").glob("*.safetensors")).read_bytes()
    else:
        flipped = good[:-3] + bytes([good[-3] ^ 1]) + good[-2:]
        bad = {"cut": good[:-10], "flipped": flipped, "emptied": b""}[damage]
    path.write_bytes(bad)
    model, said = Model(), []
    again = cache(tmp_path, said).latents(model, images, pixel_digests(images))
    assert model.encoded == 18
    assert "is damaged" in said[0]
    assert "made again" in said[0]
    np.testing.assert_array_equal(again.mean, first.mean)
    np.testing.assert_array_equal(cache(tmp_path, said).latents(model, images, pixel_digests(images)).mean, first.mean)
    assert said[-1] == "latents: 20 images from the cache"


def test_only_the_writing_process_writes_and_a_failure_leaves_nothing(tmp_path, images, monkeypatch):
    model = Model()
    cache(tmp_path / "c", writes=False).latents(model, images, pixel_digests(images))
    assert model.encoded == 18
    assert not (tmp_path / "c").exists()

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        cache(tmp_path / "c").latents(model, images, pixel_digests(images))
    assert list((tmp_path / "c").iterdir()) == []


def test_encoding_can_be_stopped(tmp_path, images):
    def stop():
        raise InterruptedError("stopped")

    with pytest.raises(InterruptedError):
        cache(tmp_path / "c", poll=stop).latents(Model(), images, pixel_digests(images))
    assert not (tmp_path / "c").exists()


def test_texts_are_embedded_once(tmp_path):
    model, said = Model(), []
    out = cache(tmp_path, said).texts(model, ["b", "a", "b", ""])
    assert out.texts == ("", "a", "b")
    assert model.embedded == 3
    np.testing.assert_array_equal(out.embeddings[out.rows(["b", "", "b"])], Model().embed(["b", "", "b"]))
    assert cache(tmp_path, said).texts(model, ["", "b", "a"]).texts == out.texts
    assert model.embedded == 3
    assert said == ["texts: 3 different texts encoded in 0 s", "texts: 3 different texts from the cache"]
    with pytest.raises(KeyError):
        out.rows(["c"])


@pytest.mark.parametrize("change", [{"text_encoder": Component(sha256="others")}, {"tokens": 5}])
def test_another_text_encoder_or_tokenizer_embeds_again(tmp_path, change):
    cache(tmp_path).texts(Model(), ["a", "b"])
    model = Model(**change)
    cache(tmp_path).texts(model, ["a", "b"])
    assert model.embedded == 2


# The noise of drawn latents


def test_the_noise_is_standard_normal_and_a_function_of_its_arguments():
    noise = normal_rows(3, "keep", 5, range(40), (16, 16, 4))
    assert noise.dtype == np.float32
    count = noise.size
    assert abs(noise.mean()) < 4 / count**0.5
    assert abs(noise.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs((noise**4).mean() - 3) < 4 * (96 / count) ** 0.5
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 4 / 1024**0.5
    np.testing.assert_array_equal(normal_rows(3, "keep", 5, [7, 30], (16, 16, 4)), noise[[7, 30]])
    for other in ((4, "keep", 5), (3, "forget", 5), (3, "keep", 6)):
        assert (normal_rows(*other, [0], (16, 16, 4)) != noise[0]).mean() > 0.99


def test_drawn_latents_are_mean_plus_std_times_noise():
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=(3, 2, 2, 4)).astype(np.float32), rng.uniform(1, 2, (3, 2, 2, 4)).astype(np.float32)
    latents = Latents(mean, std, np.array([2, 0, 0, 1]))
    chosen, rows = np.array([1, 3, 1]), np.array([4, 5, 6])
    out = latents.draw(chosen, rows, seed=1, stream="s", step=9)
    noise = normal_rows(1, "s", 9, rows, (2, 2, 4))
    np.testing.assert_array_equal(out, mean[[0, 1, 0]] + std[[0, 1, 0]] * noise)
    assert out.dtype == np.float32
    assert (out[0] != out[2]).all()
