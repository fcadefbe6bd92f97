"""``python -m eval.main compare RUN RUN ... [--out FOLDER]``: several finished runs in one table, with their Pareto front.

Reads the reports of work directories and writes ``compare.html``, ``compare.md`` and ``compare.json``. Exit codes: 0 done,
2 bad usage or a report that cannot be read: one line each, nothing written.
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from eval.arguments import Parser, UsageError
from eval.pareto import front, points, x_axis, y_axis
from jaxunlearn.io.manifest import write_json
from jaxunlearn.io.report import read_report, schema_problems
from jaxunlearn.io.workdir import Workdir
from jaxunlearn.metrics.entries import find, mean_value, value

USAGE = """\
usage: python -m eval.main compare RUN RUN ... [--out FOLDER]

Compares the reports of several runs: a table, and which runs no other one beats on forgetting and quality at once.

  RUN              work directory of an evaluated run, or its unlearning_report.json
  --out FOLDER     where compare.html, compare.md and compare.json go (default: comparison)
"""


def main(argv: list[str]) -> int:
    """Compares runs and returns the exit code."""
    if "--help" in argv or "-h" in argv:
        print(USAGE)
        return 0
    parser = Parser(prog="eval.main compare", add_help=False, allow_abbrev=False)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--out", default="comparison")
    try:
        arguments = parser.parse_args(argv)
        reports = _read(arguments.runs)
        out = pathlib.Path(arguments.out).expanduser()
        if out.exists() and not out.is_dir():
            raise UsageError([f"--out={out}: is a file; give a folder"])
    except UsageError as bad:
        return bad.refuse("eval.main compare")

    from eval.compare_page import markdown, page
    from eval.output import write_bytes

    comparison = compare(reports)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "compare.json", comparison)
    write_bytes(out / "compare.md", markdown(comparison).encode())
    write_bytes(out / "compare.html", page(comparison, reports).encode())
    print(markdown(comparison), end="")
    for name in ("compare.html", "compare.md", "compare.json"):
        print(f"wrote {out / name}")
    return 0


def _read(runs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Name -> report, in the order given.

    Raises:
      UsageError: one line for each run that cannot be compared.
    """
    paths, problems, reports = [], [], {}
    for run in runs:
        path = pathlib.Path(run).expanduser()
        paths.append(Workdir(path).report if path.is_dir() else path)
    if len(runs) < 2:
        problems.append("one run cannot be compared; give two or more")
    if len(set(paths)) < len(paths):
        problems.append("a run is given twice")
    for name, path in zip(_names(paths), paths):
        try:
            reports[name] = read_report(path)
            found = schema_problems(reports[name])
            if found:
                problems.append(f"{path}: is damaged ({found[0]}); fix: evaluate the run again")
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise UsageError(problems)
    return reports


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell the runs apart."""
    folders = [path.absolute().parent for path in paths]
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = [os.path.join(*folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def compare(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The comparison as plain JSON values.

    Returns:
      ``x`` and ``y`` (metrics of the axes), ``rows`` (one a run, ``front`` says whether no other one beats it) and
      ``notes`` (why runs cannot be compared in full).
    """
    x, y = x_axis(list(reports.values())), y_axis(list(reports.values()))
    rows = [{"run": name, **_row(report, x, y)} for name, report in reports.items()]
    placed = [row for row in rows if row["x"] is not None and row["y"] is not None]
    for row in rows:
        row["front"] = False
    for row, on_front in zip(placed, front([(row["x"], row["y"]) for row in placed])):
        row["front"] = on_front
    return {"x": x, "y": y, "rows": rows, "notes": _notes(reports)}


def _row(report: Mapping[str, Any], x: str, y: str) -> dict[str, Any]:
    evaluation, method = report["evaluation"], report["method"]
    before, after = evaluation["before"], evaluation["after"]
    copies = find(after, "copy_rate")
    place = next((point for point in points(report, x, y) if point.kind == "after"), None)
    keep = [mean_value(entries, "loss_keep") for entries in (before, after)]
    gap = find(after, "gap_kl_forget")
    return {
        "method": method["name"],
        "steps": method["steps"],
        "seconds": method["wall_s"],
        "overall": report["overall"],
        "copies_before": value(before, "copy_rate"),
        "copies": value(after, "copy_rate"),
        "copies_upper": (copies or {}).get("protocol", {}).get("upper_one_sided"),
        "forget_level": value(after, "forget_level"),
        "gap_ratio": gap["value"] / gap["floor"] if gap and gap["value"] is not None and gap["floor"] else None,
        "relearn_ratio": value(after, "relearn_ratio"),
        "keep_loss_ratio": keep[1] / keep[0] if None not in keep and keep[0] else None,
        "quality_before": value(before, y),
        "quality": value(after, y),
        "x": None if place is None else place.x,
        "y": None if place is None else place.y,
    }


def _notes(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """In what the runs differ, so that their numbers do not compare."""
    notes = []
    for what, get in (
        ("original models", lambda r: r["base_model"]["tree_sha256"]),
        ("keep sets", lambda r: r["keep_set"]["hash_of_hashes"]),
        ("numbers of samples", lambda r: r["settings"].get("num_samples")),
        ("samplers", lambda r: (r["settings"].get("sampler"), r["settings"].get("sampling_steps"))),
        ("timesteps of the loss", lambda r: tuple(r["settings"].get("loss_t", ()))),
        ("numbers of retrained models", lambda r: len(r["reference"]["models"])),
    ):
        if len({get(report) for report in reports.values()}) > 1:
            notes.append(f"The runs have different {what}: compare their numbers with care.")
    if any(not report["reference"]["models"] for report in reports.values()):
        notes.append("Not every run has a retrained model, so copies are compared instead of the forget level.")
    return notes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
