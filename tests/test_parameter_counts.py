"""Numbers of tensors and parameters of published models, from their configurations alone: nothing is allocated."""

import jax
import pytest

from jaxunlearn.models import convert
from jaxunlearn.models.autoencoder_kl_config import AutoencoderKLConfig
from jaxunlearn.models.clip_text_config import CLIPTextConfig
from jaxunlearn.models.parameters import abstract_params
from jaxunlearn.models.unet2d_condition_config import UNet2DConditionConfig
from jaxunlearn.models.unet2d_config import UNet2DConfig

D, A, U, AU = "DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"
CELEBAHQ = UNet2DConfig(
    block_out_channels=(128, 128, 256, 256, 512, 512),
    down_block_types=(D, D, D, D, A, D),
    up_block_types=(U, AU, U, U, U, U),
    attention_head_dim=None,
)
CIFAR10 = UNet2DConfig(
    block_out_channels=(128, 256, 256, 256),
    down_block_types=(D, A, D, D),
    up_block_types=(U, U, AU, U),
    attention_head_dim=None,
)
T_SHIRT = UNet2DConfig(
    in_channels=1,
    out_channels=1,
    block_out_channels=(64, 128, 256),
    down_block_types=(D, A, D),
    up_block_types=(U, AU, U),
)
STABLE_DIFFUSION_1 = UNet2DConditionConfig(sample_size=64, cross_attention_dim=768)
AUTOENCODER = AutoencoderKLConfig(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    sample_size=512,
)
CLIP_L = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)

# Tensors, of which with 1, 2 and 4 axes, and parameters.
MODELS = {
    "celebahq": (CELEBAHQ, (450, 296, 58, 96, 113_673_219)),
    "cifar10": (CIFAR10, (328, 215, 48, 65, 35_746_307)),
    "t_shirt": (T_SHIRT, (270, 176, 43, 51, 14_735_745)),
    "stable_diffusion_1": (STABLE_DIFFUSION_1, (686, 404, 184, 98, 859_520_964)),
    "autoencoder": (AUTOENCODER, (248, 176, 8, 64, 83_653_863)),
    "clip_l": (CLIP_L, (196, 122, 74, 0, 123_060_480)),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "celebahq" else n for n in MODELS])
def test_counts_and_bijective_names(name):
    config, counts = MODELS[name]
    tree = abstract_params(config)
    leaves = jax.tree.leaves(tree)
    by_rank = [sum(len(leaf.shape) == rank for leaf in leaves) for rank in (1, 2, 4)]
    assert (len(leaves), *by_rank, sum(leaf.size for leaf in leaves)) == counts
    table = convert.name_table(tree)
    assert len(table) == len(set(table.values())) == counts[0]
    assert {convert.diffusers_name(path): path for path in table.values()} == table
    # A list index that stayed a suffix would show here; these four names end with a digit of their own.
    numbered = ("linear_1.", "linear_2.", "layer_norm1.", "layer_norm2.")
    cleaned = [key for key in table if not any(part in key for part in numbered)]
    assert not any(part[-1].isdigit() and "_" in part for key in cleaned for part in key.split("."))


def test_shapes_of_the_celebahq_up_blocks():
    tree = abstract_params(CELEBAHQ)
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


def test_shapes_of_stable_diffusion_1():
    tree = abstract_params(STABLE_DIFFUSION_1)
    transformer = tree["down_blocks_2"]["attentions_1"]
    assert transformer["proj_in"]["kernel"].shape == (1, 1, 1280, 1280)
    assert transformer["transformer_blocks_0"]["attn2"]["to_v"]["kernel"].shape == (768, 1280)
    assert transformer["transformer_blocks_0"]["ff"]["net_0"]["proj"]["kernel"].shape == (1280, 10240)
    assert "attentions_0" not in tree["down_blocks_3"]
    assert "attentions_0" not in tree["up_blocks_0"]
    widths = [tuple(tree[f"up_blocks_{i}"][f"resnets_{j}"]["norm1"]["scale"].size for j in range(3)) for i in range(4)]
    assert widths == [(2560, 2560, 2560), (2560, 2560, 1920), (1920, 1280, 960), (960, 640, 640)]
