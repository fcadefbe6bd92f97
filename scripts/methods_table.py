"""Compares all methods on the default job at equal steps, and writes the table as Markdown and JSON.

    python scripts/methods_table.py [--seeds 0 1 2] [--methods siss npo ...] [--out DIR] [--config.KEY=VALUE ...]

For every seed it trains a base model and a model retrained without the photograph (kept under --out, as is every finished
row: a stopped run goes on), unlearns with the preset of each method (`train/configs/digits.py:METHOD`), and judges the result
by copies among the samples, Frechet distance, losses and forget level. Times are measured in turns at the end.
About 25 minutes for all 16 methods and 3 seeds on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import datetime
import os
import pathlib
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

HEADER = (
    "method",
    "copies",
    "strict copies",
    "forget level",
    "Frechet ratio",
    "keep loss ratio",
    "passes",
    "step time",
    "verdict",
    "settings",
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    from jaxunlearn.methods import METHODS
    from train import study_flags

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    study_flags.add_flags(parser, samples=1000)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=20, help="of the measurement of time; 0: none")
    parser.set_defaults(out=ROOT / "runs" / "methods_table")
    return study_flags.parse(parser, argv)


def configuration(variant: str, overrides: Mapping[str, Any]):
    """A variant of the digits job with changed values."""
    from train.study_flags import CONFIGS, load_config

    return load_config(f"{CONFIGS / 'digits.py'}:{variant}", overrides)


def passes(method: str, settings: Mapping[str, Any]) -> str:
    """Forward and backward passes of a step; the keep term of `dpo` is one more backward pass.

    >>> passes("naive", {}), passes("dpo", {"keep_term": True})
    ('1F 1B', "2F 2F' 3B")
    """
    from jaxunlearn.methods import METHODS

    own = METHODS[method].passes
    return own.replace("2B", "3B") if settings.get("keep_term") else own


def summary(
    method: str, rows: Sequence[Mapping[str, Any]], seconds: Mapping[str, float], settings: Mapping[str, Any]
) -> list[str]:
    """One line of the table from the rows of all seeds; `settings` is what the preset changes."""
    from jaxunlearn.methods import METHODS
    from train.study_tables import joint_verdict, mean_sd

    def over_seeds(name: str, digits: int = 2) -> str:
        return mean_sd([row.get(name) for row in rows], digits)

    known = method in METHODS
    time = f"{seconds[method] / seconds['naive']:.2f}" if method in seconds and "naive" in seconds else "-"
    return [
        f"`{method}`" if known else method,
        over_seeds("copies", 1),
        over_seeds("copies_strict", 1),
        over_seeds("forget_level"),
        over_seeds("fd_ratio"),
        over_seeds("keep_ratio", 3),
        passes(method, settings) if known else "",
        time if known else "",
        joint_verdict(rows) if known else "",
        ", ".join(f"{key}={value}" for key, value in settings.items()),
    ]


def not_run(method: str, reason: str) -> list[str]:
    """The line of a method that this study cannot run."""
    from jaxunlearn.methods import METHODS

    return [f"`{method}`", *["-"] * 5, METHODS[method].passes, "-", f"not run: {reason}", ""]


def times(study, configs: Mapping[str, Any], rounds: int) -> dict[str, float]:
    """Seconds of a step of each method, measured in turns."""
    import jax

    from jaxunlearn.parallel import global_batch, replicate
    from train.stages import unlearning_run
    from train.study_tables import timed_in_turns

    models = study.models

    def stepper(config):
        run = unlearning_run(config, models.base, models.examples, models.mesh, start=study.start(config))
        state, batch = replicate(run.state, models.mesh), global_batch(run.rows(0), models.mesh)

        def step():
            nonlocal state
            state, _ = jax.block_until_ready(run.step(state, run.key, batch))

        return step

    return timed_in_turns({name: stepper(config) for name, config in configs.items()}, rounds)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing, and writes table.md and table.json."""
    arguments = parse(argv)
    from jaxunlearn import runtime

    runtime.set_up()
    from jaxunlearn.io.manifest import write_json
    from train.configs.digits import PRESETS
    from train.log import say
    from train.studies import Judging, SeedStudy
    from train.study_flags import models_folder
    from train.study_models import study_models
    from train.study_tables import markdown, mean_sd

    judging = Judging(arguments.samples, arguments.sampling_steps, classifier_steps=arguments.classifier_steps)
    base = configuration("", arguments.overrides)
    out, rows, reasons, studies = arguments.out, {}, {}, []
    for seed in arguments.seeds:
        models = study_models(base, seed, out / "models", source=models_folder(arguments, seed))
        study = SeedStudy(models, out / "rows", judging)
        studies.append(study)
        rows.setdefault("before", []).append(study.before)
        rows.setdefault("retrained", []).append(study.retrained)
        for method in arguments.methods:
            config = configuration(method, arguments.overrides)
            if method == "vdu_style" and not (config.unlearn.checkpoints or models.checkpoints):
                reasons[method] = "it needs late checkpoints of the base training; leave out --models"
                continue
            rows.setdefault(method, []).append(study.row(method, _complete(config, models)))
    configs = {
        name: _complete(configuration(name, arguments.overrides), studies[0].models) for name in arguments.methods
    }
    configs = {name: config for name, config in configs.items() if name not in reasons}
    seconds = times(studies[0], configs, arguments.rounds) if arguments.rounds else {}

    lines = []
    for name in ("before", "retrained", *arguments.methods):
        if name in reasons:
            lines.append(not_run(name, reasons[name]))
            continue
        lines.append(summary(name, rows[name], seconds, _shown(PRESETS.get(name, {}))))
    machine = f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}"
    unlearn = base.unlearn
    naive = f", a step of naive takes {1e3 * seconds['naive']:.1f} ms" if "naive" in seconds else ""
    copies = mean_sd([row["copies"] for row in rows["before"]], 1)
    text = (
        f"{datetime.date.today()}, {machine}{naive}\n\n"
        f"{unlearn.num_steps} steps of {unlearn.batch_size}, {len(arguments.seeds)} seed(s), {judging.num_samples} samples "
        f"with {judging.sampling_steps} DDIM steps each; before unlearning {copies} of them are copies. Mean ± standard "
        "deviation over seeds; ratios are to the model before. `works`: at most a tenth of the copies and at most 1.5 times "
        f"the Frechet distance of before.\n\n{markdown(HEADER, lines)}\n"
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text)
    names = [name for name in ("before", "retrained", *arguments.methods) if name not in reasons]
    record = {
        "date": str(datetime.date.today()),
        "machine": machine,
        "seeds": arguments.seeds,
        "rows": {name: rows[name] for name in names},
        "not_run": reasons,
        "step_seconds": seconds,
        "unlearn": {name: config.unlearn.to_dict() for name, config in configs.items()},
    }
    write_json(out / "table.json", record)
    say(f"\n{text}\nwritten: {out / 'table.md'}, {out / 'table.json'}")


def _complete(config, models):
    """The configuration with what only this study can give: checkpoints of its base training, caps of its retrained model."""
    if config.unlearn.method == "vdu_style" and not config.unlearn.checkpoints:
        config.unlearn.checkpoints = models.checkpoints
        config.unlearn.anchor = "checkpoint_var" if models.checkpoints else config.unlearn.anchor
    if config.unlearn.method == "clamped":
        config.unlearn.cap = None  # a table over t, measured on this seed's retrained model
    return config


def _shown(preset: Mapping[str, Any]) -> dict[str, Any]:
    """What of a preset the study keeps: caps and checkpoints are its own."""
    return {key: value for key, value in preset.items() if key not in ("cap", "anchor")}


if __name__ == "__main__":
    from train import study_flags

    study_flags.run(main)
