"""Verdict rules on hand-made numbers: what passes, what fails, what stays open."""

from __future__ import annotations

import numpy as np
import pytest

from eval.records import entry, missing
from jaxunlearn.metrics.verdicts import REQUIRED, THRESHOLDS, judge, next_one, overall
from tests.report_example import column, make_columns, rate


def verdicts(columns, **options):
    return {verdict["id"]: verdict for verdict in judge(columns, {}, **options)}


def state(name, columns, **options):
    return verdicts(columns, **options)[name]["status"]


def with_entries(columns, *items):
    """The unlearned model's column with more entries; METRICS need not know their names."""
    return {**columns, "after": [*columns["after"], *items]}


def plain(metric, value, *, low=None, high=None, floor=None, **protocol):
    ci = None if low is None else {"low": low, "high": high, "level": 0.95, "method": "test"}
    return {
        "metric": metric,
        "value": value,
        "n": 10,
        "ci": ci,
        "floor": floor,
        "protocol": protocol,
        "status": "ok",
        "reason": None,
    }


def perfect(retrained=2):
    return with_entries(
        make_columns(retrained, loss_forget=0.505, injection=0.405),
        plain("gap_kl_forget", 11.0, low=9.0, high=14.0, floor=10.0),
        plain("gap_kl_samples", 11.0, low=9.0, high=14.0, floor=10.0),
        plain("elbo_gap", 0.1, low=-1.0, high=1.0, floor=2.0),
        plain("relearn_ratio", 1.0),
        entry("forget_level", 1.0, n=1),
    )


def test_everything_right_passes_and_only_with_retrained_models():
    found = judge(perfect(), {})
    assert overall(found, retrained=True) == "passed"
    assert {v["id"] for v in found if v["required"]} == set(REQUIRED)
    for name in REQUIRED:
        for status, result in (("fail", "failed"), ("inconclusive", "incomplete"), ("not_run", "incomplete")):
            changed = [{**v, "status": status} if v["id"] == name else v for v in found]
            assert overall(changed, retrained=True) == result
    assert overall(found, retrained=False) == "screening_passed"


def test_copies_are_judged_by_their_bound():
    columns = make_columns(0)
    for count, n, expected in ((0, 2994, "inconclusive"), (0, 2995, "pass"), (1, 2995, "fail"), (300, 3000, "fail")):
        columns["after"][0] = rate(count, n)
        assert state("copies", columns) == expected, (count, n)
    for n in (1, 100, 2994):  # however few there were, the reason names what would be enough
        columns["after"][0] = rate(0, n)
        assert "; 2,995 would be enough" in verdicts(columns)["copies"]["reason"]
    # The retrained model copies as well: one copy in few samples says nothing.
    both = make_columns(1)
    both["after"][0], both["retrained"][0] = rate(1, 1000), rate(10, 1000)
    assert state("copies", both) == "inconclusive"
    both["after"][0] = rate(30, 1000)
    assert state("copies", both) == "fail"


@pytest.mark.parametrize(
    ("value", "high", "expected"),
    [(10, 15.0, "pass"), (10, 15.1, "inconclusive"), (20, 25, "inconclusive"), (20.1, 25, "fail")],
)
def test_the_gap_is_judged_by_its_ratio_to_the_floor(value, high, expected):
    columns = with_entries(make_columns(2), plain("gap_kl_forget", value, low=1.0, high=high, floor=10.0))
    assert state("gap", columns) == expected
    assert verdicts(columns)["gap"]["value"] == value / 10
    assert state("gap", with_entries(make_columns(1), plain("gap_kl_forget", value, low=1.0, high=high))) == "not_run"


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(0.49, "fail"), (0.5, "inconclusive"), (0.8, "pass"), (1.25, "pass"), (1.3, "inconclusive"), (2.01, "fail")],
)
def test_relearning_has_two_sides(ratio, expected):
    assert state("relearn", with_entries(make_columns(2), plain("relearn_ratio", ratio))) == expected


@pytest.mark.parametrize(
    ("bound", "ratio", "expected"),
    [
        ("exact", 1.0, "pass"),
        ("lower", 1.0, "inconclusive"),  # the model was not back within the budget: at least 1
        ("lower", 2.5, "fail"),
        ("lower", 0.4, "inconclusive"),
        ("upper", 0.4, "fail"),  # a retrained model was not back: at most 0.4
        ("upper", 1.0, "inconclusive"),
        ("upper", 2.5, "inconclusive"),
    ],
)
def test_a_bound_of_the_relearning_decides_on_its_own_side_alone(bound, ratio, expected):
    assert state("relearn", with_entries(make_columns(2), plain("relearn_ratio", ratio, bound=bound))) == expected


def test_the_level_is_an_equivalence_test_with_the_spread_of_retrained_models():
    # Retrained losses .50 and .51: mean .505, sd .00707, margin .01414; injection .40 and .41 alike. One more retrained
    # model is expected within t(0.975, 1) sqrt(1 + 1/2) = 12.71 x 1.2247 = 15.56 sd = .110.
    levels = ((0.505, "pass"), (0.518, "pass"), (0.52, "inconclusive"), (0.614, "inconclusive"), (0.616, "fail"))
    for loss, expected in (*levels, (0.394, "fail"), (0.49, "inconclusive")):
        columns = make_columns(2, loss_forget=loss, injection=0.405)
        assert state("level", columns) == expected, loss
    wide = make_columns(2, loss_forget=0.518, injection=0.405)
    interval = {"low": 0.518 - 0.0196, "high": 0.518 + 0.0196, "level": 0.95, "method": "Student t"}
    wide["after"] = [{**e, "ci": interval} if e["metric"] == "loss_forget" else e for e in wide["after"]]
    assert state("level", wide) == "inconclusive"  # .013 + 1.645 * .01 > .0141, .013 - .01645 < .0141
    assert state("level", make_columns(1)) == "not_run"


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_further_retrained_model_seldom_fails_the_level(count):
    """However few set the yardstick: 5 % of normal levels, where two standard deviations alone would be up to 35 %."""
    rng = np.random.default_rng(count)
    levels = rng.normal(size=(20_000, count + 1))
    distance = np.abs(levels[:, 0] - levels[:, 1:].mean(axis=1)) / levels[:, 1:].std(axis=1, ddof=1)
    failed = np.mean(distance > next_one(count, THRESHOLDS["level_fail_confidence"]))
    assert abs(failed - 0.05) < 0.005
    assert np.mean(distance > THRESHOLDS["level_margin_sd"]) > 2 * failed


def test_over_forgetting_fails_whatever_the_gap_says():
    columns = with_entries(
        make_columns(2), entry("forget_level", 1.3, n=1), plain("elbo_gap", 0.0, low=-1, high=1, floor=1)
    )
    assert state("over_forgotten", columns) == "fail"
    assert state("loss_level", columns) == "fail"
    below = with_entries(
        make_columns(2), entry("forget_level", 1.0, n=1), plain("elbo_gap", -9, low=-12, high=-6, floor=5)
    )
    assert state("over_forgotten", below) == "inconclusive"
    assert state("over_forgotten", with_entries(make_columns(2), entry("forget_level", 1.0, n=1))) == "not_run"
    failed = with_entries(make_columns(2), missing("forget_level", "no number", status="failed"))
    assert state("over_forgotten", failed) == "inconclusive"


def test_a_dimmed_memory_fails():
    """Its copies, injection and large t are right; the gap is not: everything else cannot save it."""
    columns = with_entries(make_columns(2, loss_forget=0.505, injection=0.405), entry("forget_level", 1.0, n=1))
    columns = with_entries(columns, plain("gap_kl_forget", 12636.0, low=12600.0, high=12700.0, floor=30.0))
    found = judge(columns, {})
    assert {v["id"] for v in found if v["status"] == "fail"} == {"gap"}
    assert overall(found, retrained=True) == "failed"


def test_membership_is_compared_with_retrained_models():
    def columns(p, theirs, low=0.48, high=0.52):
        made = make_columns(1)
        score = {"statistic": "auc"}
        made["after"] += [plain("cdi_p", p), plain("mia/loss_t", 0.5, low=low, high=high, **score)]
        made["retrained"] += [plain("cdi_p", theirs), plain("mia/loss_t", 0.5, low=0.4, high=0.6, **score)]
        return made

    assert state("detectable", columns(0.4, 0.6)) == "pass"
    assert state("detectable", columns(0.001, 0.6)) == "inconclusive"
    assert state("detectable", columns(0.001, 0.001)) == "pass"
    assert state("detectable", columns(0.4, 0.6, 0.56, 0.7)) == "fail"
    assert state("detectable", columns(0.4, 0.6, 0.4, 0.6)) == "inconclusive"
    assert state("detectable", make_columns(1)) == "not_run"


def test_quality_and_collapse():
    for fd, expected in ((7.5, "pass"), (7.6, "inconclusive"), (10.1, "fail")):
        assert state("quality", make_columns(0, fd=fd)) == expected
    assert state("quality", make_columns(0), collapse="the keep loss doubled") == "fail"
    for loss, expected in ((0.33, "pass"), (0.4, "inconclusive"), (0.46, "fail")):
        assert state("keep_loss", make_columns(0, loss_keep=loss)) == expected


def test_broken_models_have_one_verdict():
    (only,) = judge({"before": column(), "after": [], "control": []}, {"after": "3 arrays hold NaN"})
    assert only["status"] == "fail"
    assert "after: 3 arrays" in only["reason"]
    assert overall([only], retrained=False) == "failed"
