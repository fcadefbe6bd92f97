"""Names and layouts of parameters between diffusers and the parameter tree."""

import jax
import numpy as np
import pytest

from jaxunlearn.models import convert
from jaxunlearn.models.parameters import abstract_params
from jaxunlearn.models.unet2d import UNet2DConfig

D, A, U, AU = "DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"
MODELS = {
    "celebahq": (
        dict(
            block_out_channels=(128, 128, 256, 256, 512, 512),
            down_block_types=(D, D, D, D, A, D),
            up_block_types=(U, AU, U, U, U, U),
            attention_head_dim=None,
        ),
        (450, 296, 58, 96, 113_673_219),
    ),
    "cifar10": (
        dict(
            block_out_channels=(128, 256, 256, 256),
            down_block_types=(D, A, D, D),
            up_block_types=(U, U, AU, U),
            attention_head_dim=None,
        ),
        (328, 215, 48, 65, 35_746_307),
    ),
    "mnist": (
        dict(
            in_channels=1,
            out_channels=1,
            block_out_channels=(64, 128, 256),
            down_block_types=(D, A, D),
            up_block_types=(U, AU, U),
        ),
        (270, 176, 43, 51, 14_735_745),
    ),
}
SMALL = UNet2DConfig(
    block_out_channels=(4, 8),
    norm_num_groups=2,
    layers_per_block=1,
    attention_head_dim=4,
    down_block_types=(D, A),
    up_block_types=(AU, U),
    num_class_embeds=3,
)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), abstract_params(SMALL))


@pytest.mark.parametrize("name", MODELS)
def test_counts_and_bijection(name):
    values, counts = MODELS[name]
    tree = abstract_params(UNet2DConfig(**values))
    leaves = jax.tree.leaves(tree)
    table = convert.name_table(tree)
    by_rank = [sum(len(leaf.shape) == rank for leaf in leaves) for rank in (1, 2, 4)]
    assert (len(leaves), *by_rank, sum(leaf.size for leaf in leaves)) == counts
    assert len(table) == len(set(table.values())) == counts[0]
    assert {convert.diffusers_name(path): path for path in table.values()} == table
    assert "time_embedding.linear_1.weight" in table
    assert not any("_0." in key or "_2." in key.replace("linear_2.", "") for key in table)


def test_shapes_of_the_celebahq_up_blocks():
    tree = abstract_params(UNet2DConfig(**MODELS["celebahq"][0]))
    assert tree["conv_in"]["kernel"].shape == (3, 3, 3, 128)
    assert tree["time_embedding"]["linear_1"]["kernel"].shape == (128, 512)
    widths = [tuple(tree[f"up_blocks_{i}"][f"resnets_{j}"]["norm1"]["scale"].size for j in range(3)) for i in range(6)]
    assert widths == [
        (1024, 1024, 1024),
        (1024, 1024, 768),
        (768, 512, 512),
        (512, 512, 384),
        (384, 256, 256),
        (256, 256, 256),
    ]


def test_layouts(params):
    tensors = convert.to_diffusers(params)
    np.testing.assert_array_equal(tensors["conv_in.weight"], params["conv_in"]["kernel"].transpose(3, 2, 0, 1))
    linear = params["time_embedding"]["linear_1"]["kernel"]
    np.testing.assert_array_equal(tensors["time_embedding.linear_1.weight"], linear.T)
    np.testing.assert_array_equal(tensors["class_embedding.weight"], params["class_embedding"]["embedding"])
    attention = params["mid_block"]["attentions_0"]
    np.testing.assert_array_equal(tensors["mid_block.attentions.0.to_out.0.weight"], attention["to_out_0"]["kernel"].T)
    np.testing.assert_array_equal(tensors["mid_block.attentions.0.group_norm.weight"], attention["group_norm"]["scale"])


def test_class_embedding_of_type_timestep_is_a_linear_layer():
    tree = abstract_params(UNet2DConfig(**{**SMALL.to_dict(), "class_embed_type": "timestep"}))
    assert convert.name_table(tree)["class_embedding.linear_1.weight"] == ("class_embedding", "linear_1", "kernel")


def test_round_trip_is_exact_and_contiguous(params):
    tensors = convert.to_diffusers(params)
    assert all(v.flags.c_contiguous for v in tensors.values())
    back = convert.to_flax(tensors, abstract_params(SMALL))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert all(leaf.flags.c_contiguous for leaf in jax.tree.leaves(back))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes_are_kept(params, dtype):
    dtype = jax.numpy.dtype(dtype)
    tensors = {name: v.astype(dtype) for name, v in convert.to_diffusers(params).items()}
    back = convert.to_flax(tensors, abstract_params(SMALL))
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(back))
    assert all(v.dtype == dtype for v in convert.to_diffusers(back).values())


def old_names(tensors, four_dimensional):
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            name = name.replace(f".{new}.", f".{old}.")
        if four_dimensional and "attentions" in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("four_dimensional", [False, True])
def test_old_attention_names(params, four_dimensional):
    tensors = convert.to_diffusers(params)
    renamed = old_names(tensors, four_dimensional)
    assert "mid_block.attentions.0.proj_attn.bias" in renamed
    back = convert.to_flax(renamed, abstract_params(SMALL))
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert convert.to_diffusers(back).keys() == tensors.keys()


def test_old_names_are_renamed_in_attention_modules_only(params):
    tensors = convert.to_diffusers(params)
    for name in ("mid_block.resnets.0.key.weight", "query.weight"):
        with pytest.raises(ValueError, match=f"unexpected: {name}"):
            convert.to_flax({**tensors, name: np.zeros((2, 2))}, abstract_params(SMALL))
    both = {**tensors, "mid_block.attentions.0.key.bias": np.zeros(8)}
    with pytest.raises(ValueError, match=r"given twice: mid_block.attentions.0.key.bias and .*to_k.bias"):
        convert.to_flax(both, abstract_params(SMALL))


def test_strict_with_all_problems_at_once(params):
    tensors = convert.to_diffusers(params)
    del tensors["conv_in.bias"]
    tensors["conv_out.weight"] = tensors["conv_out.weight"][:, :2]
    tensors["down_blocks.7.extra"] = np.zeros(3)
    with pytest.raises(ValueError, match="3 problems") as error:
        convert.to_flax(tensors, abstract_params(SMALL))
    assert str(error.value).splitlines()[1:] == [
        "missing: conv_in.bias (4,)",
        "unexpected: down_blocks.7.extra (3,)",
        "wrong shape: conv_out.weight is (3, 2, 3, 3), the model has (3, 4, 3, 3)",
    ]


def test_trees_without_names_in_diffusers():
    with pytest.raises(ValueError, match=r"unknown parameter 'a/gamma'"):
        convert.to_diffusers({"a": {"gamma": np.zeros(2)}})
    with pytest.raises(ValueError, match=r"are both 'a.weight'"):
        convert.name_table({"a": {"kernel": np.zeros((2, 2)), "scale": np.zeros(2)}})
