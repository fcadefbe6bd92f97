"""The forget level, look-alikes and the stop rule, on synthetic losses and curves."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import Example, filtered, low_pass, sum_squares
from jaxunlearn.forgetting import STATUSES, Measurement, StopRule, forget_level, look_alikes, make_probe_losses
from jaxunlearn.objectives.probes import strata
from tests import oracle
from tests import tiny_model as tm
from tests.tiny_model import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
COMMON = 0.05 * RNG.normal(size=(1, 16, 4))  # the same noises for every image and model


def losses(images, mean, seed=0, spread=0.01):
    own = np.random.default_rng(seed).normal(size=(images, 16, 4))
    return mean + COMMON + spread * own


# Probes.


def test_probes_are_the_same_for_every_image_and_model_and_batch():
    probes = make_probe_losses(tm.predict, tm.SCHEDULE, jax.random.key(1), error=sum_squares, count=4, noises=3)
    x = tm.arrays(6)["a0"]
    one, two = tm.params(), tm.params(seed=1)
    got = probes(one, Example(x))
    assert got.shape == (6, 4, 3)
    assert got.dtype == np.float64
    np.testing.assert_allclose(probes(one, Example(x[::-1])), got[::-1], rtol=1e-6)
    np.testing.assert_allclose(probes(one, Example(x[2:3])), got[2:3], rtol=1e-6)
    assert not np.allclose(probes(two, Example(x)), got)
    # A model that answers zero sees the noise alone: equal for all images.
    zero = make_probe_losses(lambda p, x, t, c: jnp.zeros_like(x), tm.SCHEDULE, jax.random.key(1), count=4, noises=3)
    np.testing.assert_allclose(zero(None, Example(x)), np.repeat(zero(None, Example(x[:1])), 6, axis=0))


def test_probes_equal_the_oracle_and_take_selections():
    key, x = jax.random.key(2), tm.arrays(2)["a0"]
    params = tm.params()
    wide = {k: np.float64(v) for k, v in params.items()}
    plain = make_probe_losses(tm.predict, tm.SCHEDULE, key, error=sum_squares, count=3, noises=2)
    low = filtered(sum_squares, low_pass(0.5))
    selected = make_probe_losses(tm.predict, tm.SCHEDULE, key, error=low, count=3, noises=2)
    got, got_low = plain(params, Example(x)), selected(params, Example(x))
    alpha, sigma = oracle.alpha_sigma(oracle.linear_table(), strata(1000, 3))
    for r, k in enumerate(jax.random.split(key, 2)):
        eps = np.asarray(jax.random.normal(k, (3, 8, 8, 1)), np.float64)
        for i in range(2):
            x_t = oracle.noised(np.repeat(x[i : i + 1], 3, axis=0), eps, alpha, sigma)
            residual = oracle.net(wide, x_t, strata(1000, 3)) - eps
            np.testing.assert_allclose(got[i, :, r], oracle.squares(residual)[0], rtol=1e-4)
            mask = oracle.mask("ideal", 0.5, 8, 8)
            np.testing.assert_allclose(got_low[i, :, r], oracle.squares(residual, mask)[0], rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"), [({"noises": 1}, "noises >= 2"), ({"t_min": 900, "count": 200}, "strata")]
)
def test_bad_probes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_probe_losses(tm.predict, tm.SCHEDULE, jax.random.key(0), **options)


# The level.


def test_the_level_is_zero_untouched_and_one_as_if_retrained():
    start, target = losses(5, 0.2), losses(5, 0.5, seed=1)
    untouched = forget_level(start, start, target, paired=True)
    assert untouched.level == untouched.low == untouched.high == 0
    assert untouched.status == "untouched"
    same = forget_level(target, start, target, paired=True)
    np.testing.assert_allclose([same.level, same.low, same.high], 1, rtol=1e-12)
    assert same.status == "retrain_level"
    np.testing.assert_allclose(same.per_image, 1)
    np.testing.assert_allclose(same.gap, 0.3, atol=0.01)


@pytest.mark.parametrize(
    ("mean", "status"), [(0.21, "untouched"), (0.3, "partial"), (0.5, "retrain_level"), (0.8, "over_unlearned")]
)
def test_levels_between_and_their_intervals(mean, status):
    """Common noise cancels: the interval is far narrower than the scatter of the losses."""
    start, target, current = losses(5, 0.2), losses(5, 0.5, seed=1), losses(5, mean, seed=2)
    got = forget_level(current, start, target, paired=True)
    np.testing.assert_allclose(got.level, (mean - 0.2) / 0.3, atol=0.02)
    assert got.low < got.level < got.high
    assert got.high - got.low < 0.05
    assert got.status == status
    assert got[:3] == forget_level(current, start, target, paired=True)[:3]
    again = forget_level(current[::-1], start[::-1], target[::-1], paired=True)
    np.testing.assert_allclose([again.level, again.low, again.high], [got.level, got.low, got.high])
    np.testing.assert_allclose(again.per_image, got.per_image[::-1])


def test_look_alikes_widen_the_interval():
    rng = np.random.default_rng(5)
    start, current = losses(3, 0.2), losses(3, 0.4, seed=2)
    level = {}
    for scatter in (0.0, 0.1):
        own = rng.normal(size=(20, 1, 1))
        target = losses(20, 0.5, seed=1) + scatter * (own - own.mean())
        level[scatter] = forget_level(current, start, target, paired=False)
        assert level[scatter].low < 2 / 3 < level[scatter].high
    assert level[0.1].high - level[0.1].low > 3 * (level[0.0].high - level[0.0].low)


def test_each_image_is_compared_with_its_own_look_alikes():
    """Two kinds of images: each is as if never seen at the loss of its own kind, whatever that of the other is."""
    start, target = losses(2, 0.2), np.concatenate([losses(8, 0.4, seed=1), losses(8, 1.2, seed=2)])
    current = start + np.reshape([0.2, 0.5], (2, 1, 1))
    nearest = np.stack([np.arange(8), np.arange(8, 16)])
    got = forget_level(current, start, target, paired=False, nearest=nearest)
    np.testing.assert_allclose(got.per_image, [1, 0.5], atol=0.03)
    np.testing.assert_allclose(got.level, 0.35 / 0.6, atol=0.01)
    assert got.low < 0.35 / 0.6 < got.high
    # Against the mean of both kinds the first would be .33, the second .83.
    pooled = forget_level(current, start, target, paired=False)
    np.testing.assert_allclose(pooled.per_image, [1 / 3, 5 / 6], atol=0.03)
    # The gap of the two kinds to each other is no uncertainty.
    assert got.gap_error < 0.1 * pooled.gap_error


def test_look_alikes_that_images_share_tell_less_than_their_own():
    rng = np.random.default_rng(7)
    start, target = losses(4, 0.2), losses(40, 0.8, seed=1) + 0.1 * rng.normal(size=(40, 1, 1))
    error = {}
    for shared, nearest in ((False, np.arange(40).reshape(4, 10)), (True, np.tile(np.arange(10), (4, 1)))):
        got = forget_level(start, start, target, paired=False, nearest=nearest)
        wanted = np.mean([target[row].mean() for row in nearest]) - start.mean()
        np.testing.assert_allclose(got.gap, wanted, rtol=1e-12)
        error[shared] = got.gap_error
    np.testing.assert_allclose(error[True], target[:10].mean(axis=(1, 2)).std(ddof=1) / np.sqrt(10), rtol=0.1)
    np.testing.assert_allclose(error[True] / error[False], 2, rtol=0.3)
    # All of them for every image is what is taken where nothing is said.
    every = forget_level(start, start, target, paired=False, nearest=np.tile(np.arange(40), (4, 1)))
    assert every.gap == pytest.approx(target.mean() - start.mean())
    assert every.gap_error == pytest.approx(forget_level(start, start, target, paired=False).gap_error)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    hits = 0
    for seed in range(60):
        rng = np.random.default_rng(1000 + seed)
        noise = rng.normal(size=(3, 1, 16, 8))
        start, target, current = 0.2 + 0.1 * noise[0], 0.5 + 0.1 * noise[1], 0.35 + 0.1 * noise[2]
        got = forget_level(current, start, target, paired=True, confidence=0.9, resamples=400)
        hits += got.low <= 0.5 <= got.high
    assert 45 <= hits <= 60


def test_without_a_gap_there_is_no_level():
    start = losses(4, 0.4)
    for target in (losses(4, 0.4, seed=1), losses(4, 0.3, seed=1)):
        got = forget_level(losses(4, 0.5, seed=2), start, target, paired=True)
        assert got.status == "no_gap"
        assert math.isnan(got.level)
    # One image without a gap of its own, among others that have one.
    target = losses(4, 0.8, seed=1)
    target[0] = start[0]
    got = forget_level(losses(4, 0.6, seed=2), start, target, paired=True)
    assert math.isnan(got.per_image[0])
    assert np.all(np.isfinite(got.per_image[1:]))


def test_losses_that_are_not_finite_are_a_collapse():
    start, target = losses(2, 0.2), losses(2, 0.5)
    for bad in (np.nan, np.inf):
        current = losses(2, 0.3)
        current[1, 3, 2] = bad
        got = forget_level(current, start, target, paired=True)
        assert got.status == "collapsed"
        assert math.isnan(got.level)
    assert {"collapsed", "no_gap"} <= set(STATUSES)


def test_bad_losses_are_refused_all_at_once():
    good = losses(3, 0.2)
    with pytest.raises(ValueError, match="current and start(.|\n)*target must be on the same probes and images"):
        forget_level(good[:2], good, good[:1], paired=True)
    with pytest.raises(ValueError, match="noises >= 2"):
        forget_level(good[..., :1], good[..., :1], good[..., :1], paired=True)
    with pytest.raises(ValueError, match="look-alikes must be at least 2, got 1"):
        forget_level(good, good, good[:1], paired=False)
    with pytest.raises(ValueError, match="must be finite"):
        forget_level(good, good * np.nan, good, paired=True)
    with pytest.raises(ValueError, match="confidence"):
        forget_level(good, good, good, paired=True, confidence=1.0)
    for nearest, message in [
        (np.zeros((2, 2), int), r"nearest must be \[3 forget images, look-alikes >= 2\], got \(2, 2\)"),
        (np.zeros((3, 1), int), "look-alikes >= 2"),
        (np.full((3, 2), 3), r"positions of the 3 look-alikes, got 3\.\.3"),
    ]:
        with pytest.raises(ValueError, match=message):
            forget_level(good, good, good, paired=False, nearest=nearest)
    with pytest.raises(ValueError, match="a paired target has none"):
        forget_level(good, good, good, paired=True, nearest=np.zeros((3, 2), int))


# Look-alikes.


def test_look_alikes_are_the_nearest_and_outliers_are_refused():
    rng = np.random.default_rng(0)
    keep, held_out = rng.normal(size=(200, 4, 4, 1)), rng.normal(size=(100, 4, 4, 1))
    forget = held_out[[7, 31, 2]] + 0.01
    index = look_alikes(forget, held_out, keep, count=10)
    assert index.shape == (3, 10)
    assert index[:, 0].tolist() == [7, 31, 2]
    for i in range(3):
        distance = np.sqrt(np.mean((held_out - forget[i]) ** 2, axis=(1, 2, 3)))
        assert index[i].tolist() == np.argsort(distance)[:10].tolist()
    # Those of an image do not depend on the other forget images.
    np.testing.assert_array_equal(look_alikes(forget[1:2], held_out, keep, count=10), index[1:2])
    assert look_alikes(forget[2:], held_out[:5], keep).shape == (1, 5)
    with pytest.raises(ValueError, match="1 of 2 forget images have no look-alikes(.|\n)*retrained without"):
        look_alikes(np.concatenate([forget[:1], forget[:1] + 5]), held_out, keep)
    with pytest.raises(ValueError, match="2 held-out and 2 keep"):
        look_alikes(forget, held_out[:1], keep)
    with pytest.raises(ValueError, match="count >= 2"):
        look_alikes(forget, held_out, keep, count=1)


# The stop rule.


def curve(levels, keep=1.0, every=5):
    keep = np.broadcast_to(keep, len(levels))
    return [Measurement(every * (i + 1), float(k), level) for i, (level, k) in enumerate(zip(levels, keep))]


def test_it_stops_at_the_first_of_two_measurements_in_a_row():
    rule = StopRule()
    data = curve([0.1, 0.5, 0.96, 0.4, 0.95, 0.99, 1.3])
    # Not at the lone one at step 15, and not before the second of the row.
    for n in range(6):
        assert rule.decide(data[:n]).action == "continue"
    got = rule.decide(data[:6])
    assert (got.action, got.reason, got.best_step) == ("stop", "reached", 25)
    # What follows is not looked at: the same after resume.
    assert rule.decide(data) == got
    assert StopRule(patience=1).decide(data).best_step == 15
    assert StopRule(target=2.0).decide(data).action == "continue"
    assert "0.95" in got.text


def test_a_collapse_stops_and_names_the_last_sound_step():
    rule = StopRule()
    data = curve([0.1, 0.3, 0.6, 0.7], keep=[1.0, 1.05, 1.2, 1.7])
    warned = rule.decide(data[:3])
    assert (warned.action, warned.warning, warned.last_sound_step) == ("continue", True, 10)
    got = rule.decide(data)
    assert (got.action, got.reason, got.best_step, got.last_sound_step) == ("stop", "collapsed", 10, 10)
    assert "step 20" in got.text


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_a_collapse(bad):
    rule = StopRule()
    for data in (curve([0.1, bad]), curve([0.1, 0.2], keep=[1.0, bad]), curve([None, None], keep=[1.0, bad])):
        got = rule.decide(data)
        assert (got.action, got.reason, got.best_step) == ("stop", "collapsed", 5)
    first = rule.decide(curve([bad]))
    assert (first.reason, first.best_step, first.last_sound_step) == ("collapsed", None, None)


def test_the_best_step_by_the_rule():
    rule = StopRule()
    # Nearest to the target among the sound ones; the earliest of equals.
    assert rule.decide(curve([0.2, 0.7, 0.5])).best_step == 10
    assert rule.decide(curve([0.2, 0.7, 0.7])).best_step == 10
    assert rule.decide(curve([0.2, 0.9, 0.5], keep=[1.0, 1.3, 1.0])).best_step == 15
    # Reached while damaged: the nearest sound one instead.
    damaged = rule.decide(curve([0.6, 0.96, 0.97], keep=[1.0, 1.3, 1.3]))
    assert (damaged.reason, damaged.best_step, damaged.warning) == ("reached", 5, True)
    # Without a yardstick only the collapse guard works, and the last sound step is the best.
    blind = rule.decide(curve([None, None, None]))
    assert (blind.action, blind.best_step) == ("continue", 15)
    assert "unknown" in blind.text
    empty = rule.decide([])
    assert (empty.action, empty.best_step, empty.warning) == ("continue", None, False)


def test_a_whole_run_on_synthetic_curves():
    """A level that rises and a keep loss that explodes later: stopped before the damage. With a quicker explosion: not."""
    steps = np.arange(1, 41)
    level = 1.2 * (1 - np.exp(-steps / 8))
    gentle, harsh = 1 + np.exp((steps - 35) / 3), 1 + np.exp((steps - 8) / 3)

    def until_stop(keep):
        seen = []
        for m in curve(list(level), keep=keep, every=1):
            seen.append(m)
            decision = StopRule().decide(seen)
            if decision.action == "stop":
                return decision
        return decision

    reached, collapsed = until_stop(gentle), until_stop(harsh)
    assert reached.reason == "reached"
    assert level[reached.best_step - 1] >= 0.95 > level[reached.best_step - 2]
    assert collapsed.reason == "collapsed"
    assert harsh[collapsed.best_step - 1] < 1.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StopRule(target=0.0), "target level"),
        (lambda: StopRule(target=math.nan), "target level"),
        (lambda: StopRule(warn=2.0), "warn <= collapse"),
        (lambda: StopRule(collapse=math.inf), "collapse"),
        (lambda: StopRule(warn=0.9), "1 <= warn"),
        (lambda: StopRule(patience=0), "patience"),
        (lambda: StopRule().decide([Measurement(5, 1.0), Measurement(5, 1.0)]), "in order of their steps"),
    ],
)
def test_bad_rules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
