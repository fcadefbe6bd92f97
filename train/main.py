"""``python -m train.main``: train or load a diffusion model, unlearn the forget set, evaluate, report, export.

Exit codes: 0 done; 1 failed while running; 2 bad usage, configuration or model folder (nothing was written); 75 stopped by
a signal with everything saved: run the same command again.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence

from train.flags_parser import FLAGS, Arguments, UsageError, help_text, parse

DONE, FAILED, USAGE, PREEMPTED = 0, 1, 2, 75


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    try:
        arguments = parse(argv)
    except UsageError as error:
        return refuse(str(error))
    if arguments.help:
        print(help_text(arguments.config))
        return DONE
    if arguments.print_config:
        print(arguments.config.to_json_best_effort(indent=2))
        return DONE
    try:
        set_up()
    except ValueError as error:
        return refuse(str(error))
    return _run(arguments)


def set_up() -> None:
    """Prepares the process: compilation cache, compiler flags, the other processes. Before anything touches a device.

    Raises:
      ValueError: flags of several processes that do not belong together.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file at lower levels
    from jaxunlearn import runtime
    from train import distributed

    runtime.set_up()
    distributed.join(FLAGS.distributed, FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id)


def refuse(message: str) -> int:
    """Prints one line per problem; returns the exit code of bad usage."""
    for line in message.splitlines():
        if line.strip():
            print(f"error: {line.strip()}", file=sys.stderr)
    return USAGE


def _run(arguments: Arguments) -> int:
    """Everything after parsing: checks, then stages."""
    import jax

    from train.dry_run import dry_run
    from train.log import say
    from train.loop import Preempted, Termination, TrainingFailed
    from train.opening import Refused, mark, open_run, start_workdir
    from train.stages import Runner

    try:
        run = open_run(arguments)
        if arguments.dry_run:
            say(dry_run(run.config, run.split, run.mesh, run.source, run.workdir))
            return DONE
        start_workdir(run, arguments)
    except (Refused, ValueError) as error:
        return refuse(str(error))
    workdir = run.workdir
    with Termination() as stop:
        runner = Runner(run.config, workdir, run.split, run.mesh, stop, run.source)
        try:
            for name, run_stage in runner.stages().items():
                started = time.monotonic()
                run_stage()
                if time.monotonic() - started > 1:
                    say(f"{name}: {time.monotonic() - started:.0f} s")
                if stop.came():
                    raise Preempted(f"stopped after stage {name}; the same command goes on from there")
                if name == arguments.mode:
                    break
        except Preempted as reason:
            mark(workdir, "PREEMPTED", str(reason))
            say(str(reason))
            return PREEMPTED
        except (TrainingFailed, ValueError, OSError) as reason:
            mark(workdir, "FAILED", str(reason))
            for line in str(reason).splitlines():
                print(f"error: {line}", file=sys.stderr)
            return FAILED
    if jax.process_index() == 0 and runner.is_finished:
        mark(workdir, "DONE", "")
        if arguments.mode is None:
            _say_results(workdir)
    return DONE


def _say_results(workdir) -> None:
    from train.log import say

    report = json.loads(workdir.report.read_text())
    say(report.get("headline", ""))
    say(f"report: {workdir.report_html}")
    say(f"model:  {workdir.export}")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
