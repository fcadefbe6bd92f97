"""Writes ``tests/golden/clip_towers.npz``: what torch twins of CLIP's towers make of drawn weights and images.

    python -m scripts.make_golden_clip          (needs torch and transformers)

The weights are not stored but drawn by :func:`state`. The file holds images uint8 [2,H,W,3] of each case, the image
vectors [2,dims], for the ResNet also at another size and without its position embedding, and text vectors [2,dims].
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from jaxunlearn.models.features.clip_resnet import MEAN, STD, CLIPResNetConfig
from jaxunlearn.models.features.clip_vit import CLIPViTConfig
from scripts.make_golden_unet import GOLDEN, weights

RESNET = CLIPResNetConfig(blocks=(2, 1), width=4, dims=6, image_size=32, head_dim=16)
VIT = CLIPViTConfig(layers=2, width=16, heads=2, patch=4, image_size=12, dims=6)
TEXT = dict(width=24, layers=2, heads=3, dims=6, vocabulary=40, length=9)
TEXT_IDS = ((38, 5, 7, 39), (38, 1, 0, 3, 12, 39))
OTHER_SIZE = (24, 34)


def state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Drawn weights for tensors of the published names, variances positive."""
    tensors = weights({name: shape for name, shape in shapes.items() if "num_batches" not in name}, seed=0)
    return {name: np.abs(v) + 0.5 if name.endswith("running_var") else v for name, v in tensors.items()}


def text_shapes() -> dict[str, tuple[int, ...]]:
    """Published name -> shape of the tensors of the small text tower."""
    width, norm = TEXT["width"], {"weight": (TEXT["width"],), "bias": (TEXT["width"],)}
    shapes = {
        "token_embedding.weight": (TEXT["vocabulary"], width),
        "positional_embedding": (TEXT["length"], width),
        "text_projection": (width, TEXT["dims"]),
        **{f"ln_final.{leaf}": shape for leaf, shape in norm.items()},
    }
    linear = {"attn.in_proj_": 3 * width, "attn.out_proj.": width, "mlp.c_fc.": 4 * width}
    for layer in range(TEXT["layers"]):
        block = f"transformer.resblocks.{layer}"
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{name}.{leaf}": shape for leaf, shape in norm.items()}
        for name, rows in linear.items():
            shapes |= {f"{block}.{name}weight": (rows, width), f"{block}.{name}bias": (rows,)}
        shapes |= {f"{block}.mlp.c_proj.weight": (width, 4 * width), f"{block}.mlp.c_proj.bias": (width,)}
    return shapes


def images(size: tuple[int, int], seed: int) -> np.ndarray:
    """Two drawn pictures uint8 [2,H,W,3]."""
    return np.random.RandomState(seed).randint(0, 256, (2, *size, 3)).astype(np.uint8)


def normalised(pictures: np.ndarray):
    """uint8 [N,H,W,3] -> what the torch towers take."""
    import torch

    x = (pictures / 255.0 - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32))


def main() -> None:
    """Runs the twins and writes the file."""
    import torch
    import transformers

    from tests import torch_clip

    torch.set_grad_enabled(False)

    def draw(tensors):
        return state({name: value.shape for name, value in tensors.items()})

    resnet = torch_clip.ResNet(RESNET).eval()
    drawn = draw({f"visual.{name}": value for name, value in resnet.state_dict().items()})
    loaded = {name.removeprefix("visual."): torch.from_numpy(value) for name, value in drawn.items()}
    resnet.load_state_dict(loaded, strict=False)
    vit, text = torch_clip.vision_transformer(VIT), torch_clip.text_transformer(**TEXT)
    for tower in (vit, text):
        torch_clip.load_published(tower, draw(torch_clip.published(tower)))
    own, other, small = images((32, 32), 10), images(OTHER_SIZE, 11), images((12, 12), 12)
    np.savez_compressed(
        GOLDEN / "clip_towers.npz",
        versions=json.dumps({module.__name__: module.__version__ for module in (torch, transformers, np)}),
        resnet=resnet(normalised(own)).numpy(),
        resnet_other_size=resnet(normalised(other), False).numpy(),
        vit=vit(normalised(small)).image_embeds.numpy(),
        text=np.stack([text(torch.tensor([ids])).text_embeds[0].numpy() for ids in TEXT_IDS]),
    )


if __name__ == "__main__":
    main()
