"""The conditional UNet against diffusers' ``UNet2DConditionModel``: the same weights, the same inputs, the same numbers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.models import convert
from jaxunlearn.models.parameters import init_params
from jaxunlearn.models.unet2d_condition import UNet2DCondition, UNet2DConditionConfig
from tests.torch_twins import perturb, twin_params

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

# A quarter of the usual compile time; the code is slower, which does not matter here.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)
D, C, U, CU = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
BASE = dict(
    sample_size=8,
    block_out_channels=(8, 16),
    norm_num_groups=4,
    layers_per_block=1,
    attention_head_dim=4,
    cross_attention_dim=12,
    down_block_types=(C, D),
    up_block_types=(U, CU),
)
VARIANTS = {
    "base": {},
    "layers_per_level": dict(layers_per_block=(1, 2)),
    "linear_projection_heads": dict(
        use_linear_projection=True, attention_head_dim=(2, 8), down_block_types=(C, C), up_block_types=(CU, CU)
    ),
    "one_cross_level": dict(attention_head_dim=(2, 8), down_block_types=(D, D), up_block_types=(U, CU)),
    "two_transformer_blocks": dict(transformer_layers_per_block=2),
    "transformer_blocks_per_level": dict(
        transformer_layers_per_block=(1, 2), down_block_types=(C, C), up_block_types=(U, CU)
    ),
    "padding_0": dict(downsample_padding=0),
    "scale_shift": dict(resnet_time_scale_shift="scale_shift"),
    "classes": dict(num_class_embeds=5),
    "class_timestep": dict(class_embed_type="timestep", act_fn="relu"),
    "class_identity": dict(class_embed_type="identity"),
    "mid_scale": dict(mid_block_scale_factor=math.sqrt(2)),
    "sd2": dict(
        block_out_channels=(8, 16, 16),
        attention_head_dim=(1, 2, 4),
        use_linear_projection=True,
        upcast_attention=True,
        cross_attention_dim=10,
        down_block_types=(C, C, D),
        up_block_types=(U, CU, CU),
    ),
    "no_mid_block": dict(mid_block_type=None),
    "mish": dict(act_fn="mish", freq_shift=1, flip_sin_to_cos=False),
    "wide_and_low": dict(sample_size=(4, 10), norm_eps=1e-6),
    "one_level": dict(
        block_out_channels=(8,), down_block_types=(C,), up_block_types=(CU,), use_linear_projection=True, act_fn="gelu"
    ),
    "odd_condition": dict(cross_attention_dim=7, center_input_sample=True, time_embedding_dim=20),
    "heads_that_do_not_divide": dict(attention_head_dim=3),
    "more_channels_out": dict(in_channels=2, out_channels=3, dropout=0.3),
}


def make(variant, spread):
    """A model of diffusers with perturbed weights, its twin here, and inputs in torch layout."""
    values = BASE | VARIANTS[variant]
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(**values).eval()
    perturb(model, spread)
    config = UNet2DConditionConfig.from_dict(dict(model.config))
    assert config == UNet2DConditionConfig(**values)
    params = twin_params(model, config)
    size = values["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    x, t = torch.randn(2, config.in_channels, height, width), torch.tensor([3, 977])
    context = torch.randn(2, 5, config.cross_attention_dim)
    labels = {
        "classes": torch.tensor([4, 1]),
        "class_timestep": torch.tensor([4, 100]),
        "class_identity": torch.randn(2, 32),
    }.get(variant)
    return model, UNet2DCondition(config), params, (x, t, context, labels)


def to_numpy(tensor):
    return tensor.detach().permute(0, 2, 3, 1).contiguous().numpy()


def to_ours(x, t, context, labels):
    return to_numpy(x), t.numpy(), context.numpy(), None if labels is None else labels.numpy()


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs(variant):
    model, module, params, inputs = make(variant, 0.1)
    with torch.no_grad():
        expected = to_numpy(model(*inputs).sample)
    out = quick_jit(module.apply)({"params": params}, *to_ours(*inputs))
    assert np.abs(np.asarray(out) - expected).max() <= 2e-5 * max(1, np.abs(expected).max())


def test_gradients():
    """Of the mean squared error, with respect to every parameter."""
    model, module, params, inputs = make("one_level", 0.02)
    target = torch.randn_like(inputs[0])
    (model(*inputs).sample - target).square().mean().backward()
    expected = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}

    def loss(params):
        return jnp.mean(jnp.square(module.apply({"params": params}, *to_ours(*inputs)) - to_numpy(target)))

    grads = convert.to_diffusers(quick_jit(jax.grad(loss))(params))
    for name, gradient in expected.items():
        np.testing.assert_allclose(grads[name], gradient, rtol=0, atol=1e-4 * np.abs(gradient).max(), err_msg=name)


def test_the_initial_parameters_have_the_spread_of_a_new_model():
    values = BASE | dict(block_out_channels=(16, 32), num_class_embeds=50)
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(**values)
    ours = convert.to_diffusers(init_params(UNet2DConditionConfig(**values), 0))
    for name, tensor in model.state_dict().items():
        tensor = tensor.numpy()
        if tensor.std() == 0:
            np.testing.assert_array_equal(ours[name], tensor)
        elif tensor.size >= 256:
            np.testing.assert_allclose(ours[name].std(), tensor.std(), rtol=0.2, err_msg=name)
            assert abs(ours[name].mean()) <= 0.3 * tensor.std(), name


def test_all_fields_and_defaults_are_those_of_diffusers():
    theirs = {
        k: v for k, v in diffusers.UNet2DConditionModel(block_out_channels=(32,) * 4).config.items() if k[0] != "_"
    }
    ours = UNet2DConditionConfig(block_out_channels=(32,) * 4).to_dict()
    assert ours == {k: list(v) if isinstance(v, tuple) else v for k, v in theirs.items()}
