"""Folders between diffusers and us: what they write we read and write back unchanged, what we write they open."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from jaxunlearn.io import diffusers as folders
from jaxunlearn.models.convert import to_diffusers
from jaxunlearn.models.parameters import init_params
from jaxunlearn.models.unet2d_config import UNet2DConfig

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

KEYS = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
X = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
T = np.array([3, 700])
TOLERANCE = {"F32": 2e-5, "F16": 2e-5, "BF16": 2e-5}  # They are run in float32 too: the rounding is in the weights.


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(**KEYS).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model


def outputs(model):
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(model.predict_raw)(model.params, X, T, None))


def their_outputs(unet):
    with torch.no_grad():
        out = unet.float()(torch.from_numpy(X.transpose(0, 3, 1, 2)), torch.from_numpy(T)).sample
    return out.numpy().transpose(0, 2, 3, 1)


def assert_same(a, b):
    assert np.abs(a - b).max() <= 2e-5 * max(1.0, np.abs(b).max())


def contents(path):
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def make(name, unet, path):
    """Writes a folder with diffusers. Returns (variant, function that opens the UNet of such a folder)."""
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(num_train_timesteps=100))
    if name == "nested":
        pipeline.save_pretrained(path)
        return None, lambda p: diffusers.DDPMPipeline.from_pretrained(p).unet
    if name == "nested_ddim":
        diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler()).save_pretrained(path)
        return None, lambda p: diffusers.DDIMPipeline.from_pretrained(p).unet
    if name == "flat":
        unet.save_pretrained(path)
        pipeline.scheduler.save_pretrained(path)
        index = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
        (path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline", **index}))
        return None, lambda p: diffusers.DDPMPipeline.from_pretrained(p).unet
    if name == "sharded":
        pipeline.scheduler.save_pretrained(path / "scheduler")
        unet.save_pretrained(path / "unet", max_shard_size="30KB")
        assert len(list((path / "unet").glob("*.safetensors"))) > 2
        return None, lambda p: diffusers.UNet2DModel.from_pretrained(p / "unet")
    if name == "sharded_variant":
        unet.save_pretrained(path / "unet", max_shard_size="30KB", variant="fp16")
        pipeline.scheduler.save_pretrained(path / "scheduler")
        return "fp16", lambda p: diffusers.UNet2DModel.from_pretrained(p / "unet", variant="fp16")
    if name == "variant":
        pipeline.save_pretrained(path, variant="non_ema")
        return "non_ema", lambda p: diffusers.DDPMPipeline.from_pretrained(p, variant="non_ema").unet
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[name]
    copy = diffusers.UNet2DModel(**KEYS)
    copy.load_state_dict(unet.state_dict())
    diffusers.DDPMPipeline(copy.to(dtype), diffusers.DDPMScheduler()).save_pretrained(path)
    return None, lambda p: diffusers.DDPMPipeline.from_pretrained(p).unet


@pytest.mark.parametrize(
    "name", ["nested", "nested_ddim", "flat", "sharded", "sharded_variant", "variant", "f16", "bf16"]
)
def test_their_folder_comes_back_and_opens_again(name, unet, tmp_path):
    variant, reopen = make(name, unet, tmp_path / "theirs")
    model = folders.load(tmp_path / "theirs", variant)
    assert_same(outputs(model), their_outputs(reopen(tmp_path / "theirs")))

    folders.save(tmp_path / "same", model)
    assert contents(tmp_path / "same") == contents(tmp_path / "theirs")

    rng = np.random.default_rng(1)
    changed = model.with_params(
        jax.tree.map(lambda leaf: leaf + 0.05 * rng.standard_normal(leaf.shape).astype(np.float32), model.params)
    )
    folders.save(tmp_path / "changed", changed)
    again = folders.load(tmp_path / "changed", variant)
    theirs = their_outputs(reopen(tmp_path / "changed"))
    assert_same(outputs(again), theirs)
    if name not in ("f16", "bf16"):
        assert_same(outputs(changed), theirs)
    assert np.abs(theirs - their_outputs(reopen(tmp_path / "theirs"))).max() > 0.01


def test_old_attention_names(unet, tmp_path):
    from safetensors.torch import save_file

    make("flat", unet, tmp_path / "old")
    old = {}
    for name, values in unet.state_dict().items():
        for new, before in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            name = name.replace(f".{new}.", f".{before}.")
        old[name] = values.contiguous()
    assert any(".query." in name for name in old)
    save_file(old, tmp_path / "old" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    model = folders.load(tmp_path / "old")
    assert_same(outputs(model), their_outputs(diffusers.UNet2DModel.from_pretrained(tmp_path / "old")))
    folders.save(tmp_path / "new", model)
    assert_same(outputs(model), their_outputs(diffusers.UNet2DModel.from_pretrained(tmp_path / "new")))


@pytest.mark.parametrize(
    ("scheduler", "pipeline"), [("DDPMScheduler", "DDPMPipeline"), ("DDIMScheduler", "DDIMPipeline")]
)
def test_our_new_model_opens_and_runs(scheduler, pipeline, tmp_path):
    config = UNet2DConfig.from_dict(KEYS)
    model = folders.new(config, init_params(config, 3), {"_class_name": scheduler, "num_train_timesteps": 50})
    folders.save(tmp_path / "m", model, {"README.md": "# A model\n"})
    opened = getattr(diffusers, pipeline).from_pretrained(tmp_path / "m")
    assert type(opened.scheduler).__name__ == scheduler
    assert_same(outputs(model), their_outputs(opened.unet))
    np.testing.assert_allclose(opened.scheduler.alphas_cumprod, model.schedule.alphas_cumprod, rtol=1e-5)
    opened.set_progress_bar_config(disable=True)
    images = opened(batch_size=2, num_inference_steps=3, output_type="np").images
    assert images.shape == (2, 8, 8, 3)
    assert np.all(np.isfinite(images))
    # The generic class finds the pipeline by its name as well, and what diffusers saves again is the same model.
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "m")).__name__ == pipeline
    opened.save_pretrained(tmp_path / "again")
    again = folders.load(tmp_path / "again")
    for name, values in to_diffusers(again.params).items():
        np.testing.assert_array_equal(values, to_diffusers(model.params)[name], err_msg=name)
    assert again.config == model.config
    assert again.sampler == model.sampler
    theirs, ours = contents(tmp_path / "again"), contents(tmp_path / "m")
    assert theirs["unet/diffusion_pytorch_model.safetensors"] == ours["unet/diffusion_pytorch_model.safetensors"]
    added = {"_name_or_path"}
    assert set(json.loads(theirs["unet/config.json"])) - added == set(json.loads(ours["unet/config.json"]))


def test_their_files_take_the_same_defaults(tmp_path):
    """Keys that a file lacks mean the same to both."""
    for name in ("DDPMScheduler", "DDIMScheduler"):
        from jaxunlearn.io.schedulers import DEFAULTS

        written = {k: v for k, v in getattr(diffusers, name)().config.items() if not k.startswith("_")}
        assert written == DEFAULTS[name]
