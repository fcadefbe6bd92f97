"""Loads a UNet of Stable Diffusion 1.x in its real size and runs it once; prints the seconds and the peak memory.

    python scripts/full_size_unet.py [--dtype F16] [--limit_gib 16]

A folder with random weights (859,520,964 parameters) is written by one process; another loads it and predicts the noise of
one 64x64x4 latent under a text of 77 tokens, on the CPU. The exit code is 1 if that process took more memory than the limit.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

PARAMETERS = 859_520_964
CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.2.2",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def peak_gib() -> float:
    """The most memory that this process had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def write(folder: pathlib.Path, dtype: str) -> None:
    """A folder with newly drawn weights."""
    from jaxunlearn.io.weights import json_bytes, single_file, write_weights
    from jaxunlearn.models.convert import to_diffusers
    from jaxunlearn.models.parameters import init_params
    from jaxunlearn.models.unet2d_condition_config import UNet2DConditionConfig

    folder.mkdir()
    (folder / "config.json").write_bytes(json_bytes(CONFIG))
    (folder / "scheduler_config.json").write_bytes(json_bytes(SCHEDULER))
    params = init_params(UNet2DConditionConfig.from_dict(CONFIG), 0)
    write_weights(folder, to_diffusers(params), single_file(), dtype)


def load_and_run(folder: pathlib.Path) -> dict:
    """Seconds of each part and the peak memory."""
    import jax
    import numpy as np

    from jaxunlearn.io import diffusers

    started = time.monotonic()
    model = diffusers.load(folder)
    assert model.num_params == PARAMETERS, model.num_params
    loaded = time.monotonic()
    loaded_gib = peak_gib()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 64, 64, 4)).astype(np.float32)
    text = rng.standard_normal((1, 77, 768)).astype(np.float32)
    run = jax.jit(model.predict).lower(model.params, x, np.array([500]), text).compile()
    compiled = time.monotonic()
    out = np.asarray(run(model.params, x, np.array([500]), text))
    done = time.monotonic()
    assert out.shape == x.shape, out.shape
    assert np.isfinite(out).all()
    return {
        "parameters": model.num_params,
        "load_seconds": round(loaded - started, 1),
        "compile_seconds": round(compiled - loaded, 1),
        "run_seconds": round(done - compiled, 1),
        "peak_gib_after_loading": round(loaded_gib, 2),
        "peak_gib": round(peak_gib(), 2),
        "output_std": round(float(out.std()), 4),
    }


def main() -> int:
    """Starts the two processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="F16", help="of the weight file: F32, F16 or BF16")
    parser.add_argument("--limit_gib", type=float, default=16.0)
    parser.add_argument("--write", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        write(args.write, args.dtype)
        return 0
    if args.run:
        print(json.dumps(load_and_run(args.run)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "model"
        subprocess.run([sys.executable, __file__, f"--write={folder}", f"--dtype={args.dtype}"], check=True)
        finished = subprocess.run(
            [sys.executable, __file__, f"--run={folder}"], check=True, stdout=subprocess.PIPE, text=True
        )
    result = json.loads(finished.stdout.splitlines()[-1]) | {"limit_gib": args.limit_gib, "dtype": args.dtype}
    print(json.dumps(result, indent=2))
    return 0 if result["peak_gib"] <= args.limit_gib else 1


if __name__ == "__main__":
    sys.exit(main())
