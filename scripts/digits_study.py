"""Runs the default job for several seeds and prints what README and the configuration state, as a table.

    python scripts/digits_study.py [--seeds 0 1 2] [--out runs/digits_study] [--config.KEY=VALUE ...]

Every run is a process of its own, with an empty compilation cache, so that the seconds are those of a first start.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def one_run(seed: int, workdir: pathlib.Path, more: list[str]) -> float:
    """Wall seconds of a run from nothing."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
        command = [sys.executable, "-m", "train.main", f"--workdir={workdir}", f"--config.seed={seed}", *more]
        started = time.monotonic()
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        return time.monotonic() - started


def value(report: dict, column: str, metric: str) -> dict:
    """An entry of the report."""
    return next(entry for entry in report["evaluation"][column] if entry["metric"] == metric)


def row(seed: int, seconds: float, report: dict) -> str:
    """One line of the table."""
    copies = {column: value(report, column, "copy_rate") for column in ("before", "after")}
    distance = {column: value(report, column, "fd_classifier")["value"] for column in ("before", "after")}
    loss = {column: value(report, column, "loss_keep")["value"] for column in ("before", "after")}
    counts = " | ".join(f"{copies[c]['protocol']['count']} of {copies[c]['n']}" for c in ("before", "after"))
    upper = copies["after"]["protocol"]["upper_one_sided"]
    return (
        f"| {seed} | {seconds:.0f} | {counts} | {100 * upper:.2f} % | {distance['before']:.1f} | {distance['after']:.1f} "
        f"| {distance['after'] / distance['before']:.2f} | {loss['after'] / loss['before']:.3f} |"
    )


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "digits_study")
    arguments, more = parser.parse_known_args()
    # Absolute: the runs start in the repository, whatever folder this was started in.
    workdirs = {seed: arguments.out.absolute() / f"seed{seed}" for seed in arguments.seeds}
    for workdir in workdirs.values():
        if workdir.exists():
            raise SystemExit(f"{workdir} is there already, and a run that goes on takes less time; give another --out")
    print(
        f"{datetime.date.today()}, {os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}"
    )
    print()
    print(
        "| seed | seconds | copies before | after | at most (95 %) | Frechet before | after | ratio | keep loss ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for seed, workdir in workdirs.items():
        seconds = one_run(seed, workdir, more)
        print(row(seed, seconds, json.loads((workdir / "unlearning_report.json").read_text())), flush=True)


if __name__ == "__main__":
    main()
