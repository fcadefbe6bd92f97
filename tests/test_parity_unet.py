"""The UNet against diffusers' ``UNet2DModel``: the same weights, the same inputs, the same numbers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.models import convert
from jaxunlearn.models.parameters import init_params
from jaxunlearn.models.unet2d import UNet2D, UNet2DConfig
from tests.torch_twins import perturb, twin_params

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
D, A, U, AU = "DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"
GOOGLE = dict(flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, attention_head_dim=None, downsample_padding=0)
BASE = dict(
    sample_size=16,
    in_channels=3,
    out_channels=3,
    block_out_channels=(32, 64),
    norm_num_groups=8,
    down_block_types=(D, A),
    up_block_types=(AU, U),
)
VARIANTS = {
    "base": {},
    "padding_0": dict(downsample_padding=0),
    "google": GOOGLE,
    "head_dim_16": dict(attention_head_dim=16),
    "head_dim_48": dict(attention_head_dim=48),
    "scale_shift": dict(resnet_time_scale_shift="scale_shift"),
    "scale_shift_attn_groups": dict(resnet_time_scale_shift="scale_shift", attn_norm_num_groups=4),
    "attn_groups": dict(attn_norm_num_groups=4),
    "resnet_resampling": dict(
        downsample_type="resnet", upsample_type="resnet", down_block_types=(A, D), up_block_types=(AU, U)
    ),
    "resnet_resampling_scale_shift": dict(
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        down_block_types=(A, A),
        up_block_types=(AU, AU),
    ),
    "classes": dict(num_class_embeds=5),
    "class_timestep": dict(class_embed_type="timestep"),
    "class_identity": dict(class_embed_type="identity"),
    "no_mid_attention": dict(add_attention=False),
    "mid_scale_factor": dict(mid_block_scale_factor=math.sqrt(2)),
    "centered_input": dict(center_input_sample=True),
    "three_levels": dict(
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32, 32),
        down_block_types=(D, A, D),
        up_block_types=(U, AU, U),
    ),
    "gelu": dict(act_fn="gelu"),
    "mish": dict(act_fn="mish"),
    "relu": dict(act_fn="relu"),
    "swish": dict(act_fn="swish"),
    "no_mid_block": dict(mid_block_type=None),
    "time_dim_odd_width": dict(time_embedding_dim=20, block_out_channels=(15, 30), norm_num_groups=5),
    "learned_steps_kept": dict(num_train_timesteps=500, dropout=0.3),
    "old_block_names": dict(down_block_types=("UNetResDownBlock2D", "UNetResAttnDownBlock2D")),
    "mnist": dict(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        norm_num_groups=8,
        block_out_channels=(16, 32, 64),
        down_block_types=(D, A, D),
        up_block_types=(U, AU, U),
    ),
    "celebahq": dict(
        sample_size=64,
        block_out_channels=(8, 8, 16, 16, 32, 32),
        down_block_types=(D, D, D, D, A, D),
        up_block_types=(U, AU, U, U, U, U),
        **GOOGLE,
    ),
    "cifar10": dict(
        sample_size=32,
        block_out_channels=(16, 32, 32, 32),
        down_block_types=(D, A, D, D),
        up_block_types=(U, U, AU, U),
        **GOOGLE,
    ),
}


def make(variant, spread):
    """A model of diffusers with perturbed weights, its twin here, and inputs in torch layout."""
    values = BASE | VARIANTS[variant]
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(**values).eval()
    perturb(model, spread)
    config = UNet2DConfig.from_dict(dict(model.config))
    assert config == UNet2DConfig(**values)
    params = twin_params(model, config)
    size = values["sample_size"]
    x, t = torch.randn(2, values["in_channels"], size, size), torch.tensor([3, 977])
    labels = {
        "classes": torch.tensor([4, 1]),
        "class_timestep": torch.tensor([4, 100]),
        "class_identity": torch.randn(2, 128),
    }.get(variant)
    return model, UNet2D(config), params, x, t, labels


def to_numpy(tensor):
    return tensor.detach().permute(0, 2, 3, 1).contiguous().numpy()


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs(variant):
    model, module, params, x, t, labels = make(variant, 0.1)
    with torch.no_grad():
        expected = to_numpy(model(x, t, labels).sample)
    labels = None if labels is None else labels.numpy()
    out = quick_jit(module.apply)({"params": params}, to_numpy(x), t.numpy(), labels)
    assert np.abs(np.asarray(out) - expected).max() <= 2e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("variant", ["base", "scale_shift", "resnet_resampling"])
def test_gradients(variant):
    model, module, params, x, t, _ = make(variant, 0.02)
    target = torch.randn_like(x)
    (model(x, t).sample - target).square().mean().backward()
    expected = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}

    def loss(params):
        return jnp.mean(jnp.square(module.apply({"params": params}, to_numpy(x), t.numpy()) - to_numpy(target)))

    grads = convert.to_diffusers(quick_jit(jax.grad(loss))(params))
    for name, gradient in expected.items():
        if not name.endswith("to_k.bias"):  # exactly zero: softmax does not see a shift of all scores
            np.testing.assert_allclose(grads[name], gradient, rtol=0, atol=1e-4 * np.abs(gradient).max(), err_msg=name)


def test_the_initial_parameters_have_the_spread_of_a_new_model():
    values = BASE | dict(num_class_embeds=50)
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(**values)
    ours = convert.to_diffusers(init_params(UNet2DConfig(**values), 0))
    for name, tensor in model.state_dict().items():
        tensor = tensor.numpy()
        if tensor.std() == 0:
            np.testing.assert_array_equal(ours[name], tensor)
        elif tensor.size >= 256:
            np.testing.assert_allclose(ours[name].std(), tensor.std(), rtol=0.2, err_msg=name)
            assert abs(ours[name].mean()) <= 0.3 * tensor.std(), name
