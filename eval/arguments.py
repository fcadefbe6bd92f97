"""Command lines whose problems are lines of text and exit code 2, never a traceback."""

from __future__ import annotations

import argparse
import sys


class UsageError(Exception):
    """The command line, or what it names, cannot be used; ``problems`` holds one line each."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems

    def refuse(self, program: str) -> int:
        """Prints the problems; the exit code."""
        for problem in self.problems:
            print(f"{program}: {problem}", file=sys.stderr)
        return 2


class Parser(argparse.ArgumentParser):
    """argparse with :class:`UsageError` instead of an exit."""

    def error(self, message):
        raise UsageError([message])
