"""The unlearning report as a record: its schema, its hash, reading and writing.

A report is plain JSON. ``record_sha256`` is the SHA-256 of its canonical form without the fields ``record_sha256`` and
``signature``, so a detached signature can cover it. Checking a report against models and pictures is the task of
:mod:`jaxunlearn.io.report_checks`.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxunlearn.io.json_files import parse_json, read_bytes
from jaxunlearn.io.manifest import write_json

SCHEMA_VERSION = 1
TITLE = "Unlearning report (evidence)"
NOTICE = "This is not a legal certificate; it does not prove the absence of influence."
"""The fixed sentence of every report."""

UNHASHED = ("record_sha256", "signature")
"""Fields that ``record_sha256`` leaves out."""


def canonical_sha256(value: Any) -> str:
    """SHA-256 of canonical JSON: sorted keys, no spaces, UTF-8. It does not depend on the order of keys.

    >>> canonical_sha256({"b": 1, "a": [1.5, None]}) == canonical_sha256({"a": [1.5, None], "b": 1})
    True

    Raises:
      ValueError: a number is not finite.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def record_sha256(report: Mapping[str, Any]) -> str:
    """What the field ``record_sha256`` of a report must hold."""
    return canonical_sha256({key: value for key, value in report.items() if key not in UNHASHED})


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a report."""
    return json.loads(importlib.resources.files("jaxunlearn.io").joinpath("report_schema.json").read_text("utf-8"))


def schema_problems(report: Any) -> list[str]:
    """One line for each place in which a report does not follow the schema; empty if it does."""
    from jsonschema import Draft202012Validator

    errors = sorted(Draft202012Validator(schema()).iter_errors(report), key=lambda error: list(map(str, error.path)))
    return [f"{'.'.join(map(str, error.path)) or 'report'}: {error.message[:200]}" for error in errors]


def complete(report: dict[str, Any]) -> dict[str, Any]:
    """The report as a reader finds it, with ``record_sha256`` filled in and the schema checked.

    Raises:
      ValueError: it does not follow the schema (one line for each problem), or a number is not finite.
    """
    report = json.loads(json.dumps(report, allow_nan=False))  # tuples become lists, as a reader finds them
    report["record_sha256"] = record_sha256(report)
    problems = schema_problems(report)
    if problems:
        raise ValueError("\n".join(problems))
    return report


def write_report(path: str | os.PathLike, report: dict[str, Any]) -> None:
    """Writes the :func:`complete` form of a report, all of it or nothing.

    Raises:
      ValueError: as :func:`complete`.
    """
    write_json(path, complete(report))


def read_report(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a report of this version; whether its content is right is checked elsewhere.

    Raises:
      ValueError: one line: there is no such file, it is not JSON, or it is no unlearning report of a known version.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; fix: give the unlearning_report.json of a run")
    try:
        report = parse_json(read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}); fix: copy it again") from None
    if not isinstance(report, dict) or "schema_version" not in report or "evaluation" not in report:
        raise ValueError(f"{path}: is no unlearning report; fix: give the unlearning_report.json of a run")
    version = report["schema_version"]
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path}: has schema_version {version!r}; allowed: {SCHEMA_VERSION}; fix: evaluate the run again"
        )
    return report
