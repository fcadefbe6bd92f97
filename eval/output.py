"""Writes what an evaluation found: evaluation.npz, report.json, report.html, each complete or not at all."""

from __future__ import annotations

import io
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from eval.inputs import Inputs
from eval.measure import Column
from eval.references import References
from eval.report_html import render
from jaxunlearn.io.hashing import file_sha256
from jaxunlearn.io.manifest import write_json

STORED_SAMPLES = 64


def write(
    inputs: Inputs, report: dict[str, Any], columns: Mapping[str, Column], refs: References
) -> list[pathlib.Path]:
    """Writes the three files into the work directory and returns their paths. ``report["files"]`` is filled in."""
    root = inputs.workdir.root
    arrays = root / "evaluation.npz"
    _write_bytes(arrays, _npz(columns))
    log, broken = _read_log(inputs.workdir.metrics)
    if broken:
        report["limitations"].append(f"{broken} lines of metrics.jsonl could not be read and are not in the curves.")
    html = render(report, columns, refs, log)
    _write_bytes(inputs.workdir.report_html, html.encode())
    files = {"report.html": inputs.workdir.report_html, "evaluation.npz": arrays, "config.json": inputs.workdir.config}
    report["files"] = {name: file_sha256(path) for name, path in files.items()}
    write_json(inputs.workdir.report, report)
    return [arrays, inputs.workdir.report_html, inputs.workdir.report]


def _npz(columns: Mapping[str, Column]) -> bytes:
    """Distances, losses and the first samples of each column, for other plots. Stays in the work directory."""
    arrays = {f"{name}/{key}": value for name, column in columns.items() for key, value in column.arrays.items()}
    for name, column in columns.items():
        if column.samples is not None:
            arrays[f"{name}/samples"] = column.samples[:STORED_SAMPLES]
            arrays[f"{name}/copies"] = column.flags
        if column.keep_samples is not None:
            arrays[f"{name}/keep_prompts/samples"] = column.keep_samples[:STORED_SAMPLES]
            arrays[f"{name}/keep_prompts/copies"] = column.keep_flags
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def _read_log(path: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
    """Lines of metrics.jsonl, and how many are not JSON objects (a run that was killed may leave half a line)."""
    rows, broken = [], 0
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            elif line.strip():
                broken += 1
    return rows, broken


def _write_bytes(path: pathlib.Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
