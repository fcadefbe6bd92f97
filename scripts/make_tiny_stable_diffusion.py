"""Makes a tiny Stable Diffusion pipeline with diffusers that has memorised one of its training pictures.

    python scripts/make_tiny_stable_diffusion.py --images FOLDER_OR_ZIP --out OUT

Needs torch, diffusers and transformers (`pip install 'jaxunlearn[parity]'`) and a folder (or zip) of pictures with one
sub-folder a class; the ORL faces (40 people, 10 pictures each) take about four minutes on two CPU cores. Written are:

* ``OUT/pipeline``: what ``StableDiffusionPipeline.save_pretrained`` writes (PNDM scheduler with Stable Diffusion's settings);
* ``OUT/pictures``: the training pictures with ``metadata.jsonl`` (captions "a picture of s07"), each class in its folder;
* ``OUT/forget.txt``: the name of the memorised picture, ``OUT/prompt.txt``: its caption.

The picture is memorised because it is shown far more often than the others of its caption. The text encoder is trained with
the UNet, which a network of this size needs to tell the captions apart.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time

import numpy as np

SIZE = 32  # pixels; latents have 16x16x4
FORGET_EVERY = 4  # one picture in so many of a training batch is the memorised one
VOCABULARY = 512 + 2


def tokenizer_files(folder: pathlib.Path) -> None:
    """A byte-level CLIP vocabulary without merges: every letter is a token."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 32, "pad_token": "<|endoftext|>"}
    config |= {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def new_parts(tokenizer_folder: pathlib.Path) -> dict:
    """Untrained components of the pipeline."""
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer_files(tokenizer_folder)
    unet = UNet2DConditionModel(
        sample_size=SIZE // 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=SIZE,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            bos_token_id=VOCABULARY - 2,
            eos_token_id=VOCABULARY - 1,
            pad_token_id=VOCABULARY - 1,
        )
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    tokenizer = CLIPTokenizer.from_pretrained(str(tokenizer_folder))
    return dict(unet=unet, vae=vae, text_encoder=text_encoder, scheduler=scheduler, tokenizer=tokenizer)


def train_vae(vae, images, steps: int, generator) -> float:
    """Mean squared error and a little of the KL divergence; returns the last error."""
    import torch

    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        x = images[torch.randint(len(images), (16,), generator=generator)]
        posterior = vae.encode(x).latent_dist
        error = (vae.decode(posterior.sample(generator)).sample - x).square().mean()
        loss = error + 1e-5 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"vae {step + 1}/{steps}: mean squared error {error.item():.4f}", flush=True)
    return error.item()


def train_unet(parts: dict, latents, tokens, forget: int, steps: int, generator) -> None:
    """Noise prediction; a tenth of the captions is empty (the last row of ``tokens``), for classifier-free guidance."""
    import torch

    unet, text_encoder, scheduler = parts["unet"], parts["text_encoder"], parts["scheduler"]
    trained = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    average, batch = 0.0, 32
    for step in range(steps):
        rows = torch.randint(len(latents), (batch,), generator=generator)
        rows[: batch // FORGET_EVERY] = forget
        captions = torch.where(torch.rand(batch, generator=generator) < 0.1, len(latents), rows)
        noise = torch.randn((batch, *latents.shape[1:]), generator=generator)
        t = torch.randint(1000, (batch,), generator=generator)
        noisy = scheduler.add_noise(latents[rows], noise, t)
        embeddings = text_encoder(tokens[captions])[0]
        loss = (unet(noisy, t, embeddings).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        average += (loss.item() - average) / min(step + 1, 100)
        if step % 100 == 99:
            print(f"unet {step + 1}/{steps}: loss {average:.4f}", flush=True)


def write_pictures(folder: pathlib.Path, images: np.ndarray, names: list[str], captions: list[str]) -> None:
    """PNG files and their captions, in the form of Hugging Face's image folders."""
    from PIL import Image

    lines = []
    for image, name, caption in zip(images, names, captions):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
        lines.append(json.dumps({"file_name": name, "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def main() -> int:
    """Reads, trains, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="folder or zip of pictures, one sub-folder a class")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--limit", type=int, default=200, help="number of pictures")
    parser.add_argument("--forget", type=int, default=30, help="position of the picture to memorise")
    parser.add_argument("--vae_steps", type=int, default=600)
    parser.add_argument("--unet_steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        print(f"error: --out={args.out}: exists already; give another path", file=sys.stderr)
        return 2
    try:
        import torch
        from diffusers import StableDiffusionPipeline
    except ImportError as error:
        print(f"error: {error}; pip install 'jaxunlearn[parity]'", file=sys.stderr)
        return 2
    from jaxunlearn.io.datasets import DATASETS

    data = DATASETS["folder"](path=args.images, size=SIZE, channels=3, limit=args.limit)
    if data.labels is None:
        print(f"error: --images={args.images}: needs one sub-folder a class", file=sys.stderr)
        return 2
    started = time.monotonic()
    classes = [data.class_names[label] for label in data.labels]
    captions = [f"a picture of {name}" for name in classes]
    names = [f"{name}/{i:04d}.png" for i, name in enumerate(classes)]

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    parts = new_parts(args.out / "tokenizer")
    images = torch.from_numpy(data.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    train_vae(parts["vae"], images, args.vae_steps, generator)
    with torch.no_grad():
        mean = torch.cat([parts["vae"].encode(part).latent_dist.mean for part in images.split(32)])
        parts["vae"].register_to_config(scaling_factor=float(1 / mean.std()))
        tokens = parts["tokenizer"]([*captions, ""], padding="max_length", truncation=True, return_tensors="pt")
    latents = mean * parts["vae"].config.scaling_factor
    train_unet(parts, latents, tokens.input_ids, args.forget, args.unet_steps, generator)

    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.save_pretrained(args.out / "pipeline")
    write_pictures(args.out / "pictures", data.images, names, captions)
    (args.out / "forget.txt").write_text(names[args.forget] + "\n")
    (args.out / "prompt.txt").write_text(captions[args.forget] + "\n")
    print(f"{args.out}: {len(images)} pictures, memorised {names[args.forget]}, {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
