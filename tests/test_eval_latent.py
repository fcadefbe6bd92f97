"""The evaluation of latent models and of models of text: numbers by hand, prompts, what is refused, what is not told."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import prompts as eval_prompts
from eval.inputs import BadInput, read_inputs
from eval.main import main
from jaxunlearn import sampling
from jaxunlearn.guidance import classifier_free
from jaxunlearn.images import to_uint8, to_unit
from jaxunlearn.io import diffusers
from jaxunlearn.io.forget import open_split
from jaxunlearn.metrics import denoising_loss, injection
from jaxunlearn.models.parameters import init_params
from jaxunlearn.models.unet2d import UNet2DConfig
from tests.tiny_model import quick_compilation  # noqa: F401
from tests.tiny_pipeline import make_pictures, make_tiny_pipeline

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.slow]

COUNT, FORGET = 20, 3
SQUARE, NOISE, RARE = "a red square", "a picture of noise", "a rare caption"
TEXTS = {f"{i:04d}.png": SQUARE if i < FORGET else RARE if i == COUNT - 1 else NOISE for i in range(COUNT)}
SETTINGS = {
    "num_samples": 4,
    "batch_size": 4,
    "sampler": "pndm",
    "sampling_steps": 2,
    "injection_t": [1, 3],
    "injection_copies": 2,
    "loss_t": [20, 400],
    "loss_noises": 2,
    "loss_images": 4,
}
ONE_LEVEL = {"block_out_channels": [8], "mid_block_type": None}
TEXT_UNET = ONE_LEVEL | {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
PLAIN_UNET = ONE_LEVEL | {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
SAMPLING, INJECTION, LOSS = range(3)
"""Streams of the evaluation's key."""


def make_workdir(root, source, *, data=None, evaluation=None, texts=TEXTS, prompt=None):
    """Pictures of which the first three are to be forgotten, and a work directory whose unlearned model is another one."""
    make_pictures(root / "pictures", count=COUNT, forget=FORGET, texts=texts)
    (root / "forget.txt").write_text("".join(f"{i:04d}.png\n" for i in range(FORGET)))
    model = diffusers.load(source)
    rng = np.random.default_rng(0)
    other = jax.tree.map(lambda leaf: leaf + 0.05 * rng.standard_normal(leaf.shape).astype(np.float32), model.params)
    diffusers.save(root / "run" / "models" / "unlearned", model.with_params(other))
    paths = {"path": str(root / "pictures"), "forget": {"files": str(root / "forget.txt")}, "held_out_fraction": 0.2}
    config = {
        "seed": 0,
        "data": {"name": "folder", **paths, **(data or {})},
        "base": {"path": str(source)},
        "unlearn": {"method": "siss", "prompt": prompt},
        "eval": SETTINGS | (evaluation or {}),
    }
    (root / "run" / "config.json").write_text(json.dumps(config))
    return root / "run"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("text") / "source", unet=TEXT_UNET)


def evaluated(work, source):
    """What the tests look at, and the parts of the pipeline by which they compute the same."""
    config = json.loads((work / "config.json").read_text())
    model = diffusers.load(source)
    return types.SimpleNamespace(
        work=work,
        model=model,
        space=model.latent_space(),
        embed=model.text().embed if model.takes_text else None,
        split=open_split(config["data"], 0),
        report=json.loads((work / "unlearning_report.json").read_text()),
        arrays=np.load(work / "evaluation.npz"),
        page=(work / "report.html").read_text(),
    )


@pytest.fixture(scope="module")
def text(pipeline, tmp_path_factory, quick_compilation):  # noqa: F811
    """A finished evaluation of a Stable Diffusion pipeline, with a sampler that draws no noise."""
    work = make_workdir(tmp_path_factory.mktemp("text-run"), pipeline)
    assert main(["--workdir", str(work)]) == 0
    return evaluated(work, pipeline)


def entries(report, metric, column="before", **protocol):
    return [
        e
        for e in report["evaluation"][column]
        if e["metric"] == metric and all(e["protocol"].get(k) == v for k, v in protocol.items())
    ]


def by_hand(found, prompts, indices, guidance=7.5):
    """Samples of some indices and their prompts as pictures, with calls of the library alone."""
    model, starts = found.model, []
    for index in indices:
        pair = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), SAMPLING), index))
        starts.append(jax.random.normal(pair[0], (8, 8, 4)))
    config = model.sampler.with_kind("pndm")
    steps = sampling.trajectory(model.schedule, config, 2)
    predict, cond = model.predict_raw, None
    if prompts is not None:
        cond, uncond = found.embed(prompts), found.embed([""])
        predict = classifier_free(predict, guidance, uncond)
    sample = jax.jit(
        lambda params, x, cond: sampling.sample(predict, params, x, None, model.schedule, config, steps, cond=cond)
    )
    return to_uint8(found.space.decode(np.asarray(sample(model.params, jnp.stack(starts), cond)))).astype(int)


def test_samples_are_guided_and_decoded(text):
    stored = text.arrays["before/samples"]
    assert stored.shape == (4, 16, 16, 3)
    assert np.abs(stored[[0, 3]] - by_hand(text, [SQUARE] * 2, [0, 3])).max() <= 1
    assert np.abs(stored[[0, 3]] - by_hand(text, [SQUARE] * 2, [0, 3], guidance=1)).max() > 3
    keep = read_inputs(str(text.work), {}).prompts.keep
    stored = text.arrays["before/keep_prompts/samples"]
    assert np.abs(stored[1:3] - by_hand(text, keep[1:3], [1, 2])).max() <= 1


def test_keep_prompts_are_drawn_as_often_as_they_occur(text):
    split, own = text.split, [text.split.captions[i] for i in text.split.keep]
    order = np.random.default_rng([0, 3]).permutation(len(own))
    inputs = read_inputs(str(text.work), {})
    assert inputs.prompts.keep == tuple(own[order[i]] for i in range(4))
    assert inputs.prompts.forget == (SQUARE,) * 4
    many = eval_prompts.choose_prompts({}, {"num_samples": 3 * len(own), "prompts": None, "seed": 0}, split)[0]
    assert {t: many.keep.count(t) for t in set(own)} == {t: 3 * own.count(t) for t in set(own)}
    assert not np.array_equal(text.arrays["before/samples"], text.arrays["before/keep_prompts/samples"])


def test_loss_is_measured_on_latents_under_the_own_caption(text):
    model = text.model
    image = text.split.images[text.split.forget[1]][None]
    x0 = text.space.encode(image)[0]
    cond = text.embed([SQUARE])
    key = jax.random.fold_in(jax.random.key(0), LOSS)
    predict = jax.jit(model.predict)
    for place, t in enumerate(SETTINGS["loss_t"]):
        values = []
        for index in range(SETTINGS["loss_noises"]):
            eps = denoising_loss.noise(key, jnp.int32(t), jnp.int32(index), x0.shape[1:])
            x_t = model.schedule.alpha(t) * x0 + model.schedule.sigma(t) * eps
            values.append(np.mean((np.asarray(predict(model.params, x_t, jnp.array([t]), cond)) - eps) ** 2))
        assert text.arrays["before/loss_forget"][1, place] == pytest.approx(np.mean(values), rel=1e-4)
    entry = entries(text.report, "loss_forget", t=20)[0]
    assert entry["unit"] == "mean square per latent number"
    assert entry["protocol"]["space"].startswith("latents")
    assert "caption" in entry["protocol"]["condition"]


def test_injection_goes_through_latents_and_is_compared_with_both(text):
    model, place = text.model, 1
    t = SETTINGS["injection_t"][place]
    image = text.split.images[text.split.forget[2]][None]
    space = text.space
    a0 = space.encode(text.split.images[text.split.forget])[0]
    key = jax.random.fold_in(jax.random.key(0), INJECTION)
    x_t, keys = injection.noised(jnp.asarray(a0), model.schedule, key, t, 2)
    config = model.sampler.with_kind("ddpm")
    cond = text.embed([SQUARE] * 2)
    out = sampling.sample(
        model.predict, model.params, x_t[4:], keys[4:], model.schedule, config, np.arange(t, -1, -1), cond=cond
    )
    made = np.asarray(to_unit(space.decode(np.asarray(out))), np.float64)
    reconstruction = to_uint8(space.decode(a0[2:]))
    for name, target in (("injection_distance", image), ("injection_distance_to_reconstruction", reconstruction)):
        wanted = np.sqrt(np.mean((made - target / 255.0) ** 2, axis=(1, 2, 3)))
        np.testing.assert_allclose(text.arrays[f"before/{name}"][2, place], wanted, rtol=2e-4)
    pair = entries(text.report, "injection_distance", t=t)
    assert [e["protocol"]["compared_with"] for e in pair] == [
        "the forget image",
        "the autoencoder's reconstruction of it",
    ]
    assert entries(text.report, "injection_distance", "after", t=t)


def test_report_says_what_was_asked_and_tells_no_prompt(text):
    report, block = text.report, text.report["text"]
    key = (text.work / "commitment.key").read_bytes()
    assert block["guidance"] == 7.5
    assert block["forget_prompts"]["hmac"] == [hmac.new(key, b"text\0" + SQUARE.encode(), hashlib.sha256).hexdigest()]
    assert block["forget_prompts"]["texts"] is None
    assert block["keep_prompts"]["n"] == len(set(read_inputs(str(text.work), {}).prompts.keep))
    assert block["text_encoder_sha256"] == text.model.text_encoder.sha256
    for told in (SQUARE, hashlib.sha256(SQUARE.encode()).hexdigest()):
        assert told not in json.dumps(report) + text.page
    copies = entries(report, "copy_rate")
    assert [e["protocol"]["prompts"] for e in copies] == ["forget", "keep"]
    assert all(e["protocol"]["guidance"] == 7.5 and e["protocol"]["prompt_count"] >= 1 for e in copies)
    assert copies[0]["protocol"]["space"] == "latents, decoded"
    assert entries(report, "nearest_forget_min")[0]["protocol"]["prompts"] == "forget"
    assert entries(report, "fd_pixel")[0]["protocol"]["prompts"] == "keep"
    assert report["headline"].startswith("Copies of the 3 forget images were 0 % of samples of their prompt before")
    assert "Prompts of the keep images" in text.page
    assert "forget prompts" in text.page
    assert any("guidance 7.5" in line for line in report["limitations"])
    assert any("follow their prompts" in line for line in report["not_tested"])


def test_reconstructions_count_as_copies_where_the_images_cannot_be_reached(text):
    """A random autoencoder loses the picture: the report says so, and a latent copy would still be found."""
    from eval.prompts import Conditions
    from eval.references import choose, prepare
    from eval.sample_metrics import find_copies
    from eval.spaces import space_of

    report, model, split = text.report, text.model, text.split
    images = split.images[split.forget]
    decoded = text.space.decode(text.space.encode(images)[0])
    rms = np.sqrt(np.mean((np.asarray(to_unit(decoded)) - images / 255.0) ** 2, axis=(1, 2, 3)))
    np.testing.assert_allclose(report["autoencoder"]["rms_forget_images"], rms, rtol=1e-4, atol=2e-6)
    assert report["autoencoder"]["rms_mean"] == pytest.approx(rms.mean(), rel=1e-4)
    for metric in ("copy_rate", "injection_distance", "injection_copies"):
        assert entries(report, metric)[0]["protocol"]["autoencoder_rms"] == pytest.approx(rms.mean(), rel=1e-4)
    assert report["autoencoder"]["beyond_threshold"] == np.sum(rms >= report["calibration"]["threshold"]) > 0
    assert any("beyond the copy threshold" in line for line in report["limitations"])

    inputs = read_inputs(str(text.work), {})
    refs = prepare(
        split, choose(split, inputs.settings), inputs.config, inputs.settings, space_of(model, 8), Conditions(), print
    )
    again = to_uint8(decoded)
    others = to_uint8(text.space.decode(text.space.encode(split.images[split.keep])[0]))
    assert find_copies(again, refs).flags.all()
    assert find_copies(again, refs).strict.all()
    assert not find_copies(others, refs).flags.any()
    assert not find_copies(split.images[split.keep], refs).flags.any()


@pytest.fixture(scope="module")
def plain(tmp_path_factory, quick_compilation):  # noqa: F811
    """A finished evaluation of a latent model without text, whose forget images may be shown."""
    root = tmp_path_factory.mktemp("plain")
    source = make_tiny_pipeline(root / "source", text=False, unet=PLAIN_UNET)
    work = make_workdir(root, source, evaluation={"include_images": True})
    assert main(["--workdir", str(work)]) == 0
    return evaluated(work, source)


def test_latent_model_without_text(plain):
    stored = plain.arrays["before/samples"]
    assert np.abs(stored[[0, 2]] - by_hand(plain, None, [0, 2])).max() <= 1
    report = plain.report
    assert report["text"] is None
    assert report["autoencoder"]["latent_shape"] == [8, 8, 4]
    assert report["autoencoder"]["sha256"] == plain.model.vae.sha256
    copies = entries(report, "copy_rate")
    assert len(copies) == 1
    assert "prompts" not in copies[0]["protocol"]
    assert "condition" not in entries(report, "loss_keep")[0]["protocol"]
    assert "before/keep_prompts/samples" not in plain.arrays
    assert "through the autoencoder alone" in plain.page
    assert "per latent number" in plain.page
    assert report["settings"]["guidance"] == 7.5
    assert not any("guidance" in line for line in report["limitations"])


def problems_of(work, **overrides):
    with pytest.raises(BadInput) as caught:
        read_inputs(str(work), overrides)
    return caught.value.problems


def test_prompts_of_the_run_and_given_ones(pipeline, tmp_path):
    split = types.SimpleNamespace(captions=("x", "", "y", "x"), forget=np.array([0, 1]), keep=np.array([2, 3]))
    settings = {"num_samples": 5, "prompts": None, "seed": 0}
    choose = eval_prompts.choose_prompts
    run = {"unlearn": {"prompt": "p"}}
    found, problems = choose(run, settings, split)
    assert (found.forget, problems) == (("p", "x", "p", "x", "p"), [])
    assert set(found.keep) == {"y", "x"}
    few, _ = choose(run, settings | {"num_samples": 1}, split)
    assert (few.forget, few.forget_available) == (("p",), 2)
    found, _ = choose(run, settings | {"prompts": ("a", "b")}, split)
    assert (found.forget, found.keep) == (("a", "b", "a", "b", "a"), None)
    alike = types.SimpleNamespace(captions=("x",) * 4, forget=split.forget, keep=split.keep)
    assert choose({}, settings, alike)[0].keep is None  # one prompt: one set of samples
    bare = types.SimpleNamespace(captions=None, forget=split.forget, keep=split.keep)
    found, _ = choose(run, settings, bare)
    assert (found.forget, found.keep) == (("p",) * 5, None)
    assert eval_prompts.image_texts(run, split, [0, 1]) == ("x", "p")
    assert eval_prompts.image_texts({}, split, [0, 1]) == ("x", "")

    work = make_workdir(tmp_path, pipeline, texts={})
    (line,) = problems_of(work)
    assert "eval.prompts: None" in line
    assert "forget and keep images have no caption" in line
    assert "--eval.prompts=" in line
    assert read_inputs(str(work), {"prompts": "a cat"}).prompts.texts == ("a cat",)


def test_every_setting_is_checked(text):
    lines = problems_of(text.work, guidance="-1", prompts="('a', 'a')", sampler="dpm")
    assert len(lines) == 3
    for part in ("eval.guidance: -1", "eval.prompts: ('a', 'a')", "'pndm'"):
        assert sum(part in line for line in lines) == 1, (part, lines)
    assert read_inputs(str(text.work), {"guidance": "0"}).settings["guidance"] == 0


def test_prompts_for_models_without_text_and_pictures_that_do_not_fit(plain, tmp_path):
    (line,) = problems_of(plain.work, prompts="a cat")
    assert "take no text" in line
    work = tmp_path / "run"
    shutil.copytree(plain.work, work)
    config = json.loads((work / "config.json").read_text())
    config["data"] |= {"channels": 1, "size": 15}
    (work / "config.json").write_text(json.dumps(config))
    lines = problems_of(work)
    assert len(lines) == 4
    for column in ("before", "after"):
        assert f"{column} model: works with its autoencoder on 3 channels, the images have 1" in lines
        assert f"{column} model: needs with its autoencoder sides divisible by 2, not 15x15" in lines


def test_companions_must_be_those_of_the_first_model(text, tmp_path):
    work = tmp_path / "run"
    shutil.copytree(text.work, work)
    other = work / "models" / "unlearned"
    make_tiny_pipeline(tmp_path / "other", unet=TEXT_UNET, seed=1)
    for name in ("vae", "text_encoder"):
        shutil.rmtree(other / name)
        shutil.copytree(tmp_path / "other" / name, other / name)
    (other / "tokenizer" / "merges.txt").write_text("#version: 0.2\n\n")
    lines = problems_of(work)
    assert len(lines) == 3
    for part in ("another autoencoder (vae/)", "another text encoder (text_encoder/)", "another tokenizer"):
        assert sum(part in line for line in lines) == 1, (part, lines)

    shutil.rmtree(other / "vae")
    (line,) = problems_of(work)
    assert line.startswith("after model: ")
    assert "vae" in line

    shutil.rmtree(other)
    config = UNet2DConfig.from_dict({"sample_size": 16, **PLAIN_UNET, "norm_num_groups": 4, "layers_per_block": 1})
    diffusers.save(other, diffusers.new(config, init_params(config, 0), {}))
    lines = problems_of(work)
    for part in ("autoencoder (vae/): only the before model", "text encoder (text_encoder/): only the before model"):
        assert sum(part in line for line in lines) == 1, (part, lines)


def test_same_companion_in_other_files_is_accepted(text, tmp_path):
    """What counts are the parameters, not the bytes of the files."""
    from safetensors.numpy import load_file, save_file

    work = tmp_path / "run"
    shutil.copytree(text.work, work)
    file = work / "models" / "unlearned" / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "note": "written again"})
    assert set(read_inputs(str(work), {}).models) == {"before", "after"}
    assert read_inputs(str(work), {}).models["after"].vae is None  # read once, from the first model


def test_pipeline_without_tokenizer_is_refused(text, tmp_path):
    source, work = tmp_path / "source", tmp_path / "run"
    shutil.copytree(text.model.source.path, source)
    shutil.copytree(text.work, work)
    index = json.loads((source / "model_index.json").read_text())
    for name in ("text_encoder", "tokenizer"):
        del index[name]
        shutil.rmtree(source / name)
        shutil.rmtree(work / "models" / "unlearned" / name)
    (source / "model_index.json").write_text(json.dumps(index))
    (work / "models" / "unlearned" / "model_index.json").write_text(json.dumps(index))
    config = json.loads((work / "config.json").read_text())
    config["base"]["path"] = str(source)
    (work / "config.json").write_text(json.dumps(config))
    (line,) = problems_of(work)
    assert "no text_encoder/ and no tokenizer/" in line


def test_large_pictures_are_shown_reduced_and_measured_in_parts(text, monkeypatch):
    import base64
    import io

    from PIL import Image

    from eval import figures, parts

    def size(images):
        data = figures.grid(images, np.zeros(len(images), bool)).removeprefix("data:image/png;base64,")
        return Image.open(io.BytesIO(base64.b64decode(data))).size

    assert size(np.zeros((2, 300, 600, 3), np.uint8)) == (2 * (96 + 6), 48 + 6)
    assert size(np.zeros((2, 16, 16, 3), np.uint8)) == (2 * (64 + 6), 64 + 6)
    images = text.split.images
    monkeypatch.setattr(parts, "MAX_NUMBERS", 3 * images[0].size)
    assert [len(part) for part in parts.parts_of(images)] == [3] * 6 + [2]
    np.testing.assert_array_equal(parts.in_parts(lambda part: part + 1, images), images + 1)


def test_losses_take_conditions(text):
    model = text.model
    rows = denoising_loss.make_loss_rows(lambda params, x, t, cond: x * cond[:, None, None, None], model.schedule)
    x0 = np.ones((3, 2, 2, 1), np.float32)
    key = jax.random.key(0)
    alone = [
        denoising_loss.denoising_loss(rows, None, x0[:1], key, [5], 2, 2, cond=np.float32([c]))[0, 0] for c in (1, 2, 3)
    ]
    together = denoising_loss.denoising_loss(rows, None, x0, key, [5], 2, 4, cond=np.float32([1, 2, 3]))
    np.testing.assert_allclose(together[:, 0], alone, rtol=1e-6)
    with pytest.raises(ValueError, match="2 conditions for 3 images"):
        denoising_loss.denoising_loss(rows, None, x0, key, [5], cond=np.float32([1, 2]))


def test_prediction_of_the_image_does_not_go_with_pndm(text, monkeypatch):
    from eval import inputs

    load = inputs.load
    monkeypatch.setattr(inputs, "load", lambda *a, **k: dataclasses.replace(load(*a, **k), prediction_type="sample"))
    lines = problems_of(text.work)
    assert [line.split(";")[0] for line in lines] == ["eval.sampler: 'pndm'"] * 2
