"""Does the gap to retrained models order models rightly? Two retrained digits models give the floor.

    python scripts/gap_study.py [--seed 0] [--retrained 2] [--out runs/gap_study] [--config.KEY=VALUE ...]

Judged are the model before unlearning, one that was fine-tuned on keep images (`naive`), one unlearned with SISS, and one
that was destroyed by ascent (`collapsed`: NegGrad at a rate far too large). What must hold, with intervals that do not
overlap:

* near the forget image (`gap_kl_forget`): SISS < naive < before;
* at the models' own samples (`gap_kl_samples`): SISS < naive < collapsed.

Intervals are those of the draws: what another pair of retrained models would change is not in them.
Models are trained once and kept under --out. Exit code 1 if an order does not hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

HEADER = ("model", "gap_kl_forget", "ratio", "gap_kl_samples", "ratio", "elbo_gap")
ORDERS = (
    ("gap_kl_forget", "siss", "naive"),
    ("gap_kl_forget", "naive", "before"),
    ("gap_kl_samples", "siss", "naive"),
    ("gap_kl_samples", "naive", "collapsed"),
)
"""Metric, the model that must have less of it, the model that must have more."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    from train import study_flags

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--retrained", type=int, default=2, help="how many retrained models, at least 2")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "gap_study")
    parser.add_argument("--models", help="folder of finished models, {seed} in it: runs/digits_study/seed{seed}/models")
    parser.add_argument("--draws", type=int, default=2048, help="noised images of each replicate")
    parser.add_argument("--replicates", type=int, default=8)
    parser.add_argument("--collapse_steps", type=int, default=60, help="of ascent, at --collapse_rate")
    parser.add_argument("--collapse_rate", type=float, default=1e-4)
    parser.add_argument("--config", default=str(study_flags.CONFIGS / "digits.py"), help="FILE")
    arguments = study_flags.parse(parser, argv)
    if arguments.retrained < 2:
        parser.error(f"--retrained={arguments.retrained}: the floor needs at least 2")
    return arguments


def unlearned(arguments: argparse.Namespace, models) -> dict[str, Any]:
    """Parameters of the three models that are made from the base model."""
    from train.study_flags import load_config
    from train.trials import run_trial

    collapse = {
        "unlearn.num_steps": arguments.collapse_steps,
        "unlearn.optimizer.learning_rate": arguments.collapse_rate,
    }
    changes = {"naive": ("naive", {}), "siss": ("siss", {}), "collapsed": ("neggrad", collapse)}
    out = {}
    for name, (method, values) in changes.items():
        config = load_config(f"{arguments.config}:{method}", arguments.overrides | values)
        config.seed = arguments.seed
        out[name] = run_trial(config, models.base, models.examples, models.mesh).params
    return out


def measure(arguments: argparse.Namespace, models, columns: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> metric -> Estimate, and ``<metric> ratio`` -> Estimate of gap / floor.

    ``columns`` are the parameters of all models; retrained ones are named by ``io.workdir.retrained_names``.
    """
    import jax
    import numpy as np

    from jaxunlearn import sampling
    from jaxunlearn.images import to_model
    from jaxunlearn.io.workdir import is_reference
    from jaxunlearn.metrics import gap

    model, split, key = models.base, models.split, jax.random.key(arguments.seed)
    rows, names = jax.jit(gap.make_eps_rows(model.predict, model.schedule)), list(columns)
    references = [name for name in names if is_reference(name)]
    options = {"n": arguments.draws, "replicates": arguments.replicates}
    forget = np.asarray(to_model(np.unique(split.images[split.forget], axis=0)))
    near = gap.gaps(rows, list(columns.values()), forget, model.schedule, jax.random.fold_in(key, 0), **options)
    places = [names.index(name) for name in references]

    config = model.sampler.with_kind("ddim", model.schedule, 50)
    steps = sampling.trajectory(model.schedule, config, 50)
    draw = jax.jit(lambda p, z: sampling.sample(model.predict, p, z, None, model.schedule, config, steps))
    start = jax.random.normal(jax.random.fold_in(key, 1), (min(arguments.draws, 512), *forget.shape[1:]))
    distances = {}
    for name, params in columns.items():
        x0 = np.clip(np.asarray(draw(params, start)), -1, 1)
        others = [columns[r] for r in references if r != name]
        found = gap.gaps(rows, [params, *others], x0, model.schedule, jax.random.fold_in(key, 2), **options)
        distances[name] = gap.to_references(found, 0, range(1, 1 + len(others)))
    floors = gap.floor(near, places), np.mean([distances[name] for name in references], axis=0)

    out: dict[str, dict[str, Any]] = {}
    for place, name in enumerate(names):
        others = [r for r in places if r != place]
        values = {"gap_kl_forget": gap.to_references(near, place, places), "gap_kl_samples": distances[name]}
        out[name] = {metric: gap.estimate(value) for metric, value in values.items()}
        out[name]["elbo_gap"] = gap.estimate(np.mean([near.elbo(place, r) for r in others], axis=0))
        for (metric, value), floor in zip(values.items(), floors):
            out[name][f"{metric} ratio"] = gap.ratio(value, floor)
    return out


def ordered(found: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str, str], bool]:
    """Which of :data:`ORDERS` hold with intervals that do not overlap."""
    return {order: found[order[1]][order[0]].ci.high < found[order[2]][order[0]].ci.low for order in ORDERS}


def lines(found: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The table, one line a model."""

    def cell(estimate) -> str:
        return f"{estimate.value:.4g} ({estimate.ci.low:.4g} to {estimate.ci.high:.4g})"

    columns = ("gap_kl_forget", "gap_kl_forget ratio", "gap_kl_samples", "gap_kl_samples ratio", "elbo_gap")
    return [[name, *(cell(row[column]) for column in columns)] for name, row in found.items()]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes gap.md and gap.json; returns the exit code."""
    arguments = parse(argv)
    from jaxunlearn import runtime

    runtime.set_up()
    from jaxunlearn.io.manifest import write_json
    from jaxunlearn.io.workdir import retrained_names
    from train.study_flags import load_config, models_folder
    from train.study_models import study_models
    from train.study_tables import markdown

    config = load_config(arguments.config, arguments.overrides)
    source = models_folder(arguments, arguments.seed)
    models = study_models(config, arguments.seed, arguments.out / "models", source=source)
    columns = {"before": models.base.params, **unlearned(arguments, models)}
    for place, name in enumerate(retrained_names(arguments.retrained)):
        columns[name] = _retrained(models, place).params
    found = measure(arguments, models, columns)
    holds = ordered(found)
    text = markdown(HEADER, lines(found))
    verdict = [f"{metric}: {low} < {high}: {'yes' if held else 'NO'}" for (metric, low, high), held in holds.items()]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "gap.md").write_text("\n\n".join([text, "\n".join(verdict)]) + "\n", encoding="utf-8")
    plain = {
        name: {metric: {"value": e.value, "error": e.error, "ci": [e.ci.low, e.ci.high]} for metric, e in row.items()}
        for name, row in found.items()
    }
    write_json(arguments.out / "gap.json", {"models": plain, "orders": dict(zip(verdict, holds.values()))})
    print(text, *verdict, sep="\n")
    return 0 if all(holds.values()) else 1


def _retrained(models, place: int):
    """The retrained model with other initial weights, order and noise; the division of the data stays."""
    if place == 0:
        return models.retrained
    config = models.config.copy_and_resolve_references()
    with config.unlocked():
        config.seed = models.config.seed + place
    folder = models.folder.with_name(f"{models.folder.name}_{place + 1}")
    return dataclasses.replace(models, config=config, folder=folder, source=None).retrained


if __name__ == "__main__":
    from train import study_flags

    study_flags.run(main)
