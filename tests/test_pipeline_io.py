"""Whole pipeline folders, Stable Diffusion's and those of unconditional latent models: read, refused, written back."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save

from jaxunlearn.io import diffusers as folders
from jaxunlearn.io.hashing import tree_sha256
from jaxunlearn.models.convert import to_diffusers
from jaxunlearn.models.parameters import init_params
from tests.tiny_pipeline import make_tiny_pipeline
from tests.torch_files import calls, torch_file

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
PICKLED = {UNET: UNET.replace("safetensors", "bin"), VAE: VAE.replace("safetensors", "bin")}
PICKLED[TEXT] = "text_encoder/pytorch_model.bin"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("made") / "m")


@pytest.fixture
def source(made, tmp_path):
    """A folder of one's own, with the parts that nothing here reads."""
    shutil.copytree(made, tmp_path / "m")
    edit(tmp_path / "m", "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    edit(tmp_path / "m", "model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"])
    put(tmp_path / "m", "safety_checker/config.json", b"{ }")
    put(tmp_path / "m", "safety_checker/pytorch_model.bin", b"\x80\x02 never opened")
    put(tmp_path / "m", "feature_extractor/preprocessor_config.json", b'{"crop_size": 224}')
    put(tmp_path / "m", "README.md", b"A card.")
    return tmp_path / "m"


def put(root, name, content):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)


def edit(root, name, **changes):
    content = json.loads((root / name).read_bytes()) | changes
    put(root, name, json.dumps(content).encode())


def contents(path):
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def convert(root, name, target, change=lambda tensors: tensors, write=save):
    """Replaces a weight file by another one with the same tensors, changed."""
    tensors = change(load_file(root / name))
    (root / name).unlink()
    put(root, target, write(tensors))


def cast(dtype):
    return lambda tensors: {name: values.astype(dtype) for name, values in tensors.items()}


def changed(params, by=0.01):
    return jax.tree.map(lambda leaf: leaf + np.float32(by), params)


def problems(root, **kwargs):
    with pytest.raises(ValueError) as error:
        folders.load(root, **kwargs)
    head, *lines = str(error.value).splitlines()
    assert f"{root} cannot be loaded ({len(lines)} problem" in head
    return lines


def test_what_a_pipeline_holds(source):
    model = folders.load(source)
    assert (model.is_latent, model.takes_text, model.sampler.kind) == (True, True, "pndm")
    assert model.notes == ()
    assert type(model.config).__name__ == "UNet2DConditionConfig"
    assert (model.vae.name, model.vae.config.latent_channels) == ("vae", 4)
    assert model.text_encoder.config.hidden_size == model.config.cross_attention_dim
    assert model.vae.sha256 == tree_sha256(model.vae.params)
    for part in (model, model.vae, model.text_encoder):
        assert {leaf.dtype for leaf in jax.tree.leaves(part.params)} == {np.dtype(np.float32)}
    parts = ("feature_extractor", "safety_checker", "text_encoder", "tokenizer", "vae")
    assert model.source.parts == parts
    assert model.num_params == sum(values.size for values in load_file(source / UNET).values())


def quick_jit(function):
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.slow
def test_the_parts_work_together(made):
    """From a text and a picture to predicted noise, in both compute dtypes."""
    model = folders.load(made)
    assert type(model.latent_space(2)).__name__ == "LatentSpace"
    texts = model.text().embed(["a picture", ""])
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    args = (model.params, latents, np.array([10, 900]), texts)
    eps = np.asarray(quick_jit(model.predict)(*args))
    assert eps.shape == latents.shape
    out = np.asarray(quick_jit(model.with_compute("bfloat16").predict)(*args))
    assert out.dtype == np.float32
    assert 1e-4 < np.abs(out - eps).max() < 0.1 * np.abs(eps).max()


def test_a_round_trip_is_byte_identical(source, tmp_path):
    before = contents(source)
    assert folders.save(tmp_path / "out", folders.load(source)) == []
    assert contents(tmp_path / "out") == before == contents(source)
    without = folders.load(source, companions=False)
    assert (without.vae, without.text_encoder, without.tokenizer) == (None, None, None)
    assert without.takes_text
    assert folders.save(tmp_path / "without", without) == []
    assert contents(tmp_path / "without") == before
    for method in ("latent_space", "text"):
        with pytest.raises(ValueError, match="give a pipeline folder that has"):
            getattr(without, method)()


def test_only_the_weights_of_the_unet_change(source, tmp_path):
    model = folders.load(source)
    new = model.with_params(changed(model.params))
    assert (new.vae, new.text_encoder, new.tokenizer) == (model.vae, model.text_encoder, model.tokenizer)
    folders.save(tmp_path / "out", new, {"README.md": "new", "report.json": "{}"})
    before, after = contents(source), contents(tmp_path / "out")
    assert {name for name in after if after[name] != before.get(name)} == {UNET, "README.md", "report.json"}
    assert tree_sha256(folders.load(tmp_path / "out").params) == tree_sha256(new.params)


def test_a_latent_model_without_text(tmp_path):
    source = make_tiny_pipeline(tmp_path / "m", text=False)
    model = folders.load(source)
    assert (model.is_latent, model.takes_text, model.text_encoder, model.tokenizer) == (True, False, None, None)
    folders.save(tmp_path / "out", model)
    assert contents(tmp_path / "out") == contents(source)


def test_the_unet_of_a_pipeline_alone(made, tmp_path):
    model = folders.load(made / "unet", default_scheduler={})
    assert (model.is_latent, model.takes_text, model.source.layout) == (False, True, "unet")
    folders.save(tmp_path / "out", model)
    assert contents(tmp_path / "out") == contents(made / "unet")


def test_without_an_index_the_folders_count(made, tmp_path):
    shutil.copytree(made, tmp_path / "m")
    (tmp_path / "m" / "model_index.json").unlink()
    model = folders.load(tmp_path / "m")
    assert model.source.parts == ("text_encoder", "tokenizer", "vae")
    assert model.is_latent
    folders.save(tmp_path / "out", model)
    assert contents(tmp_path / "out") == contents(tmp_path / "m")


def test_an_ema_copy_of_a_pipeline(source, tmp_path):
    shutil.copytree(source / "unet", source / "unet_ema")
    convert(source, UNET.replace("unet/", "unet_ema/"), UNET.replace("unet/", "unet_ema/"), cast(np.float16))
    edit(source, "unet_ema/config.json", decay=0.9999)
    model = folders.load(source)
    assert "unet_ema" in model.notes[0]
    assert folders.save(tmp_path / "out", model) == ["the same new weights were written into unet_ema and unet"]
    after = contents(tmp_path / "out")
    assert after.keys() == contents(source).keys()
    assert load_file(tmp_path / "out" / UNET.replace("unet/", "unet_ema/"))["conv_in.bias"].dtype == np.float16


def test_pickled_weights(source, tmp_path):
    plain = folders.load(source)
    for name, target in PICKLED.items():
        convert(source, name, target, write=torch_file)
    model = folders.load(source)
    for a, b in ((model, plain), (model.vae, plain.vae), (model.text_encoder, plain.text_encoder)):
        assert tree_sha256(a.params) == tree_sha256(b.params)
    assert model.notes == tuple(
        f"{name.split('/')[0]}: the weights were read from pickled files ({name.split('/')[1]})"
        for name in (PICKLED[VAE], PICKLED[TEXT], PICKLED[UNET])
    )
    before = contents(source)
    assert folders.save(tmp_path / "out", model) == [
        "unet: the weights of diffusion_pytorch_model.bin were written as diffusion_pytorch_model.safetensors"
    ]
    after = contents(tmp_path / "out")
    assert after.keys() == (before.keys() - {PICKLED[UNET]}) | {UNET}
    assert {name for name in before if after.get(name) != before[name]} == {PICKLED[UNET]}
    assert tree_sha256(folders.load(tmp_path / "out").params) == tree_sha256(plain.params)


def test_safetensors_win_over_pickled_weights(source):
    put(source, PICKLED[UNET], b"never opened")
    put(source, PICKLED[TEXT], b"never opened")
    assert folders.load(source).notes == ()


@pytest.mark.parametrize("ending", ["", ".fp16"])
def test_pickled_shards_become_safetensors_shards(ending, source, tmp_path):
    tensors = cast(np.float16)(load_file(source / UNET)) if ending else load_file(source / UNET)
    (source / UNET).unlink()
    weight_map = {}
    for i in range(2):
        name = f"diffusion_pytorch_model{ending}-0000{i + 1}-of-00002.bin"
        part = dict(list(tensors.items())[i::2])
        weight_map |= dict.fromkeys(part, name)
        put(source, f"unet/{name}", torch_file(part))
    total = sum(values.nbytes for values in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    put(source, f"unet/diffusion_pytorch_model.bin.index{ending}.json", json.dumps(index).encode())
    model = folders.load(source, ending[1:] or None)
    (note,) = folders.save(tmp_path / "out", model)
    assert note.startswith("unet: the weights of diffusion_pytorch_model")
    names = {name for name in contents(tmp_path / "out") if name.startswith("unet/d")}
    shards = {f"unet/diffusion_pytorch_model{ending}-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert names == {*shards, f"unet/diffusion_pytorch_model.safetensors.index{ending}.json"}
    again = folders.load(tmp_path / "out", ending[1:] or None)
    assert tree_sha256(again.params) == tree_sha256(model.params)
    written = json.loads(
        (tmp_path / "out" / f"unet/diffusion_pytorch_model.safetensors.index{ending}.json").read_text()
    )
    assert written["metadata"] == {"total_size": total}


def test_hostile_weights_are_refused_and_not_run(source, tmp_path):
    for name, target in PICKLED.items():
        (source / name).unlink()
        put(source, target, calls(os.system, f"touch {tmp_path / 'marker'}"))
    lines = problems(source)
    assert [line.split(":")[0] for line in lines] == ["unet", "vae", "text_encoder"]
    assert all("is not a zip" in line for line in lines)
    assert not (tmp_path / "marker").exists()


def test_a_variant_of_some_parts(source, tmp_path):
    plain = folders.load(source)
    half = UNET.replace("model.", "model.fp16.")
    put(source, half, save(cast(np.float16)(load_file(source / UNET)), metadata={"format": "pt"}))
    put(source, TEXT.replace("model.", "model.fp16."), save(cast(ml_dtypes.bfloat16)(load_file(source / TEXT))))
    model = folders.load(source, "fp16")
    assert model.notes == ("vae: has no variant 'fp16'; its plain weights were read",)
    assert model.vae.sha256 == plain.vae.sha256
    assert model.text_encoder.sha256 != plain.text_encoder.sha256
    assert {leaf.dtype for leaf in jax.tree.leaves(model.text_encoder.params)} == {np.dtype(np.float32)}
    assert folders.save(tmp_path / "out", model) == [f"{UNET} was left out: it holds old weights"]
    assert contents(tmp_path / "out").keys() == contents(source).keys() - {UNET}
    (source / VAE).rename(source / VAE.replace("model.", "model.non_ema."))
    assert problems(source) == [
        "vae: weights: there are only variants: non_ema; ask for one, for example variant='non_ema'"
    ]
    assert problems(source, variant="fp16") == [
        "vae: weights: no variant 'fp16'; there are: non_ema; ask for one of these"
    ]


def test_old_names_of_the_text_encoder(source, tmp_path):
    plain = folders.load(source)

    def old(tensors):
        ids = {"text_model.embeddings.position_ids": np.arange(24)[None]}
        return {f"text_model.{name}": values for name, values in tensors.items()} | ids

    convert(source, TEXT, TEXT, old)
    model = folders.load(source)
    assert model.text_encoder.sha256 == plain.text_encoder.sha256
    folders.save(tmp_path / "out", model)
    assert contents(tmp_path / "out") == contents(source)

    # Other weights are written in the form that was read; the buffer is no parameter and stays out.
    params = changed(model.text_encoder.params)
    other = dataclasses.replace(model, text_encoder=model.text_encoder.with_params(params))
    notes = folders.save(tmp_path / "other", other)
    assert notes == ["text_encoder: other weights than those of the source were written"]
    assert set(load_file(tmp_path / "other" / TEXT)) == set(old(to_diffusers(params))) - {
        "text_model.embeddings.position_ids"
    }
    assert folders.load(tmp_path / "other").text_encoder.sha256 == tree_sha256(params)

    convert(source, TEXT, PICKLED[TEXT], write=torch_file)
    model = folders.load(source)
    assert model.text_encoder.sha256 == plain.text_encoder.sha256
    other = dataclasses.replace(model, text_encoder=model.text_encoder.with_params(params))
    assert folders.save(tmp_path / "third", other)[1:] == [
        "text_encoder: the weights of pytorch_model.bin were written as model.safetensors"
    ]
    assert folders.load(tmp_path / "third").text_encoder.sha256 == tree_sha256(params)


def test_a_changed_autoencoder(source, tmp_path):
    convert(source, VAE, VAE, cast(np.float16))
    put(source, "vae/notes/deep.txt", b"kept")
    put(source, PICKLED[VAE], b"old")
    model = folders.load(source)
    other = dataclasses.replace(model, vae=model.vae.with_params(changed(model.vae.params)))
    folders.save(tmp_path / "out", other)
    before, after = contents(source), contents(tmp_path / "out")
    assert {name for name in after if after[name] != before[name]} == {VAE}
    assert before.keys() - after.keys() == {PICKLED[VAE]}
    assert load_file(tmp_path / "out" / VAE)["encoder.conv_in.bias"].dtype == np.float16
    with pytest.raises(ValueError, match="missing parameter: decoder"):
        model.vae.with_params({})


def test_the_pipeline_corrects_its_scheduler(source, tmp_path):
    edit(source, "scheduler/scheduler_config.json", steps_offset=0)
    model = folders.load(source)
    assert model.sampler.steps_offset == 1
    assert [note.split(" ")[0] for note in model.notes] == ["steps_offset"]
    folders.save(tmp_path / "out", model)
    assert contents(tmp_path / "out") == contents(source)


def test_computing_in_another_way(made):
    model = folders.load(made)
    other = model.with_compute("bfloat16", remat=True)
    assert (other.dtype, other.remat, model.dtype, model.remat) == ("bfloat16", True, "float32", False)
    assert (other.module.dtype, other.module.remat) == (jnp.bfloat16, True)
    assert (model.module.dtype, model.module.remat) == (jnp.float32, False)
    assert other.params is model.params
    assert other.predict is other.predict
    assert other.with_params(changed(other.params)).dtype == "bfloat16"
    with pytest.raises(ValueError, match="dtype: 'float16' is not supported; allowed: float32, bfloat16"):
        model.with_compute("float16")


def test_all_problems_of_all_parts_come_together(source):
    edit(source, "unet/config.json", act_fn="tanh")
    edit(source, "vae/config.json", latents_mean=[0.0], shift_factor="x")
    edit(source, "text_encoder/config.json", hidden_act="relu")
    edit(source, "scheduler/scheduler_config.json", skip_prk_steps=False)
    edit(source, "tokenizer/tokenizer_config.json", model_max_length=1)
    put(source, VAE, b"broken")
    put(source, TEXT, save(cast(np.int32)(load_file(source / TEXT))))
    starts = [line.split(" ")[0] for line in problems(source)]
    assert {start.split(":")[0].split("/")[0] for start in starts} == {
        *("unet", "vae", "text_encoder", "scheduler", "tokenizer")
    }
    assert len(starts) > 20


def test_parts_that_do_not_fit_together(source, tmp_path):
    edit(source, "model_index.json", vae=["diffusers", "AutoencoderKL"])
    shutil.rmtree(source / "vae")
    other = make_tiny_pipeline(tmp_path / "o", vae={"latent_channels": 3}, text_encoder={"hidden_size": 8})
    shutil.copytree(other / "vae", source / "vae")
    shutil.rmtree(source / "text_encoder")
    shutil.copytree(other / "text_encoder", source / "text_encoder")
    edit(source, "tokenizer/tokenizer_config.json", model_max_length=30)
    assert [line.split(" is not")[0] for line in problems(source)] == [
        "tokenizer: model_max_length: 30",
        "unet/config.json: in_channels: 4",
        "unet/config.json: out_channels: 4",
        "unet/config.json: cross_attention_dim: 16",
    ]


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("text_encoder_2", ["transformers", "CLIPTextModelWithProjection"]),
        ("tokenizer_2", ["transformers", "CLIPTokenizer"]),
        ("vae", ["diffusers", "VQModel"]),
        ("vqvae", ["diffusers", "VQModel"]),
        ("text_encoder", ["transformers", "T5EncoderModel"]),
        ("tokenizer", ["transformers", "T5Tokenizer"]),
        ("unet", ["diffusers", "FlaxUNet2DConditionModel"]),
        ("controlnet", ["diffusers", "ControlNetModel"]),
        ("transformer", ["diffusers", "PixArtTransformer2DModel"]),
    ],
)
def test_other_parts_are_refused(name, entry, source):
    edit(source, "model_index.json", **{name: entry})
    (line,) = problems(source)
    assert line.startswith(f"model_index.json: {name}: {entry[1]!r} is not supported; allowed: unet (UNet2DModel,")


def test_parts_that_are_missing(source, tmp_path):
    shutil.rmtree(source / "safety_checker")
    notes = folders.save(tmp_path / "out", folders.load(source))
    assert notes == ["safety_checker/ was left out: the source does not have it"]
    edit(source, "model_index.json", tokenizer=[None, None])
    assert problems(source) == ["tokenizer: is not there, but the text encoder needs it; copy it as well"]
    edit(source, "model_index.json", tokenizer=["transformers", "CLIPTokenizer"])
    shutil.rmtree(source / "vae")
    shutil.rmtree(source / "tokenizer")
    lines = problems(source)
    assert [line.split(":")[0] for line in lines] == ["vae/config.json", "vae", "tokenizer"]
    edit(source, "model_index.json", vae=[None, None], tokenizer=[None, None], text_encoder=[None, None])
    model = folders.load(source)
    assert (model.is_latent, model.takes_text) == (False, True)


def test_links_that_go_round_are_refused(source, tmp_path):
    (source / "safety_checker" / "again").symlink_to(source, target_is_directory=True)
    (source / "vae" / "loop").symlink_to(source / "vae" / "loop")
    model = folders.load(source)
    with pytest.raises(ValueError, match="is a link to a folder above it; remove it"):
        folders.save(tmp_path / "out", model)
    (source / "safety_checker" / "again").unlink()
    with pytest.raises(ValueError, match="loop is neither a file nor a folder"):
        folders.save(tmp_path / "out", model)
    (source / "vae" / "loop").unlink()
    os.mkfifo(source / "tokenizer" / "pipe")
    with pytest.raises(ValueError, match="pipe is neither a file nor a folder"):
        folders.save(tmp_path / "out", model)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_new_models_that_take_text_are_refused(made):
    config = folders.load(made, companions=False).config
    with pytest.raises(ValueError, match="UNet2DConditionConfig: a model that takes text needs a text encoder"):
        folders.new(config, init_params(config, 0), {})
