"""Unlearns a picture from a tiny Stable Diffusion pipeline, end to end, and compares the result with diffusers.

    python scripts/tiny_stable_diffusion.py --images FOLDER_OR_ZIP --out OUT [--small] [--config.KEY=VALUE ...]

1. A pipeline is made with diffusers that reproduces one picture for its prompt (``make_tiny_stable_diffusion.py``).
2. ``python -m train.main --config=train/configs/sd14.py`` unlearns the picture; the launcher evaluates, reports and exports.
3. The original and the exported folder are opened by ``StableDiffusionPipeline.from_pretrained`` and by this library. The
   same prompt and noise must give the same pictures (mean difference under 1/255), and the memorised one must be gone.

Prints a table, writes ``OUT/result.json`` and ``OUT/pictures.png`` (from the top: before, after, the memorised picture last);
the exit code is 1 if one of the claims fails. ``--small`` is the size at which the tests run it.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shlex
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
COUNT = 8  # pictures a model
STEPS = 50
GUIDANCE = 2.0
GONE = 0.0  # share of copies that may be left
LARGEST_DIFFERENCE = 1 / 255

TINY = {
    "unlearn.num_steps": "200",
    "unlearn.batch_size": "16",
    "unlearn.micro_batches": "1",
    "unlearn.optimizer.learning_rate": "3e-4",
    "unlearn.optimizer.lr_schedule": "cosine",
    "unlearn.combine.name": "relative_norm",
    "unlearn.select.window": "(250,1000)",
    "latents.sample": "False",  # as it was trained; the spread of this small autoencoder is no small noise
    "compute.remat": "False",
    "checkpoint.every": "100",
    "log.every": "20",
    "log.sample_count": "16",
    "eval.guidance": str(GUIDANCE),
    "eval.num_samples": "64",
    "eval.batch_size": "32",
    "eval.injection_t": "(100,250)",
    "eval.injection_copies": "4",
    "eval.loss_noises": "4",
    "eval.loss_images": "32",
    "eval.classifier.steps": "50",
    "eval.include_images": "True",
}
"""What differs from the Stable Diffusion recipe for so small a network."""

SMALL = {
    "unlearn.num_steps": "200",
    "unlearn.optimizer.learning_rate": "6e-4",
    "unlearn.combine.rho": "0.2",
    "eval.num_samples": "16",
    "eval.batch_size": "16",
    "eval.sampling_steps": "10",
    "eval.injection_t": "(50,100)",
    "eval.injection_copies": "1",
    "eval.loss_noises": "1",
}
"""What differs further with ``--small``."""


def start_noise(shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise [COUNT, h, w, z], the same for all."""
    return np.random.default_rng(0).standard_normal((COUNT, *shape)).astype(np.float32)


def our_pictures(folder: pathlib.Path, prompt: str, image_shape: tuple[int, int, int]) -> np.ndarray:
    """[COUNT,H,W,C] in [0, 1], with the pipeline's own scheduler."""
    import jax

    from jaxunlearn import sampling
    from jaxunlearn.guidance import classifier_free
    from jaxunlearn.images import to_unit
    from jaxunlearn.io import diffusers

    model = diffusers.load(folder)
    space = model.latent_space()
    texts = model.text().embed([prompt, ""])
    steps = sampling.trajectory(model.schedule, model.sampler, STEPS)

    def latents(params, noise, cond, uncond):
        predict = classifier_free(model.predict_raw, GUIDANCE, uncond)
        key = jax.random.key(0)
        return sampling.sample(
            predict,
            params,
            noise,
            key,
            model.schedule,
            model.sampler,
            steps,
            cond=cond,
            prediction_type=model.prediction_type,
        )

    noise = start_noise(space.latent_shape(image_shape))
    cond = np.repeat(texts[:1], COUNT, axis=0)
    return np.asarray(to_unit(space.decode(jax.jit(latents)(model.params, noise, cond, texts[1:]))))


def their_pictures(folder: pathlib.Path, prompt: str, image_shape: tuple[int, int, int]) -> np.ndarray:
    """The same by diffusers."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    height, width = (side // pipeline.vae_scale_factor for side in image_shape[:2])
    latent_shape = (height, width, pipeline.unet.config.in_channels)
    latents = torch.from_numpy(start_noise(latent_shape).transpose(0, 3, 1, 2).copy())
    return pipeline(
        [prompt] * COUNT, latents=latents, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np"
    ).images


def run(*command: str) -> None:
    """A command, shown; its failure ends the script with its exit code."""
    print("$ python", shlex.join(command), flush=True)
    code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if code:
        sys.exit(code)


def main() -> int:
    """Makes, unlearns, compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="folder or zip of pictures, one sub-folder a class")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--small", action="store_true")
    args, more = parser.parse_known_args()
    out = args.out.resolve()
    started = time.monotonic()
    make = ["--images", args.images, "--out", str(out / "model")]
    if args.small:
        make += ["--vae_steps=300", "--unet_steps=600", "--limit=80", "--forget=12"]
    if not (out / "model" / "prompt.txt").exists():
        run("scripts/make_tiny_stable_diffusion.py", *make)
    prompt = (out / "model" / "prompt.txt").read_text().strip()
    forget = (out / "model" / "forget.txt").read_text().strip()
    overrides = TINY | (SMALL if args.small else {})
    run(
        "-m",
        "train.main",
        "--config=train/configs/sd14.py",
        f"--workdir={out / 'run'}",
        f"--config.base.path={out / 'model' / 'pipeline'}",
        f"--config.data.path={out / 'model' / 'pictures'}",
        "--config.data.size=32",
        f"--config.data.forget.files={out / 'model' / 'forget.txt'}",
        f"--config.unlearn.prompt={prompt}",
        *(f"--config.{key}={value}" for key, value in overrides.items()),
        *more,
    )
    return compare(out, prompt, forget, time.monotonic() - started)


def compare(out: pathlib.Path, prompt: str, forget: str, seconds: float) -> int:
    """Prints the table; 0 if every claim holds."""
    from jaxunlearn.io.datasets import DATASETS
    from jaxunlearn.metrics.extraction import calibrate

    data = DATASETS["folder"](path=str(out / "model" / "pictures"))
    memorised = data.images[data.names.index(forget)][None]
    others = data.images[[name != forget for name in data.names]]
    threshold = float(calibrate(memorised, others).threshold[0])
    image_shape = memorised.shape[1:]
    folders = {"before": out / "model" / "pipeline", "after": out / "run" / "export"}

    result = {"prompt": prompt, "copy_threshold": threshold, "seconds": round(seconds)}
    rows, holds = [], True
    print(f"{'model':8} {'copies':>8} {'nearest rms':>12} {'ours - diffusers, mean':>23}")
    for name, folder in folders.items():
        ours = our_pictures(folder, prompt, image_shape)
        theirs = their_pictures(folder, prompt, image_shape)
        difference = float(np.abs(ours - theirs).mean())
        rms = np.sqrt(np.mean((theirs - memorised / 255) ** 2, axis=(1, 2, 3)))
        copies = int((rms < threshold).sum())
        result[name] = {"copies": copies, "of": COUNT, "rms": rms.round(4).tolist(), "difference": difference}
        print(f"{name:8} {copies:>3} of {COUNT:<2} {rms.min():12.4f} {difference:23.2e}")
        rows.append(theirs)
        holds &= difference < LARGEST_DIFFERENCE
    holds &= result["before"]["copies"] > COUNT // 2 and result["after"]["copies"] <= GONE * COUNT
    result["holds"] = bool(holds)
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    save_rows(out / "pictures.png", [*rows, memorised / 255])
    print("every claim holds" if holds else "a claim does not hold", f"({seconds:.0f} s)")
    return 0 if holds else 1


def save_rows(path: pathlib.Path, rows: list[np.ndarray]) -> None:
    """Rows of pictures in [0, 1] as a PNG, enlarged four times."""
    from PIL import Image

    height, width, channels = rows[0].shape[1:]
    sheet = np.ones((len(rows) * height, COUNT * width, channels))
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            sheet[i * height : (i + 1) * height, j * width : (j + 1) * width] = picture
    pixels = np.round(sheet * 255).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(path)


if __name__ == "__main__":
    sys.exit(main())
