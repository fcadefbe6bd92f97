"""What a filter costs: time of a SISS training step with a filtered forget error over that of the plain one.

    python scripts/benchmark_filters.py --configs digits mnist_tshirt_cpu --rounds 15

For the networks of ``train/configs`` and both backends of ``frequency``. The variants run in turns, round by round; the
ratio is the median over rounds of the ratio within a round, since on a shared machine absolute times mean little. A loss
alone, without a network, is timed too (``loss``): what a filter costs where it costs most.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jaxunlearn as ju
from jaxunlearn import runtime
from jaxunlearn.models.parameters import init_params
from jaxunlearn.models.unet2d import UNet2D, UNet2DConfig
from jaxunlearn.timesteps import uniform

BATCH = {"digits": 64, "mnist_tshirt_cpu": 16, "mnist_tshirt": 4}
"""Config -> examples a step: as in the config where that is quick on 2 cores, fewer where not."""

SCHEDULE = ju.schedule.linear(1000)


def errors(cutoff: float) -> dict[str, object]:
    """The plain error and the filtered ones."""
    backends = {name: ju.filtered(ju.sum_squares, ju.low_pass(cutoff, backend=name)) for name in ("fft", "matmul")}
    return {"plain": ju.sum_squares, **backends}


def images(count: int, size: int, channels: int = 1, seed: int = 0) -> jax.Array:
    """Random images [count, size, size, channels]."""
    values = np.random.default_rng(seed).uniform(-1, 1, (count, size, size, channels))
    return jnp.asarray(values, jnp.float32)


def training_steps(config: str, batch_size: int, cutoff: float, error_of=errors):
    """``(name -> function that runs one compiled step, name -> compile seconds)`` of a config's network."""
    model = importlib.import_module(f"train.configs.{config}").get_config().model.to_dict()
    settings = UNet2DConfig.from_dict(model)
    predict, params = ju.predictors.from_linen(UNet2D(settings)), init_params(settings, 0)
    x = images(2 * batch_size, settings.sample_size, settings.in_channels)
    batch = ju.Batch(ju.Example(x[:batch_size]), ju.Example(x[batch_size:]))
    draw = jax.jit(uniform(1000))(jax.random.key(0), batch)
    tx, combine = optax.adamw(1e-4), ju.relative_norm(0.1)
    state = ju.init_state(params, tx, combine)
    runs, seconds = {}, {}
    for name, error in error_of(cutoff).items():
        step = ju.make_train_step(ju.siss(SCHEDULE, forget_error=error), combine, predict, tx)
        start = time.perf_counter()
        compiled = jax.jit(step).lower(state, batch, draw).compile()
        seconds[name] = time.perf_counter() - start
        runs[name] = lambda compiled=compiled: compiled(state, batch, draw)
    return runs, seconds


def losses(batch_size: int, size: int, channels: int, cutoff: float):
    """The same for the gradient of the error alone, in the residual."""
    x, t = images(batch_size, size, channels), jnp.arange(batch_size)
    runs, seconds = {}, {}
    for name, error in errors(cutoff).items():
        start = time.perf_counter()
        gradient = jax.value_and_grad(lambda x, error=error: jnp.mean(error(x, t)))
        compiled = jax.jit(gradient).lower(x).compile()
        seconds[name] = time.perf_counter() - start
        runs[name] = lambda compiled=compiled: compiled(x)
    return runs, seconds


def in_turns(runs, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall and CPU seconds of every variant in every round, after one run to warm up."""
    for run in runs.values():
        jax.block_until_ready(run())
    wall, cpu = ({name: [] for name in runs} for _ in range(2))
    names = list(runs)
    for i in range(rounds):
        # Another order every round: the first of a round must not always be the same.
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start, start_cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(runs[name]())
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    return wall, cpu


def report(label: str, runs, seconds, rounds: int) -> dict[str, float]:
    """Prints a line for every variant; returns its wall ratio to the plain one."""
    wall, cpu = in_turns(runs, rounds)
    ratios = {}
    for name in runs:
        ratios[name], of_cpu = (statistics.median(a / b for a, b in zip(x[name], x["plain"])) for x in (wall, cpu))
        step = f"{1e3 * statistics.median(wall[name]):10.2f} ms"
        print(f"{label:26s} {name:8s} {step} {ratios[name]:7.3f} {of_cpu:7.3f} {seconds[name]:8.1f} s", flush=True)
    return ratios


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Parses the command line, measures, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--configs", nargs="*", choices=sorted(BATCH), default=["digits", "mnist_tshirt_cpu", "mnist_tshirt"]
    )
    parser.add_argument("--losses", nargs="*", default=["128x28x1", "16x256x3"], help="batch x side x channels")
    parser.add_argument("--cutoff", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, cutoff {options.cutoff}, {options.rounds} rounds")
    print(f"{'':26s} {'error':8s} {'step':>13s} {'ratio':>7s} {'CPU':>7s} {'compiled':>10s}")
    results = {}
    for config in options.configs:
        made = training_steps(config, BATCH[config], options.cutoff)
        results[config] = report(f"{config}, batch {BATCH[config]}", *made, options.rounds)
    for shape in options.losses:
        made = losses(*map(int, shape.split("x")), options.cutoff)
        results[shape] = report(f"loss {shape}", *made, options.rounds)
    return results


if __name__ == "__main__":
    runtime.set_up()  # the flags of the launcher: without them XLA's CPU backend adds a tenth to a small step with an FFT
    jax.config.update("jax_enable_compilation_cache", False)  # or the seconds of compilation would be those of reading
    main()
