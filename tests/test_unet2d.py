"""The UNet: golden outputs of diffusers, fast against textbook form, config refusals, inputs, initial values."""

import functools
import importlib.util
import json
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.models import convert
from jaxunlearn.models.parameters import abstract_params, init_params
from jaxunlearn.models.unet2d import UNet2D, UNet2DConfig, sinusoid

ROOT = pathlib.Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("make_golden_unet", ROOT / "scripts" / "make_golden_unet.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiles in a third of the time; the code is slower, which does not matter here."""

TINY = dict(
    in_channels=1,
    out_channels=1,
    block_out_channels=(4, 8),
    layers_per_block=1,
    norm_num_groups=2,
    attention_head_dim=4,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
ONE_LEVEL = TINY | dict(
    block_out_channels=(8,),
    down_block_types=("AttnDownBlock2D",),
    up_block_types=("AttnUpBlock2D",),
    mid_block_type=None,
)


def golden_params(config, seed):
    shapes = {name: v.shape for name, v in convert.to_diffusers(init_params(config, 0)).items()}
    return convert.to_flax(golden.weights(shapes, seed), abstract_params(config))


def check_golden(name, cases, config_class, module, *, gradients):
    """Outputs of diffusers, and its gradients too where the file has them."""
    file = np.load(ROOT / "tests" / "golden" / f"unet2d_{name}.npz")
    stored = json.loads(str(file["config"]))
    assert stored == json.loads(json.dumps(cases[name]))
    config = config_class.from_dict(stored)
    params = golden_params(config, int(file["seed"]))
    context = (file["context"],) if "context" in file else ()
    labels = file["labels"] if file["labels"].size else None

    def loss(params):
        out = module(config).apply({"params": params}, file["x"], file["t"], *context, labels)
        return jnp.mean(jnp.square(out)), out

    with jax.default_matmul_precision("highest"):
        if gradients:
            grads, out = quick_jit(jax.grad(loss, has_aux=True))(params)
            tensors = convert.to_diffusers(grads)
            norms = [np.linalg.norm(tensors[name].astype(np.float64)) for name in sorted(tensors)]
            largest = max(file["gradient_norms"])
            np.testing.assert_allclose(norms, file["gradient_norms"], rtol=1e-4, atol=1e-6 * largest)
        else:
            out = quick_jit(loss)(params)[1]
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, file["out"], rtol=0, atol=2e-5 * max(1, np.abs(file["out"]).max()))


def images(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module")
def tiny():
    config = UNet2DConfig(**TINY)
    return UNet2D(config), golden_params(config, 0)


@pytest.fixture(scope="module")
def one_level():
    config = UNet2DConfig(**ONE_LEVEL)
    return UNet2D(config), golden_params(config, 0)


@pytest.mark.parametrize("name", golden.CASES)
def test_golden(name):
    check_golden(name, golden.CASES, UNet2DConfig, UNet2D, gradients=name == "scale_shift")


@pytest.mark.slow
def test_fast_and_textbook_forms_are_one_function(one_level, x64):
    module, params = one_level
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
    x, t = images(2, 8, 8, 1).astype(jnp.float64), jnp.array([3, 700])

    def results(fast):
        one = UNet2D(module.config, dtype=jnp.float64, fast=fast)
        return quick_jit(jax.value_and_grad(lambda p: jnp.mean(jnp.square(one.apply({"params": p}, x, t)))))(params)

    (value, grads), (expected_value, expected) = results(True), results(False)
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, expected_value, rtol=1e-12)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
    assert largest > 1e-3
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=1e-12 * largest), grads, expected)


def test_compiles_once_keeps_examples_apart_and_takes_scalar_or_float_t(one_level):
    module, params = one_level
    traces = []

    @quick_jit
    def apply(x, t):
        traces.append(1)
        return module.apply({"params": params}, x, t)

    x = images(2, 8, 8, 1)
    both = apply(x, jnp.array([5, 900]))
    swapped = apply(x[::-1], jnp.array([900, 5]))
    np.testing.assert_allclose(swapped[::-1], both, atol=1e-5)
    other = apply(x.at[1].set(7.0), jnp.array([5, 1]))
    np.testing.assert_allclose(other[0], both[0], atol=1e-6)
    assert len(traces) == 1
    same = apply(x, jnp.array([5, 5]))
    np.testing.assert_allclose(apply(x, jnp.array(5)), same, atol=1e-6)
    np.testing.assert_allclose(apply(x, jnp.array([5.0, 5.0])), same, atol=1e-6)


def test_bfloat16_is_close_and_the_output_has_the_type_of_the_input(one_level):
    module, params = one_level
    x, t = images(2, 4, 4, 1), jnp.array([3, 700])
    exact = quick_jit(module.apply)({"params": params}, x, t)
    half = quick_jit(UNet2D(module.config, dtype=jnp.bfloat16).apply)({"params": params}, x, t)
    assert half.dtype == jnp.float32
    difference = float(jnp.abs(half - exact).max())
    assert 0 < difference < 0.05 * float(jnp.abs(exact).max())


def test_dropout_only_when_asked_for(one_level):
    plain_module, params = one_level
    module = UNet2D(UNet2DConfig(**ONE_LEVEL, dropout=0.5))
    x, t = images(2, 4, 4, 1), jnp.array([3, 700])
    plain = quick_jit(plain_module.apply)({"params": params}, x, t)
    np.testing.assert_array_equal(quick_jit(module.apply)({"params": params}, x, t), plain)
    apply = quick_jit(lambda key: module.apply({"params": params}, x, t, deterministic=False, rngs={"dropout": key}))
    one, same, other = (apply(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert float(jnp.abs(one - other).max()) > 1e-4
    assert float(jnp.abs(one - plain).max()) > 1e-4


def test_class_embedding_types():
    config = UNet2DConfig(**ONE_LEVEL, class_embed_type="identity")
    params = golden_params(config, 0)
    assert "class_embedding" not in params
    x, t = images(1, 4, 4, 1), jnp.array([3])
    apply = quick_jit(lambda labels: UNet2D(config).apply({"params": params}, x, t, labels))
    assert float(jnp.abs(apply(jnp.zeros((1, 32))) - apply(jnp.ones((1, 32)))).max()) > 1e-3
    tree = abstract_params(UNet2DConfig(**TINY, class_embed_type="timestep", num_class_embeds=3))
    assert tree["class_embedding"]["linear_1"]["kernel"].shape == (4, 16)
    tree = abstract_params(UNet2DConfig(**TINY, num_class_embeds=3))
    assert tree["class_embedding"]["embedding"].shape == (3, 16)


def test_sinusoid_golden():
    expected = [-0.99938, -0.95214, -0.94100, 0.55951, 0.03531, -0.30565, -0.33841, 0.82882]
    np.testing.assert_allclose(sinusoid(jnp.array([977]), 8, True, 0)[0], expected, atol=2e-5)
    expected = [0.03531, 0.97911, 0.86073, 0.09754, -0.99938, 0.20334, -0.50905, 0.99523]
    np.testing.assert_allclose(sinusoid(jnp.array([977.0]), 8, False, 1)[0], expected, atol=2e-5)
    odd = sinusoid(jnp.array([977]), 9, False, 1)
    assert odd.shape == (1, 9)
    assert odd[0, -1] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=images(2, 15, 8, 1)), "multiples of 2 .* got 15x8"),
        (dict(x=images(2, 8, 8, 3)), r"x must be \[B,H,W,1\]"),
        (dict(x=images(8, 8, 1)), r"x must be \[B,H,W,1\]"),
        (dict(x=jnp.zeros((2, 8, 8, 1), jnp.uint8)), "x must be floating"),
        (dict(t=jnp.zeros(3)), r"t must be a scalar or \[B\] = \[2\]"),
        (dict(class_labels=jnp.zeros(2, jnp.int32)), "model without classes"),
    ],
)
def test_inputs_that_do_not_fit(tiny, arguments, message):
    module, params = tiny
    arguments = dict(x=images(2, 8, 8, 1), t=jnp.zeros(2, jnp.int32)) | arguments
    with pytest.raises(ValueError, match=message):
        module.apply({"params": params}, **arguments)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "labels are missing"),
        (np.zeros(3, np.int32), "must have shape"),
        (np.zeros(2), "must be integers below 3"),
    ],
)
def test_labels_that_do_not_fit(labels, message):
    config = UNet2DConfig(**TINY, num_class_embeds=3)
    with pytest.raises(ValueError, match=message):
        UNet2D(config).apply({"params": init_params(config, 0)}, images(2, 4, 4, 1), jnp.zeros(2), labels)


def test_unknown_attention_impl(tiny):
    module, params = tiny
    with pytest.raises(ValueError, match="attention_impl must be one of"):
        UNet2D(module.config, attention_impl="flash").apply({"params": params}, images(2, 4, 4, 1), jnp.zeros(2))


REFUSED = {
    "_class_name": "UNet2DConditionModel",
    "time_embedding_type": "fourier",
    "class_embed_type": "projection",
    "resnet_time_scale_shift": "ada_group",
    "act_fn": "tanh",
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_num_groups": 3,
    "attn_norm_num_groups": 5,
    "attention_head_dim": 16,
    "down_block_types": ["DownBlock2D", "SkipDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D"],
    "downsample_padding": 2,
    "downsample_type": "fir",
    "upsample_type": "fir",
    "dropout": 1.0,
    "norm_eps": 0,
    "mid_block_scale_factor": 0,
    "in_channels": 0,
    "sample_size": [1, 2, 3],
    "freq_shift": 2,
    "add_attention": None,
    "num_class_embeds": 0,
}


@pytest.mark.parametrize("key", REFUSED)
def test_refusals_name_key_value_and_what_is_allowed(key):
    with pytest.raises(ValueError, match="is not supported; allowed: ") as error:
        UNet2DConfig.from_dict({**TINY, key: REFUSED[key]})
    lines = str(error.value).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(key)
    value = "SkipDownBlock2D" if key == "down_block_types" else str(REFUSED[key]).strip("[]")
    assert value in lines[0]


@pytest.mark.parametrize("value", ["learned", "fourier"])
def test_time_embeddings_that_are_refused(value):
    with pytest.raises(ValueError, match="time_embedding_type: "):
        UNet2DConfig(**{**TINY, "time_embedding_type": value})


def test_all_refusals_at_once():
    keys = ("_class_name", "time_embedding_type", "act_fn", "downsample_padding", "up_block_types", "norm_num_groups")
    with pytest.raises(ValueError) as error:
        UNet2DConfig.from_dict({**TINY, **{key: REFUSED[key] for key in keys}})
    assert sorted(line.split(":")[0] for line in str(error.value).splitlines()) == sorted(keys)


def test_config_round_trip_old_names_and_defaults():
    config = UNet2DConfig.from_dict({**TINY, "down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"]})
    assert config.down_block_types[0] == "UNetResDownBlock2D"
    assert jax.tree.structure(abstract_params(config)) == jax.tree.structure(abstract_params(UNet2DConfig(**TINY)))
    plain = config.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert UNet2DConfig.from_dict(plain) == config
    assert UNet2DConfig.from_dict({}) == UNet2DConfig()
    assert hash(config) == hash(UNet2DConfig.from_dict(plain))
    extra = {"_class_name": "UNet2DModel", "_diffusers_version": "0.30.0", "decay": 0.999, "optimization_step": 3}
    assert UNet2DConfig.from_dict({**plain, **extra}) == config


def test_config_warnings():
    with pytest.warns(UserWarning, match="unknown keys .*: alpha, beta$") as record:
        UNet2DConfig.from_dict({**TINY, "beta": 1, "alpha": 2})
    assert len(record) == 1
    old = {key: value for key, value in TINY.items() if key != "attention_head_dim"}
    with pytest.warns(UserWarning, match="attention_head_dim is missing"):
        assert UNet2DConfig.from_dict({**old, "_diffusers_version": "0.0.4"}).attention_head_dim is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert UNet2DConfig.from_dict({**old, "_diffusers_version": "0.3.0"}).attention_head_dim == 8


def test_initial_parameters():
    config = UNet2DConfig(**TINY, num_class_embeds=50)
    params = init_params(config, 3)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, abstract_params(config))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, params, init_params(config, 3))
    assert float(jnp.abs(params["conv_in"]["kernel"] - init_params(config, 4)["conv_in"]["kernel"]).max()) > 0.01
    resnet = params["mid_block"]["resnets_0"]
    bound = 1 / np.sqrt(9 * 8)
    for leaf in (resnet["conv1"]["kernel"], resnet["conv1"]["bias"]):
        assert 0.5 * bound < float(jnp.abs(leaf).max()) <= bound
    assert abs(float(resnet["conv1"]["kernel"].std()) * np.sqrt(3) / bound - 1) < 0.1
    assert (np.asarray(resnet["norm1"]["scale"]) == 1).all()
    assert (np.asarray(resnet["norm1"]["bias"]) == 0).all()
    assert abs(float(params["class_embedding"]["embedding"].std()) - 1) < 0.1
    assert float(jnp.abs(resnet["conv1"]["kernel"] - resnet["conv2"]["kernel"]).max()) > 0.01
    for seed in (-1, 1.5, True, "0"):
        with pytest.raises(ValueError, match="seed must be a non-negative integer"):
            init_params(config, seed)
