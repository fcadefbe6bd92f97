"""Writes tests/golden/schedulers.npz: chains walked by diffusers, with their noise, for the torch-free test suite.

Needs torch and diffusers. Run it from the repository's root::

    python scripts/make_golden_schedulers.py

The model is a formula, ``out = 0.3 x + 0.01 sin(t)``, so that nothing but the scheduler is compared. Each case is
stored as ``<name>/config`` (the scheduler's keys, JSON), ``<name>/x_start``, ``<name>/noise`` [n,B,H,W,C] (pndm: n = 0)
and ``<name>/x`` [n,B,H,W,C], the image after each model call. ``header`` holds the versions that made the file.
"""

from __future__ import annotations

import json
import pathlib
import platform

import numpy as np

SHAPE = (2, 3, 2, 1)  # B, H, W, C

LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
PNDM = {key: LATENT[key] for key in ("beta_schedule", "beta_start", "beta_end")} | {"skip_prk_steps": True}
CASES = {
    # name: (class, steps, eta, scheduler keys)
    "ddpm50": ("DDPMScheduler", 50, 0.0, {}),
    "ddim50": ("DDIMScheduler", 50, 0.0, {}),
    "ddpm10_large": ("DDPMScheduler", 10, 0.0, {"variance_type": "fixed_large"}),
    "ddpm10_large_trailing": (
        "DDPMScheduler",
        10,
        0.0,
        {"variance_type": "fixed_large", "timestep_spacing": "trailing", "clip_sample": False},
    ),
    "ddpm10_linspace": ("DDPMScheduler", 10, 0.0, {"timestep_spacing": "linspace", "clip_sample_range": 0.7}),
    "ddpm10_cosine_v": (
        "DDPMScheduler",
        10,
        0.0,
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    ),
    "ddim10_eta": ("DDIMScheduler", 10, 0.6, {"clip_sample": False}),
    "ddim10_latent": ("DDIMScheduler", 10, 0.0, {**LATENT, "steps_offset": 1, "set_alpha_to_one": False}),
    "ddim30_trailing": ("DDIMScheduler", 30, 1.0, {"timestep_spacing": "trailing"}),
    "ddim11_linspace": ("DDIMScheduler", 11, 0.0, {"timestep_spacing": "linspace", "set_alpha_to_one": False}),
    "ddim10_sample": ("DDIMScheduler", 10, 0.3, {"prediction_type": "sample"}),
    "ddim10_zero_snr_v": (
        "DDIMScheduler",
        10,
        0.0,
        {
            "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "clip_sample": False,
        },
    ),
    "pndm50_latent": ("PNDMScheduler", 50, 0.0, {**PNDM, "steps_offset": 1}),
    "pndm10_linspace": ("PNDMScheduler", 10, 0.0, {"skip_prk_steps": True, "timestep_spacing": "linspace"}),
    "pndm11_trailing_v": (
        "PNDMScheduler",
        11,
        0.0,
        {**PNDM, "timestep_spacing": "trailing", "prediction_type": "v_prediction", "set_alpha_to_one": True},
    ),
    "pndm1": ("PNDMScheduler", 1, 0.0, {**PNDM, "steps_offset": 1}),
}


def run_chain(class_name, num_steps, eta, keys, x_start, noise):
    """The image after each model call, float32 [n,B,H,W,C], walked by diffusers' scheduler with the given noise."""
    from unittest import mock

    import diffusers
    import torch
    from diffusers.schedulers import scheduling_ddim, scheduling_ddpm

    scheduler = getattr(diffusers, class_name)(**keys)
    scheduler.set_timesteps(num_steps)
    options = {"eta": eta} if class_name == "DDIMScheduler" else {}
    x, chain = torch.from_numpy(x_start), []
    calls = scheduler.timesteps.tolist()
    draws = [None] * len(calls) if class_name == "PNDMScheduler" else torch.from_numpy(noise)
    for t, z in zip(calls, draws, strict=True):
        out = 0.3 * x + 0.01 * float(np.sin(t))
        # Both schedulers draw their noise with this function; the DDPM scheduler takes it in no other way.
        with (
            mock.patch.object(scheduling_ddpm, "randn_tensor", return_value=z),
            mock.patch.object(scheduling_ddim, "randn_tensor", return_value=z),
        ):
            x = scheduler.step(out, t, x, **options).prev_sample
        chain.append(x.numpy().copy())
    return np.stack(chain)


def main():
    import diffusers
    import torch

    rng = np.random.default_rng(0)
    arrays = {}
    for name, (class_name, num_steps, eta, keys) in CASES.items():
        x_start = rng.standard_normal(SHAPE, np.float32)
        noise = rng.standard_normal((0 if class_name == "PNDMScheduler" else num_steps, *SHAPE), np.float32)
        config = {"_class_name": class_name, **keys}
        arrays[f"{name}/config"] = np.array(json.dumps({"steps": num_steps, "eta": eta, "scheduler": config}))
        arrays[f"{name}/x_start"] = x_start
        arrays[f"{name}/noise"] = noise
        arrays[f"{name}/x"] = run_chain(class_name, num_steps, eta, keys, x_start, noise)
    versions = {"diffusers": diffusers.__version__, "torch": torch.__version__, "numpy": np.__version__}
    versions |= {"script": "make_golden_schedulers", "python": platform.python_version()}
    arrays["header"] = np.array(json.dumps(versions))
    path = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden" / "schedulers.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, **arrays)
    print(f"{path}: {len(CASES)} chains, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
