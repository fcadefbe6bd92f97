"""Folders of diffusers, written here byte by byte as diffusers writes them: reading, refusing, writing back."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from jaxunlearn.io import diffusers as folders
from jaxunlearn.io.hashing import tree_sha256
from jaxunlearn.io.weights import is_weight_file, json_bytes, save_tensors
from jaxunlearn.models.convert import to_diffusers
from jaxunlearn.models.parameters import init_params
from jaxunlearn.models.unet2d_config import UNet2DConfig
from jaxunlearn.sampling import SamplerConfig

CONFIG = UNet2DConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(8, 8),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=4,
)
PARAMS = init_params(CONFIG, 0)
TENSORS = to_diffusers(PARAMS)
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.30.0",
    "num_train_timesteps": 100,
    "clip_sample": True,
}
INDEX = {
    "_class_name": "DDPMPipeline",
    "_diffusers_version": "0.30.0",
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
}


def write(path: pathlib.Path, files: dict) -> pathlib.Path:
    """Writes name -> JSON value, bytes or tensors."""
    for name, content in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json") and not isinstance(content, bytes):
            content = json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"
        elif not isinstance(content, bytes):
            content = save(content, metadata={"format": "pt"})
        file.write_bytes(content)
    return path


def unet_json(**changes) -> dict:
    return {"_class_name": "UNet2DModel", "_diffusers_version": "0.30.0", **CONFIG.to_dict(), **changes}


def nested(path, tensors=TENSORS, **changes):
    files = {
        "model_index.json": INDEX,
        "unet/config.json": unet_json(),
        f"unet/{WEIGHTS}": tensors,
        "scheduler/scheduler_config.json": SCHEDULER,
    }
    return write(path, files | changes)


def contents(path: pathlib.Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def cast(dtype):
    return {name: values.astype(dtype) for name, values in TENSORS.items()}


def shards(tensors=TENSORS, variant=""):
    """Three files with an index, as diffusers names them."""
    names, files, weight_map = sorted(tensors), {}, {}
    for i in range(3):
        name = f"diffusion_pytorch_model{variant}-0000{i + 1}-of-00003.safetensors"
        files[name] = {n: tensors[n] for n in names[i::3]}
        weight_map |= dict.fromkeys(files[name], name)
    total = sum(values.nbytes for values in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return files | {f"diffusion_pytorch_model.safetensors.index{variant}.json": index}


def flat_files(**more):
    return {"config.json": unet_json(), "scheduler_config.json": SCHEDULER, "model_index.json": INDEX} | more


LAYOUTS = {
    "nested": (nested, None),
    "flat": (lambda path: write(path, flat_files(**{WEIGHTS: TENSORS, "README.md": b"A cat model."})), None),
    "sharded": (lambda path: write(path, flat_files(**shards())), None),
    "sharded_variant": (lambda path: write(path, flat_files(**shards(cast(np.float16), ".fp16"))), "fp16"),
    "variant": (
        lambda path: write(path, flat_files(**{"diffusion_pytorch_model.fp16.safetensors": cast(np.float16)})),
        "fp16",
    ),
    "float16": (lambda path: nested(path, cast(np.float16)), None),
    "bfloat16": (lambda path: nested(path, cast(ml_dtypes.bfloat16)), None),
    "mixed": (lambda path: nested(path, TENSORS | {"conv_in.bias": TENSORS["conv_in.bias"].astype(np.float16)}), None),
    "no_metadata": (lambda path: nested(path, **{f"unet/{WEIGHTS}": save(TENSORS)}), None),
    "odd_json": (
        lambda path: nested(path, **{"unet/config.json": json.dumps(unet_json(), indent=7).encode() + b"  "}),
        None,
    ),
    "other_parts": (
        lambda path: nested(
            path,
            **{
                "model_index.json": INDEX | {"extractor": ["some_library", "Extractor"], "gone": [None, None]},
                "extractor/deep/pytorch_model.bin": b"\x80\x02 untouched",
                "extractor/config.json": b"{ }",
            },
        ),
        None,
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_round_trip_is_byte_identical(name, tmp_path):
    make, variant = LAYOUTS[name]
    source = make(tmp_path / "source")
    before = contents(source)
    model = folders.load(source, variant)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {np.dtype(np.float32)}
    assert folders.save(tmp_path / "out", model) == []
    assert contents(tmp_path / "out") == before
    assert contents(source) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_what_a_model_holds(tmp_path):
    model = folders.load(nested(tmp_path / "m"))
    assert model.config == CONFIG
    assert model.source.layout == "nested"
    assert (model.schedule.num_steps, model.prediction_type) == (100, "epsilon")
    assert model.sampler == SamplerConfig()
    assert model.num_params == sum(values.size for values in TENSORS.values())
    jax.tree.map(np.testing.assert_array_equal, model.params, PARAMS)
    assert model.predict is model.predict
    assert model.scheduler_json == SCHEDULER


def test_unet_folder_alone_needs_a_scheduler(tmp_path):
    source = write(tmp_path / "m", {"config.json": unet_json(), WEIGHTS: TENSORS})
    with pytest.raises(ValueError, match="give the scheduler's keys"):
        folders.load(source)
    model = folders.load(source, default_scheduler={"num_train_timesteps": 30})
    assert (model.schedule.num_steps, model.source.layout) == (30, "unet")
    notes = folders.save(tmp_path / "out", model)
    assert notes == ["no scheduler_config.json was written, as the source has none"]
    assert contents(tmp_path / "out") == contents(source)
    own = folders.load(nested(tmp_path / "n"), default_scheduler={"num_train_timesteps": 30})
    assert own.scheduler_json == SCHEDULER


def test_a_pipeline_of_ddim_samples_with_ddim(tmp_path):
    index = INDEX | {"_class_name": "DDIMPipeline", "scheduler": ["diffusers", "PNDMScheduler"]}
    scheduler = SCHEDULER | {"_class_name": "PNDMScheduler"}
    assert (
        folders.load(
            nested(tmp_path / "m", **{"model_index.json": index, "scheduler/scheduler_config.json": scheduler})
        ).sampler.kind
        == "ddim"
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_new_weights_are_written_in_the_old_dtype(dtype, tmp_path):
    model = folders.load(nested(tmp_path / "m", cast(dtype)))
    changed = model.with_params(jax.tree.map(lambda leaf: leaf + 0.01, model.params))
    folders.save(tmp_path / "out", changed)
    written = load_file(tmp_path / "out" / "unet" / WEIGHTS)
    for name, values in to_diffusers(changed.params).items():
        assert written[name].dtype == dtype
        np.testing.assert_array_equal(written[name], values.astype(dtype))
    folders.save(tmp_path / "full", changed, dtype="F32")
    assert load_file(tmp_path / "full" / "unet" / WEIGHTS)["conv_in.bias"].dtype == np.float32


def test_weights_that_do_not_fit_the_dtype_are_refused(tmp_path):
    model = folders.load(nested(tmp_path / "m", cast(np.float16)))
    huge = jax.tree.map(lambda leaf: leaf * 0 + 1e6, model.params)
    with pytest.raises(ValueError, match="not finite as F16; export it as dtype 'F32'"):
        folders.save(tmp_path / "out", model.with_params(huge))
    broken = jax.tree.map(lambda leaf: leaf * np.nan, model.params)
    with pytest.raises(ValueError, match="themselves are broken"):
        folders.save(tmp_path / "out", model.with_params(broken))
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_transposed_arrays_are_written_right(tmp_path):
    """safetensors' save_file writes the memory of a view: this pins both the trap and our way around it."""
    view = np.arange(6, dtype=np.float32).reshape(2, 3).T
    save_file({"x": view}, tmp_path / "trap.safetensors")
    assert load_file(tmp_path / "trap.safetensors")["x"].tolist() == [[0, 1], [2, 3], [4, 5]]
    save_tensors(tmp_path / "good.safetensors", {"x": view, "scalar": np.float32(3)}, None)
    assert load_file(tmp_path / "good.safetensors")["x"].tolist() == [[0, 3], [1, 4], [2, 5]]


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def with_old_names(tensors):
    old = {}
    for name, values in tensors.items():
        for after, before in OLD_NAMES.items():
            name = name.replace(f".{after}.", f".{before}.")
        old[name] = values
    return old


def test_old_attention_names_become_new_ones(tmp_path):
    old = with_old_names(TENSORS)
    assert old.keys() != TENSORS.keys()
    for name, source in [
        ("one", nested(tmp_path / "one", old)),
        ("shards", write(tmp_path / "shards", flat_files(**shards(old)))),
    ]:
        model = folders.load(source)
        jax.tree.map(np.testing.assert_array_equal, model.params, PARAMS)
        folders.save(tmp_path / f"{name}_out", model)
        assert tree_sha256(folders.load(tmp_path / f"{name}_out").params) == tree_sha256(PARAMS)
    assert load_file(tmp_path / "one_out" / "unet" / WEIGHTS).keys() == TENSORS.keys()
    index = json.loads((tmp_path / "shards_out" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == TENSORS.keys()
    assert index["metadata"]["total_size"] == sum(values.nbytes for values in TENSORS.values())


def test_ema_weights_are_read_and_both_copies_are_written(tmp_path):
    raw = {name: values * 2 for name, values in TENSORS.items()}
    ema_json = unet_json(decay=0.999, optimization_step=10)
    source = nested(tmp_path / "m", raw, **{"unet_ema/config.json": ema_json, f"unet_ema/{WEIGHTS}": cast(np.float16)})
    model = folders.load(source)
    assert "unet_ema" in model.notes[0]
    np.testing.assert_array_equal(model.params["conv_in"]["bias"], TENSORS["conv_in.bias"].astype(np.float16))
    notes = folders.save(tmp_path / "out", model)
    assert notes == ["the same new weights were written into unet_ema and unet"]
    out = contents(tmp_path / "out")
    assert out.keys() == contents(source).keys()
    assert out["unet_ema/config.json"] == contents(source)["unet_ema/config.json"]
    assert load_file(tmp_path / "out" / "unet_ema" / WEIGHTS)["conv_in.bias"].dtype == np.float16
    assert load_file(tmp_path / "out" / "unet" / WEIGHTS)["conv_in.bias"].dtype == np.float32
    assert tree_sha256(folders.load(tmp_path / "out").params) == tree_sha256(model.params)

    shutil.rmtree(source / "unet_ema")
    write(source, {"unet_ema/config.json": unet_json(norm_eps=1e-3), f"unet_ema/{WEIGHTS}": TENSORS})
    with pytest.raises(ValueError, match="another architecture"):
        folders.load(source)


def test_old_weights_are_not_carried_along(tmp_path):
    stale = {
        "unet/diffusion_pytorch_model.bin": b"old",
        "unet/diffusion_pytorch_model.fp16.safetensors": cast(np.float16),
        "full.ckpt": b"old",
        "checkpoint-500/unet/diffusion_pytorch_model.bin": b"old",
        ".git/lfs/objects/ab": b"old",
        ".cache/huggingface/x": b"old",
        "README.md": b"card",
        ".gitattributes": b"x",
    }
    source = nested(tmp_path / "m", **stale)
    notes = folders.save(tmp_path / "out", folders.load(source), {"README.md": "new card", "logs/run.txt": b"log"})
    out = contents(tmp_path / "out")
    assert not any(content == b"old" for content in out.values())
    assert "unet/diffusion_pytorch_model.fp16.safetensors" not in out
    assert (out["README.md"], out["logs/run.txt"], out[".gitattributes"]) == (b"new card", b"log", b"x")
    assert sorted(note.split(" ")[0] for note in notes) == [
        "checkpoint-500/",
        "full.ckpt",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ]


def test_new_models(tmp_path):
    model = folders.new(CONFIG, PARAMS, {"num_train_timesteps": 20, "beta_schedule": "squaredcos_cap_v2"})
    assert folders.save(tmp_path / "deep" / "out", model) == []
    loaded = folders.load(tmp_path / "deep" / "out")
    assert loaded.config == CONFIG
    assert tree_sha256(loaded.params) == tree_sha256(PARAMS)
    np.testing.assert_array_equal(loaded.schedule.alphas_cumprod, model.schedule.alphas_cumprod)
    index = json.loads((tmp_path / "deep" / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    ddim = folders.new(CONFIG, PARAMS, {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"})
    folders.save(tmp_path / "ddim", ddim)
    assert folders.load(tmp_path / "ddim").sampler.kind == "ddim"
    assert json.loads((tmp_path / "ddim" / "model_index.json").read_text())["_class_name"] == "DDIMPipeline"
    with pytest.raises(ValueError, match="missing parameter: conv_in/bias") as error:
        folders.new(CONFIG, PARAMS | {"conv_in": {"kernel": np.zeros(2), "other": np.zeros(1)}}, {})
    assert "unexpected parameter: conv_in/other" in str(error.value)
    assert "wrong shape: conv_in/kernel" in str(error.value)
    with pytest.raises(ValueError, match="beta_schedule"):
        folders.new(CONFIG, PARAMS, {"beta_schedule": "x"})


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_predict_returns_noise_for_every_prediction_type(kind, tmp_path):
    model = folders.new(CONFIG, PARAMS, {"prediction_type": kind})
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 1)).astype(np.float32)
    t = np.array([10, 700])
    raw, predict = (
        jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})(PARAMS, x, t, None)
        for function in (model.predict_raw, model.predict)
    )
    out = np.asarray(raw, np.float64)
    a = model.schedule.alphas_cumprod[t][:, None, None, None]
    expected = (
        np.sqrt(a) * out + np.sqrt(1 - a) * x if kind == "v_prediction" else (x - np.sqrt(a) * out) / np.sqrt(1 - a)
    )
    np.testing.assert_allclose(predict, expected, rtol=1e-3, atol=1e-5)


def test_save_refuses(tmp_path):
    source = nested(tmp_path / "m")
    before = contents(source)
    model = folders.load(source)
    for path, match in [
        (source, "exists already"),
        (source / "export", "never written to"),
        (tmp_path / "m" / ".." / "m" / "unet" / "x", "never written to"),
    ]:
        with pytest.raises(ValueError, match=match):
            folders.save(path, model)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="exists already"):
        folders.save(tmp_path / "link", model)
    for name in (
        "../x",
        "/x",
        "",
        "unet/config.json",
        "a.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
    ):
        with pytest.raises(ValueError, match="extra file"):
            folders.save(tmp_path / "out", model, {name: "x"})
    with pytest.raises(ValueError, match="must be one of F32, F16, BF16"):
        folders.save(tmp_path / "out", model, dtype="F8")
    with pytest.raises(IsADirectoryError):
        folders.save(tmp_path / "out", model, {"unet": "a file where a folder is"})
    assert contents(source) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "m"]
    shutil.rmtree(source)
    with pytest.raises(ValueError, match="is gone"):
        folders.save(tmp_path / "out", model)


def test_names_of_the_hub_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing is ever downloaded for such a name.*hf download goo") as error:
        folders.load("google/ddpm-cat-256")
    assert "--local-dir ddpm-cat-256" in str(error.value)
    assert "or give 'hf://google/ddpm-cat-256'" in str(error.value)
    file = write(tmp_path, {"model.ckpt": b"x"}) / "model.ckpt"
    with pytest.raises(ValueError, match="single file; convert it to a diffusers folder"):
        folders.load(file)


BAD = {
    "empty": ({"unet/config.json": None, f"unet/{WEIGHTS}": None}, "unet/config.json: is not there"),
    "variants only": (
        {f"unet/{WEIGHTS}": None, "unet/diffusion_pytorch_model.fp16.safetensors": TENSORS},
        "unet: weights: there are only variants: fp16; ask for one, for example variant='fp16'",
    ),
    "sharded variants only": (
        {f"unet/{WEIGHTS}": None, **{f"unet/{k}": v for k, v in shards(variant=".non_ema").items()}},
        "there are only variants: non_ema;",
    ),
    "pickle": (
        {f"unet/{WEIGHTS}": None, "unet/diffusion_pytorch_model.bin": b"x"},
        "unet: diffusion_pytorch_model.bin: is not a zip: a file of torch before 1.6, or none of torch; re-save",
    ),
    "checkpoint": (
        {f"unet/{WEIGHTS}": None, "unet/model.ckpt": b"x"},
        "unet: model.ckpt: is not diffusion_pytorch_model.safetensors or diffusion_pytorch_model.bin, the only names",
    ),
    "msgpack": (
        {f"unet/{WEIGHTS}": None, "unet/diffusion_flax_model.msgpack": b"x"},
        "diffusion_flax_model.msgpack: old Flax weights are not read",
    ),
    "no weights": ({f"unet/{WEIGHTS}": None}, "neither diffusion_pytorch_model.safetensors nor"),
    "lfs": ({f"unet/{WEIGHTS}": b"version https://git-lfs.github.com/spec/v1\noid"}, "run `git lfs pull`"),
    "damaged": ({f"unet/{WEIGHTS}": b"\0\1\2"}, "is not a safetensors file, or is damaged"),
    "cut short": ({f"unet/{WEIGHTS}": save(TENSORS)[:-4]}, "bytes but should have"),
    "integers": (
        {f"unet/{WEIGHTS}": TENSORS | {"conv_in.bias": np.zeros(8, np.int32)}},
        "conv_in.bias is I32; allowed: F32, F16, BF16",
    ),
    "single-file LDM": (
        {f"unet/{WEIGHTS}": {"model.diffusion_model.x": np.zeros(1, np.float32)}},
        "is a single-file LDM checkpoint; convert it to a diffusers folder first",
    ),
    "missing": (
        {f"unet/{WEIGHTS}": {k: v for k, v in TENSORS.items() if k != "conv_in.bias"}},
        "unet: missing: conv_in.bias (8,)",
    ),
    "unexpected": ({f"unet/{WEIGHTS}": TENSORS | {"conv_x.bias": np.zeros(1, np.float32)}}, "unexpected: conv_x.bias"),
    "shape": (
        {f"unet/{WEIGHTS}": TENSORS | {"conv_in.bias": np.zeros(7, np.float32)}},
        "wrong shape: conv_in.bias is (7,), the model has (8,)",
    ),
    "class": (
        {"unet/config.json": unet_json(_class_name="Transformer2DModel")},
        "unet/config.json: _class_name: 'Transformer2DModel' is not supported; allowed: 'UNet2DModel', 'UNet2DCond",
    ),
    "VQ-VAE": (
        {"model_index.json": INDEX | {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}},
        "model_index.json: vqvae: 'VQModel' is not supported; allowed: unet (UNet2DModel, UNet2DConditionModel), vae",
    ),
    "Flax class": (
        {"model_index.json": INDEX | {"unet": ["diffusers", "FlaxUNet2DConditionModel"]}},
        "model_index.json: unet: 'FlaxUNet2DConditionModel' is not supported",
    ),
    "malformed part": ({"model_index.json": INDEX | {"vae": 3}}, "'vae': must be a name with [library, class], not 3"),
    "part outside": ({"model_index.json": INDEX | {"../x": ["a", "b"]}}, "'../x': must be a name with"),
    "not finite": (
        {f"unet/{WEIGHTS}": TENSORS | {"conv_in.bias": np.full(8, np.nan, np.float32)}},
        f"unet: {WEIGHTS}: conv_in.bias holds values that are not finite",
    ),
    "far too deep": (
        {"unet/config.json": unet_json(layers_per_block=10**9)},
        "unet: layers_per_block: 1000000000 layers need more than",
    ),
    "far too wide": (
        {"unet/config.json": unet_json(block_out_channels=(8, 8 * 10**8))},
        "unet: block_out_channels: 800000000 is wider than the widest tensor",
    ),
    "integers beyond 32 bits": (
        {"unet/config.json": unet_json(norm_eps=10**12, sample_size=2**31)},
        "unet/config.json: norm_eps: 1000000000000 is not supported; allowed: a text, a number or a list of them, with",
    ),
    "twice": ({"unet/config.json": b'{"a": 1, "a": 2}'}, "unet/config.json: is not JSON (the key 'a' stands twice"),
    "infinite": ({"unet/config.json": b'{"norm_eps": 1e999}'}, "(1e999 is not a finite number)"),
    "deep": ({"unet/config.json": b"[" * 100_000}, "(it is nested too deeply)"),
    "config": ({"unet/config.json": unet_json(act_fn="tanh")}, "unet/config.json: act_fn: 'tanh'"),
    "json": ({"unet/config.json": b"{"}, "unet/config.json: is not JSON"),
    "json list": ({"unet/config.json": b"[]"}, "unet/config.json: must hold an object, not a list"),
    "scheduler": (
        {"scheduler/scheduler_config.json": SCHEDULER | {"variance_type": "learned"}},
        "scheduler/scheduler_config.json: variance_type: 'learned' is not supported",
    ),
    "scheduler class": (
        {"model_index.json": INDEX | {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}},
        "'EulerDiscreteScheduler' is not supported; allowed: DDPMScheduler, DDIMScheduler",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals_name_the_problem(name, tmp_path):
    changes, expected = BAD[name]
    source = nested(tmp_path / "m", **{k: v for k, v in changes.items() if v is not None})
    for file in [k for k, v in changes.items() if v is None]:
        (source / file).unlink()
    with pytest.raises(ValueError) as error:
        folders.load(source)
    assert expected in str(error.value)
    assert str(source) in str(error.value).splitlines()[0]


def test_all_problems_come_together(tmp_path):
    source = nested(
        tmp_path / "m",
        **{
            "unet/config.json": unet_json(act_fn="tanh", norm_num_groups=3),
            f"unet/{WEIGHTS}": b"x",
            "scheduler/scheduler_config.json": SCHEDULER | {"thresholding": True, "beta_schedule": "laplace"},
            "model_index.json": b"?",
        },
    )
    with pytest.raises(ValueError, match=r"cannot be loaded \(6 problems\)") as error:
        folders.load(source)
    assert len(str(error.value).splitlines()) == 7
    with pytest.raises(ValueError, match="neither the folder nor its unet/"):
        folders.load(write(tmp_path / "e", {"readme.txt": b""}))


def test_variants_and_shards_refuse(tmp_path):
    source = write(tmp_path / "m", flat_files(**shards(), **{"diffusion_pytorch_model.fp16.safetensors": TENSORS}))
    with pytest.raises(ValueError, match=r"no variant 'fp32'; there are: none \(the plain files\), fp16;"):
        folders.load(source, "fp32")
    folders.load(source, "fp16")
    (source / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="00002-of-00003.safetensors: named by .*index.json but not there"):
        folders.load(source)
    index = "diffusion_pytorch_model.safetensors.index.json"
    for content, match in [
        ({"weight_map": {"a": "../secret.safetensors"}}, "files outside of its folder: ../secret"),
        ({"weights": {}}, "not an index with a weight_map"),
        ({"weight_map": {"conv_in.bias": "diffusion_pytorch_model-00001-of-00003.safetensors"}}, "does not say what"),
    ]:
        with pytest.raises(ValueError, match=match):
            folders.load(write(source, {index: content}))


def test_links_of_a_download_cache_are_followed(tmp_path):
    source = nested(tmp_path / "blobs")
    for name in contents(source):
        link = tmp_path / "snapshot" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(source / name)
    folders.save(tmp_path / "out", folders.load(tmp_path / "snapshot"))
    assert contents(tmp_path / "out") == contents(source)
    assert not any(file.is_symlink() for file in (tmp_path / "out").rglob("*"))


def test_the_fingerprint_survives_the_folder(tmp_path):
    folders.save(tmp_path / "m", folders.new(CONFIG, PARAMS, {}))
    assert tree_sha256(folders.load(tmp_path / "m").params) == tree_sha256(PARAMS)


def test_small_helpers():
    assert is_weight_file("diffusion_pytorch_model.safetensors.index.fp16.json")
    assert not is_weight_file("model_index.json")
    assert json_bytes({"b": 1, "a": [2]}) == b'{\n  "a": [\n    2\n  ],\n  "b": 1\n}\n'
