"""Which timesteps unlearn one of two half-moons, and which destroy: a study in two dimensions, with its picture.

    python scripts/half_moons.py --output half_moons.png

A small network learns both moons. Then the lower one is unlearned with the same steps and rate, once with the forget term at
all t and once in each of several windows of t: by plain ascent (NegGrad), which nothing holds, and by SISS, whose keep term
trains at all t. On 2 CPU cores in less than a minute.

The idea of the toy is that of arXiv 2510.17917, of which the abstract and the public reviews were available: network, method
and windows are ours, and no number here is the paper's.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jaxunlearn as ju
from jaxunlearn.combine import COMBINERS
from scripts.plane import init, make_predict, make_sampler, sliced_distance, train

SCHEDULE = ju.schedule.linear(1000)
predict = make_predict(SCHEDULE)
NOISE = 0.05  # standard deviation across a moon


class Recipe(NamedTuple):
    """How a method is run."""

    combiner: str
    options: dict[str, float]
    steps: int
    learning_rate: float


RECIPES = {
    "neggrad": Recipe("weighted_sum", {"forget": -0.02}, 50, 1e-4),
    "siss": Recipe("relative_norm", {"rho": 0.6}, 100, 5e-4),
}
"""The methods of the study. Adam makes the weight of the only term of NegGrad irrelevant: steps and rate decide."""


class Settings(NamedTuple):
    """How large the study is."""

    base_steps: int = 12_000
    steps: int = 0  # of unlearning; 0: each method's own
    batch_size: int = 256
    width: int = 128
    samples: int = 2000
    windows: int = 5
    seed: int = 0


class Row(NamedTuple):
    """What became of the model.

    Attributes:
      name: of the method and the window.
      window: (t1, t2).
      forget_share: share of samples on the forget moon, in [0, 1].
      stray_share: share of samples on neither moon.
      distance: sliced Wasserstein distance between the samples and the keep moon, in units of the plane.
      samples: [n, 2].
    """

    name: str
    window: tuple[int, int]
    forget_share: float
    stray_share: float
    distance: float
    samples: np.ndarray


def moon(count: int, upper: bool, seed: int) -> np.ndarray:
    """Points [count,1,1,2] around a half circle: upper is kept, lower is unlearned. Both moons have mean about 0."""
    rng = np.random.default_rng(seed)
    angle = np.pi * rng.random(count)
    sign = 1 if upper else -1
    points = np.stack([sign * (np.cos(angle) - 0.5), sign * (np.sin(angle) - 0.25)], axis=1)
    return np.float32(points + NOISE * rng.standard_normal((count, 2))).reshape(count, 1, 1, 2)


def off_the_moon(points: np.ndarray, upper: bool) -> np.ndarray:
    """Distance of points [n, 2] to the middle line of a moon."""
    angle = np.linspace(0, np.pi, 200)
    sign = 1 if upper else -1
    line = sign * np.stack([np.cos(angle) - 0.5, np.sin(angle) - 0.25], axis=1)
    return np.min(np.linalg.norm(points[:, None] - line[None], axis=-1), axis=1)


def windows(count: int) -> list[tuple[str, tuple[int, int]]]:
    """Everything, and ``count`` equal parts of it."""
    ends = np.linspace(0, SCHEDULE.num_steps, count + 1).astype(int).tolist()
    parts = list(zip(ends[:-1], ends[1:]))
    return [("all t", (0, SCHEDULE.num_steps)), *((f"[{a}, {b})", (a, b)) for a, b in parts)]


def measure(name: str, window: tuple[int, int], points: np.ndarray, truth: np.ndarray) -> Row:
    """The row of a model from its samples [n, 2] and fresh points of the keep moon."""
    far = 4 * NOISE
    to_keep, to_forget = (off_the_moon(points, upper) for upper in (True, False))
    on_forget = (to_forget < far) & (to_forget < to_keep)
    stray = np.minimum(to_keep, to_forget) >= far
    return Row(name, window, float(on_forget.mean()), float(stray.mean()), sliced_distance(points, truth), points)


def study(settings: Settings) -> dict[str, list[Row]]:
    """Trains the model, unlearns in each window with each method, and measures.

    Returns:
      Method -> rows; the first row is the model before unlearning.
    """
    keep, forget = (jnp.asarray(moon(4000, upper, settings.seed + upper)) for upper in (True, False))
    both = jnp.concatenate([keep, forget])
    key = jax.random.key(settings.seed)

    @jax.jit
    def learn():
        tx = optax.adam(optax.cosine_decay_schedule(5e-3, settings.base_steps))
        params, options = init(key, settings.width), (settings.base_steps, settings.batch_size, key)
        return train(predict, ju.denoise(SCHEDULE), ju.weighted_sum(keep=1.0), tx, params, both, both, *options)

    def unlearner(method):
        recipe = RECIPES[method]

        @jax.jit
        def unlearn(params, weights):
            # The weights of t are an argument: one program serves all windows.
            error = ju.weighted(ju.sum_squares, lambda t: weights[t])
            objective = ju.methods.make_objective(method, SCHEDULE, forget_error=error)
            combine, tx = COMBINERS[recipe.combiner](**recipe.options), optax.adam(recipe.learning_rate)
            options = settings.steps or recipe.steps, settings.batch_size, jax.random.fold_in(key, 1)
            return train(predict, objective, combine, tx, params, keep, forget, *options)

        return unlearn

    draw_samples = make_sampler(predict, SCHEDULE, jax.random.fold_in(key, 2), settings.samples)
    truth = moon(settings.samples, True, settings.seed + 10).reshape(-1, 2)

    base = learn()
    before = measure("before", (0, 0), np.asarray(draw_samples(base)), truth)
    tables = {}
    for method in RECIPES:
        unlearn, tables[method] = unlearner(method), [before]
        for name, window in windows(settings.windows):
            weights = ju.window(*window, num_steps=SCHEDULE.num_steps)(jnp.arange(SCHEDULE.num_steps))
            points = np.asarray(draw_samples(unlearn(base, weights)))
            tables[method].append(measure(name, window, points, truth))
    return tables


def picture(tables: dict[str, list[Row]], path: pathlib.Path) -> None:
    """One line of panels a method: samples, the moons' middle lines, the numbers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = len(tables), max(len(rows) for rows in tables.values())
    figure, axes = pyplot.subplots(*size, figsize=(2.2 * size[1], 2.2 * size[0]), squeeze=False, layout="constrained")
    angle = np.linspace(0, np.pi, 100)
    for line, (method, rows) in zip(axes, tables.items()):
        for axis, r in zip(line, rows):
            axis.scatter(*r.samples.T, s=1.5, color="#3366aa", linewidths=0)
            for sign, color in ((1, "#228833"), (-1, "#cc3311")):
                axis.plot(sign * (np.cos(angle) - 0.5), sign * (np.sin(angle) - 0.25), color=color, linewidth=0.8)
            axis.set(xlim=(-2.2, 2.2), ylim=(-1.6, 1.6), xticks=[], yticks=[], aspect="equal")
            axis.set_title(f"{r.name}\nred {r.forget_share:.0%}, neither {r.stray_share:.0%}", fontsize=8)
        line[0].set_ylabel(method)
    figure.suptitle(
        "Samples; keep the green moon, unlearn the red one with the forget term in a window of t", fontsize=9
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, list[Row]]:
    """Parses the command line, runs the study, prints a table, writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("half_moons.png"))
    for name, default in Settings()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    options = vars(parser.parse_args(arguments))
    output = options.pop("output")
    start = time.perf_counter()
    tables = study(Settings(**options))
    print(
        f"{'method':8s} {'forget term at':>15s} {'on forget moon':>15s} {'on neither':>11s} {'distance to keep moon':>22s}"
    )
    for method, rows in tables.items():
        for r in rows:
            print(f"{method:8s} {r.name:>15s} {r.forget_share:>15.1%} {r.stray_share:>11.1%} {r.distance:>22.3f}")
    picture(tables, output)
    print(f"{output}, {time.perf_counter() - start:.0f} s")
    return tables


if __name__ == "__main__":
    main()
