"""Images to scaled latents and back, prompts to conditions: batches, scales, and what is refused."""

import functools

import jax
import numpy as np
import pytest

from jaxunlearn.io.tokenizer import load_tokenizer
from jaxunlearn.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from jaxunlearn.models.clip_text import CLIPText, CLIPTextConfig
from jaxunlearn.models.latent_space import LatentSpace, TextEncoder
from jaxunlearn.models.parameters import init_params
from tests.tiny_clip import vocabulary, write_tokenizer

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

CONFIG = AutoencoderKLConfig(
    in_channels=1,
    out_channels=1,
    block_out_channels=(4, 8),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    latent_channels=2,
    norm_num_groups=2,
    scaling_factor=0.25,
    shift_factor=0.5,
)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, 0)


def model(params, x, method):
    return quick_jit(functools.partial(AutoencoderKL(CONFIG).apply, method=method))({"params": params}, x)


@pytest.fixture(scope="module")
def space(params):
    return LatentSpace(CONFIG, params, batch_size=3)


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (4, 8, 4, 1), np.uint8)


@pytest.mark.slow
def test_encode_gives_scaled_mean_and_spread(space, params, pictures):
    mean, std = space.encode(pictures)
    assert mean.dtype == std.dtype == np.float32
    assert mean.shape == std.shape == (4, *space.latent_shape((8, 4, 1))) == (4, 4, 2, 2)
    x = pictures.astype(np.float32) / 127.5 - 1
    expected, logvar = model(params, x, "encode")
    np.testing.assert_allclose(mean, 0.25 * (expected - 0.5), atol=1e-5)
    np.testing.assert_allclose(std, 0.25 * np.exp(logvar / 2), rtol=1e-4)
    again, _ = space.encode(x.astype(np.float64))
    np.testing.assert_allclose(again, mean, atol=1e-5)


@pytest.mark.slow
def test_decode_takes_scaled_latents(space, params):
    z = np.random.default_rng(1).standard_normal((4, 4, 2, 2))
    out = space.decode(z)
    assert out.dtype == np.float32
    assert out.shape == (4, 8, 4, 1)
    expected = model(params, np.float32(z / 0.25 + 0.5), "decode")
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_batches_do_not_matter_and_one_program_serves_all(space, pictures):
    mean, _ = space.encode(pictures)
    for count in (1, 2, 3):
        np.testing.assert_allclose(space.encode(pictures[:count])[0], mean[:count], atol=1e-5)
    programs = space._encode._cache_size()
    assert programs <= 2  # bytes and floats
    space.encode(pictures[:2])
    assert space._encode._cache_size() == programs
    nothing, _ = space.encode(pictures[:0])
    assert nothing.shape == (0, 4, 2, 2)
    assert space.decode(nothing).shape == (0, 8, 4, 1)


def test_images_and_latents_that_do_not_suit(space):
    with pytest.raises(ValueError) as error:
        space.latent_shape((9, 4, 3))
    size, channels = str(error.value).splitlines()
    assert "9x4" in size
    assert "multiples of 2" in size
    assert "3 channels, the autoencoder takes 1" in channels
    with pytest.raises(ValueError, match="0x4"):
        space.latent_shape((0, 4, 1))
    with pytest.raises(ValueError, match=r"images must be \[N,H,W,C\]"):
        space.encode(np.zeros((8, 4, 1), np.uint8))
    with pytest.raises(TypeError, match="uint8 in 0..255 or floating .* got int64"):
        space.encode(np.zeros((1, 8, 4, 1), np.int64))
    with pytest.raises(ValueError, match=r"latents must be \[N,h,w,2\]"):
        space.decode(np.zeros((1, 4, 2, 4)))
    with pytest.raises(ValueError, match="add or remove axes"):
        space.decode(np.zeros((4, 2, 2)))
    with pytest.raises(TypeError, match="latents must be floating, got uint8"):
        space.decode(np.zeros((1, 4, 2, 2), np.uint8))


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8"])
def test_batch_sizes_that_are_none(params, value):
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1"):
        LatentSpace(CONFIG, params, batch_size=value)


TEXT = dict(
    vocab_size=len(vocabulary()),
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=6,
)


@pytest.fixture
def tokenizer(tmp_path):
    return load_tokenizer(write_tokenizer(tmp_path, length=6))


def test_prompts_are_embedded_once(tokenizer):
    config = CLIPTextConfig(**TEXT)
    params, seen = init_params(config, 0), []

    def spy(prompts):
        seen.extend(prompts)
        return tokenizer(prompts)

    encoder = TextEncoder(config, params, spy, batch_size=2)
    prompts = ["the cat", "", "a photo", "the cat", ""]
    out = encoder.embed(prompts)
    assert out.dtype == np.float32
    assert out.shape == (5, 6, 8)
    assert seen == ["the cat", "", "a photo"]
    expected = quick_jit(CLIPText(config).apply)({"params": params}, tokenizer(prompts))
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_array_equal(out[0], out[3])
    np.testing.assert_array_equal(encoder.embed(tuple(prompts[:3])), out[:3])
    assert encoder._apply._cache_size() == 1
    assert encoder.embed([]).shape == (0, 6, 8)
    with pytest.raises(ValueError, match="put it into a list"):
        encoder.embed("the cat")


def test_a_tokenizer_that_does_not_suit(tokenizer):
    config = CLIPTextConfig(**TEXT | dict(vocab_size=100, max_position_embeddings=5))
    params = init_params(config, 0)
    with pytest.raises(ValueError) as error:
        TextEncoder(config, params, tokenizer)
    length, vocabulary_size = str(error.value).splitlines()
    assert "model_max_length is 6, the text encoder allows at most 5" in length
    assert "vocab_size is 570, the text encoder allows at most 100" in vocabulary_size
    encoder = TextEncoder(config, params, lambda prompts: np.full((len(prompts), 5), 100))
    with pytest.raises(ValueError, match="must be in 0..99, got 100"):
        encoder.embed(["the cat"])
