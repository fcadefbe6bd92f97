"""Writes what an evaluation found: evaluation.npz, unlearning_report.json, report.html, each complete or not at all.

All three are made before the first is written, so that a report that cannot be written leaves those of before.
"""

from __future__ import annotations

import hashlib
import io
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from eval.context import Column
from eval.figure_parts import data_uri
from eval.inputs import Inputs
from eval.references import References
from eval.report_html import render
from eval.run_record import read_log
from jaxunlearn.io.hashing import file_sha256
from jaxunlearn.io.manifest import write_json
from jaxunlearn.io.report import complete

STORED_SAMPLES = 64


def write(
    inputs: Inputs, report: dict[str, Any], columns: Mapping[str, Column], refs: References
) -> list[pathlib.Path]:
    """Writes the three files into the work directory and returns their paths. ``report["files"]`` is filled in.

    Raises:
      ValueError: the report does not follow its schema or holds a number that is not finite; nothing was written.
    """
    root = inputs.workdir.root
    log, broken = read_log(inputs.workdir.metrics)
    if broken:
        report["limitations"].append(f"{broken} lines of metrics.jsonl could not be read and are not in the curves.")
    picture = root / "selection.png"
    shown = report["selection"] is not None and picture.is_file()
    selection = data_uri(picture.read_bytes(), "image/png") if shown else None
    page = render(report, columns, refs, log, selection).encode()
    made = {inputs.workdir.report_html: page, inputs.workdir.arrays: _npz(columns)}
    hashes = {path: hashlib.sha256(data).hexdigest() for path, data in made.items()}
    pictures = sorted(inputs.workdir.samples.glob("*.png")) + ([picture] if shown else [])
    hashes |= {path: file_sha256(path) for path in (inputs.workdir.config, *pictures)}
    report["files"] = {path.relative_to(root).as_posix(): digest for path, digest in hashes.items()}
    finished = complete(report)
    for path, data in made.items():
        write_bytes(path, data)
    write_json(inputs.workdir.report, finished)
    return [*made, inputs.workdir.report]


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


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Writes a file, complete or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
