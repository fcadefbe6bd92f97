"""Names and layouts of parameters between torch (diffusers, transformers) and the parameter tree."""

import tracemalloc

import jax
import numpy as np
import pytest

from jaxunlearn.models import convert
from jaxunlearn.models.autoencoder_kl_config import AutoencoderKLConfig
from jaxunlearn.models.clip_text_config import CLIPTextConfig
from jaxunlearn.models.parameters import abstract_params
from jaxunlearn.models.unet2d_condition_config import UNet2DConditionConfig
from jaxunlearn.models.unet2d_config import UNet2DConfig

D, A, U, AU = "DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"
SMALL = UNet2DConfig(
    block_out_channels=(4, 8),
    norm_num_groups=2,
    layers_per_block=1,
    attention_head_dim=4,
    down_block_types=(D, A),
    up_block_types=(AU, U),
    num_class_embeds=3,
)
OTHERS = {
    "conditional": UNet2DConditionConfig(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=3,
        down_block_types=("CrossAttnDownBlock2D", D),
        up_block_types=(U, "CrossAttnUpBlock2D"),
    ),
    "vae": AutoencoderKLConfig(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ),
    "clip": CLIPTextConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=7,
        bos_token_id=18,
        eos_token_id=19,
    ),
}


def drawn(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), abstract_params(config))


def assert_equal_trees(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture(scope="module")
def params():
    return drawn(SMALL)


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


SHAPES = {
    "conditional": {
        "down_blocks.0.attentions.0.proj_in.weight": (4, 4, 1, 1),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (4, 3),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.bias": (4,),
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight": (32, 4),
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.weight": (4, 16),
        "mid_block.attentions.0.transformer_blocks.0.norm3.weight": (8,),
        "up_blocks.1.attentions.1.norm.bias": (4,),
    },
    "vae": {
        "encoder.down_blocks.0.downsamplers.0.conv.weight": (4, 4, 3, 3),
        "encoder.mid_block.attentions.0.group_norm.weight": (8,),
        "decoder.mid_block.attentions.0.to_out.0.weight": (8, 8),
        "decoder.up_blocks.1.resnets.0.conv_shortcut.weight": (4, 8, 1, 1),
        "quant_conv.weight": (8, 8, 1, 1),
        "post_quant_conv.bias": (4,),
    },
    "clip": {
        "embeddings.token_embedding.weight": (20, 8),
        "embeddings.position_embedding.weight": (7, 8),
        "encoder.layers.1.self_attn.q_proj.weight": (8, 8),
        "encoder.layers.0.mlp.fc1.weight": (16, 8),
        "encoder.layers.0.layer_norm2.bias": (8,),
        "final_layer_norm.weight": (8,),
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_names_and_round_trip_of_the_other_architectures(name):
    params = drawn(OTHERS[name])
    tensors = convert.to_diffusers(params)
    assert {key: tensors[key].shape for key in SHAPES[name]} == SHAPES[name]
    assert all(v.flags.c_contiguous for v in tensors.values())
    table = convert.name_table(params)
    assert {convert.diffusers_name(path): path for path in table.values()} == table
    assert_equal_trees(convert.to_flax(tensors, abstract_params(OTHERS[name])), params)


def test_embeddings_of_tokens_are_not_transposed():
    params = drawn(OTHERS["clip"])
    tensors = convert.to_diffusers(params)
    expected = params["embeddings"]["token_embedding"]["embedding"]
    np.testing.assert_array_equal(tensors["embeddings.token_embedding.weight"], expected)


@pytest.mark.parametrize("four_dimensional", [False, True])
def test_old_attention_names_of_an_autoencoder(four_dimensional):
    params = drawn(OTHERS["vae"])
    tensors = convert.to_diffusers(params)
    renamed = old_names(tensors, four_dimensional)
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in renamed
    assert_equal_trees(convert.to_flax(renamed, abstract_params(OTHERS["vae"])), params)


def test_transformers_have_no_old_names_and_nothing_in_them_is_squeezed():
    config = OTHERS["conditional"]
    tensors = convert.to_diffusers(drawn(config))
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    renamed = {key.replace("attn1.to_q", "attn1.query") if key == name else key: v for key, v in tensors.items()}
    with pytest.raises(ValueError, match=r"2 problems.*\n.*missing: .*attn1.to_q.*\nunexpected: .*attn1.query.weight"):
        convert.to_flax(renamed, abstract_params(config))
    with pytest.raises(ValueError, match=r"wrong shape: .*attn1.to_q.weight is \(8, 8, 1, 1\), the model has \(8, 8\)"):
        convert.to_flax({**tensors, name: tensors[name][:, :, None, None]}, abstract_params(config))
    # diffusers, too, refuses projections of the other kind.
    linear = UNet2DConditionConfig.from_dict({**config.to_dict(), "use_linear_projection": True})
    with pytest.raises(ValueError, match=r"proj_in.weight is \(4, 4, 1, 1\), the model has \(4, 4\)"):
        convert.to_flax(tensors, abstract_params(linear))


def test_both_forms_of_the_names_of_a_text_model():
    """transformers before 5 wrote a prefix and, before 4.31, position ids, which are no parameters."""
    config = OTHERS["clip"]
    params = drawn(config)
    plain = convert.to_diffusers(params)
    old = convert.to_diffusers(params, prefix="text_model.")
    assert set(old) == {"text_model." + name for name in plain}
    assert convert.prefix_of(plain) == convert.prefix_of([]) == ""
    assert convert.prefix_of(old) == "text_model."
    ids = np.arange(7)[None]
    assert_equal_trees(
        convert.to_flax({**old, "text_model.embeddings.position_ids": ids}, abstract_params(config)), params
    )
    assert_equal_trees(convert.to_flax({**plain, "embeddings.position_ids": ids}, abstract_params(config)), params)
    twice = {**plain, "text_model.final_layer_norm.bias": np.zeros(8)}
    with pytest.raises(ValueError, match=r"given twice: text_model.final_layer_norm.bias and final_layer_norm.bias"):
        convert.to_flax(twice, abstract_params(config))
    with pytest.raises(ValueError, match=r"unexpected: text_model.logit_scale \(\)"):
        convert.to_flax({**old, "text_model.logit_scale": np.zeros(())}, abstract_params(config))


@pytest.mark.parametrize("direction", ["to_flax", "to_diffusers"])
def test_one_tensor_at_a_time_is_held_beside_source_and_result(direction):
    tree = {f"linear_{i}": {"kernel": np.ones((256, 512), np.float32)} for i in range(16)}
    tensors = convert.to_diffusers(tree)
    tracemalloc.start()
    try:
        result = convert.to_flax(tensors, tree) if direction == "to_flax" else convert.to_diffusers(tree)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = 16 * 256 * 512 * 4
    assert len(result) == 16
    assert peak < 1.2 * size
