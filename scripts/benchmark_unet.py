"""Time of forward and backward pass of the UNet in its fast and textbook forms, and of diffusers' if it is installed.

    python scripts/benchmark_unet.py --batch 4 --rounds 7
    XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= python scripts/benchmark_unet.py

The model is the MNIST UNet (64,128,256 channels, 14.7 M parameters). The variants run in turns, round by round, and the
medians are compared: on a shared machine ratios mean something, absolute times do not.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from jaxunlearn.models.convert import to_diffusers
from jaxunlearn.models.parameters import init_params
from jaxunlearn.models.unet2d import UNet2D, UNet2DConfig

CONFIG = UNet2DConfig(
    sample_size=28,
    in_channels=1,
    out_channels=1,
    block_out_channels=(64, 128, 256),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)


def jax_step(module: UNet2D, params, x, t, target):
    """A function that runs one forward and backward pass, its temporaries in MB, and its compile seconds."""

    def loss(params):
        return jnp.mean(jnp.square(module.apply({"params": params}, x, t) - target))

    start = time.perf_counter()
    compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    megabytes = memory.temp_size_in_bytes / 1e6 if memory is not None else float("nan")
    return lambda: jax.block_until_ready(compiled(params)), megabytes, seconds


def torch_step(params, x, t, target):
    """The same in torch with diffusers' model, or None where they are not installed."""
    try:
        import diffusers
        import torch
    except ImportError:
        return None
    model = diffusers.UNet2DModel(**CONFIG.to_dict())
    model.load_state_dict({name: torch.from_numpy(np.array(v)) for name, v in to_diffusers(params).items()})
    x, target = (torch.from_numpy(np.array(a)).permute(0, 3, 1, 2).contiguous() for a in (x, target))
    t = torch.from_numpy(np.array(t))

    def run():
        model.zero_grad(set_to_none=True)
        torch.mean((model(x, t).sample - target) ** 2).backward()

    return run


def main() -> None:
    """Parses the command line, measures, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--no-torch", action="store_true")
    options = parser.parse_args()

    params = init_params(CONFIG, 0)
    rng = np.random.default_rng(0)
    shape = (options.batch, 28, 28, 1)
    x, target = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
    t = jnp.asarray(rng.integers(0, 1000, options.batch))
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, XLA_FLAGS={os.environ.get('XLA_FLAGS', '')!r}")

    steps, notes = {}, {}
    for name, fast in (("fast", True), ("textbook", False)):
        module = UNet2D(CONFIG, dtype=jnp.dtype(options.dtype), fast=fast)
        steps[name], megabytes, seconds = jax_step(module, params, x, t, target)
        notes[name] = f"temporaries {megabytes:.0f} MB, compiled in {seconds:.0f} s"
    reference = None if options.no_torch else torch_step(params, x, t, target)
    if reference is not None:
        steps["torch"], notes["torch"] = reference, "diffusers' UNet2DModel, eager"
    for run in steps.values():
        run()
    wall, cpu = ({name: [] for name in steps} for _ in range(2))
    for _ in range(options.rounds):
        for name, run in steps.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            run()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    base = "torch" if "torch" in steps else "textbook"
    print(f"{'':10s} {'wall':>9s} {'wall ratio':>11s} {'CPU ratio':>10s}   (ratios to {base}, {options.rounds} rounds)")
    for name in steps:
        seconds = statistics.median(wall[name])
        ratio = statistics.median(a / b for a, b in zip(wall[name], wall[base]))
        cpu_ratio = statistics.median(a / b for a, b in zip(cpu[name], cpu[base]))
        print(f"{name:10s} {seconds:8.3f}s {ratio:11.2f} {cpu_ratio:10.2f}   {notes[name]}")


if __name__ == "__main__":
    main()
