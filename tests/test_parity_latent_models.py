"""Autoencoder, text encoder and tokenizer against diffusers and transformers: the same weights, the same numbers."""

import functools
import json

import jax
import numpy as np
import pytest

from jaxunlearn.io.tokenizer import load_tokenizer
from jaxunlearn.models import convert
from jaxunlearn.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from jaxunlearn.models.clip_text import CLIPText, CLIPTextConfig
from jaxunlearn.models.latent_space import LatentSpace, TextEncoder
from jaxunlearn.models.parameters import abstract_params
from tests.tiny_clip import BOS, EOS, PROMPTS, write_tokenizer
from tests.torch_twins import perturb, twin_params

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def close(out, expected):
    expected = np.asarray(expected)
    assert out.shape == expected.shape
    assert np.abs(np.asarray(out) - expected).max() <= 2e-5 * max(1, np.abs(expected).max())


def levels(*channels):
    count = len(channels)
    return dict(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
        norm_num_groups=8,
    )


AUTOENCODERS = {
    "one_block": levels(16),
    "two_blocks": levels(16, 32),
    "three_blocks": levels(16, 32, 32) | dict(layers_per_block=2),
    "grey": levels(8, 16) | dict(in_channels=1, out_channels=1, latent_channels=2),
    "grey_in_colour_out": levels(8, 16) | dict(in_channels=1, latent_channels=3),
    "three_layers_odd_widths": levels(6, 15, 9) | dict(layers_per_block=3, norm_num_groups=3),
    "no_quant_conv": levels(16, 32) | dict(use_quant_conv=False, use_post_quant_conv=False),
    "quant_conv_before_only": levels(16, 32) | dict(use_post_quant_conv=False, shift_factor=0.1),
    "no_attention": levels(16, 32) | dict(mid_block_add_attention=False),
    "gelu": levels(16, 32) | dict(act_fn="gelu", scaling_factor=0.3),
}


def autoencoder(variant, spread=0.1):
    values = AUTOENCODERS[variant]
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(**values).eval()
    perturb(model, spread)
    config = AutoencoderKLConfig.from_dict(dict(model.config))
    assert config == AutoencoderKLConfig(**values)
    return model, config, twin_params(model, config)


def channels_last(tensor):
    return tensor.detach().permute(0, 2, 3, 1).contiguous().numpy()


@pytest.mark.parametrize("variant", AUTOENCODERS)
def test_autoencoder(variant):
    model, config, params = autoencoder(variant)
    module = AutoencoderKL(config)
    size = 4 * config.size_divisor
    x = torch.randn(2, config.in_channels, size, 2 * size)
    z = torch.randn(2, config.latent_channels, 8, 4)
    with torch.no_grad():
        posterior = model.encode(x).latent_dist
        images = model.decode(z).sample
    mean, logvar = quick_jit(functools.partial(module.apply, method="encode"))({"params": params}, channels_last(x))
    close(mean, channels_last(posterior.mean))
    close(logvar, channels_last(posterior.logvar))
    close(
        quick_jit(functools.partial(module.apply, method="decode"))({"params": params}, channels_last(z)),
        channels_last(images),
    )


def test_the_logarithm_of_the_variance_is_clipped_alike():
    model, config, params = autoencoder("two_blocks")
    x = 3 * torch.randn(1, 3, 16, 16)
    for tensors, shift in ((model.quant_conv.bias, 60.0), (model.quant_conv.bias, -200.0)):
        with torch.no_grad():
            tensors[4:6] += shift
        params["quant_conv"]["bias"] = model.quant_conv.bias.detach().numpy()
        with torch.no_grad():
            expected = channels_last(model.encode(x).latent_dist.logvar)
        _, logvar = AutoencoderKL(config).apply({"params": params}, channels_last(x), method="encode")
        assert expected.max() == 20 or expected.min() == -30
        close(logvar, expected)


def test_latent_space_gives_the_latents_of_the_pipeline():
    model, config, params = autoencoder("two_blocks", 0.02)
    space = LatentSpace(config, params, batch_size=2)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 8, 3), np.uint8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        posterior = model.encode(x).latent_dist
        expected = model.decode(posterior.mean).sample
    mean, std = space.encode(images)
    close(mean, channels_last(posterior.mean * model.config.scaling_factor))
    close(std, channels_last(posterior.std * model.config.scaling_factor))
    close(space.decode(mean), channels_last(expected))


TEXT_ENCODERS = {
    "quick_gelu": dict(hidden_act="quick_gelu"),
    "gelu": dict(hidden_act="gelu", num_hidden_layers=3),
    "small_vocabulary": dict(vocab_size=11, max_position_embeddings=5, hidden_size=12, num_attention_heads=3),
    "one_head": dict(num_attention_heads=1, vocab_size=1000, layer_norm_eps=1e-3),
}
TEXT = dict(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=77,
    eos_token_id=2,
    bos_token_id=1,
    pad_token_id=0,
)


def text_encoder(variant):
    values = TEXT | TEXT_ENCODERS[variant]
    torch.manual_seed(0)
    their_config = transformers.CLIPTextConfig(**values)
    model = transformers.CLIPTextModel(their_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    config = CLIPTextConfig.from_dict({**json.loads(their_config.to_json_string()), "architectures": ["CLIPTextModel"]})
    assert config == CLIPTextConfig(**values)
    return model, config, twin_params(model, config)


@pytest.mark.parametrize("variant", TEXT_ENCODERS)
def test_text_encoder(variant):
    model, config, params = text_encoder(variant)
    rng = np.random.default_rng(0)
    for length in (1, 3, config.max_position_embeddings):
        ids = rng.integers(0, config.vocab_size, (3, length))
        with torch.no_grad():
            expected = model(torch.from_numpy(ids)).last_hidden_state
        close(quick_jit(CLIPText(config).apply)({"params": params}, ids), expected)


def test_the_names_of_transformers_4_are_read():
    _, config, params = text_encoder("quick_gelu")
    tensors = {f"text_model.{name}": value for name, value in convert.to_diffusers(params).items()}
    tensors["text_model.embeddings.position_ids"] = np.arange(77)[None]
    again = convert.to_flax(tensors, abstract_params(config))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def same_ids(folder, **kwargs):
    theirs, ours = transformers.CLIPTokenizer.from_pretrained(folder), load_tokenizer(folder, **kwargs)
    length = ours.model_max_length
    expected = theirs(PROMPTS, padding="max_length", max_length=length, truncation=True).input_ids
    ids = ours(PROMPTS)
    assert ids.dtype == np.int32
    for prompt, row, expected_row in zip(PROMPTS, ids, expected):
        assert row.tolist() == expected_row, prompt
    whole = theirs(PROMPTS, padding=False, truncation=False).input_ids
    assert ours.truncated(PROMPTS) == [len(row) > length for row in whole]
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.pad_token_id == theirs.pad_token_id
    return theirs


@pytest.mark.parametrize("length", [77, 7])
@pytest.mark.parametrize("pad", [EOS, "!"])
def test_token_ids(tmp_path, pad, length):
    folder = write_tokenizer(tmp_path / "tokenizer", pad, length)
    theirs = same_ids(folder)
    theirs.save_pretrained(tmp_path / "again")  # tokenizer.json and tokenizer_config.json
    assert not (tmp_path / "again" / "vocab.json").exists()
    same_ids(tmp_path / "again")
    (folder / "special_tokens_map.json").unlink()
    same_ids(folder)


def rewrite(folder, name, change):
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(change(values)))


def test_token_ids_with_other_forms_of_the_special_tokens(tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer")
    rewrite(folder, "tokenizer_config.json", lambda _: {"model_max_length": 77})
    (folder / "special_tokens_map.json").unlink()
    same_ids(folder)
    flags = dict(lstrip=False, normalized=True, rstrip=False, single_word=False, special=True)
    decoder = {"569": dict(content=EOS, **flags), "568": dict(content=BOS, **flags), "0": dict(content="!", **flags)}
    config = dict(added_tokens_decoder=decoder, model_max_length=9, pad_token="!", bos_token=BOS, eos_token=EOS)
    rewrite(folder, "tokenizer_config.json", lambda _: config | dict(padding_side="left", truncation_side="left"))
    rewrite(folder, "special_tokens_map.json", lambda _: {"pad_token": EOS})
    same_ids(folder)
    folder = write_tokenizer(tmp_path / "alone")
    (folder / "tokenizer_config.json").unlink()
    same_ids(folder, model_max_length=12)


def test_token_ids_with_learned_words(tmp_path):
    """Textual inversion adds tokens after the vocabulary."""
    folder = write_tokenizer(tmp_path / "tokenizer")
    rewrite(folder, "added_tokens.json", lambda _: {"cat": 571, "photo of": 570})
    theirs = same_ids(folder)
    assert load_tokenizer(folder).vocab_size == 572
    assert load_tokenizer(folder)(["a cat"])[0, 2] == 571
    theirs.save_pretrained(tmp_path / "again")
    same_ids(tmp_path / "again")


def test_prompt_to_condition(tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer")
    torch.manual_seed(1)
    their_config = transformers.CLIPTextConfig(**TEXT | dict(vocab_size=570, eos_token_id=569))
    model = transformers.CLIPTextModel(their_config).eval()
    config = CLIPTextConfig.from_dict(json.loads(their_config.to_json_string()))
    encoder = TextEncoder(config, twin_params(model, config), load_tokenizer(folder), batch_size=3)
    prompts = ["the cat", "", "a photo of a house", "the cat"]
    tokens = transformers.CLIPTokenizer.from_pretrained(folder)(prompts, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        expected = model(tokens.input_ids).last_hidden_state
    close(encoder.embed(prompts), expected)
