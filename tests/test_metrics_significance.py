"""Ranks, tests and shadow attacks: against double loops, enumerations and simulated error rates."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from eval.families.copy_detector import injection_entry
from jaxunlearn.metrics import roc, significance, ulira
from jaxunlearn.metrics.statistics import bootstrap_interval, mean_interval, rank_p


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def test_auc_is_the_double_loop_with_ties(rng):
    members, others = rng.integers(0, 6, 23) / 2.0, rng.integers(1, 8, 31) / 2.0
    pairs = [1.0 if a < b else 0.5 if a == b else 0.0 for a in members for b in others]
    assert roc.auc(members, others) == pytest.approx(np.mean(pairs), abs=1e-14)
    assert roc.auc(others, members) == pytest.approx(1 - np.mean(pairs), abs=1e-14)
    assert roc.auc([1.0, 2.0], [3.0]) == 1.0
    assert roc.auc(np.ones(5), np.ones(4)) == 0.5


def test_auc_interval_covers_and_is_none_where_it_would_lie(rng):
    true = stats.norm.cdf(0.7 / np.sqrt(2))
    found = [roc.auc_interval(rng.normal(0, 1, 60), rng.normal(0.7, 1, 80), resamples=200, seed=i) for i in range(100)]
    assert np.mean([low <= true <= high for low, high, *_ in found]) >= 0.88
    assert roc.auc_interval([1.0], [2.0, 3.0]) is None
    assert roc.auc_interval([1.0, 2.0], [3.0, 4.0]) is None  # separated: no spread to resample
    few = roc.auc_interval([1.0, 2.5, 2.0], [2.0, 3.0, 4.0], seed=3)
    assert few == roc.auc_interval([1.0, 2.5, 2.0], [2.0, 3.0, 4.0], seed=3)
    assert 0 <= few.low < few.high <= 1


def test_p_value_of_ranks_is_the_rank_of_one_and_the_enumeration_of_few(rng):
    others = rng.normal(size=30)
    assert roc.p_value([0.1], others) == rank_p(0.1, others)
    members, few = rng.normal(-0.5, 1, 4), others[:5]
    together, areas = np.concatenate([members, few]), []
    for chosen in itertools.combinations(range(9), 4):
        areas.append(roc.auc(together[list(chosen)], np.delete(together, chosen)))
    assert roc.p_value(members, few) == pytest.approx(np.mean(np.array(areas) >= roc.auc(members, few) - 1e-12))
    assert roc.p_value(np.ones(5), np.ones(6)) == 1.0


def test_balanced_accuracy_is_the_best_threshold_of_a_loop(rng):
    members, others = rng.normal(0, 1, 40).round(1), rng.normal(0.8, 1, 30).round(1)
    edges = [-np.inf, *members, *others]
    best = max((np.mean(members <= edge) + np.mean(others > edge)) / 2 for edge in edges)
    assert roc.balanced_accuracy(members, others) == pytest.approx(best)
    assert roc.balanced_accuracy(others + 10, members) == 0.5


def test_tpr_at_fpr_keeps_the_rate_with_ties_and_refuses_few(rng):
    members, others = rng.normal(-1, 1, 500).round(1), rng.normal(0, 1, 1000).round(1)
    found = roc.tpr_at_fpr(members, others, 0.05)
    allowed = [edge for edge in np.unique(others) if np.mean(others < edge) <= 0.05]
    assert found == pytest.approx(np.mean(members < max(allowed)))
    with pytest.raises(ValueError, match="999 non-members.*1000"):
        roc.tpr_at_fpr(members, others[:999], 0.01)


@pytest.mark.parametrize("bad", [([], [1.0]), ([np.nan], [1.0]), ([[1.0]], [1.0])])
def test_scores_that_are_none_are_refused(bad):
    for function in (roc.auc, roc.auc_interval, roc.balanced_accuracy, roc.tpr_at_fpr):
        with pytest.raises(ValueError, match="scores"):
            function(*bad)


def test_holm_rejects_what_the_procedure_rejects(rng):
    for p in rng.uniform(size=(50, 6)) ** 3:
        adjusted = significance.holm(p)
        rejected = np.zeros(6, bool)
        for step, place in enumerate(np.argsort(p)):  # Holm's procedure, step by step
            if p[place] > 0.05 / (6 - step):
                break
            rejected[place] = True
        np.testing.assert_array_equal(adjusted <= 0.05, rejected)
        assert np.all(adjusted >= p)
    for p in ([], [1.2], [np.nan]):
        with pytest.raises(ValueError, match="p-values"):
            significance.holm(p)


def test_tost_passes_and_fails_at_the_margin(rng):
    values = rng.normal(0.1, 1, 40)
    wide = significance.tost(values, 0.0, 1.0)
    edge = max(abs(wide.interval.low), abs(wide.interval.high))
    assert significance.tost(values, 0.0, edge * (1 + 1e-9)).equivalent
    assert not significance.tost(values, 0.0, edge * (1 - 1e-9)).equivalent
    assert significance.tost(values, 0.0, edge).p == pytest.approx(0.05, rel=1e-6)
    sides = [
        stats.ttest_1samp(values, popmean, alternative=side).pvalue
        for popmean, side in ((-0.4, "greater"), (0.4, "less"))
    ]
    assert significance.tost(values, 0.0, 0.4).p == pytest.approx(max(sides))
    assert wide.interval.level == 0.9
    assert significance.tost([2.0, 2.0], 2.5, 0.6).equivalent
    assert not significance.tost([2.0, 2.0], 2.5, 0.4).equivalent


def test_tost_of_two_groups_is_two_welch_tests(rng):
    first, second = rng.normal(0, 1, 12), rng.normal(0.2, 3, 30)
    sides = (
        stats.ttest_ind(first + 1.5, second, equal_var=False, alternative="greater").pvalue,
        stats.ttest_ind(first - 1.5, second, equal_var=False, alternative="less").pvalue,
    )
    assert significance.tost_two(first, second, 1.5).p == pytest.approx(max(sides))
    for margin in (0.0, -1.0, np.inf):
        with pytest.raises(ValueError, match="margin"):
            significance.tost_two(first, second, margin)
    with pytest.raises(ValueError, match="at least 2"):
        significance.tost([1.0], 0.0, 1.0)


def test_tost_at_the_edge_of_the_margin_errs_in_five_percent(rng):
    found = [significance.tost(values, 0.0, 1.0).equivalent for values in rng.normal(1.0, 1, (1000, 12))]
    assert np.mean(found) == pytest.approx(0.05, abs=0.02)


def test_sign_flips_and_divisions_are_enumerated(rng):
    d = rng.normal(0.5, 1, 9)
    sums = np.array([np.dot(signs, d) for signs in itertools.product([1, -1], repeat=9)])
    assert significance.sign_flip_test(d, "greater") == np.mean(sums >= d.sum() - 1e-9)
    assert significance.sign_flip_test(d) == np.mean(np.abs(sums) >= abs(d.sum()) - 1e-9)
    a, b = rng.normal(0, 1, 4), rng.normal(1, 1, 5)
    scipys = stats.permutation_test(
        (a, b), lambda x, y: np.mean(x) - np.mean(y), n_resamples=np.inf, alternative="less"
    ).pvalue
    assert significance.permutation_test(a, b, "less") == pytest.approx(scipys)
    with pytest.raises(ValueError, match="22"):
        significance.sign_flip_test(np.ones(23))
    with pytest.raises(ValueError, match="welch"):
        significance.permutation_test(np.ones(20), np.ones(20))
    with pytest.raises(ValueError, match="two-sided, less, greater"):
        significance.sign_flip_test(d, "more")


def test_welch_sides_and_constant_groups(rng):
    a, b = rng.normal(0, 1, 8), rng.normal(1, 2, 15)
    p = {side: significance.welch(a, b, side) for side in significance.ALTERNATIVES}
    assert p["less"] + p["greater"] == pytest.approx(1.0)
    assert p["two-sided"] == pytest.approx(2 * min(p["less"], p["greater"]))
    assert significance.welch([1.0, 1.0], [1.0, 1.0]) == 1.0
    assert significance.welch([1.0, 1.0], [2.0, 2.0], "less") == 0.0
    assert significance.welch([1.0, 1.0], [2.0, 2.0], "greater") == 1.0


def test_paired_interval_is_over_subjects(rng):
    before = rng.normal(0, 10, 40)
    after = before + rng.normal(1, 0.1, 40)
    found = significance.paired_interval(before, after)
    assert found.low < 1.0 < found.high
    assert found.high - found.low < 0.2  # the spread of subjects cancels
    assert significance.paired_interval(before[:19], after[:19]) is None
    with pytest.raises(ValueError, match="40 before and 39 after"):
        significance.paired_interval(before, after[:39])


@pytest.mark.parametrize(("images", "copies"), [(2, 4), (19, 4), (20, 4), (1, 16), (1, 20)])
def test_similarities_are_bootstrapped_from_20_subjects_on(rng, images, copies):
    values = rng.uniform(0.2, 0.4, (images, copies))
    subjects = values[0] if images == 1 else values.mean(axis=1)
    settings = {"confidence": 0.95, "seed": 3, "sscd": {"convention": "short288"}, "injection_copies": copies}
    detector = SimpleNamespace(record={"weights_sha256": "0" * 64})
    found = injection_entry("sscd", values, 50, detector, settings)["ci"]
    few = len(subjects) < significance.LEAST_BOOTSTRAP
    wanted = mean_interval(subjects) if few else bootstrap_interval(subjects, statistic=np.mean, seed=3)
    assert (found["low"], found["high"]) == (wanted.low, wanted.high)
    over = "over copies of one image" if images == 1 else "over subjects"
    assert found["method"] == ("Student t " if few else "percentile bootstrap ") + over


def test_rank_p_is_uniform_for_exchangeable_images(rng):
    p = [rank_p(x[0], x[1:]) for x in rng.normal(size=(200, 200))]
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_leave_one_out_moments_equal_the_loop(rng):
    s = rng.normal(size=(3, 7))
    mean, variance = ulira._without_self(s)
    for z, m in itertools.product(range(3), range(7)):
        rest = np.delete(s[z], m)
        assert mean[z, m] == pytest.approx(rest.mean())
        assert variance[z, m] == pytest.approx(rest.var(ddof=1))


def test_shadow_attack_sees_a_shift_and_nothing_else(rng):
    seen, never = rng.normal(-1.5, 0.5, (40, 32)), rng.normal(0, 0.5, (40, 32))
    found = ulira.ulira(seen, never, resamples=100)
    assert found.auc > 0.95
    assert found.ci.low > 0.9
    assert set(found.tpr) == {0.01}  # 1,280 pairs show 1 %, not 0.1 %
    equal = ulira.ulira(rng.normal(0, 0.5, (40, 32)), never, resamples=100)
    assert equal.auc == pytest.approx(0.5, abs=0.05)
    assert equal.ci.low < 0.5 < equal.ci.high


def test_shadow_attack_judges_each_example_by_its_own_level(rng):
    level = rng.normal(0, 20, (30, 1))  # examples differ far more than the worlds do
    found = ulira.ulira(level + rng.normal(-1, 0.3, (30, 32)), level + rng.normal(0, 0.3, (30, 32)), resamples=50)
    assert found.auc > 0.95


def test_shadow_attack_refuses(rng):
    good = rng.normal(size=(4, 32))
    with pytest.raises(ValueError, match="31 unlearned.*needs 32"):
        ulira.ulira(good[:, :31], good)
    with pytest.raises(ValueError, match="same examples"):
        ulira.ulira(good[:3], good)
    with pytest.raises(ValueError, match="NaN"):
        ulira.ulira(good * np.nan, good)
    with pytest.raises(ValueError, match="equal in all models"):
        ulira.ulira(np.ones((4, 32)), good)
