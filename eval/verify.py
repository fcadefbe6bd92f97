"""``python -m eval.main verify REPORT.json --model DIR [--base DIR] [--forget DIR --key FILE]``: checks a report.

One line a check: ok, FAIL or skipped. Exit codes: 0 nothing failed, 1 a check failed, 2 bad usage or no report.
"""

from __future__ import annotations

import pathlib
import sys

from eval.arguments import Parser, UsageError

USAGE = """\
usage: python -m eval.main verify REPORT.json [--model DIR] [--base DIR] [--forget DIR --key FILE]

Checks an unlearning report: its form and hash, its numbers and verdicts, and whether models, files and pictures are those
that it names. What is not given is skipped.

  --model DIR      the unlearned model: the work directory's models/unlearned or the exported folder
  --base DIR       the original model
  --forget DIR     folder with the pictures of the forget set
  --key FILE       commitment.key of the work directory; needed with --forget
"""


def main(argv: list[str]) -> int:
    """Checks a report, prints one line a check, and returns the exit code."""
    if "--help" in argv or "-h" in argv:
        print(USAGE)
        return 0
    from jaxunlearn.io.manifest import read_key
    from jaxunlearn.io.report import read_report
    from jaxunlearn.io.report_checks import FAIL, verify

    parser = Parser(prog="eval.main verify", add_help=False, allow_abbrev=False)
    parser.add_argument("report")
    for flag in ("--model", "--base", "--forget", "--key"):
        parser.add_argument(flag)
    try:
        arguments = parser.parse_args(argv)
        problems = [
            f"{flag}={path}: no such folder"
            for flag, path in (("--model", arguments.model), ("--base", arguments.base), ("--forget", arguments.forget))
            if path is not None and not pathlib.Path(path).is_dir()
        ]
        if (arguments.forget is None) != (arguments.key is None):
            problems.append("--forget and --key go together; give both or neither")
        key = None
        try:
            report = read_report(arguments.report)
        except ValueError as error:
            problems.append(str(error))
        if arguments.key is not None:
            try:
                key = read_key(arguments.key)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise UsageError(problems)
    except UsageError as bad:
        return bad.refuse("eval.main verify")

    checks = verify(
        report,
        pathlib.Path(arguments.report).parent,
        model=arguments.model,
        base=arguments.base,
        forget=arguments.forget,
        key=key,
    )
    for check in checks:
        print(check.line)
    failed = sum(check.state == FAIL for check in checks)
    print(f"{failed} of {len(checks)} checks failed" if failed else f"none of {len(checks)} checks failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
