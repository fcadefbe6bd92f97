"""Writes ``tests/golden/{autoencoder_kl,clip_text}_<case>.npz`` and ``clip_tokenizer.npz``.

    python -m scripts.make_golden_latent_models          (needs torch, diffusers and transformers)

The weights are not stored but drawn by :func:`scripts.make_golden_unet.weights`. Every file holds the versions (JSON).

* Autoencoder: config (JSON), seed, x [B,H,W,C], mean and logvar of ``encode(x)``, z [B,h,w,c], images = ``decode(z)``.
* Text encoder: config (JSON), seed, input_ids [B,N], out = ``last_hidden_state`` [B,N,D].
* Tokenizer: prompts (JSON), and for both padding tokens the ids that ``CLIPTokenizer`` gives with the tiny vocabulary of
  ``tests/tiny_clip.py``.
"""

from __future__ import annotations

import json
import pathlib
import tempfile

import numpy as np

from scripts.make_golden_unet import GOLDEN, weights
from tests.tiny_clip import EOS, PROMPTS, write_tokenizer

LENGTH = 24
PADS = {"end": EOS, "mark": "!"}

AUTOENCODERS = {
    "colour": dict(
        block_out_channels=(8, 12, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        scaling_factor=0.3,
    ),
    "grey": dict(
        in_channels=1,
        out_channels=1,
        block_out_channels=(6, 9),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=2,
        latent_channels=2,
        norm_num_groups=3,
        act_fn="gelu",
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    ),
}
TEXT_ENCODERS = {
    "quick_gelu": dict(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=11,
        hidden_act="quick_gelu",
    ),
    "gelu": dict(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=7,
        hidden_act="gelu",
        layer_norm_eps=1e-4,
    ),
}


def main() -> None:
    """Runs the references on every case and writes the files."""
    import diffusers
    import torch
    import transformers

    modules = dict(torch=torch, diffusers=diffusers, transformers=transformers, numpy=np)
    versions = json.dumps({name: module.__version__ for name, module in modules.items()})

    def draw(model, seed):
        tensors = weights({name: tuple(value.shape) for name, value in model.state_dict().items()}, seed)
        model.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
        return model.eval()

    def first(x):
        return torch.from_numpy(x).permute(0, 3, 1, 2)

    def last(tensor):
        return tensor.permute(0, 2, 3, 1).contiguous().numpy()

    def save(name, **arrays):
        np.savez_compressed(GOLDEN / f"{name}.npz", versions=versions, **arrays)

    torch.set_grad_enabled(False)
    for seed, (name, config) in enumerate(AUTOENCODERS.items()):
        model = draw(diffusers.AutoencoderKL(**config), seed)
        rng = np.random.RandomState(100 + seed)
        x = rng.standard_normal((2, 8, 16, model.config.in_channels)).astype(np.float32)
        z = rng.standard_normal((2, 4, 2, model.config.latent_channels)).astype(np.float32)
        posterior, images = model.encode(first(x)).latent_dist, model.decode(first(z)).sample
        arrays = dict(x=x, mean=last(posterior.mean), logvar=last(posterior.logvar), z=z, images=last(images))
        save(f"autoencoder_kl_{name}", config=json.dumps(config), seed=seed, **arrays)
    for seed, (name, config) in enumerate(TEXT_ENCODERS.items()):
        ends = dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)
        model = draw(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config, **ends)), seed)
        shape = (2, config["max_position_embeddings"])
        ids = np.random.RandomState(100 + seed).randint(0, config["vocab_size"], shape)
        out = model(torch.from_numpy(ids)).last_hidden_state.numpy()
        save(f"clip_text_{name}", config=json.dumps(config), seed=seed, input_ids=ids, out=out)
    ids = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, pad in PADS.items():
            tokenizer = transformers.CLIPTokenizer.from_pretrained(
                write_tokenizer(pathlib.Path(folder) / name, pad, LENGTH)
            )
            rows = tokenizer(PROMPTS, padding="max_length", max_length=LENGTH, truncation=True).input_ids
            ids[name] = np.array(rows, np.int32)
    save("clip_tokenizer", prompts=json.dumps(PROMPTS), **ids)


if __name__ == "__main__":
    main()
