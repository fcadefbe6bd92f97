"""The conditional UNet: golden outputs of diffusers, fast against textbook form, memory, config refusals, inputs."""

import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import predictors
from jaxunlearn.models.parameters import abstract_params
from jaxunlearn.models.unet2d import UNet2D, UNet2DConfig
from jaxunlearn.models.unet2d_condition import UNet2DCondition, UNet2DConditionConfig
from tests.test_unet2d import check_golden, golden, golden_params

# A quarter of the usual compile time; the code is slower, which does not matter here.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)

ONE_LEVEL = dict(
    block_out_channels=(8,),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=2,
    cross_attention_dim=6,
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
)
TWO_LEVELS = ONE_LEVEL | dict(
    block_out_channels=(4, 8),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module")
def model():
    config = UNet2DConditionConfig(**ONE_LEVEL)
    return UNet2DCondition(config), golden_params(config, 0)


@pytest.fixture(scope="module")
def exact(model):
    """Inputs, and what the model makes of them."""
    module, params = model
    inputs = normal(2, 4, 4, 4), jnp.array([3, 700]), normal(2, 5, 6, seed=1)
    return inputs, quick_jit(module.apply)({"params": params}, *inputs)


SLOW = pytest.param("condition_sd2", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [SLOW if n == "condition_sd2" else n for n in golden.CONDITION_CASES])
def test_golden(name):
    cases = golden.CONDITION_CASES
    check_golden(name, cases, UNet2DConditionConfig, UNet2DCondition, gradients=name == "condition_sd2")


@pytest.mark.slow
def test_fast_and_textbook_forms_are_one_function(model, x64):
    module, params = model
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
    x, t, context = normal(2, 4, 6, 4).astype(jnp.float64), jnp.array([3, 700]), normal(2, 5, 6).astype(jnp.float64)

    def results(fast):
        one = UNet2DCondition(module.config, dtype=jnp.float64, fast=fast)
        return quick_jit(
            jax.value_and_grad(lambda p, c: jnp.mean(jnp.square(one.apply({"params": p}, x, t, c))), argnums=(0, 1))
        )(params, context)

    (value, grads), (expected_value, expected) = results(True), results(False)
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, expected_value, rtol=1e-12)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
    assert largest > 1e-3
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=1e-12 * largest), grads, expected)


def test_the_condition_matters_token_by_token_and_examples_stay_apart(model, exact):
    module, params = model
    (x, t, context), expected = exact
    apply = quick_jit(lambda context: module.apply({"params": params}, x, t, context))
    np.testing.assert_allclose(apply(context[:, ::-1]), expected, atol=1e-6)  # a set of tokens, without order
    changed = apply(context.at[0, 4].add(1.0))
    assert float(jnp.abs(changed[0] - expected[0]).max()) > 1e-3
    np.testing.assert_allclose(changed[1], expected[1], atol=1e-6)


def test_a_predictor(model, exact):
    module, params = model
    (x, t, context), expected = exact
    predict = quick_jit(predictors.from_linen(module))
    np.testing.assert_allclose(predict(params, x, t, context), expected, atol=1e-6)
    with pytest.raises(ValueError, match="encoder_hidden_states are missing"):
        predictors.from_linen(module)(params, x, t)


def test_bfloat16_is_close_and_the_output_has_the_type_of_the_input(model, exact):
    module, params = model
    inputs, expected = exact
    half = quick_jit(UNet2DCondition(module.config, dtype=jnp.bfloat16).apply)({"params": params}, *inputs)
    assert half.dtype == jnp.float32
    difference = float(jnp.abs(half - expected).max())
    assert 0 < difference < 0.05 * float(jnp.abs(expected).max())


UNCONDITIONAL = UNet2DConfig(
    block_out_channels=(8,),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=4,
    down_block_types=("AttnDownBlock2D",),
    up_block_types=("AttnUpBlock2D",),
)
CONDITIONAL = UNet2DConditionConfig(**ONE_LEVEL, dropout=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONDITIONAL, UNCONDITIONAL], ids=["conditional", "unconditional"])
def test_remat_needs_less_memory_for_the_same_gradients(config):
    """On CPU only a schedule that minds memory shows it; the tree of parameters and the dropout masks are the same."""
    conditional = config is CONDITIONAL
    inputs = [normal(1, 16, 16, config.in_channels), jnp.array([700])] + [normal(1, 5, 6)] * conditional
    params = golden_params(config, 0)
    options = QUICK | {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    results, megabytes = [], []
    for remat in (False, True):
        module = (UNet2DCondition if conditional else UNet2D)(config, remat=remat)
        shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
        assert jax.tree.structure(shapes) == jax.tree.structure(params)

        def loss(params, module=module):
            rngs = {"dropout": jax.random.key(1, impl="rbg")}  # compiles fast
            out = module.apply({"params": params}, *inputs, deterministic=False, rngs=rngs)
            return jnp.mean(jnp.square(out))

        compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile(options)
        results.append(compiled(params))
        megabytes.append(compiled.memory_analysis().temp_size_in_bytes / 1e6)
    (value, grads), (remat_value, remat_grads) = results
    np.testing.assert_allclose(remat_value, value, rtol=1e-6)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * largest), remat_grads, grads)
    assert megabytes[1] < 0.75 * megabytes[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=normal(2, 5, 4, 4)), "multiples of 2 .* got 5x4"),
        (dict(x=normal(2, 4, 4, 3)), r"x must be \[B,H,W,4\]"),
        (dict(t=jnp.zeros(3)), r"t must be a scalar or \[B\] = \[2\]"),
        (dict(encoder_hidden_states=None), r"encoder_hidden_states are missing: .* \[B,N,6\]"),
        (dict(encoder_hidden_states=normal(2, 5, 7)), r"must be \[B,N,6\] .* got shape \(2, 5, 7\)"),
        (dict(encoder_hidden_states=normal(1, 5, 6)), r"with B = 2, .* got shape \(1, 5, 6\)"),
        (dict(encoder_hidden_states=normal(2, 6)), r"got shape \(2, 6\)"),
        (dict(encoder_hidden_states=normal(2, 0, 6)), r"got shape \(2, 0, 6\)"),
        (dict(encoder_hidden_states=jnp.zeros((2, 5, 6), jnp.int32)), "must be floating, .* not token ids"),
        (dict(class_labels=jnp.zeros(2, jnp.int32)), "model without classes"),
    ],
)
def test_inputs_that_do_not_fit(arguments, message):
    config = UNet2DConditionConfig(**TWO_LEVELS)
    fitting = dict(x=normal(2, 4, 4, 4), t=jnp.zeros(2, jnp.int32), encoder_hidden_states=normal(2, 5, 6))
    with pytest.raises(ValueError, match=message):
        UNet2DCondition(config).apply({"params": {}}, **(fitting | arguments))


REFUSED = {
    "_class_name": "UNet2DModel",
    "dual_cross_attention": True,
    "only_cross_attention": True,
    "encoder_hid_dim": 1024,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text_time",
    "class_embeddings_concat": True,
    "time_cond_proj_dim": 256,
    "timestep_post_act": "silu",
    "time_embedding_act_fn": "gelu",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1.5,
    "cross_attention_norm": "layer_norm",
    "attention_type": "gated",
    "conv_in_kernel": 1,
    "conv_out_kernel": 5,
    "mid_block_only_cross_attention": True,
    "num_attention_heads": 8,
    "reverse_transformer_layers_per_block": [1, 2],
    "class_embed_type": "projection",
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "in_channels": 9,
    "time_embedding_type": "fourier",
    "resnet_time_scale_shift": "spatial",
    "act_fn": "tanh",
    "norm_num_groups": 3,
    "down_block_types": ["CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "cross_attention_dim": [6, 6],
    "attention_head_dim": [8, 2],
    "layers_per_block": [1, 2, 3],
    "transformer_layers_per_block": [[1, 1], [2]],
    "use_linear_projection": None,
    "downsample_padding": 2,
    "mid_block_scale_factor": 0,
    "dropout": 1.0,
    "norm_eps": 0,
    "sample_size": [1, 2, 3],
    "freq_shift": 2,
}


@pytest.mark.parametrize("key", REFUSED)
def test_refusals_name_key_value_and_what_is_allowed(key):
    with pytest.raises(ValueError, match="is not supported; allowed: ") as error:
        UNet2DConditionConfig.from_dict({**TWO_LEVELS, key: REFUSED[key]})
    lines = str(error.value).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(key)
    value = REFUSED[key][-1] if key == "down_block_types" else str(REFUSED[key]).strip("[]")
    assert value in lines[0]
    assert lines[0].count("; ") >= 2


def test_all_refusals_at_once():
    keys = ("_class_name", "addition_embed_type", "encoder_hid_dim", "act_fn", "in_channels", "layers_per_block")
    with pytest.raises(ValueError) as error:
        UNet2DConditionConfig.from_dict({**TWO_LEVELS, **{key: REFUSED[key] for key in keys}})
    assert sorted(line.split(":")[0] for line in str(error.value).splitlines()) == sorted(keys)


def test_simple_projection_is_refused_too():
    with pytest.raises(ValueError, match="class_embed_type: 'simple_projection' is not supported"):
        UNet2DConditionConfig(**TWO_LEVELS, class_embed_type="simple_projection")


def test_config_round_trip_and_defaults():
    config = UNet2DConditionConfig.from_dict({**TWO_LEVELS, "attention_head_dim": [2, 4], "layers_per_block": [1, 2]})
    plain = config.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert UNet2DConditionConfig.from_dict(plain) == config
    assert hash(config) == hash(UNet2DConditionConfig.from_dict(plain))
    assert [level.heads for level in config.up_levels] == [4, 2]
    assert [level.layers for level in config.up_levels] == [3, 2]
    assert UNet2DConditionConfig.from_dict({}) == UNet2DConditionConfig()
    extra = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "decay": 0.999, "power": 0.75}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert UNet2DConditionConfig.from_dict({**plain, **extra}) == config
    with pytest.warns(UserWarning, match="unknown keys .*: alpha$"):
        UNet2DConditionConfig.from_dict({**plain, "alpha": 1})


def test_linear_and_convolutional_projections_are_one_function(model, exact):
    """They differ in the shapes of two kernels per transformer only."""
    _, params = model
    inputs, expected = exact
    config = UNet2DConditionConfig(**ONE_LEVEL, use_linear_projection=True)
    shapes = abstract_params(config)
    differs = [a.shape != b.shape for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(params), strict=True)]
    assert sum(differs) == 2 * 4
    same = jax.tree.map(lambda shape, p: p.reshape(shape.shape), shapes, params)
    np.testing.assert_allclose(quick_jit(UNet2DCondition(config).apply)({"params": same}, *inputs), expected, atol=2e-6)
