"""CLIP's towers: golden numbers of torch twins, names and layouts, sizes, and the text vectors of the two prompts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.models.features import clip_prompts, clip_resnet, clip_vit, trees
from scripts import make_golden_clip as golden

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def published_shapes(module, config):
    """Published name -> shape in torch layout."""
    shapes = {}
    for path, leaf in trees.paths(module.abstract_params(config)).items():
        order = {4: (3, 2, 0, 1), 2: (1, 0)}[len(leaf.shape)] if path[-1] == "kernel" else range(len(leaf.shape))
        shapes[module.torch_name(path)] = tuple(leaf.shape[i] for i in order)
    return shapes


def drawn(module, config):
    return module.from_state_dict(golden.state(published_shapes(module, config)), config)


@pytest.fixture(scope="module")
def stored():
    with np.load(golden.GOLDEN / "clip_towers.npz") as file:
        return dict(file)


def close(found, wanted):
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("case", ["resnet", "resnet_other_size"])
def test_golden_resnet(case, stored):
    size, seed = ((32, 32), 10) if case != "resnet_other_size" else (golden.OTHER_SIZE, 11)
    images = np.float32(golden.images(size, seed) / 255)
    run = functools.partial(clip_resnet.embed, position=case == "resnet", config=golden.RESNET)
    close(quick_jit(run)(drawn(clip_resnet, golden.RESNET), images), stored[case])


def test_golden_vit(stored):
    images = np.float32(golden.images((12, 12), 12) / 255)
    run = functools.partial(clip_vit.embed, config=golden.VIT)
    close(quick_jit(run)(drawn(clip_vit, golden.VIT), images), stored["vit"])


def test_golden_text(stored):
    state = golden.state(golden.text_shapes())
    for ids, wanted in zip(golden.TEXT_IDS, stored["text"]):
        found = clip_prompts.text_vector(state, ids, head_dim=golden.TEXT["width"] // golden.TEXT["heads"])
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_prompt_ids_follow_from_the_order_of_the_vocabulary():
    """Bytes in CLIP's order, bytes at the end of a word, merges, begin, end; see the docstring of PROMPT_IDS."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stop = 256 + printable.index(ord("."))
    size = 256 * 2 + (49152 - 256 - 2) + 2
    good, bad, photo = (512 + merge for merge in (374, 1591, 613))
    assert clip_prompts.PROMPT_IDS["Good photo."] == (size - 2, good, photo, stop, size - 1)
    assert clip_prompts.PROMPT_IDS["Bad photo."] == (size - 2, bad, photo, stop, size - 1)


def test_prompt_vectors_are_unit_and_good_comes_first():
    state = golden.state(golden.text_shapes() | {"token_embedding.weight": (49408, golden.TEXT["width"])})
    vectors = clip_prompts.prompt_vectors(state, head_dim=8)
    assert vectors.shape == (2, golden.TEXT["dims"])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    good = clip_prompts.text_vector(state, clip_prompts.PROMPT_IDS["Good photo."], 8)
    np.testing.assert_allclose(vectors[0], good / np.linalg.norm(good), atol=1e-6)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


def test_text_vector_without_a_text_tower():
    with pytest.raises(ValueError, match="missing: token_embedding.weight"):
        clip_prompts.prompt_vectors({"visual.proj": np.zeros((2, 2))})


@pytest.mark.parametrize(
    ("module", "config", "total", "text"),
    [
        (clip_resnet, clip_resnet.RN50, 102_007_137, 63_165_952 + 512 * 1024),
        (clip_vit, clip_vit.VIT_L14, 427_616_513, 123_060_480 + 768 * 768),
    ],
)
def test_full_size_has_as_many_parameters_as_published(module, config, total, text):
    """The published total is the image tower, the text tower with its projection, and one logit scale."""
    shapes = published_shapes(module, config)
    assert sum(int(np.prod(s)) for name, s in shapes.items() if "running_" not in name) == total - text - 1


def test_names_are_strict():
    state = golden.state(published_shapes(clip_vit, golden.VIT))
    state["transformer.resblocks.0.ln_1.weight"] = np.ones(3)  # Of the text tower: passed over.
    params = clip_vit.from_state_dict(state, golden.VIT)
    again = clip_vit.from_flat(clip_vit.to_flat(params), golden.VIT)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    state["visual.extra"] = state.pop("visual.class_embedding")
    with pytest.raises(ValueError, match=r"missing: visual.class_embedding \(16,\)\nunexpected: visual.extra"):
        clip_vit.from_state_dict(state, golden.VIT)


def test_refused_images():
    with pytest.raises(ValueError, match=r"\[N,12,12,3\], got shape \(1, 8, 8, 3\)"):
        clip_vit.embed({}, np.zeros((1, 8, 8, 3)), config=golden.VIT)
    for shape in ((1, 96, 96, 1), (1, 16, 96, 3), (96, 96, 3)):
        with pytest.raises(ValueError, match="at least 32 pixels"):
            clip_resnet.embed({}, np.zeros(shape))
    run = functools.partial(clip_resnet.embed, config=golden.RESNET)
    with pytest.raises(ValueError, match="has 16 places and the image 64"):
        jax.eval_shape(run, clip_resnet.abstract_params(golden.RESNET), np.zeros((1, 64, 64, 3), np.float32))
