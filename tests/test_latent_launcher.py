"""Unlearning of latent models and of models of text: what is refused, what a batch holds, and whole runs."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import signal
import socket
import time

import numpy as np
import pytest

from jaxunlearn.io import diffusers
from jaxunlearn.io.batches import batch_indices
from jaxunlearn.io.forget import open_split
from jaxunlearn.io.latent_cache import normal_rows
from jaxunlearn.io.workdir import Workdir
from tests.launching import run, start
from tests.tiny_pipeline import HIDDEN, TOKENS, make_pictures, make_tiny_pipeline
from train import data_summary, examples, stages
from train.configs import sd14

CONFIG = "--config=train/configs/sd14.py:smoke"
ONE_LEVEL = {
    "block_out_channels": [8],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "mid_block_type": None,
}
# XLA need not polish a program for three steps.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pipelines ``sd`` (one level) and ``ldm`` (no text), pictures with captions, and the names of the forget set."""
    root = tmp_path_factory.mktemp("latent")
    make_tiny_pipeline(root / "sd", unet=ONE_LEVEL)
    make_tiny_pipeline(root / "ldm", text=False)
    make_pictures(root / "pictures")
    make_pictures(root / "bare", texts={})
    (root / "forget.txt").write_text("0000.png\n0001.png\n0002.png\n")
    return root


def settings(folder, pipeline: str | None = "sd", pictures: str = "pictures", **changes):
    """The configuration of a small run."""
    config = sd14.get_config("smoke")
    config.base.path = None if pipeline is None else str(folder / pipeline)
    config.data.path = str(folder / pictures)
    config.data.forget.files = str(folder / "forget.txt")
    config.data.size = 16
    for key, value in changes.items():
        node = config
        *parents, leaf = key.split("__")
        for part in parents:
            node = node[part]
        node[leaf] = value
    return config


@pytest.fixture(scope="module")
def models(folder):
    return {name: diffusers.load(folder / name) for name in ("sd", "ldm")}


def split_of(config):
    return open_split(config.data.to_dict(), config.seed)


def problems(config, model) -> list[str]:
    return data_summary.split_problems(config, split_of(config), model)


# Refusals


def test_mixtures_need_one_text(folder, models):
    (line,) = problems(settings(folder), models["sd"])
    for words in (
        "'siss'",
        "'a picture of noise', 'a red square', 2 in all",
        "unlearn.prompt",
        "siss_no_is, erasediff",
    ):
        assert words in line
    (line,) = problems(settings(folder, unlearn__method="bernoulli"), models["sd"])
    assert "'bernoulli'" in line
    assert problems(settings(folder, unlearn__prompt="a square"), models["sd"]) == []
    for method in ("siss_no_is", "erasediff", "naive", "neggrad"):
        assert problems(settings(folder, unlearn__method=method, unlearn__combine__name=""), models["sd"]) == []
    assert problems(settings(folder, pictures="bare", data__caption="a picture"), models["sd"]) == []


def test_a_model_of_text_needs_texts(folder, models):
    (line,) = problems(settings(folder, pictures="bare"), models["sd"])
    for words in ("no image has a caption", "metadata.jsonl", "file_name and text", "data.caption", "or a prompt"):
        assert words in line
    config = settings(folder, pictures="bare", unlearn__prompt="a square", retrain__enabled=True)
    (line,) = problems(config, models["sd"])
    assert line.startswith("config.retrain.enabled = True")
    absent = dataclasses.replace(models["sd"], text_encoder=None, tokenizer=None)
    (line,) = problems(settings(folder, unlearn__prompt="a square"), absent)
    assert "no text_encoder/ and no tokenizer/" in line


def test_texts_for_a_model_without_text(folder, models):
    config = settings(folder, "ldm")
    assert problems(config, models["ldm"]) == []
    lines = data_summary.model_lines(config, Workdir(folder / "w"), split_of(config), models["ldm"])
    unused = "captions: the model takes no text, so they are not used"
    assert [line for line in lines if "captions" in line] == [unused]
    assert data_summary.model_lines(config, Workdir(folder / "w"), split_of(config), None) == [unused]
    (line,) = problems(settings(folder, "ldm", unlearn__prompt="a square"), models["ldm"])
    assert line.startswith("config.unlearn.prompt = 'a square': the model takes no text")


def test_the_summary_tells_what_happens_to_the_texts(folder, models):
    config = settings(folder, unlearn__prompt="a red square of more than twenty-two letters", latents__sample=False)
    config.latents.cache = "somewhere"
    lines = data_summary.model_lines(config, Workdir(folder / "w"), split_of(config), models["sd"])
    assert lines == [
        "latents: 8x8x4, their means, kept in somewhere",
        "captions: 2 different",
        "unlearning under one prompt: 'a red square of more than twenty-two letters'",
        f"warning: 1 of 3 texts have more than {TOKENS} tokens and are cut, for example {config.unlearn.prompt!r}",
    ]
    texts = folder / "some.jsonl"
    texts.write_text(json.dumps({"file_name": "0000.png", "text": "a square"}) + "\n")
    config = settings(folder, pictures="bare", data__captions=str(texts))
    lines = data_summary.model_lines(config, Workdir(folder / "w"), split_of(config), models["sd"])
    assert "captions: 1 different; 10 images have none" in lines


def test_images_must_fit_the_autoencoder_and_the_unet(folder, models):
    (line,) = problems(settings(folder, "ldm", data__size=18), models["ldm"])
    assert "images of 18x18 do not fit; both must be multiples of 4" in line
    (line,) = problems(settings(folder, "ldm", data__channels=1), models["ldm"])
    assert "in_channels = 3" in line
    assert "config.data.channels=3" in line


def test_retraining_takes_the_form_of_the_users_model(folder, models):
    assert problems(settings(folder, "ldm", retrain__enabled=True), models["ldm"]) == []
    pixel = diffusers.load(folder / "ldm", companions=False)
    config = settings(folder, retrain__enabled=True, data__size=8)
    assert not [line for line in problems(config, pixel) if "config.model" in line]
    fresh = stages.untrained_model(config, pixel, seed=1)
    assert (fresh.config, fresh.source, fresh.schedule) == (pixel.config, pixel.source, pixel.schedule)
    assert fresh.params["conv_in"]["kernel"].tolist() != pixel.params["conv_in"]["kernel"].tolist()


def test_a_refusal_writes_nothing(folder, tmp_path):
    done = run("train.main", CONFIG, *arguments(folder, "sd"), f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "config.unlearn.prompt" in line
    assert list(tmp_path.iterdir()) == []


# Batches


def encoded(config, model, tmp_path, stage="unlearn"):
    poll = lambda: None  # noqa: E731
    return examples.encoded_examples(config, Workdir(tmp_path), split_of(config), model, stage, poll)


@pytest.fixture(scope="module")
def own_captions(folder, models, tmp_path_factory):
    """Examples of the stage with each image's own caption."""
    config = settings(folder, unlearn__method="siss_no_is")
    return config, encoded(config, models["sd"], tmp_path_factory.mktemp("run"))


def test_rows_are_drawn_latents_and_their_texts(own_captions, models):
    config, made = own_captions
    split, model = made.split, models["sd"]
    mean, std = model.latent_space().encode(split.images)
    batch = examples.unlearning_rows(made, seed=5, batch_size=4)(3)
    forget = split.forget[batch_indices(5, "forget", 3, len(split.forget), 4)]
    noise = normal_rows(5, "latents/forget", 3, range(4), made.shape)
    np.testing.assert_allclose(batch.forget.x0, mean[forget] + std[forget] * noise, rtol=1e-5, atol=1e-5)
    embedded = model.text().embed(["a red square", "a picture of noise"])
    np.testing.assert_allclose(batch.forget.cond, embedded[:1].repeat(4, 0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(batch.keep.cond, embedded[1:].repeat(4, 0), rtol=1e-5, atol=1e-5)
    assert batch.keep.cond.shape == (4, TOKENS, HIDDEN)
    assert batch.keep.x0.shape == (4, 8, 8, 4)
    assert batch.keep.x0.dtype == batch.keep.cond.dtype == np.float32
    again = examples.unlearning_rows(made, seed=5, batch_size=4)(3)
    np.testing.assert_array_equal(again.keep.x0, batch.keep.x0)
    other = examples.unlearning_rows(made, seed=5, batch_size=4)(4)
    assert (other.keep.x0 != batch.keep.x0).all()


def test_two_processes_take_the_rows_of_one(own_captions, monkeypatch):
    _, made = own_captions
    rows = examples.unlearning_rows(made, seed=0, batch_size=4)
    whole = rows(2)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    parts = []
    for process in range(2):
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        parts.append(rows(2))
    for name in ("keep", "forget"):
        for field in ("x0", "cond"):
            joined = np.concatenate([getattr(getattr(part, name), field) for part in parts])
            np.testing.assert_array_equal(joined, getattr(getattr(whole, name), field))


def test_one_prompt_and_means(folder, models, tmp_path, own_captions):
    config = settings(folder, unlearn__prompt="a square", latents__sample=False)
    config.latents.cache = str(tmp_path / "shared")
    made = encoded(config, models["sd"], tmp_path)
    batch = examples.unlearning_rows(made, seed=0, batch_size=4)(0)
    np.testing.assert_array_equal(batch.keep.cond, batch.forget.cond)
    np.testing.assert_array_equal(batch.keep.cond, made.condition(["a square"] * 4))
    keep = made.split.keep[batch_indices(0, "keep", 0, len(made.split.keep), 4)]
    np.testing.assert_array_equal(batch.keep.x0, made.latents.mean[made.latents.row[keep]])
    assert {path.suffix for path in (tmp_path / "shared").iterdir()} == {".safetensors", ".json"}
    assert not (tmp_path / "cache").exists()
    # Retraining takes each image's own caption, whatever unlearning takes.
    texts = examples.captions_of_stage(config, made.split, "retrain")
    assert [texts[i] for i in made.split.forget] == ["a red square"] * 3
    assert [texts[i] for i in made.split.held_out] == [""] * len(made.split.held_out)


def test_stand_ins_have_the_shapes_of_the_encoded(own_captions, models):
    config, made = own_captions
    real = examples.unlearning_rows(made, seed=0, batch_size=2)(0)
    stand_in = examples.unlearning_rows(
        examples.abstract_examples(config, made.split, models["sd"]), seed=0, batch_size=2
    )(0)
    for name in ("keep", "forget"):
        for field in ("x0", "cond"):
            a, b = (getattr(getattr(batch, name), field) for batch in (real, stand_in))
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_pixel_models_see_bytes_and_no_condition():
    config = settings(pathlib.Path("nowhere"), None)
    config.data.update({"name": "digits", "path": None, "size": None, "channels": None, "caption": "a digit"})
    config.data.forget.update({"files": None, "indices": (0,)})
    made = examples.Examples(split_of(config))
    batch = examples.training_rows(made, made.split.train, seed=0, stage="base", batch_size=3)(0)
    assert batch.keep.x0.dtype == np.uint8
    assert batch.keep.cond is None
    assert made.shape == (8, 8, 1)


def test_the_texts_of_a_grid(folder):
    config = settings(folder, log__sample_count=5)
    split = split_of(config)
    assert examples.grid_texts(config, split) == ["a red square"] * 3 + ["a picture of noise"] * 2
    config.unlearn.prompt = "a square"
    assert examples.grid_texts(config, split) == ["a square"] * 3 + ["a picture of noise"] * 2
    bare = split_of(settings(folder, pictures="bare"))
    assert examples.grid_texts(config, bare) == ["a square"] * 5
    assert examples.texts_of_stage(config, bare, "unlearn") == ["", "a square"]


def test_retraining_starts_from_the_pipeline_with_a_new_unet(folder, models, capsys):
    config = settings(folder)
    fresh = stages.untrained_model(config, models["sd"], seed=1)
    assert "newly initialised UNet" in capsys.readouterr().out
    assert fresh.vae is models["sd"].vae
    assert fresh.source is models["sd"].source
    old = models["sd"].params["conv_in"]["kernel"]
    assert fresh.params["conv_in"]["kernel"].shape == old.shape


# Whole runs


def arguments(folder, pipeline: str, *more: str) -> tuple[str, ...]:
    return (
        f"--config.base.path={folder / pipeline}",
        f"--config.data.path={folder / 'pictures'}",
        f"--config.data.forget.files={folder / 'forget.txt'}",
        "--config.data.size=16",
        "--config.log.tensorboard=False",
        *more,
    )


def prompted(folder, workdir, *more: str) -> tuple[str, ...]:
    given = ("--config.unlearn.prompt=a square", "--config.compute.remat=False", f"--workdir={workdir}", *more)
    return (CONFIG, *arguments(folder, "sd", *given))


def unet_of(workdir, name: str = "unlearned") -> bytes:
    return (workdir / "models" / name / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def unbroken(folder, tmp_path_factory):
    """Three steps of SISS on the text pipeline, undisturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    done = run("train.main", *prompted(folder, workdir, "--mode=unlearn"), **QUICK)
    assert done.returncode == 0, done.stderr
    return workdir, done


@pytest.mark.slow
def test_a_text_pipeline_is_unlearned(folder, unbroken):
    workdir, done = unbroken
    assert done.stderr == ""
    for words in (
        "latents: 8x8x4, drawn anew each time, kept in",
        "captions: 2 different",
        "unlearning under one prompt: 'a square'",
        "latents: 12 images encoded in",
        "texts: 3 different texts encoded in",
        "unlearn 3/3",
    ):
        assert words in done.stdout, done.stdout
    assert (workdir / "samples" / "unlearn_000003.png").is_file()
    written, source = workdir / "models" / "unlearned", folder / "sd"
    for path in source.rglob("*"):
        if path.is_file() and path.parent.name != "unet":
            assert (written / path.relative_to(source)).read_bytes() == path.read_bytes(), path
    assert unet_of(workdir) != (source / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    items = json.loads((workdir / "forget_manifest.json").read_text())["items"]
    assert [item["caption"] for item in items] == ["a red square"] * 3


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bits_and_encodes_nothing_again(folder, unbroken, tmp_path):
    workdir = tmp_path / "run"
    command = prompted(folder, workdir, "--mode=unlearn", f"--config.latents.cache={unbroken[0] / 'cache'}")
    process = start("train.main", *command, **QUICK)
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = run("train.main", *command, **QUICK)
    assert done.returncode == 0, done.stderr
    for words in ("latents: 12 images from the cache", "texts: 3 different texts from the cache"):
        assert words in done.stdout
    assert not (workdir / "cache").exists()
    assert unet_of(workdir) == unet_of(unbroken[0])
    again = run("train.main", *command, **QUICK)
    assert again.returncode == 0, again.stderr
    assert "unlearn: done before" in again.stdout


@pytest.mark.slow
def test_a_dry_run_encodes_and_writes_nothing(folder, tmp_path):
    done = run("train.main", *prompted(folder, tmp_path / "run", "--dry_run"), **QUICK)
    assert done.returncode == 0, done.stderr
    for words in ("latents: 8x8x4", "step compiled", "nothing was written"):
        assert words in done.stdout
    assert "encoded in" not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_each_image_has_its_own_text_in_low_precision(folder, tmp_path):
    more = ("--config.unlearn.method=siss_no_is", "--config.compute.dtype=bfloat16", f"--workdir={tmp_path / 'run'}")
    done = run("train.main", CONFIG, *arguments(folder, "sd", "--mode=unlearn", *more), **QUICK)
    assert done.returncode == 0, done.stderr
    assert "unlearning under one prompt" not in done.stdout
    assert diffusers.load(tmp_path / "run" / "models" / "unlearned").params["conv_in"]["kernel"].dtype == np.float32


@pytest.mark.slow
def test_a_latent_model_without_text_is_unlearned(folder, tmp_path):
    done = run(
        "train.main", CONFIG, *arguments(folder, "ldm", "--mode=unlearn", f"--workdir={tmp_path / 'run'}"), **QUICK
    )
    assert done.returncode == 0, done.stderr
    assert "captions: the model takes no text" in done.stdout
    assert "texts:" not in done.stdout
    assert unet_of(tmp_path / "run") != (folder / "ldm" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.mark.slow
def test_two_processes_share_a_cache_and_equal_one_with_two_devices(folder, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    two_devices = {**QUICK, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    alone = run("train.main", *prompted(folder, tmp_path / "one", "--mode=unlearn"), **two_devices)
    assert alone.returncode == 0, alone.stderr
    together = ("--mode=unlearn", f"--coordinator_address=localhost:{port}", "--num_processes=2")
    processes = [
        start("train.main", *prompted(folder, tmp_path / "two", *together, f"--process_id={i}"), **QUICK)
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=280) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "latents: 12 images encoded in" in outputs[0][0]
    assert "latents: 12 images from the cache" in outputs[1][0]
    assert unet_of(tmp_path / "one") == unet_of(tmp_path / "two")


@pytest.mark.slow
def test_a_whole_run_of_a_text_pipeline(folder, tmp_path):
    """All stages, with retraining: evaluation, report and export of the whole pipeline."""
    workdir = tmp_path / "run"
    done = run("train.main", *prompted(folder, workdir, "--config.retrain.enabled=True"), timeout=900, **QUICK)
    assert done.returncode == 0, done.stderr
    assert "newly initialised UNet" in done.stdout
    for name in ("DONE", "report.html", "export/model_index.json", "export/tokenizer/vocab.json", "export/README.md"):
        assert (workdir / name).is_file(), name
    exported = (workdir / "export" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert exported == unet_of(workdir)
    assert unet_of(workdir, "retrained") != exported
