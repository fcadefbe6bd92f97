"""Stable Diffusion pipelines between diffusers and us: their folders are read and come back, ours open there."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from jaxunlearn.io import diffusers as folders
from jaxunlearn.io.torch_pickle import inspect_torch_file, read_torch_file
from tests.tiny_pipeline import make_tiny_pipeline

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

X = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
T = np.array([3, 700])
TEXTS = np.random.default_rng(1).standard_normal((2, 24, 16)).astype(np.float32)
STEM = "diffusion_pytorch_model"


def opened(path, variant=None):
    """The pipeline as diffusers opens it, in float32."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        path, variant=variant, safety_checker=None, low_cpu_mem_usage=False, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Theirs, with perturbed weights in all parts."""
    pipeline = opened(make_tiny_pipeline(tmp_path_factory.mktemp("made") / "m"))
    torch.manual_seed(0)
    with torch.no_grad():
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            for p in part.parameters():
                p.add_(0.05 * torch.randn(p.shape))
    return pipeline


@pytest.fixture(scope="module")
def ours():
    """``model -> `` output of its UNet; all models here have one configuration and share one program."""
    programs = {}

    def run(model):
        if model.config not in programs:
            programs[model.config] = jax.jit(model.predict_raw)
        with jax.default_matmul_precision("highest"):
            return np.asarray(programs[model.config](model.params, X, T, TEXTS))

    return run


def theirs(unet):
    with torch.no_grad():
        out = unet(torch.from_numpy(X.transpose(0, 3, 1, 2)), torch.from_numpy(T), torch.from_numpy(TEXTS)).sample
    return out.numpy().transpose(0, 2, 3, 1)


def assert_same(a, b):
    assert np.abs(a - b).max() <= 2e-5 * max(1.0, np.abs(b).max())


def contents(path):
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def renamed(path, change):
    """Rewrites a weight file with other names."""
    from safetensors.torch import load_file, save_file

    tensors = {change(name): values.contiguous() for name, values in load_file(path).items()}
    assert tensors.keys() != load_file(path).keys()
    save_file(tensors, path, metadata={"format": "pt"})
    return tensors


def old_attention(name):
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


def write(name, pipeline, path):
    """Writes a folder with diffusers; returns the variant."""
    if name == "shards":
        pipeline.save_pretrained(path, max_shard_size="40KB")
        assert len(list((path / "unet").glob("*.safetensors"))) > 2
        assert len(list((path / "text_encoder").glob("*.safetensors"))) > 1
    elif name in ("float16 variant", "sharded variant"):
        more = {"max_shard_size": "40KB"} if name == "sharded variant" else {}
        pipeline.to(torch.float16).save_pretrained(path, variant="fp16", **more)
        return "fp16"
    elif name == "pickled":
        pipeline.save_pretrained(path, safe_serialization=False)
        (path / "text_encoder" / "model.safetensors").unlink()
        torch.save(pipeline.text_encoder.state_dict(), path / "text_encoder" / "pytorch_model.bin")
        assert not list(path.rglob("*.safetensors"))
    else:
        pipeline.save_pretrained(path)
    if name == "old names":
        renamed(path / "vae" / f"{STEM}.safetensors", old_attention)
        renamed(path / "text_encoder" / "model.safetensors", lambda n: f"text_model.{n}")
    return None


@pytest.mark.parametrize("name", ["plain", "shards", "float16 variant", "sharded variant", "pickled", "old names"])
def test_their_pipeline_comes_back_and_opens_again(name, pipeline, ours, tmp_path):
    import copy

    variant = write(name, copy.deepcopy(pipeline), tmp_path / "theirs")
    before = contents(tmp_path / "theirs")
    model = folders.load(tmp_path / "theirs", variant)
    reference = opened(tmp_path / "theirs", variant)
    assert_same(ours(model), theirs(reference.unet))
    with torch.no_grad():
        ids = torch.from_numpy(model.tokenizer(["a cat"]).astype(np.int64))
        wanted = reference.text_encoder(ids).last_hidden_state.numpy()
    with jax.default_matmul_precision("highest"):
        assert_same(model.text().embed(["a cat"]), wanted)

    folders.save(tmp_path / "same", model)
    same = contents(tmp_path / "same")
    pickled = {f"unet/{STEM}.bin"} if name == "pickled" else set()
    assert {n for n in before if same.get(n) != before[n]} == pickled

    rng = np.random.default_rng(1)
    changed = model.with_params(
        jax.tree.map(lambda leaf: leaf + 0.05 * rng.standard_normal(leaf.shape).astype(np.float32), model.params)
    )
    folders.save(tmp_path / "changed", changed)
    after = contents(tmp_path / "changed")
    assert {n for n in after if after[n] != before.get(n)} == {
        n for n in after if n.startswith(f"unet/{STEM}") and n[-4:] != "json"
    }
    assert contents(tmp_path / "theirs") == before
    again = opened(tmp_path / "changed", variant)
    assert_same(ours(folders.load(tmp_path / "changed", variant)), theirs(again.unet))
    assert np.abs(theirs(again.unet) - theirs(reference.unet)).max() > 0.01
    if name == "plain":
        assert_same(ours(changed), theirs(again.unet))
        images = again("a cat", num_inference_steps=2, output_type="np", height=16, width=16).images
        assert images.shape == (1, 16, 16, 3)
        assert (
            type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "changed")).__name__
            == "StableDiffusionPipeline"
        )


def test_what_diffusers_saves_again_is_the_same_model(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "theirs")
    folders.save(tmp_path / "ours", folders.load(tmp_path / "theirs"))
    opened(tmp_path / "ours").save_pretrained(tmp_path / "again")
    first, again = contents(tmp_path / "theirs"), contents(tmp_path / "again")
    assert first.keys() == again.keys()
    assert {n for n in first if first[n] != again[n] and not n.endswith(".json")} == set()
    for name in ("unet", "vae"):
        one, two = (json.loads(files[f"{name}/config.json"]) for files in (first, again))
        assert {k: v for k, v in one.items() if k != "_name_or_path"} == {
            k: v for k, v in two.items() if k != "_name_or_path"
        }


def test_the_scheduler_is_corrected_as_theirs(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"steps_offset": 0}))
    model = folders.load(tmp_path / "m")
    reference = opened(tmp_path / "m").scheduler
    assert model.sampler.steps_offset == reference.config.steps_offset == 1
    np.testing.assert_allclose(reference.alphas_cumprod, model.schedule.alphas_cumprod, rtol=1e-5)
    assert len(model.notes) == 1


def test_pickled_tensors_are_theirs(tmp_path):
    """What torch.save writes, of every dtype and kind of view."""
    base = torch.randn(4, 5, 6)
    tensors = {
        "float32": torch.randn(3, 4),
        "float16": torch.randn(5).half(),
        "bfloat16": torch.randn(2, 3).bfloat16(),
        "float64": torch.randn(2).double(),
        "int64": torch.arange(-3, 4),
        "int32": torch.arange(5, dtype=torch.int32),
        "uint8": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([[True, False]]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "shared": base,
        "row of shared": base[1],
        "column of shared": base[:, 2],
        "transposed": base.transpose(0, 2),
        "strided": base[::2, 1:, ::3],
        "permuted": base.permute(2, 0, 1)[1:],
        "detached": torch.nn.Linear(2, 3).weight.detach(),
        "with gradient": torch.randn(3, requires_grad=True),
    }
    for protocol in (2, 4, 5):
        torch.save(tensors, tmp_path / "m.bin", pickle_protocol=protocol)
        read = read_torch_file(tmp_path / "m.bin")
        assert list(read) == list(tensors)
        for name, values in tensors.items():
            values = values.detach()
            assert read[name].dtype.name == str(values.dtype).removeprefix("torch.")
            # Bytes are compared, as numpy and torch do not share bfloat16.
            np.testing.assert_array_equal(
                read[name].ravel().view(np.uint8), values.contiguous().ravel().view(torch.uint8)
            )
            assert read[name].shape == tuple(values.shape)
        assert [entry.shape for entry in inspect_torch_file(tmp_path / "m.bin").values()] == [
            v.shape for v in read.values()
        ]
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), tmp_path / "m.bin")
    for name, values in module.state_dict().items():
        np.testing.assert_array_equal(read_torch_file(tmp_path / "m.bin")[name], values)


@pytest.mark.parametrize(
    "kind", ["module", "parameter", "nested", "list", "number", "expanded", "old format", "complex"]
)
def test_other_things_that_torch_saves_are_refused(kind, tmp_path):
    values = {
        "module": (torch.nn.Linear(2, 3), "asks for 'torch.nn.modules.linear.Linear'"),
        "parameter": ({"w": torch.nn.Parameter(torch.zeros(2))}, "asks for 'torch._utils._rebuild_parameter'"),
        "nested": ({"state_dict": {"w": torch.zeros(2)}}, "'state_dict' is of type dict, not a tensor"),
        "list": ([torch.zeros(2)], "holds something of type list, not a dictionary"),
        "number": ({"w": torch.zeros(2), "step": 3}, "'step' is of type int, not a tensor"),
        "expanded": ({"w": torch.zeros(2).expand(3, 2)}, "has overlapping strides"),
        "old format": ({"w": torch.zeros(2)}, "is not a zip: a file of torch before 1.6"),
        "complex": ({"w": torch.zeros(2, dtype=torch.complex64)}, "asks for 'torch.ComplexFloatStorage'"),
    }
    value, expected = values[kind]
    torch.save(value, tmp_path / "m.bin", _use_new_zipfile_serialization=kind != "old format")
    with pytest.raises(ValueError, match="re-save as safetensors") as error:
        read_torch_file(tmp_path / "m.bin")
    assert expected in str(error.value)
