"""Figures that sum a run up: what they show, what they leave out, and where there is nothing to show."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from eval.pareto import points
from eval.report_run import run_section, selection_section
from eval.summary_figures import gap_bars, pareto, training, trajectories
from jaxunlearn.metrics.entries import columns_of
from jaxunlearn.metrics.verdicts import forget_level
from tests.report_example import make_columns


def report_of(columns):
    names = [name for name in columns if name.startswith("retrained")]
    reference = [{"model": name, **item} for name in names for item in columns[name]]
    evaluation = {name: columns[name] for name in ("before", "after", "control")} | {"reference": reference}
    method = {"name": "siss", "steps": 20, "stop_rule": "a fixed number of steps"}
    return {"evaluation": evaluation, "reference": {"models": names}, "method": method, "selection": None}


def gap(metric, value, floor, **protocol):
    ci = {"low": value - 1, "high": value + 1, "level": 0.95, "method": "t"}
    return {"metric": metric, "value": value, "floor": floor, "ci": ci, "protocol": protocol, "status": "ok"}


def decoded(picture):
    kind, data = picture.split(";base64,")
    assert kind == "data:image/svg+xml"
    return base64.b64decode(data).decode()


def test_points_on_the_level_axis_by_hand():
    # Losses: before .1, retrained .50 and .52 (mean .51), after .3: its level is .2 / .41.
    columns = make_columns(2, loss_forget=0.3)
    columns["retrained_2"][2]["value"] = 0.52
    level = forget_level(columns)
    assert level == pytest.approx(0.2 / 0.41)
    columns["after"].append({**columns["after"][0], "metric": "forget_level", "value": level})
    report = report_of(columns)
    assert list(columns_of(report)) == ["before", "after", "retrained", "retrained_2", "control"]
    found = {point.name: point for point in points(report, "forget_level", "fd_pixel")}
    assert found["before"].x == pytest.approx(1.0)
    assert found["after"].x == pytest.approx(1 - 0.2 / 0.41)
    assert found["retrained"].x == pytest.approx(0.01 / 0.41)
    assert found["retrained 2"].x == pytest.approx(0.01 / 0.41)
    assert [point.kind for point in found.values()] == ["before", "after", "retrained", "retrained"]
    assert pareto(report) == pareto(report)  # the same bytes each time
    decoded(pareto(report))


def test_broken_models_have_no_point():
    columns = make_columns(0)
    columns["after"] = [{**item, "value": None, "status": "failed", "ci": None} for item in columns["after"]]
    assert pareto(report_of(columns)) is None


def test_gap_bars_need_a_floor():
    columns = make_columns(2)
    assert gap_bars(report_of(columns)) is None
    columns["after"].append(gap("gap_kl_forget", 12.0, None))
    assert gap_bars(report_of(columns)) is None
    columns["after"][-1] = gap("gap_kl_forget", 12.0, 10.0, ratio_low=1.1, ratio_high=1.3)
    near = decoded(gap_bars(report_of(columns)))
    columns["after"][-1] = gap("gap_kl_forget", 9000.0, 10.0)
    assert near != decoded(gap_bars(report_of(columns)))


def test_trajectories_are_those_of_the_unlearning_stage():
    log = [
        {"stage": "base", "step": 1, "loss/keep": 9.0, "eval/copies": 0.5},
        {"stage": "unlearn", "step": 0, "eval/forget_level": 0.0, "eval/keep_ratio": 1.0},
        {"stage": "unlearn", "step": 10, "eval/forget_level": 0.5, "eval/keep_ratio": float("inf"), "loss/keep": 1.0},
        {"stage": "unlearn", "step": 20, "eval/forget_level": None, "eval/keep_ratio": 1.1, "loss/keep": 1.5},
        {"stage": "unlearn", "eval/fd": 3.0},
    ]
    found = trajectories(log)
    assert set(found) == {"eval/forget_level", "eval/keep_ratio"}
    for _, picture in found.values():
        decoded(picture)
    assert training(log) is not None
    assert training(log[:2]) is None
    section = run_section(report_of(make_columns(0)), log)
    assert section.count("<figure>") == 4
    assert "20 steps" in section
    assert "no logged losses" in run_section(report_of(make_columns(0)), [])


def test_the_selection_is_told_and_escaped():
    report = report_of(make_columns(0))
    assert selection_section(report, None) == ""
    report["selection"] = {"rule": "auto", "summary": "<all>", "reasons": ["a < b"], "select": {}, "num_steps": 10}
    section = selection_section(report, "data:image/png;base64,AA")
    assert "&lt;all&gt;" in section
    assert "a &lt; b" in section
    assert section.count("<img") == 1
    assert np.all([word not in section for word in ("<all>", "a < b")])
