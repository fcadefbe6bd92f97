"""Does it help to select times and frequencies? Every selection at equal forgetting, on the digits or on another job.

    python scripts/selection_study.py [--seeds 0 1 2] [--out runs/selection_study] [--config.KEY=VALUE ...]
    python scripts/selection_study.py --config=train/configs/mnist_tshirt_cpu.py --base runs/mnist/models/base \
        --config.data.path=MNIST_FOLDER --config.data.plant.image=TSHIRT.png --out runs/selection_mnist

For every method (SISS, whose strength is `combine.rho`, and NPO, whose strength is the weight of its forget term) and every
selection the strengths are tried from the weakest on, until at most a tenth of the copies is left (`--left`; 0: none). So
qualities are compared where each selection has just forgotten enough. The rows: `none`; `window`; `low_pass`; both; and what
the launcher's rules choose (`--config.select=auto`). The best of all but the rules is the grid's best.
Models and finished rows are kept under --out: a stopped study goes on.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

STRENGTHS = {
    "siss": ("combine.rho", (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4), {}),
    "npo": ("combine.forget", (0.003125, 0.00625, 0.0125, 0.025, 0.05, 0.1, 0.2), {"beta": 0.1}),
    "simnpo": ("combine.forget", (0.003125, 0.00625, 0.0125, 0.025, 0.05, 0.1, 0.2), {"beta": 0.1}),
}
"""Method -> the key below `unlearn` that is its strength, the values that are tried, and further settings of it."""
RULES = ("auto", "spectrum", "responsibility")
HEADER = ("selection", "which", "enough forgotten", "strength", "copies", "Frechet ratio", "keep loss ratio")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    from train import study_flags
    from train.study_tables import COPIES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    study_flags.add_flags(parser, samples=1000)
    parser.add_argument("--config", default=str(study_flags.CONFIGS / "digits.py"), help="FILE or FILE:VARIANT")
    parser.add_argument("--base", help="a diffusers folder to start from, for all seeds; else one is trained for each")
    parser.add_argument("--methods", nargs="+", default=["siss", "npo"], choices=list(STRENGTHS))
    parser.add_argument("--windows", nargs="+", default=["250,750"], help="T1,T2 of each")
    parser.add_argument("--cutoffs", nargs="+", type=float, default=[0.5], help="of the low-pass filters, 1 = Nyquist")
    parser.add_argument("--rules", nargs="+", default=["auto"], choices=RULES)
    parser.add_argument("--strengths", nargs="+", default=[], help="METHOD=V1,V2,... of each that should try others")
    parser.add_argument("--left", type=float, default=COPIES, help="share of the copies that may be left, %(default)s")
    parser.set_defaults(out=ROOT / "runs" / "selection_study")
    arguments = study_flags.parse(parser, argv)
    if not 0 <= arguments.left < 1:
        parser.error(f"--left must be at least 0 and below 1, got {arguments.left:g}")
    try:
        arguments.strengths = strengths_of(arguments.strengths)
    except ValueError as error:
        parser.error(f"--strengths: {error}")
    return arguments


def strengths_of(texts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """What each method tries, from the weakest on.

    >>> strengths_of(["siss=0.2,0.1"])["siss"], strengths_of([])["siss"][:2]
    ((0.1, 0.2), (0.0125, 0.025))
    """
    found = {method: values for method, (_, values, _) in STRENGTHS.items()}
    for text in texts:
        method, equals, values = text.partition("=")
        if method not in STRENGTHS or not equals:
            raise ValueError(f"{text!r} is not METHOD=V1,V2,... with a method of {', '.join(STRENGTHS)}")
        found[method] = tuple(sorted(float(value) for value in values.split(",")))
    return found


def selections_of(windows: Sequence[str], cutoffs: Sequence[float]) -> dict[str, dict[str, Any]]:
    """The grid: name -> all values below `unlearn.select` that a rule would choose.

    >>> list(selections_of(["250,750"], [0.5]))
    ['none', 'window', 'low_pass', 'window + low_pass']
    """
    from train.auto_select import EVERYTHING

    spans = {"": (0, 0)} | {_name("window", w, windows): tuple(int(x) for x in w.split(",")) for w in windows}
    filters = {"": None} | {_name("low_pass", c, cutoffs): c for c in cutoffs}
    grid = {}
    for cutoff_name, cutoff in filters.items():
        for span_name, span in spans.items():
            name = " + ".join(part for part in (span_name, cutoff_name) if part) or "none"
            values = EVERYTHING | {"window": span}
            grid[name] = values if cutoff is None else {**values, "filter": "low_pass", "cutoff": cutoff}
    order = sorted(grid, key=lambda name: (name != "none", " + " in name))
    return {name: grid[name] for name in order}


def _name(kind: str, value: Any, values: Sequence[Any]) -> str:
    return kind if len(values) == 1 else f"{kind} {value}"


def chosen(study, config, rule: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What one of the launcher's rules chooses for the starting model: values below `unlearn.select`, and why."""
    from train import auto_select

    config.select = rule
    found = auto_select.choose(config, study.models.base, study.models.examples)
    return dict(found.select), found.reasons


def weakest(study, name: str, config, key: str, strengths: Sequence[float], program, left: float) -> dict[str, Any]:
    """The row of the weakest strength that leaves few enough copies; of the last one where none does.

    Args:
      study: of a seed.
      name: of the rows' files.
      config: the configuration, whose strength is changed.
      key: of the strength, below `unlearn`.
      strengths: what is tried, from the weakest on.
      program: unlearns; one compiled step serves every selection and strength.
      left: share of the copies before that is few enough.
    """
    for strength in strengths:
        config.unlearn.update_from_flattened_dict({key: strength})
        row = study.row(f"{name}_{strength:g}", config, level=False, unlearn=program.run)
        enough = row["copies"] <= left * row["copies_before"] and row["fd_ratio"] is not None
        if enough or row["broken_step"] is not None:
            break
    return {**row, "strength": strength, "enough": enough}


def table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[list[str]]:
    """The lines of one method."""
    from train.study_tables import mean_sd

    lines = []
    for name, of_seeds in rows.items():
        which = list(dict.fromkeys(row["which"] for row in of_seeds))
        lines.append(
            [
                name,
                "; ".join(which),
                f"{sum(row['enough'] for row in of_seeds)} of {len(of_seeds)}",
                mean_sd([row["strength"] for row in of_seeds], 3),
                mean_sd([row["copies"] for row in of_seeds], 1),
                mean_sd([row["fd_ratio"] for row in of_seeds]),
                mean_sd([row["keep_ratio"] for row in of_seeds], 3),
            ]
        )
    return lines


def against_the_grid(rows: Mapping[str, Sequence[Mapping[str, Any]]], rule: str = "auto") -> dict[str, Any]:
    """The Frechet distance of a rule over that of the grid's best, means over seeds; None where one forgot too little.

    >>> row = lambda fd: [{"enough": True, "fd_ratio": fd}]
    >>> against_the_grid({"none": row(2.0), "window": row(0.8), "auto": row(1.0)})
    {'rule': 'auto', 'best': 'window', 'fd_rule': 1.0, 'fd_best': 0.8, 'ratio': 1.25, 'of_seeds': [1.25]}
    """
    import numpy as np

    means = {
        name: float(np.mean([row["fd_ratio"] for row in of_seeds]))
        for name, of_seeds in rows.items()
        if all(row["enough"] for row in of_seeds)
    }
    grid = {name: value for name, value in means.items() if name not in RULES}
    best = min(grid, key=grid.get) if grid else None
    own = means.get(rule)
    found = {"rule": rule, "best": best, "fd_rule": own, "fd_best": grid.get(best), "ratio": None, "of_seeds": []}
    if best is None or own is None:
        return found
    pairs = zip(rows[rule], rows[best], strict=True)
    of_seeds = [chosen["fd_ratio"] / other["fd_ratio"] for chosen, other in pairs]
    return {**found, "ratio": own / grid[best], "of_seeds": of_seeds}


def _sentence(found: Mapping[str, Any]) -> str:
    if found["ratio"] is None:
        absent = "no selection of the grid has" if found["best"] is None else f"{found['rule']} has not"
        return f"No comparison of {found['rule']} with the grid: {absent} forgotten enough for every seed."
    return (
        f"Frechet distance of {found['rule']} over that of the grid's best ({found['best']}): "
        f"{found['fd_rule']:.2f} / {found['fd_best']:.2f} = {found['ratio']:.2f}; "
        f"of each seed: {', '.join(f'{ratio:.2f}' for ratio in found['of_seeds'])}."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing, and writes selection.md and selection.json."""
    arguments = parse(argv)
    from jaxunlearn import runtime

    runtime.set_up()
    from jaxunlearn.io.manifest import write_json
    from train.auto_select import describe
    from train.log import say
    from train.prepare import Start
    from train.studies import Judging, SeedStudy
    from train.study_flags import load_config, models_folder
    from train.study_models import study_models
    from train.study_tables import markdown, mean_sd
    from train.sweep_program import SweepProgram

    overrides = arguments.overrides | ({"base.path": arguments.base} if arguments.base else {})
    base = load_config(arguments.config, overrides)
    judging = Judging(arguments.samples, arguments.sampling_steps, classifier_steps=arguments.classifier_steps)
    grid = selections_of(arguments.windows, arguments.cutoffs)
    rows: dict[str, dict[str, list]] = {method: {} for method in arguments.methods}
    before, reasons = [], {}
    for seed in arguments.seeds:
        models = study_models(base, seed, arguments.out / "models", source=models_folder(arguments, seed))
        study = SeedStudy(models, arguments.out / "rows", judging)
        before.append(study.before)
        num_steps = models.base.schedule.num_steps
        for method in arguments.methods:
            key, _, further = STRENGTHS[method]
            strengths = arguments.strengths[method]
            settings = {"method": method, "combine.name": "", **further}
            own = load_config(arguments.config, {f"unlearn.{k}": v for k, v in settings.items()} | overrides)
            own.seed = seed
            # The level that NPO asks for is measured for every selection.
            program = SweepProgram(own, models.base, models.examples, models.mesh, Start(level=1.0))
            candidates = dict(grid)
            for rule in arguments.rules:
                candidates[rule], reasons[f"seed {seed}, {method}, {rule}"] = chosen(study, copy.deepcopy(own), rule)
            for name, values in candidates.items():
                config = copy.deepcopy(own)
                config.unlearn.select.update(values)
                slug = f"{method}_{name.replace(' ', '_')}"
                row = weakest(study, slug, config, key, strengths, program, arguments.left)
                which = describe(values, num_steps)
                rows[method].setdefault(name, []).append({**row, "which": which, "select": values})

    found = {
        method: [against_the_grid(of_method, rule) for rule in arguments.rules] for method, of_method in rows.items()
    }
    copies = mean_sd([row["copies"] for row in before], 1)
    parts = [
        f"{datetime.date.today()}, configuration {base.name}: {base.unlearn.num_steps} steps of {base.unlearn.batch_size}, "
        f"{len(arguments.seeds)} seed(s), {judging.num_samples} samples with {judging.sampling_steps} DDIM steps each; "
        f"before unlearning {copies} of them are copies. Each line shows the weakest strength that leaves at most "
        f"{arguments.left:.0%} of them. Mean ± standard deviation over seeds; ratios are to the model before."
    ]
    for method, of_method in rows.items():
        parts += [f"`{method}` (strength: {STRENGTHS[method][0]})", markdown(HEADER, table(of_method))]
        parts += map(_sentence, found[method])
    text = "\n\n".join(parts)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "selection.md").write_text(text + "\n")
    record = {"date": str(datetime.date.today()), "seeds": arguments.seeds, "left": arguments.left}
    record |= {"before": before, "rows": rows}
    write_json(arguments.out / "selection.json", {**record, "reasons": reasons, "against_the_grid": found})
    say(f"\n{text}\n\nwritten: {arguments.out / 'selection.md'}, {arguments.out / 'selection.json'}")


if __name__ == "__main__":
    from train import study_flags

    study_flags.run(main)
