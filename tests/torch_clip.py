"""Torch twins of the CLIP towers (only for tests and scripts that have torch), with the names of the published files.

The ResNet is written here from its description; the transformers are those of the package transformers under new names.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Bottleneck whose stride is a mean pool."""

    def __init__(self, channels: int, width: int, stride: int, project: bool):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.stride = stride
        if project:
            self.downsample = nn.Sequential(nn.Conv2d(channels, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.avg_pool2d(functional.relu(self.bn2(self.conv2(y))), self.stride)
        y = self.bn3(self.conv3(y))
        if hasattr(self, "downsample"):
            x = self.downsample(functional.avg_pool2d(x, self.stride))
        return functional.relu(x + y)


class AttentionPool(nn.Module):
    """Torch's own multi-head attention, with the mean as the only query."""

    def __init__(self, tokens: int, channels: int, heads: int, dims: int):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(tokens, channels))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))
        self.c_proj = nn.Linear(channels, dims)
        self.heads = heads

    def forward(self, x, position):
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x])
        if position:
            x = x + self.positional_embedding[:, None]
        layers = (self.q_proj, self.k_proj, self.v_proj)
        out, _ = functional.multi_head_attention_forward(
            x[:1],
            x,
            x,
            embed_dim_to_check=x.shape[-1],
            num_heads=self.heads,
            in_proj_weight=None,
            in_proj_bias=torch.cat([layer.bias for layer in layers]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias,
            use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
            training=False,
            need_weights=False,
        )
        return out[0]


class ResNet(nn.Module):
    """The image tower for a CLIPResNetConfig; images are normalised [B,3,H,W]."""

    def __init__(self, config):
        super().__init__()
        width, half = config.width, config.width // 2
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, 2, 1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, 1, 1, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(half, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        channels, self.stages = width, len(config.blocks)
        for stage, count in enumerate(config.blocks):
            inner, blocks = width * 2**stage, []
            for block in range(count):
                blocks.append(Block(channels, inner, 2 if stage and not block else 1, not block))
                channels = 4 * inner
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool(config.tokens, channels, channels // config.head_dim, config.dims)

    def forward(self, x, position=True):
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = functional.relu(bn(conv(x)))
        x = functional.avg_pool2d(x, 2)
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.attnpool(x, position)


def vision_transformer(config):
    """transformers' image tower for a CLIPViTConfig."""
    import transformers

    return transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            projection_dim=config.dims,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            image_size=config.image_size,
            patch_size=config.patch,
            hidden_act="quick_gelu",
        )
    ).eval()


def text_transformer(width: int, layers: int, heads: int, dims: int, vocabulary: int, length: int):
    """transformers' text tower; the end token is the last id of the vocabulary."""
    import transformers

    return transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=dims,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=length,
            hidden_act="quick_gelu",
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    ).eval()


_NAMES = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "encoder.layers": "transformer.resblocks",
    "embeddings.patch_embedding": "conv1",
    "embeddings.class_embedding": "class_embedding",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
}


_QKV = ("q_proj", "k_proj", "v_proj")


def _place(name: str, vision: bool) -> tuple[str, int | None, bool]:
    """Name in transformers -> published name, which third of it (None: all of it), whether it is transposed."""
    if name.endswith("_projection.weight"):
        return ("visual.proj" if vision else "text_projection"), None, True
    name = ("visual." if vision else "") + name.removeprefix("vision_model.").removeprefix("text_model.")
    for old, new in _NAMES.items():
        name = name.replace(old, new)
    for third, part in enumerate(_QKV):
        if f"self_attn.{part}." in name:
            return name.replace(f"self_attn.{part}.", "attn.in_proj_"), third, False
    return name, None, False


def published(model) -> dict[str, np.ndarray]:
    """State dict of a tower of transformers under the names and layouts of the published CLIP files."""
    found: dict[str, list] = {}
    for name, value in _state(model).items():
        new, third, transposed = _place(name, hasattr(model, "visual_projection"))
        found.setdefault(new, []).append((third, value.T if transposed else value))
    return {
        name: parts[0][1] if parts[0][0] is None else np.concatenate([v for _, v in sorted(parts, key=lambda p: p[0])])
        for name, parts in found.items()
    }


def load_published(model, tensors) -> None:
    """The way back: gives a tower of transformers the tensors of a published file."""
    new = {}
    for name in _state(model):
        source, third, transposed = _place(name, hasattr(model, "visual_projection"))
        value = tensors[source].T if transposed else tensors[source]
        value = value if third is None else np.split(value, 3)[third]
        new[name] = torch.from_numpy(np.ascontiguousarray(value))
    model.load_state_dict(new, strict=False)


def _state(model) -> dict[str, np.ndarray]:
    return {n: v.detach().numpy() for n, v in model.state_dict().items() if not n.endswith("position_ids")}
