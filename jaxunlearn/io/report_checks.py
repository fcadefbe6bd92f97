"""Checks a report: its form, its hash, its arithmetic, and, where they are at hand, its models, files and pictures.

Every check gives one line: ok, FAIL or skipped. A check that needs something that was not given is skipped, never passed.
"""

from __future__ import annotations

import hashlib
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxunlearn.io.hashing import file_sha256, tree_sha256
from jaxunlearn.io.manifest import hmac_file, hmac_pixels, merkle_root
from jaxunlearn.io.report import canonical_sha256, record_sha256, schema_problems

OK, FAIL, SKIPPED = "ok", "FAIL", "skipped"


class Check(NamedTuple):
    """The result of one check.

    Attributes:
      name: what was checked.
      state: "ok", "FAIL" or "skipped".
      detail: what was found, or why it was skipped.
    """

    name: str
    state: str
    detail: str = ""

    @property
    def line(self) -> str:
        """The check as one line."""
        return f"{self.state:<8} {self.name}" + (f": {self.detail}" if self.detail else "")


def verify(
    report: Mapping[str, Any],
    folder: str | os.PathLike,
    *,
    model: str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
    forget: str | os.PathLike | None = None,
    key: bytes | None = None,
) -> list[Check]:
    """All checks of a report, in a fixed order.

    Args:
      report: its content, see :func:`jaxunlearn.io.report.read_report`.
      folder: where it lies; the files that it names are looked for there.
      model, base: folders of the unlearned and of the original model.
      forget: folder with the pictures of the forget set; needs ``key``.
      key: the key of the work directory, see :func:`jaxunlearn.io.manifest.read_key`.
    """
    problems = schema_problems(report)
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        return [Check("schema", FAIL, problems[0] + more), _record(report)]
    checks = [Check("schema", OK), _record(report)]
    checks += _again("numbers agree with each other", _arithmetic, report)
    checks += _again("verdicts computed again", _verdicts, report)
    checks += [_result("forget and keep set are disjoint", _disjoint(report))]
    checks += [_result("root of the forget set", _root(report))]
    checks += [_result("settings of the method", _method(report))]
    checks += _model("unlearned model", report["result_model"], model, "--model", report["schedule"])
    checks += _model("original model", report["base_model"], base, "--base", report["schedule"])
    checks += _files(report["files"], pathlib.Path(folder))
    return [*checks, _pictures(report["forget_set"], forget, key)]


def _result(name: str, problems: list[str]) -> Check:
    more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
    return Check(name, FAIL, problems[0] + more) if problems else Check(name, OK)


def _record(report: Mapping[str, Any]) -> Check:
    try:
        same = record_sha256(report) == report.get("record_sha256")
    except ValueError:
        return Check("record_sha256", FAIL, "a number is not finite")
    return Check("record_sha256", OK) if same else Check("record_sha256", FAIL, "the report was changed")


def _again(name: str, compute: Callable[[Mapping[str, Any]], list[Check]], report: Mapping[str, Any]) -> list[Check]:
    """The checks of ``compute``; one that failed where the report lacks a number or holds one that none can be made from."""
    try:
        return compute(report)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        found = " ".join(str(error).split())
        detail = f"cannot be computed again: a value is missing or not allowed ({type(error).__name__}: {found})"
        return [Check(name, FAIL, detail)]


def _arithmetic(report: Mapping[str, Any]) -> list[Check]:
    """Numbers that follow from other numbers: rates from counts, intervals around values, copies from thresholds."""
    from jaxunlearn.metrics.entries import columns_of
    from jaxunlearn.metrics.statistics import clopper_pearson

    problems = []
    for column, entries in columns_of(report).items():
        for item in entries:
            where, interval, protocol = f"{column} {item['metric']}", item["ci"], item["protocol"]
            numbers = [item["value"], item["floor"], *([] if interval is None else [interval["low"], interval["high"]])]
            if any(number is not None and not math.isfinite(number) for number in numbers):
                problems.append(f"{where}: a number is not finite")
            elif item["status"] == "ok" and interval is not None and interval["low"] > interval["high"]:
                problems.append(f"{where}: its interval is reversed")
            if item["status"] != "ok" or not isinstance(protocol.get("count"), int) or not item["n"]:
                continue
            if abs(item["value"] - protocol["count"] / item["n"]) > 1e-9:
                problems.append(f"{where}: {item['value']:g} is not {protocol['count']} of {item['n']}")
            elif interval is not None and "Clopper-Pearson" in interval["method"]:
                expected = clopper_pearson(protocol["count"], item["n"], interval["level"])
                if abs(expected.low - interval["low"]) + abs(expected.high - interval["high"]) > 1e-9:
                    problems.append(f"{where}: the interval is not that of {protocol['count']} of {item['n']}")
    return [_result("numbers agree with each other", problems)]


def _verdicts(report: Mapping[str, Any]) -> list[Check]:
    """Every verdict computed again from the stored numbers and the thresholds of this version."""
    from jaxunlearn.metrics.entries import columns_of, references
    from jaxunlearn.metrics.verdicts import THRESHOLDS, judge, overall

    if report["thresholds"] != THRESHOLDS:
        return [Check("verdicts", FAIL, "the thresholds are not those of this version")]
    columns, stored = columns_of(report), report["verdicts"]
    expected = judge(columns, report["evaluation"]["failed"], report["method"]["collapse"])
    problems = [
        f"{given.get('claim')!r} is {given.get('status')!r}, computed again it is {made['status']!r}"
        if given.get("status") != made["status"]
        else f"{given.get('claim')!r}: a number, rule or reason differs"
        for given, made in zip(stored, expected)
        if given != made
    ]
    if len(stored) != len(expected):
        problems.append(f"{len(stored)} verdicts, there should be {len(expected)}")
    whole = overall(expected, bool(references(columns)))
    kind = "retrained" if references(columns) else "none"
    more = [] if report["overall"] == whole else [f"{report['overall']!r}, computed again it is {whole!r}"]
    if report["reference"]["kind"] != kind or len(report["reference"]["models"]) != len(references(columns)):
        more.append("the retrained models are not those of the evaluation")
    return [_result("verdicts computed again", problems), _result("overall verdict", more)]


def _disjoint(report: Mapping[str, Any]) -> list[str]:
    return [] if report["keep_set"]["disjoint"] else ["a forget image is also kept or held out"]


def _root(report: Mapping[str, Any]) -> list[str]:
    block = report["forget_set"]
    hashes = [item["hmac_pixels"] for item in block["items"]]
    problems = []
    if block["n"] != len(hashes):
        problems.append(f"n is {block['n']}, but there are {len(hashes)} items")
    if block["unique"] != len(set(hashes)):
        problems.append(f"unique is {block['unique']}, but there are {len(set(hashes))} different pictures")
    if merkle_root(hashes) != block["root"]:
        problems.append("the root is not that of the items")
    return problems


def _method(report: Mapping[str, Any]) -> list[str]:
    method = report["method"]
    same = canonical_sha256(method["config"]) == method["config_sha256"]
    return [] if same else ["config_sha256 is not that of the settings"]


def _model(name: str, record: Mapping[str, Any], folder, flag: str, schedule: Mapping[str, Any]) -> list[Check]:
    if folder is None:
        return [Check(f"{name}: {what}", SKIPPED, f"no {flag}") for what in ("parameters", "files")]
    from jaxunlearn.io.diffusers import load

    default = {"num_train_timesteps": schedule["T"]}  # a folder without a scheduler has parameters all the same
    try:
        loaded = load(folder, record.get("variant"), default_scheduler=default, companions=False)
    except (ValueError, OSError) as error:
        return [Check(f"{name}: parameters", FAIL, "; ".join(str(error).splitlines()))]
    problems = []
    if tree_sha256(loaded.params) != record["tree_sha256"]:
        problems.append("the parameters are not those of the report")
    own_scheduler = any("scheduler" in file["path"] for file in record["files"])
    if own_scheduler and alphas_sha256(loaded.schedule.alphas_cumprod) != schedule["alphas_cumprod_sha256"]:
        problems.append("the noise schedule is not that of the report")
    root = loaded.source.path
    return [_result(f"{name}: parameters", problems), _result(f"{name}: files", _changed(root, record["files"]))]


def _changed(root: pathlib.Path, files: list[Mapping[str, Any]]) -> list[str]:
    problems = []
    for file in files:
        path = root / file["path"]
        if not path.is_file():
            problems.append(f"{file['path']} is missing")
        elif path.stat().st_size != file["bytes"] or file_sha256(path) != file["sha256"]:
            problems.append(f"{file['path']} was changed")
    return problems


def _files(files: Mapping[str, str], folder: pathlib.Path) -> list[Check]:
    checks = []
    for name, digest in files.items():
        path = folder / name
        if pathlib.PurePosixPath(name).is_absolute() or ".." in pathlib.PurePosixPath(name).parts:
            checks.append(Check(f"file {name}", FAIL, "the name leads out of the folder"))
        elif not path.is_file():
            checks.append(Check(f"file {name}", SKIPPED, "is not beside the report"))
        else:
            checks.append(_result(f"file {name}", [] if file_sha256(path) == digest else ["was changed"]))
    return checks


def _pictures(block: Mapping[str, Any], folder, key: bytes | None) -> Check:
    """The pictures against their keyed hashes: every item has its picture, and every picture its item."""
    from jaxunlearn.io.pictures import decode, list_pictures, reading

    name = "forget pictures"
    if folder is None or key is None:
        return Check(name, SKIPPED, "no --forget and --key")
    height, width, channels = block["size"]
    pixels, files = set(), set()
    try:
        found = list_pictures(folder)
        with reading(found.values()) as read:
            for picture, file in found.items():
                data = read(file)
                files.add(hmac_file(key, data))
                pixels.add(hmac_pixels(key, decode(data, picture, (height, width), channels)))
    except (ValueError, OSError) as error:
        return Check(name, FAIL, "; ".join(str(error).splitlines()))
    expected = {item["hmac_pixels"] for item in block["items"]}
    problems = []
    if expected - pixels:
        problems.append(f"{len(expected - pixels)} of {len(expected)} pictures of the report are not in the folder")
    if pixels - expected:
        problems.append(f"{len(pixels - expected)} pictures of the folder are not in the report")
    stored = {item["hmac_file"] for item in block["items"]} - {None}
    note = f"{len(expected)} pictures"
    if stored - files and not problems:
        note += f", {len(stored - files)} of them in other files with the same pixels"
    return Check(name, FAIL, "; ".join(problems)) if problems else Check(name, OK, note)


def alphas_sha256(alphas_cumprod: Any) -> str:
    """SHA-256 of a noise schedule's table as little-endian float32."""
    import numpy as np

    return hashlib.sha256(np.asarray(alphas_cumprod, "<f4").tobytes()).hexdigest()
