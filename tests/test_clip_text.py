"""The text encoder: golden numbers of transformers, the causal mask, inputs, configs of both versions of transformers."""

import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.models import convert
from jaxunlearn.models.clip_text import CLIPText, CLIPTextConfig, causal_attention, quick_gelu
from jaxunlearn.models.parameters import abstract_params, init_params
from scripts import make_golden_latent_models as golden

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
TINY = golden.TEXT_ENCODERS["quick_gelu"]


def golden_params(config, seed):
    shapes = {name: v.shape for name, v in convert.to_diffusers(init_params(config, 0)).items()}
    return convert.to_flax(golden.weights(shapes, seed), abstract_params(config))


@pytest.fixture(scope="module")
def tiny():
    config = CLIPTextConfig(**TINY)
    params = golden_params(config, 0)
    return config, params, quick_jit(lambda ids: CLIPText(config).apply({"params": params}, ids))


@pytest.mark.parametrize("name", golden.TEXT_ENCODERS)
def test_golden(name):
    file = np.load(golden.GOLDEN / f"clip_text_{name}.npz")
    stored = json.loads(str(file["config"]))
    assert stored == golden.TEXT_ENCODERS[name]
    config = CLIPTextConfig.from_dict(stored)
    params = golden_params(config, int(file["seed"]))
    with jax.default_matmul_precision("highest"):
        out = quick_jit(CLIPText(config).apply)({"params": params}, file["input_ids"])
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, file["out"], rtol=0, atol=2e-5 * max(1, np.abs(file["out"]).max()))


def test_a_token_sees_only_those_before_it(tiny):
    _, _, apply = tiny
    ids = np.array([[3, 4, 5, 6, 7], [3, 4, 5, 9, 7]])
    out = apply(ids)
    np.testing.assert_allclose(out[0, :3], out[1, :3], atol=1e-6)
    assert float(jnp.abs(out[0, 3:] - out[1, 3:]).max(-1).min()) > 1e-3


def test_causal_attention_against_sums(x64):
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 4, 3, 5))
    expected = np.zeros_like(q)
    for b, i, h in np.ndindex(2, 4, 3):
        weights = np.exp([q[b, i, h] @ k[b, j, h] / np.sqrt(5) for j in range(i + 1)])
        expected[b, i, h] = weights @ v[b, : i + 1, h] / weights.sum()
    np.testing.assert_allclose(causal_attention(*map(jnp.asarray, (q, k, v))), expected, rtol=1e-12)


def test_quick_gelu():
    x = np.linspace(-5, 5, 11)
    np.testing.assert_allclose(quick_gelu(jnp.asarray(x)), x / (1 + np.exp(-1.702 * x)), atol=1e-6)


def test_fast_and_textbook_forms_are_one_function(tiny, x64):
    config, params, _ = tiny
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
    ids = np.array([[1, 2, 3]])
    out, expected = (
        quick_jit(CLIPText(config, dtype=jnp.float64, fast=fast).apply)({"params": params}, ids)
        for fast in (True, False)
    )
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)


def test_bfloat16_is_close(tiny):
    config, params, apply = tiny
    ids = np.arange(10).reshape(2, 5)
    half = quick_jit(CLIPText(config, dtype=jnp.bfloat16).apply)({"params": params}, ids)
    assert half.dtype == jnp.bfloat16
    exact = apply(ids)
    assert 0 < float(jnp.abs(half - exact).max()) < 0.1 * float(jnp.abs(exact).max())


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([[0, 50]]), "must be in 0..49, got 50; are tokenizer"),
        (np.array([[-1, 3, -7]]), "must be in 0..49, got -7, -1"),
        (np.zeros((1, 12), int), "must have 1 to 11 tokens a prompt, got 12"),
        (np.zeros((1, 0), int), "must have 1 to 11 tokens a prompt, got 0"),
        (np.zeros(3, int), r"must be integers \[B,N\], got int\d+ \(3,\)"),
        (np.zeros((1, 3)), r"must be integers \[B,N\], got float"),
    ],
)
def test_ids_that_do_not_fit(tiny, ids, message):
    config, params, _ = tiny
    with pytest.raises(ValueError, match=message):
        CLIPText(config).apply({"params": params}, ids)


REFUSED = {
    "architectures": ["CLIPTextModelWithProjection"],
    "model_type": "t5",
    "vocab_size": 0,
    "hidden_size": 24.0,
    "intermediate_size": None,
    "num_hidden_layers": True,
    "num_attention_heads": 7,
    "max_position_embeddings": -1,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 0,
    "attention_dropout": 1,
    "eos_token_id": [1, "x"],
}


@pytest.mark.parametrize("key", REFUSED)
def test_refusals_name_key_value_and_what_is_allowed(key):
    with pytest.raises(ValueError, match="is not supported; allowed: ") as error:
        CLIPTextConfig.from_dict({**TINY, key: REFUSED[key]})
    lines = str(error.value).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(key)


def test_all_refusals_at_once():
    with pytest.raises(ValueError) as error:
        CLIPTextConfig.from_dict({**TINY, **REFUSED})
    keys = [line.split(":")[0] for line in str(error.value).splitlines()]
    assert sorted(keys) == sorted(
        set(REFUSED) - {"num_attention_heads"}
    )  # the width that it should divide is wrong too


V4 = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
V5 = {
    **{key: value for key, value in V4.items() if key not in ("dropout", "torch_dtype")},
    "dtype": "float32",
    "chunk_size_feed_forward": 0,
    "id2label": {"0": "LABEL_0"},
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0},
    "output_attentions": False,
    "output_hidden_states": False,
    "problem_type": None,
    "return_dict": True,
    "transformers_version": "5.23.0",
}


def test_configs_of_both_versions_and_of_a_whole_model():
    expected = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, bos_token_id=0, eos_token_id=2
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CLIPTextConfig.from_dict(V4) == expected
        assert CLIPTextConfig.from_dict(V5) == expected
        whole = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 768, "text_config": V4}
        assert CLIPTextConfig.from_dict(whole | {"vision_config": {"hidden_size": 5}}) == expected
    del whole["text_config"]
    with pytest.raises(ValueError, match="text_config: None is not supported"):
        CLIPTextConfig.from_dict(whole)
    with pytest.warns(UserWarning, match="unknown keys .*: rope_theta$"):
        CLIPTextConfig.from_dict({**V4, "rope_theta": 1})


def test_config_round_trip():
    config = CLIPTextConfig.from_dict({**TINY, "eos_token_id": [1, 2]})
    plain = config.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert CLIPTextConfig.from_dict(plain) == config
    assert hash(CLIPTextConfig.from_dict(plain)) == hash(config)
    assert CLIPTextConfig.from_dict({}) == CLIPTextConfig()
