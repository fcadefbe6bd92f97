"""CLIP's towers against torch with drawn weights, images of several sizes, and the full depth of RN50."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxunlearn.io.feature_weights import load_weights
from jaxunlearn.models.features import clip_prompts, clip_resnet, clip_vit
from scripts import convert_weights
from scripts import make_golden_clip as golden
from tests.torch_twins import perturb

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
torch_clip = pytest.importorskip("tests.torch_clip")

pytestmark = pytest.mark.parity
FULL_DEPTH = clip_resnet.CLIPResNetConfig(width=8, dims=24, head_dim=16)


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    model = torch_clip.ResNet(FULL_DEPTH)
    perturb(model, 0.02)
    with torch.no_grad():
        # Statistics as after training, so that activations neither vanish nor grow over 50 layers.
        model.train()(golden.normalised(golden.images((224, 224), 0)))
    model.eval()
    state = {f"visual.{name}": value.numpy() for name, value in model.state_dict().items()}
    return model, clip_resnet.from_state_dict(state, FULL_DEPTH)


@pytest.mark.parametrize(
    ("size", "position"), [((224, 224), True), ((224, 224), False), ((64, 64), False), ((97, 130), False)]
)
def test_resnet(resnet, size, position):
    model, params = resnet
    images = golden.images(size, 1)
    with torch.no_grad():
        wanted = model(golden.normalised(images), position).numpy()
    found = clip_resnet.embed(params, np.float32(images / 255), position=position, config=FULL_DEPTH)
    close(found, wanted)


@pytest.mark.parametrize("patch", [3, 4, 6])
def test_vit(patch):
    torch.manual_seed(patch)
    config = dataclasses.replace(golden.VIT, layers=6, width=32, patch=patch)
    model = torch_clip.vision_transformer(config)
    perturb(model, 0.05)
    images = golden.images((12, 12), 2)
    with torch.no_grad():
        wanted = model(golden.normalised(images)).image_embeds.numpy()
    params = clip_vit.from_state_dict(torch_clip.published(model), config)
    close(jax.jit(lambda p, x: clip_vit.embed(p, x, config=config))(params, np.float32(images / 255)), wanted)


def test_text():
    """With padding behind the end token, as the published code has it."""
    torch.manual_seed(0)
    model = torch_clip.text_transformer(width=32, layers=4, heads=4, dims=12, vocabulary=60, length=16)
    perturb(model, 0.05)
    ids = (58, 4, 9, 2, 59)
    padded = torch.zeros((1, 16), dtype=torch.long)
    padded[0, : len(ids)] = torch.tensor(ids)
    with torch.no_grad():
        wanted = model(padded).text_embeds[0].numpy()
    close(clip_prompts.text_vector(torch_clip.published(model), ids, head_dim=8), wanted)


def test_published_names_go_both_ways():
    model = torch_clip.vision_transformer(golden.VIT)
    tensors = torch_clip.published(model)
    other = torch_clip.vision_transformer(golden.VIT)
    torch_clip.load_published(other, tensors)
    again = torch_clip.published(other)
    assert all(np.array_equal(tensors[name], again[name]) for name in tensors)


def holder(state):
    """A module whose parameters have the dotted names of a state dict."""
    root = torch.nn.Module()
    for name, values in state.items():
        *path, last = name.split(".")
        node = root
        for part in path:
            if not hasattr(node, part):
                node.add_module(part, torch.nn.Module())
            node = getattr(node, part)
        node.register_parameter(last, torch.nn.Parameter(torch.from_numpy(np.array(values)), requires_grad=False))
    return root


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_published_archive_through_the_conversion(resnet, tmp_path, monkeypatch):
    """A TorchScript archive in half precision, as RN50.pt is one: converted, loaded and run."""
    model, _ = resnet
    torch.manual_seed(1)
    text = torch_clip.text_transformer(width=128, layers=2, heads=2, dims=24, vocabulary=49408, length=77)
    visual = {f"visual.{name}": value.numpy() for name, value in model.state_dict().items() if "tracked" not in name}
    state = {
        name: value if "bn" in name or "downsample.1" in name else value.astype(np.float16)
        for name, value in (visual | torch_clip.published(text)).items()
    }
    torch.jit.save(torch.jit.script(holder(state)), str(tmp_path / "RN50.pt"))
    convert = functools.partial(convert_weights.convert_clip_rn50, config=FULL_DEPTH)
    monkeypatch.setitem(convert_weights.CONVERTERS, "clip_rn50", convert)
    arguments = ["clip_rn50", str(tmp_path / "RN50.pt"), "--out", str(tmp_path / "out"), "--allow-unpinned"]
    assert convert_weights.main(arguments) == 0
    tensors = load_weights("clip_rn50", tmp_path / "out", allow_unpinned=True).tensors
    prompts = tensors.pop("prompts")
    rounded = {name: torch.from_numpy(np.float32(value)) for name, value in state.items()}
    tower = {name.removeprefix("visual."): value for name, value in rounded.items() if name.startswith("visual.")}
    model.load_state_dict(tower, strict=False)
    torch_clip.load_published(text, {name: value.numpy() for name, value in rounded.items()})
    images = golden.images((64, 64), 3)
    with torch.no_grad():
        wanted = model(golden.normalised(images), False).numpy()
        ids = torch.tensor(list(clip_prompts.PROMPT_IDS.values()))
        vectors = text(ids).text_embeds.numpy()
    params = clip_resnet.from_flat(tensors, FULL_DEPTH)
    close(clip_resnet.embed(params, np.float32(images / 255), position=False, config=FULL_DEPTH), wanted)
    close(prompts, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
