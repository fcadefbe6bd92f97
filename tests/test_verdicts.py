"""Verdict rules on hand-made numbers: what passes, what fails, what stays open."""

from __future__ import annotations

import numpy as np
import pytest

from eval.records import entry, missing
from jaxunlearn.metrics.statistics import clopper_pearson, clopper_pearson_upper
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
    # One copy among many passes, and the claim does not say otherwise.
    columns["after"][0] = rate(1, 10_000)
    found = verdicts(columns)["copies"]
    assert found["status"] == "pass"
    assert found["claim"] == "fewer than one sample in 1,000 is a copy of a forget image"


@pytest.mark.parametrize(
    ("count", "theirs", "expected"),
    [
        (0, None, "pass"),
        (1, None, "fail"),
        (1, 0, "inconclusive"),  # one stray sample is no more than the retrained model's 0 of 4,000 allow
        (30, 0, "fail"),
        (3, 2, "inconclusive"),
        (30, 2, "fail"),
    ],
)
def test_copies_that_remain_fail_where_no_retrained_model_could_make_them(count, theirs, expected):
    columns = make_columns(0 if theirs is None else 1)
    columns["after"][0] = rate(count)
    if theirs is not None:
        columns["retrained"][0] = rate(theirs)
    found = verdicts(columns)["fewer_copies"]
    assert found["status"] == expected
    assert (
        "copies after fail where the interval of their share lies above that of every retrained model" in found["rule"]
    )


def prompted(forget, keep, retrained=(0, 0)):
    """Columns of a text model: copies among samples of the forget and of the keep prompts; before: 200 and none."""
    columns = make_columns(1)
    for name, counts in (("before", (200, 0)), ("after", (forget, keep)), ("retrained", retrained)):
        rates = [rate(count) for count in counts]
        for item, prompts in zip(rates, ("forget", "keep")):
            item["protocol"]["prompts"] = prompts
        columns[name] = [*rates, *columns[name][1:]]
    return columns


def test_copies_among_samples_of_the_keep_prompts_count():
    assert state("copies", prompted(0, 0)) == state("fewer_copies", prompted(0, 0)) == "pass"
    for forget, keep, which in ((0, 40, "keep"), (40, 0, "forget"), (3, 40, "keep")):
        found = verdicts(prompted(forget, keep))
        for name in ("copies", "fewer_copies"):
            assert found[name]["status"] == "fail"
            assert found[name]["value"] == 40 / 4000
            assert found[name]["reason"] == f"40 of 4000 samples of the {which} prompts are copies"
    # Each set of samples is compared with the same one of the retrained model.
    alike = verdicts(prompted(0, 40, (0, 40)))
    assert alike["copies"]["status"] == alike["fewer_copies"]["status"] == "inconclusive"
    assert "keep prompts" in alike["copies"]["reason"]
    assert state("copies", prompted(0, 40, (40, 0))) == "fail"
    nothing = prompted(0, 0)
    nothing["before"] = nothing["after"]
    assert state("fewer_copies", nothing) == "inconclusive"


def test_rules_state_the_confidence_of_the_report():
    columns = make_columns(2)
    found = verdicts(columns)
    for name in ("copies", "gap", "over_forgotten", "fewer_copies", "detectable"):
        assert "95% " in found[name]["rule"], name
    protocol = {"count": 0, "upper_one_sided": clopper_pearson_upper(0, 4000, 0.975).high}
    columns["after"][0] = entry("copy_rate", 0.0, n=4000, ci=clopper_pearson(0, 4000, 0.975), protocol=protocol)
    assert "97.5% bound" in verdicts(columns)["copies"]["rule"]


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


@pytest.mark.parametrize("where", ["after", "retrained_2"])
def test_a_failed_measurement_leaves_the_level_open(where):
    columns = make_columns(2, loss_forget=0.505, injection=0.405)
    failed = missing("injection_distance", "an injection is not finite", status="failed", protocol={"t": 5})
    columns[where] = [failed if item["metric"] == "injection_distance" else item for item in columns[where]]
    found = verdicts(columns)["level"]
    assert found["status"] == "inconclusive"
    assert found["reason"] == f"the distance of injections could not be measured ({where}: an injection is not finite)"
    columns["after"] = [
        {**item, "value": 9.0} if item["metric"] == "loss_forget" else item for item in columns["after"]
    ]
    found = verdicts(columns)["level"]
    assert found["status"] == "fail"
    assert "8.49 away" in found["reason"]
    assert "could not be measured" in found["reason"]
    lost = {name: [item for item in items if item["metric"] != "loss_forget"] for name, items in columns.items()}
    assert state("level", lost) == "inconclusive"


def test_the_level_names_what_was_measured():
    columns = make_columns(2, loss_forget=0.505, injection=0.405)
    both = "the loss on the forget images and the distance of injections are at the level of retrained models"
    assert verdicts(columns)["level"]["claim"] == both
    without = {
        name: [item for item in items if item["metric"] != "injection_distance"] for name, items in columns.items()
    }
    found = verdicts(without)["level"]
    assert found["claim"] == "the loss on the forget images is at the level of retrained models"
    assert found["status"] == "pass"
    for name in ("after", "retrained", "retrained_2"):
        columns[name] = [*columns[name], plain("nll_latent", 1.0)]
    assert verdicts(columns)["level"]["claim"].startswith(
        "the loss on the forget images, the distance of injections and "
    )


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
    # Perfect separation has no interval: resampling shows no spread.
    separated = columns(0.4, 0.6)
    for value, expected in ((1.0, "fail"), (0.551, "fail"), (0.5, "inconclusive"), (0.0, "inconclusive")):
        separated["after"][-1] = plain("mia/loss_t", value, statistic="auc")
        assert state("detectable", separated) == expected, value
    separated["retrained"][-1] = plain("mia/loss_t", 1.0, statistic="auc")  # an easy set, whoever trained on it
    assert state("detectable", separated) == "inconclusive"
    del separated["retrained"][-1]
    assert state("detectable", separated) == "inconclusive"


def test_quality_and_collapse():
    for fd, expected in ((7.5, "pass"), (7.6, "inconclusive"), (10.1, "fail")):
        assert state("quality", make_columns(0, fd=fd)) == expected
    assert state("quality", make_columns(0), collapse="the keep loss doubled") == "fail"
    # With one retrained model the gap at samples has no floor, and the Frechet distance decides.
    for fd, floor, expected in ((50.0, None, "fail"), (5.0, None, "pass"), (50.0, 10.0, "pass")):
        gap = plain("gap_kl_samples", 11.0, low=9.0, high=14.0, floor=floor)
        assert state("quality", with_entries(make_columns(1, fd=fd), gap)) == expected
    for loss, expected in ((0.33, "pass"), (0.4, "inconclusive"), (0.46, "fail")):
        assert state("keep_loss", make_columns(0, loss_keep=loss)) == expected


def test_broken_models_have_one_verdict():
    (only,) = judge({"before": column(), "after": [], "control": []}, {"after": "3 arrays hold NaN"})
    assert only["status"] == "fail"
    assert "after: 3 arrays" in only["reason"]
    assert overall([only], retrained=False) == "failed"
