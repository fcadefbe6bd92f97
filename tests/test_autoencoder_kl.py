"""The autoencoder: golden numbers of diffusers, fast against textbook form, inputs, config refusals."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.models import convert
from jaxunlearn.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from jaxunlearn.models.parameters import abstract_params, init_params
from scripts import make_golden_latent_models as golden

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

TINY = dict(
    in_channels=1,
    out_channels=1,
    block_out_channels=(4, 8),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    latent_channels=2,
    norm_num_groups=2,
)


def golden_params(config, seed):
    shapes = {name: v.shape for name, v in convert.to_diffusers(init_params(config, 0)).items()}
    return convert.to_flax(golden.weights(shapes, seed), abstract_params(config))


def images(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def apply(config, params, x, method, **settings):
    module = AutoencoderKL(config, **settings)
    return quick_jit(functools.partial(module.apply, method=method))({"params": params}, x)


@pytest.fixture(scope="module")
def tiny():
    config = AutoencoderKLConfig(**TINY)
    return config, golden_params(config, 0)


@pytest.mark.parametrize("name", golden.AUTOENCODERS)
def test_golden(name):
    file = np.load(golden.GOLDEN / f"autoencoder_kl_{name}.npz")
    stored = json.loads(str(file["config"]))
    assert stored == json.loads(json.dumps(golden.AUTOENCODERS[name]))
    config = AutoencoderKLConfig.from_dict(stored)
    params = golden_params(config, int(file["seed"]))
    with jax.default_matmul_precision("highest"):
        results = dict(zip(("mean", "logvar"), apply(config, params, file["x"], "encode")))
        results["images"] = apply(config, params, file["z"], "decode")
    for key, out in results.items():
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out, file[key], rtol=0, atol=2e-5 * max(1, np.abs(file[key]).max()), err_msg=key)


@pytest.mark.slow
def test_fast_and_textbook_forms_are_one_function(tiny, x64):
    config, params = tiny
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
    x = images(1, 4, 8, 1).astype(jnp.float64)
    out, expected = (apply(config, params, x, "__call__", dtype=jnp.float64, fast=fast) for fast in (True, False))
    assert out.dtype == jnp.float64
    assert out.shape == x.shape
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12 * float(jnp.abs(expected).max()))


@pytest.mark.slow
def test_bfloat16_is_close_and_the_output_has_the_type_of_the_input(tiny):
    config, params = tiny
    x = images(2, 4, 4, 1)
    exact, half = (apply(config, params, x, "__call__", dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert half.dtype == jnp.float32
    difference = float(jnp.abs(half - exact).max())
    assert 0 < difference < 0.1 * float(jnp.abs(exact).max())


def test_examples_do_not_mix_and_logvar_is_clipped(tiny):
    config, params = tiny
    x = images(2, 4, 4, 1)
    mean, _ = apply(config, params, x, "encode")
    np.testing.assert_allclose(apply(config, params, x[::-1], "encode")[0][::-1], mean, atol=1e-5)
    np.testing.assert_allclose(apply(config, params, x.at[1].set(7.0), "encode")[0][0], mean[0], atol=1e-5)
    far = {**params, "quant_conv": {**params["quant_conv"], "bias": np.array([0, 0, 99, -99], np.float32)}}
    _, logvar = apply(config, far, x, "encode")
    np.testing.assert_array_equal(np.unique(logvar[..., 0]), [20])
    np.testing.assert_array_equal(np.unique(logvar[..., 1]), [-30])


def test_parts_that_a_config_leaves_out():
    tree = abstract_params(AutoencoderKLConfig(**TINY))
    assert tree["quant_conv"]["kernel"].shape == (1, 1, 4, 4)
    assert tree["post_quant_conv"]["kernel"].shape == (1, 1, 2, 2)
    assert tree["encoder"]["mid_block"]["attentions_0"]["to_q"]["kernel"].shape == (8, 8)
    assert set(tree["decoder"]["up_blocks_0"]) == {"resnets_0", "resnets_1", "upsamplers_0"}
    assert set(tree["encoder"]["down_blocks_1"]) == {"resnets_0"}
    assert set(tree["encoder"]["down_blocks_0"]["resnets_0"]) == {"norm1", "conv1", "norm2", "conv2"}
    less = dict(use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False)
    tree = abstract_params(AutoencoderKLConfig(**TINY, **less))
    assert set(tree) == {"encoder", "decoder"}
    assert set(tree["decoder"]["mid_block"]) == {"resnets_0", "resnets_1"}


@pytest.mark.parametrize(
    ("method", "x", "message"),
    [
        ("encode", images(1, 5, 4, 1), "multiples of 2 .* got 5x4"),
        ("encode", images(1, 4, 4, 3), r"x must be images .*\[B,H,W,1\]"),
        ("encode", images(4, 4, 1), r"x must be images .*got shape \(4, 4, 1\)"),
        ("encode", jnp.zeros((1, 4, 4, 1), jnp.uint8), "x must be floating, got uint8"),
        ("encode", jnp.zeros((1, 0, 4, 1)), "x must be images"),
        ("decode", images(1, 2, 2, 4), r"z must be latents \[B,H,W,2\]"),
        ("decode", jnp.zeros((1, 2, 2, 2), jnp.int32), "z must be floating"),
    ],
)
def test_inputs_that_do_not_fit(tiny, method, x, message):
    config, params = tiny
    with pytest.raises(ValueError, match=message):
        AutoencoderKL(config).apply({"params": params}, x, method=method)


def test_unknown_attention_impl(tiny):
    config, params = tiny
    with pytest.raises(ValueError, match="attention_impl must be one of"):
        AutoencoderKL(config, attention_impl="flash").apply({"params": params}, images(1, 4, 4, 1))


REFUSED = {
    "_class_name": "VQModel",
    "in_channels": 0,
    "out_channels": None,
    "layers_per_block": 1.5,
    "latent_channels": True,
    "norm_num_groups": 3,
    "sample_size": [1, 2, 3],
    "act_fn": "tanh",
    "scaling_factor": 0,
    "shift_factor": "0.1",
    "latents_mean": [0.1, 0.2],
    "latents_std": [1.0, 2.0],
    "force_upcast": None,
    "use_quant_conv": 1,
    "use_post_quant_conv": "yes",
    "mid_block_add_attention": None,
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [],
}


@pytest.mark.parametrize("key", REFUSED)
def test_refusals_name_key_value_and_what_is_allowed(key):
    with pytest.raises(ValueError, match="is not supported; allowed: ") as error:
        AutoencoderKLConfig.from_dict({**TINY, key: REFUSED[key]})
    lines = str(error.value).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(key)


def test_all_refusals_at_once():
    keys = [key for key in REFUSED if key != "block_out_channels"]
    with pytest.raises(ValueError) as error:
        AutoencoderKLConfig.from_dict({**TINY, **{key: REFUSED[key] for key in keys}})
    found = {line.split(":")[0] for line in str(error.value).splitlines()}
    assert {name.split("[")[0] for name in found} == set(keys)


def test_config_defaults_round_trip_and_unknown_keys():
    config = AutoencoderKLConfig.from_dict({**TINY, "_class_name": "AutoencoderKL", "_diffusers_version": "0.2.2"})
    assert config == AutoencoderKLConfig(**TINY)
    assert config.scaling_factor == 0.18215
    assert config.size_divisor == 2
    assert config.shift == 0
    plain = config.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert AutoencoderKLConfig.from_dict(plain) == config
    assert hash(AutoencoderKLConfig.from_dict(plain)) == hash(config)
    assert AutoencoderKLConfig.from_dict({}) == AutoencoderKLConfig()
    with pytest.warns(UserWarning, match="unknown keys .*: alpha, beta$"):
        AutoencoderKLConfig.from_dict({**TINY, "beta": 1, "alpha": 2})
