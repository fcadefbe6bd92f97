"""A tiny Stable Diffusion pipeline on disk, drawn at random and written without torch: what the tests of latents run on."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

from jaxunlearn.models.architectures import ARCHITECTURES
from jaxunlearn.models.convert import to_diffusers
from jaxunlearn.models.parameters import init_params

SIZE = 16
"""Side of the images; latents have half of it."""

TOKENS = 24
"""Length of a tokenised prompt."""

HIDDEN = 16
"""Width of the text embeddings."""

_VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": SIZE,
    "scaling_factor": 0.18215,
}
_CLIP = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 514,
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": TOKENS,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": 512,
    "eos_token_id": 513,
    "pad_token_id": 513,
}
_TEXT_UNET = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": SIZE // 2,
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": HIDDEN,
}
_PLAIN_UNET = {
    "_class_name": "UNet2DModel",
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": SIZE // 2,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def letters() -> list[str]:
    """The 256 characters that stand for the bytes in CLIP's vocabulary: printable ones for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]


def make_tiny_pipeline(
    path: Any, *, text: bool = True, prediction_type: str = "epsilon", seed: int = 0, **changes: dict[str, Any]
) -> pathlib.Path:
    """Writes the folder; less than 1 MB.

    Args:
      path: the new folder.
      text: a Stable Diffusion pipeline (UNet2DConditionModel, PNDM scheduler); without, UNet2DModel on latents (DDIM).
      prediction_type: of the scheduler.
      seed: of all weights.
      **changes: ``unet={...}``, ``vae={...}``, ``text_encoder={...}``: keys of the configurations that differ.
    """
    root = pathlib.Path(path)
    _component(root / "vae", "AutoencoderKL", _VAE | changes.get("vae", {}), seed)
    index = {"_class_name": "LDMPipeline", "_diffusers_version": "0.42.1", "vae": ["diffusers", "AutoencoderKL"]}
    scheduler = {"_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": prediction_type} | _SCHEDULER
    unet = _PLAIN_UNET
    if text:
        unet = _TEXT_UNET
        scheduler = scheduler | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
        del scheduler["clip_sample"]
        _component(root / "text_encoder", "CLIPTextModel", _CLIP | changes.get("text_encoder", {}), seed, "model")
        _tokenizer(root / "tokenizer")
        index |= {
            "_class_name": "StableDiffusionPipeline",
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        }
    _component(root / "unet", unet["_class_name"], unet | changes.get("unet", {}), seed)
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2))
    index |= {"scheduler": ["diffusers", scheduler["_class_name"]], "unet": ["diffusers", unet["_class_name"]]}
    (root / "model_index.json").write_text(json.dumps(index, indent=2))
    return root


def _component(folder: pathlib.Path, name: str, config: dict, seed: int, stem: str = "diffusion_pytorch_model") -> None:
    from safetensors.numpy import save_file

    parsed = ARCHITECTURES[name].config.from_dict(config)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(to_diffusers(init_params(parsed, seed)), folder / f"{stem}.safetensors", metadata={"format": "pt"})


def _tokenizer(folder: pathlib.Path) -> None:
    tokens = [*letters(), *(letter + "</w>" for letter in letters()), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TOKENS,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    special = {key: value for key, value in config.items() if key.endswith("_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def make_pictures(
    folder: Any, *, texts: dict[str, str] | None = None, count: int = 12, forget: int = 3
) -> pathlib.Path:
    """Writes ``count`` pictures of 16x16 pixels, ``0000.png`` ..., and ``metadata.jsonl``.

    Args:
      folder: the new folder.
      texts: file name -> caption; None: the first ``forget`` are "a red square", the others "a picture of noise".
      count: number of pictures; the first ``forget`` are squares, the others noise.
      forget: number of squares, all different.
    """
    from PIL import Image

    root = pathlib.Path(folder)
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"{i:04d}.png" for i in range(count)]
    for i, name in enumerate(names):
        picture = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        if i < forget:
            picture = np.zeros((SIZE, SIZE, 3), np.uint8)
            picture[2 + i : 12, 2:12, 0] = 255
        Image.fromarray(picture).save(root / name)
    if texts is None:
        texts = {name: "a red square" if i < forget else "a picture of noise" for i, name in enumerate(names)}
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in texts.items()]
    if lines:
        (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root
