"""Writes ``tests/golden/unet2d_<case>.npz``: inputs and outputs of diffusers' UNets in float32.

    python scripts/make_golden_unet.py [case ...]          (needs torch and diffusers; default: all cases)

:data:`CASES` are of ``UNet2DModel``, :data:`CONDITION_CASES` of ``UNet2DConditionModel``.

The weights are not stored but drawn by :func:`weights` from the legacy generator of numpy, whose stream never changes.
Each file holds the config and the versions (JSON), x [B,H,W,C], t [B], labels (or an empty array), context [B,N,D] (of
conditional UNets only), out [B,H,W,C], and the norm of every tensor's gradient of ``mean(out ** 2)`` with the names in
ascending order.
"""

from __future__ import annotations

import json
import math
import pathlib
import sys
from collections.abc import Mapping

import numpy as np

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden"
D, A, U, AU = "DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"
GOOGLE = dict(downsample_padding=0, norm_eps=1e-6, flip_sin_to_cos=False, freq_shift=1, attention_head_dim=None)

CASES = {
    "mnist": dict(
        sample_size=12,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16, 24),
        norm_num_groups=4,
        down_block_types=(D, A, D),
        up_block_types=(U, AU, U),
    ),
    "celebahq": dict(
        sample_size=32,
        block_out_channels=(8, 8, 16, 16, 24, 24),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=(D, D, D, D, A, D),
        up_block_types=(U, AU, U, U, U, U),
        **GOOGLE,
    ),
    "cifar10": dict(
        sample_size=16,
        block_out_channels=(8, 16, 16, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=(D, A, D, D),
        up_block_types=(U, U, AU, U),
        **GOOGLE,
    ),
    "scale_shift": dict(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=(D, A),
        up_block_types=(AU, U),
        attention_head_dim=6,
        resnet_time_scale_shift="scale_shift",
        mid_block_scale_factor=math.sqrt(2),
        center_input_sample=True,
        act_fn="mish",
    ),
    "classes": dict(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=(A, D),
        up_block_types=(AU, U),
        attention_head_dim=4,
        num_class_embeds=5,
        downsample_type="resnet",
        upsample_type="resnet",
        act_fn="gelu",
    ),
}

CD, CU = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
CONDITION_CASES = {
    "condition_sd1": dict(
        sample_size=(8, 12),
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=(CD, D),
        up_block_types=(U, CU),
    ),
    "condition_sd2": dict(
        sample_size=(4, 4),
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=10,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        upcast_attention=True,
        act_fn="gelu",
        num_class_embeds=5,
        mid_block_scale_factor=math.sqrt(2),
        down_block_types=(D, CD),
        up_block_types=(CU, U),
    ),
}


def weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Float32 weights for dotted names with torch shapes: about torch's size, nothing 0 or 1, in order of the names."""
    rng = np.random.RandomState(seed)
    tensors = {}
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        norm_scale = name.endswith(".weight") and len(shape) == 1
        size = 0.1 if len(shape) == 1 else 1 / math.sqrt(math.prod(shape[1:]))
        tensors[name] = (float(norm_scale) + size * rng.standard_normal(shape)).astype(np.float32)
    return tensors


def write(name: str, model, config: Mapping, seed: int, versions: Mapping) -> None:
    """Gives the model of diffusers the weights of ``seed``, runs it forward and backward and writes one file."""
    import torch

    tensors = weights({k: tuple(v.shape) for k, v in model.state_dict().items()}, seed)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()})
    rng = np.random.RandomState(100 + seed)
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    x = rng.standard_normal((2, height, width, model.config.in_channels)).astype(np.float32)
    t = np.array([0, 977])
    labels = np.array([3, 0]) if "num_class_embeds" in config else np.array([], np.int64)
    inputs = dict(x=x, t=t, labels=labels)
    arguments = [torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t)]
    if "cross_attention_dim" in config:
        inputs["context"] = rng.standard_normal((2, 7, config["cross_attention_dim"])).astype(np.float32)
        arguments.append(torch.from_numpy(inputs["context"]))
    out = model(*arguments, *([torch.from_numpy(labels)] if labels.size else [])).sample
    out.square().mean().backward()
    gradients = {k: float(p.grad.double().norm()) for k, p in model.named_parameters()}
    np.savez_compressed(
        GOLDEN / f"unet2d_{name}.npz",
        config=json.dumps(config),
        versions=json.dumps(versions),
        seed=seed,
        **inputs,
        out=out.detach().permute(0, 2, 3, 1).numpy(),
        gradient_norms=np.array([gradients[k] for k in sorted(gradients)]),
    )


def main() -> None:
    """Runs diffusers on the cases that were asked for, or on all, and writes the files."""
    import diffusers
    import torch

    versions = dict(torch=torch.__version__, diffusers=diffusers.__version__, numpy=np.__version__)
    for cases, model in ((CASES, diffusers.UNet2DModel), (CONDITION_CASES, diffusers.UNet2DConditionModel)):
        for seed, (name, config) in enumerate(cases.items()):
            if name in sys.argv[1:] or not sys.argv[1:]:
                write(name, model(**config), config, seed, versions)


if __name__ == "__main__":
    main()
