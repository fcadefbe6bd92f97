"""``python -m train.sweep``: which window, which cutoff, which strength?

Trains or loads the base model once, unlearns once for every row of a grid, judges each row, and draws the grid. One compiled
step serves all rows.

    python -m train.sweep --config=FILE --workdir=DIR --windows="all (250,750) auto" --cutoffs="0.25 none" --scales="0.1 0.2"

Writes ``sweep.json``, ``sweep.md`` and ``sweep.png`` into the work directory; a row is kept as soon as it is there, and the
same command goes on with those that are missing. Exit codes as ``train.main``: 0 done, 1 failed, 2 bad usage, 75 stopped by a
signal.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Sequence

from absl import flags

from train.flags_parser import FLAGS, Arguments, UsageError, keys_text, parse
from train.main import DONE, FAILED, PREEMPTED, refuse, set_up

AXES = ("windows", "cutoffs", "lams", "scales")
flags.DEFINE_string(
    "windows",
    None,
    'Windows of t in unlearn.select.window_unit, "all", "auto" (the automatic choice): "all (250,750) auto".',
)
flags.DEFINE_string("cutoffs", None, 'Radii (1 = Nyquist), pairs of a band, "none": "0.25 0.5 (0.2,0.5) none".')
flags.DEFINE_string("lams", None, 'Values of unlearn.lam: "0.25 0.5".')
flags.DEFINE_string(
    "scales", None, 'Values of the combiner\'s number (rho, c, eta, or the forget weight): "0.05 0.1 0.2".'
)
flags.DEFINE_integer("num_samples", 500, "Samples by which a row is judged.")
flags.DEFINE_integer("sampling_steps", 25, "DDIM steps of these samples.")


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    try:
        arguments = parse(argv)
    except UsageError as error:
        return refuse(str(error))
    if arguments.help:
        print(_help(arguments))
        return DONE
    if arguments.print_config:
        print(arguments.config.to_json_best_effort(indent=2))
        return DONE
    if arguments.mode is not None:
        return refuse(f"--mode={arguments.mode}: a sweep has no stages; leave it out")
    try:
        set_up()
    except ValueError as error:
        return refuse(str(error))
    return _run(arguments)


def _help(arguments: Arguments) -> str:
    lines = [__doc__.split("\n\nWrites")[0].replace("``", ""), ""]
    lines += [
        f"  --{name:16} {FLAGS[name].help}"
        for name in (*AXES, "num_samples", "sampling_steps", "workdir", "dry_run", "print_config")
    ]
    return "\n".join([*lines, "", keys_text(arguments.config)])


def _problems(config, axes) -> list[str]:
    import jax

    from train.sweep_grid import axis_problems

    found = axis_problems(config, axes)
    num_steps = config.scheduler.get("num_train_timesteps", 1000)
    if FLAGS.num_samples < 2:
        found.append(f"--num_samples={FLAGS.num_samples}: must be 2 or more")
    if not 1 <= FLAGS.sampling_steps <= num_steps:
        found.append(f"--sampling_steps={FLAGS.sampling_steps}: must be in [1, {num_steps}]")
    if jax.process_count() > 1:
        found.append("a sweep runs in one process; use the devices of one host")
    return found


def _run(arguments: Arguments) -> int:
    from train import sweep_grid
    from train.log import say
    from train.loop import Preempted, Termination, TrainingFailed
    from train.opening import Refused, mark, open_run, start_workdir
    from train.stages import Runner

    try:
        axes = sweep_grid.parse_axes(*(getattr(FLAGS, name) for name in AXES))
        run = open_run(arguments, lambda config: _problems(config, axes))
        if run.source is not None and (run.source.is_latent or run.source.takes_text):
            raise Refused("config.base.path: a sweep judges models of pixels; this one has latents or takes text")
        problems = sweep_grid.axis_problems(run.config, axes, run.source.schedule) if run.source is not None else []
        if problems:
            raise Refused("\n".join(problems))
        rows = axes.rows()
        done = Results(run.workdir, run.config)
        say(f"sweep: {len(rows)} rows of {run.config.unlearn.num_steps} steps, {done.count(rows)} of them done before")
        if arguments.dry_run:
            say("dry run: nothing was written")
            return DONE
        start_workdir(run, arguments, "train.sweep")
    except (Refused, ValueError) as error:
        return refuse(str(error))
    with Termination() as stop:
        runner = Runner(run.config, run.workdir, run.split, run.mesh, stop, run.source)

        def poll() -> None:
            if stop.came():
                raise Preempted("sweep: stopped; the same command goes on with the rows that are missing")

        try:
            runner.base()
            poll()
            runner.retrain()
            poll()
            _sweep(run, runner.source_model(), rows, done, poll)
        except Preempted as reason:
            mark(run.workdir, "PREEMPTED", str(reason))
            say(str(reason))
            return PREEMPTED
        except (TrainingFailed, ValueError, OSError) as reason:
            mark(run.workdir, "FAILED", str(reason))
            for line in str(reason).splitlines():
                print(f"error: {line}", file=sys.stderr)
            return FAILED
    if runner.is_finished:
        mark(run.workdir, "DONE", "")
    say(done.verdict())
    say(f"table:   {done.path.with_suffix('.md')}")
    say(f"picture: {done.path.with_suffix('.png')}")
    return DONE


class Results:
    """sweep.json and what follows from it. Every change is written at once.

    Args:
      workdir: the work directory.
      config: the configuration of the sweep.

    Raises:
      ValueError: the file cannot be used, or its rows were judged in another way.
    """

    def __init__(self, workdir, config):
        from train import methods

        self.path = workdir.root / "sweep.json"
        combiner = methods.combiner_name(config.unlearn)
        self.content = {
            "version": 1,
            "method": config.unlearn.method,
            "combiner": combiner,
            "scale_name": methods.SCALES[combiner],
            "has_lam": "lam" in methods.method_of(config.unlearn).options,
            "num_steps": config.unlearn.num_steps,
            "num_samples": FLAGS.num_samples,
            "sampling_steps": FLAGS.sampling_steps,
            "before": None,
            "retrained": None,
            "automatic": None,
            "rows": [],
        }
        if not self.path.exists():
            return
        try:
            saved = json.loads(self.path.read_text())
            rows = {row["key"] for row in saved["rows"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path}: cannot be used ({error}); delete it and all rows are run again") from None
        for name in ("num_samples", "sampling_steps"):
            if saved.get(name) != self.content[name]:
                raise ValueError(
                    f"--{name}={self.content[name]}: the {len(rows)} rows in {self.path} were judged with {saved.get(name)}; "
                    "give that, or another --workdir"
                )
        self.content = saved

    def count(self, rows) -> int:
        """How many of these rows are there."""
        return sum(self.has(row) for row in rows)

    def has(self, row) -> bool:
        """Whether a row is there."""
        return any(old["key"] == row.key for old in self.content["rows"])

    def add(self, record: dict) -> None:
        """Adds a row and writes."""
        self.content["rows"].append(record)
        self.write()

    def write(self) -> None:
        """Writes sweep.json and, where there are rows, sweep.md."""
        from jaxunlearn.io.manifest import write_json
        from train.sweep_table import RULE, best_of, table

        rows, before = self.content["rows"], self.content["before"]
        best = best_of(rows, before) if rows else None
        write_json(self.path, {**self.content, "rule": RULE, "best": best and best["key"]})
        if rows:
            temporary = self.path.with_suffix(".md.tmp")
            temporary.write_text(table(self.content))
            temporary.replace(self.path.with_suffix(".md"))

    def verdict(self) -> str:
        """What came out, in a sentence or two."""
        from train.sweep_table import verdict

        return f"sweep: {verdict(self.content)}"


def _sweep(run, model, rows, done: Results, poll) -> None:
    """Runs and judges the rows that are missing, then draws all."""
    from train import auto_select, methods, prepare, sweep_grid
    from train.examples import Examples
    from train.heat_map import draw_sweep
    from train.log import say
    from train.loop import to_host
    from train.sweep_judge import Judge
    from train.sweep_program import SweepProgram

    config, num_steps = run.config, model.schedule.num_steps
    examples = Examples(run.split)
    automatic = None
    if any(row.is_auto for row in rows):
        by_rule = copy.deepcopy(config)
        by_rule.select = "auto"
        automatic = auto_select.choose(by_rule, model, examples, poll)
        for line in auto_select.lines(automatic, num_steps):
            say(line)
        done.content["automatic"] = {
            "summary": auto_select.describe(automatic.select, num_steps),
            "select": {k: list(v) if isinstance(v, tuple) else v for k, v in automatic.select.items()},
            "reasons": list(automatic.reasons),
        }
    missing = [row for row in rows if not done.has(row)]
    if missing:
        judge = Judge(config, model, run.split, run.workdir, FLAGS.num_samples, FLAGS.sampling_steps)
        done.content["before"], done.content["retrained"] = judge.before, judge.retrained
        # What a method measures for one selection is measured for each row instead.
        measured = copy.deepcopy(config)
        measured.unlearn.level = 1.0 if methods.needs_level(config.unlearn) else config.unlearn.level
        start = prepare.start(measured, run.workdir, model, examples, resumes=False, poll=poll)
        program = SweepProgram(config, model, examples, run.mesh, start)
    for number, row in enumerate(missing, 1):
        of_row = sweep_grid.configured(config, row, automatic)
        select = of_row.unlearn.select
        in_t = {
            "window": auto_select.window_in_t(select, model.schedule),
            "filter": select.filter,
            "cutoff": select.cutoff,
        }
        started = time.monotonic()
        finished = program.run(of_row, poll)
        seconds = time.monotonic() - started
        broken = finished.broken_step is not None
        record = {
            "key": row.key,
            "auto": row.is_auto,
            "window": in_t["window"],
            "cutoff": None if select.filter == "none" else select.cutoff,
            "filter": select.filter,
            "column": row.cutoff,
            "selection": auto_select.describe(in_t, num_steps, select.unit),
            "lam": of_row.unlearn.lam if done.content["has_lam"] else None,
            "scale": row.scale if row.scale is not None else _plain_scale(of_row),
            "status": f"broken at step {finished.broken_step}" if broken else "ok",
            "seconds": round(seconds, 2),
            **(dict.fromkeys(("figures", "keep_ratio", "forget_level")) if broken else judge(to_host(finished.params))),
        }
        done.add(json.loads(json.dumps(record)))
        said = (
            record["status"]
            if broken
            else (
                f"copies {record['figures']['copies']} of {record['figures']['samples']}, "
                f"{record['figures']['fd_name']} {_said(record['figures']['fd'])}, keep ratio {_said(record['keep_ratio'])}"
            )
        )
        say(f"row {number}/{len(missing)} ({seconds:.1f} s): {_name(record, done.content)}: {said}")
    if missing:
        # A step that compiled again would say so here and in sweep.json.
        done.content["compilations"] = program.step._cache_size()
    done.write()
    wanted = {row.key for row in rows}
    shown = [row for row in done.content["rows"] if row["key"] in wanted]
    draw_sweep(done.path.with_suffix(".png"), {**done.content, "rows": shown})


def _plain_scale(config):
    """The combiner's number as configured: a number or the text of a schedule."""
    from train import methods

    key = methods.SCALES[methods.combiner_name(config.unlearn)]
    number = config.unlearn.combine[key]
    return methods.weight_of(config.unlearn, key) if number is None else number


def _said(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _name(record: dict, content: dict) -> str:
    lam = f", lam {record['lam']}" if content["has_lam"] else ""
    return f"{'auto, ' if record['auto'] else ''}{record['selection']}{lam}, {content['scale_name']} {record['scale']}"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
