"""Which methods unlearn one memorised point of a ring of Gaussians, and at what cost: a study in two dimensions.

    python scripts/ring.py [--seed 0]

Eight Gaussians on a circle and one point that was repeated until the model draws it for most of its samples. Each method runs
300 steps at the same rate. A row says how many samples still lie at the point (deleted means few), how far the others are
from the ring (sliced Wasserstein distance), the forget level against a model trained without the point, and by how much the
keep loss grew. In about a minute on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jaxunlearn as ju
from jaxunlearn.forgetting import forget_level, make_probe_losses
from jaxunlearn.objectives.probes import probe_levels
from jaxunlearn.schedule import from_betas
from scripts.plane import init, make_predict, make_sampler, sliced_distance, train

SCHEDULE = from_betas(np.linspace(1e-3, 0.2, 100))
POINT = np.array([0.6, 0.3])
COPIES = 40  # of 2,000 points: 2 %
NEAR = 0.3  # a sample within this distance of the point is a copy
METHODS = {
    "naive": ("weighted_sum", {"keep": 1.0}),
    "siss": ("relative_norm", {"rho": 0.1}),
    "siss_no_is": ("relative_norm", {"rho": 0.1}),
    "npo": ("weighted_sum", {"keep": 1.0, "forget": 0.2}),
    "simnpo": ("weighted_sum", {"keep": 1.0, "forget": 0.2}),
    "mirrored": ("weighted_sum", {"keep": 1.0, "forget": -0.2}),
    "neggrad": ("weighted_sum", {"forget": -1.0}),
}
"""Method -> combiner and its numbers."""


class Settings(NamedTuple):
    """How large the study is."""

    base_steps: int = 12_000
    steps: int = 300
    batch_size: int = 128
    width: int = 128
    samples: int = 4000
    seed: int = 0


class Row(NamedTuple):
    """What became of the model.

    Attributes:
      deleted: share of samples that are not at the point, in [0, 1].
      distance: sliced Wasserstein distance of the other samples to the points of the ring, in units of the plane.
      level: forget level, 0 untouched, 1 as the model that never saw the point.
      keep_ratio: keep loss over that of the start.
    """

    deleted: float
    distance: float
    level: float
    keep_ratio: float


def ring(count: int, seed: int) -> np.ndarray:
    """Points [count,1,1,2] of eight Gaussians of standard deviation .15 on a circle of radius 2."""
    rng = np.random.default_rng(seed)
    angle = 2 * np.pi * rng.integers(0, 8, count) / 8
    points = 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.15 * rng.standard_normal((count, 2))
    return np.float32(points).reshape(count, 1, 1, 2)


def study(settings: Settings) -> dict[str, Row]:
    """Trains both models, unlearns with each method, and measures: row name -> :class:`Row`."""
    predict, key = make_predict(SCHEDULE), jax.random.key(settings.seed)
    keep = jnp.asarray(ring(2000, settings.seed))
    forget = jnp.asarray(np.float32(POINT).reshape(1, 1, 1, 2))
    everything = jnp.concatenate([keep, jnp.tile(forget, (COPIES, 1, 1, 1))])

    @jax.jit
    def learn(data):
        tx = optax.adam(optax.cosine_decay_schedule(3e-3, settings.base_steps))
        options = (settings.base_steps, 2 * settings.batch_size, key)
        start, keep_only = init(key, settings.width), ju.weighted_sum(keep=1.0)
        return train(predict, ju.denoise(SCHEDULE), keep_only, tx, start, data, data, *options, num_steps=100)

    base, retrained = learn(everything), learn(keep)
    # An argument of the probes, so that the images of one size share a program.
    losses = make_probe_losses(predict, SCHEDULE, jax.random.fold_in(key, 3), noises=16)
    of_forget, of_keep = (
        (lambda params: losses(params, ju.Example(forget))),
        (lambda params: losses(params, ju.Example(keep[:64])).mean()),
    )
    start_loss, target_loss, keep_loss = of_forget(base), of_forget(retrained), of_keep(base)
    level = float(
        probe_levels(
            predict, base, ju.Example(forget), SCHEDULE, jax.random.fold_in(key, 4), error=ju.sum_squares
        ).mean()
    )
    draw_samples = make_sampler(predict, SCHEDULE, jax.random.fold_in(key, 2), settings.samples, 100)
    truth = np.asarray(keep).reshape(-1, 2)

    def measure(params) -> Row:
        points = np.asarray(draw_samples(params))
        at_point = np.linalg.norm(points - POINT, axis=1) < NEAR
        rest = points[~at_point]
        distance = sliced_distance(rest, truth) if len(rest) and np.all(np.isfinite(rest)) else float("inf")
        forgotten = forget_level(of_forget(params), start_loss, target_loss, paired=True)
        return Row(1 - float(at_point.mean()), distance, forgotten.level, float(of_keep(params) / keep_loss))

    rows = {"before": measure(base), "retrained": measure(retrained)}
    for name, (combiner, numbers) in METHODS.items():
        options = {"level": level} if "level" in ju.METHODS[name].options else {}
        objective = ju.methods.make_objective(name, SCHEDULE, error=ju.sum_squares, **options)
        combine = ju.methods.make_combine(name, combiner, **numbers)
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-4))
        run = jax.jit(
            lambda params, objective=objective, combine=combine, tx=tx: train(
                predict,
                objective,
                combine,
                tx,
                params,
                keep,
                forget,
                settings.steps,
                settings.batch_size,
                jax.random.fold_in(key, 1),
                num_steps=100,
            )
        )
        rows[name] = measure(run(base))
    return rows


def main(arguments: list[str] | None = None) -> dict[str, Row]:
    """Parses the command line, runs the study, prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in Settings()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    rows = study(Settings(**vars(parser.parse_args(arguments))))
    print("| model | samples at the point | distance of the others | forget level | keep loss ratio |")
    print("|---|---|---|---|---|")
    for name, r in rows.items():
        print(f"| {name} | {1 - r.deleted:.2%} | {r.distance:.3f} | {r.level:.2f} | {r.keep_ratio:.3g} |")
    return rows


if __name__ == "__main__":
    main()
