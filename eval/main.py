"""``python -m eval.main --workdir DIR [--preset standard] [--eval.num_samples=500 ...]``: evaluates a finished run.

Reads the work directory's configuration, data and models; writes ``unlearning_report.json``, ``report.html`` and
``evaluation.npz`` into it. Exit codes: 0 done; 1 a model could not be measured (the report says why) or the run failed;
2 bad usage or a damaged work directory: one line per problem, nothing written.

``python -m eval.main verify`` checks a report (:mod:`eval.verify`), ``python -m eval.main compare`` puts several runs into
one table (:mod:`eval.compare`).
"""

from __future__ import annotations

import sys

from eval.arguments import Parser, UsageError

USAGE = """\
usage: python -m eval.main --workdir DIR [--preset NAME] [--eval.KEY=VALUE ...]
       python -m eval.main verify REPORT.json [--model DIR] [--base DIR] [--forget DIR --key FILE]
       python -m eval.main compare RUN RUN ... [--out FOLDER]

Evaluates the models of a work directory and writes report.html, unlearning_report.json and evaluation.npz into it; or
checks a report; or compares runs. `verify --help` and `compare --help` say more.

  --workdir DIR        work directory of a finished run of train.main
  --preset NAME        smoke (minutes on a CPU), standard (what a report should hold) or audit (everything)
  --eval.KEY=VALUE     changes a setting of the run's configuration; KEY is one of:
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the evaluation and returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("verify", "compare"):
        from eval import compare, verify

        return {"verify": verify, "compare": compare}[argv[0]].main(argv[1:])
    if "--help" in argv or "-h" in argv:
        print(USAGE + _keys())
        return 0

    from eval.inputs import BadInput, read_inputs

    parser = Parser(prog="eval.main", add_help=False, allow_abbrev=False)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--preset")
    try:
        arguments, rest = parser.parse_known_args(argv)
        overrides, problems = _overrides(rest)
        if problems:
            raise UsageError(problems)
        inputs = read_inputs(arguments.workdir, overrides, arguments.preset)
    except (UsageError, BadInput) as bad:
        return UsageError(bad.problems).refuse("eval.main")

    from eval.evaluate import evaluate
    from eval.output import write
    from jaxunlearn import runtime

    runtime.set_up()
    try:
        report, columns, references = evaluate(inputs, _say)
        written = write(inputs, report, columns, references)
    except (ValueError, OSError) as error:
        print(f"eval.main: failed: {'; '.join(str(error).splitlines())}", file=sys.stderr)
        return 1
    for path in written:
        _say(f"wrote {path}")
    _say(report["headline"])
    return 1 if any(column.failed for column in columns.values()) else 0


def _overrides(rest: list[str]) -> tuple[dict[str, str], list[str]]:
    """``--eval.key=value`` and ``--eval.key value`` -> key -> text; everything else is a problem."""
    overrides, problems, rest = {}, [], list(rest)
    while rest:
        item = rest.pop(0)
        name, equals, text = item.partition("=")
        if not name.startswith("--eval."):
            hint = f"; did you mean --{item}?" if item.startswith("eval.") else ""
            problems.append(f"unexpected argument {item!r}; allowed: --workdir and --eval.KEY=VALUE{hint}")
        elif equals:
            overrides[name.removeprefix("--eval.")] = text
        elif rest and not rest[0].startswith("--"):
            overrides[name.removeprefix("--eval.")] = rest.pop(0)
        else:
            problems.append(f"{item}: has no value; write {item}=VALUE")
    return overrides, problems


def _keys() -> str:
    from eval.settings import DEFAULTS, RULES

    lines = []
    for key, (_, allowed) in RULES.items():
        group, _, name = key.partition(".")
        default = DEFAULTS[group][name] if name else DEFAULTS[group]
        if not isinstance(default, dict):
            lines.append(f"    {key:<26} {allowed} (default {default!r})")
    return "\n".join(lines)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
