"""Intervals, distances and copies: against known values, double loops and simulated coverage."""

from __future__ import annotations

import numpy as np
import pytest

from jaxunlearn.metrics import METRICS, distances, extraction, statistics


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize(("n", "upper"), [(300, 0.00994), (1000, 0.00299), (10_000, 0.000300)])
def test_upper_bound_of_nothing_found(n, upper):
    bound = statistics.clopper_pearson_upper(0, n)
    assert bound.high == pytest.approx(upper, abs=5e-6)
    assert bound.high == pytest.approx(1 - 0.05 ** (1 / n), rel=1e-9)
    assert "one-sided" in bound.method


def test_two_sided_known_values_and_ends():
    low, high, level, method = statistics.clopper_pearson(3, 3000)
    assert (round(low, 6), round(high, 6), level) == (0.000206, 0.002920, 0.95)
    assert "two-sided" in method
    assert statistics.clopper_pearson(7, 7).high == 1.0
    assert statistics.clopper_pearson(7, 7).low == pytest.approx(0.025 ** (1 / 7))
    assert statistics.clopper_pearson(0, 7).low == 0.0


def test_two_sided_interval_covers(rng):
    rate, n = 0.03, 200
    hits = rng.binomial(n, rate, 400)
    covered = [low <= rate <= high for low, high, *_ in (statistics.clopper_pearson(int(k), n) for k in hits)]
    assert np.mean(covered) >= 0.94


def test_mean_interval_and_bootstrap_cover(rng):
    draws = rng.normal(2.0, 1.0, (200, 30))
    for interval in (
        statistics.mean_interval,
        lambda v: statistics.bootstrap_interval(v, statistic=np.mean, resamples=200),
    ):
        inside = [low <= 2.0 <= high for low, high, *_ in map(interval, draws)]
        assert np.mean(inside) >= 0.85
    assert statistics.mean_interval([1.0]) is None
    assert statistics.bootstrap_interval([1.0]) is None


@pytest.mark.parametrize(("count", "n", "confidence"), [(-1, 3, 0.95), (4, 3, 0.95), (0, 0, 0.95), (1, 3, 1.0)])
def test_impossible_counts_are_refused(count, n, confidence):
    with pytest.raises(ValueError, match="must|needs"):
        statistics.clopper_pearson(count, n, confidence)


def test_rank_p_is_uniform_under_exchangeability(rng):
    p = [statistics.rank_p(x[0], x[1:]) for x in rng.normal(size=(400, 100))]
    assert np.mean(p) == pytest.approx(0.5, abs=0.05)
    assert np.mean(np.array(p) <= 0.1) == pytest.approx(0.1, abs=0.05)


def test_distances_agree_with_a_double_loop(rng):
    x, y = (rng.integers(0, 256, (n, 5, 4, 3), np.uint8) for n in (23, 31))
    expected = np.array([[np.sqrt(np.mean((a / 255.0 - b / 255.0) ** 2)) for b in y] for a in x])
    np.testing.assert_allclose(distances.pairwise(x, y, chunk=7), expected, atol=1e-7)
    found = distances.nearest(x, y, chunk=5, reference_chunk=8)
    np.testing.assert_array_equal(found.index, expected.argmin(axis=1))
    np.testing.assert_allclose(found.distance, expected.min(axis=1), atol=1e-7)


def test_distance_of_equal_images_is_zero(rng):
    x = rng.integers(0, 256, (40, 8, 8, 1), np.uint8)
    found = distances.nearest(x, x[::-1], reference_chunk=16)
    np.testing.assert_array_equal(found.distance, 0.0)
    np.testing.assert_array_equal(found.index, np.arange(40)[::-1])
    np.testing.assert_allclose(distances.pairwise(x, x).diagonal(), 0.0, atol=1e-7)


def test_distances_refuse_model_images_and_other_sizes(rng):
    unit = np.zeros((2, 4, 4, 1), np.float32)
    with pytest.raises(ValueError, match=r"\[0, 1\].*to_unit"):
        distances.pairwise(unit - 1.0, unit)
    with pytest.raises(ValueError, match="cannot be compared"):
        distances.nearest(unit, np.zeros((2, 5, 5, 1), np.float32))
    with pytest.raises(ValueError, match="no reference"):
        distances.nearest(unit, unit[:0])


def test_threshold_flags_no_other_image_and_follows_the_rule(rng):
    others = rng.uniform(size=(200, 8, 8, 1)).astype(np.float32)
    forget = rng.uniform(size=(3, 8, 8, 1)).astype(np.float32)
    calibration = extraction.calibrate(forget, others)
    distance = distances.pairwise(others, forget)
    assert not extraction.copies(distance, calibration.threshold).any()
    np.testing.assert_allclose(calibration.closest, distance.min(axis=0), atol=1e-6)
    np.testing.assert_allclose(calibration.threshold, 0.85 * calibration.closest)
    np.testing.assert_allclose(calibration.strict_threshold, 0.5 * calibration.closest)


def test_a_strict_copy_is_closer_to_the_forget_image_than_to_any_other(rng):
    others = rng.uniform(size=(100, 4, 4, 1)).astype(np.float32)
    forget = rng.uniform(size=(1, 4, 4, 1)).astype(np.float32)
    calibration = extraction.calibrate(forget, others)
    mix = rng.uniform(0, 1, (500, 1, 1, 1)).astype(np.float32)
    samples = mix * forget + (1 - mix) * others[rng.integers(0, 100, 500)]
    distance = distances.pairwise(samples, forget)
    strict = extraction.copies(distance, calibration.strict_threshold)
    assert strict.sum() > 50
    assert np.all(distance[strict, 0] < distances.nearest(samples, others).distance[strict])
    assert not np.any(strict & ~extraction.copies(distance, calibration.threshold))


def test_user_threshold_overrides_and_bounds_the_strict_one(rng):
    others, forget = np.ones((2, 4, 4, 1)), np.zeros((1, 4, 4, 1))
    assert extraction.calibrate(forget, others, threshold=0.3).threshold.tolist() == [0.3]
    assert extraction.calibrate(forget, others, threshold=0.3).strict_threshold.tolist() == [0.3]
    assert "user" in extraction.calibrate(forget, others, threshold=0.3).rule


@pytest.mark.parametrize(
    ("forget", "kwargs", "message"),
    [
        (np.zeros((0, 4, 4, 1)), {}, "empty"),
        (np.zeros((1, 4, 4, 1)), {"threshold": 0.0}, "positive"),
        (np.zeros((1, 4, 4, 1)), {"fraction": 1.5}, "fraction"),
        (np.ones((1, 4, 4, 1)), {}, "duplicates"),
    ],
)
def test_calibration_refuses(forget, kwargs, message):
    with pytest.raises(ValueError, match=message):
        extraction.calibrate(forget, np.ones((2, 4, 4, 1)), **kwargs)


def test_copy_rate_of_planted_copies(rng):
    flags = np.zeros(2000, bool)
    flags[:102] = True
    found = extraction.copy_rate(rng.permutation(flags))
    assert (found.count, found.n, found.rate) == (102, 2000, 0.051)
    assert found.ci.low < 0.051 < found.upper.high < found.ci.high


def test_samples_needed_shows_a_copy_with_the_stated_confidence():
    for rate in (0.001, 0.01, 0.2):
        n = extraction.samples_needed(rate)
        assert (1 - rate) ** n <= 0.05 < (1 - rate) ** (n - 1)


def test_registry_is_complete_and_importing_it_stays_light(repository):
    import subprocess
    import sys

    for name, metric in METRICS.items():
        assert callable(metric.fn), name
        assert metric.unit, name
        assert metric.target in ("equal_reference", "lower", "higher"), name
        assert metric.description[0].isupper(), name
        assert "fid" not in name.split("_") or "weights" in metric.needs  # only with the network of that name
    code = (
        "import sys, jaxunlearn.metrics; "
        "print([m for m in ('flax', 'torch', 'sklearn', 'diffrax', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout
