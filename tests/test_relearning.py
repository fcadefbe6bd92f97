"""Relearning on a model whose training is known step by step, and the inversion probe on closed-form models."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.closed_form import make_predict, weighted_set
from jaxunlearn.metrics import relearning
from jaxunlearn.metrics.inversion import levels, make_inversion_probe
from jaxunlearn.metrics.relearning import relearn_ratio, relearn_steps
from jaxunlearn.schedule import linear

KEYS = [jax.random.key(i) for i in range(3)]
RATE = 0.9


def halving(state, key):
    """A loss that falls by a tenth each step, whatever the key."""
    return state * RATE


def noisy(state, key):
    return state * (RATE + 0.02 * float(jax.random.uniform(key)))


def run(start, target=1.0, step=halving, key=KEYS[0], **options):
    return relearn_steps(step, start, lambda state: state, key, target=target, **options)


@pytest.mark.parametrize("every", [1, 4, 30])
def test_crossing_is_exact_for_a_geometric_loss(every):
    found = run(10.0, every=every)
    assert found.steps == pytest.approx(math.log(10) / -math.log(RATE), rel=1e-9)
    assert not found.censored
    assert found.losses[-1] <= 1.0 < found.losses[-2]


def test_the_model_before_needs_no_step():
    found = run(1.0)
    assert found == (0.0, False, False, (0,), (1.0,))


def test_budget_censors_and_is_never_exceeded():
    found = run(10.0, budget=10, every=4)
    assert found.censored
    assert found.steps == 10
    assert found.at == (0, 4, 8, 10)
    assert run(10.0, step=lambda state, key: math.nan).failed


def test_keys_are_those_of_the_step_number():
    seen = []

    def step(state, key):
        seen.append(jax.random.key_data(key).tolist())
        return state

    run(2.0, step=step, budget=4, every=3)
    assert seen == [jax.random.key_data(jax.random.fold_in(KEYS[0], k)).tolist() for k in range(4)]
    relearning.train(step, None, KEYS[0], 2)
    assert seen[4:] == seen[:2]


def test_ratio_is_one_for_a_retrained_model_and_zero_for_the_one_before():
    references = [[run(start, step=noisy, key=key) for key in KEYS] for start in (10.0, 12.0)]
    same = relearn_ratio(references[0], [references[0]])
    assert (same.value, same.bound) == (1.0, "exact")
    assert same.ci.low == same.ci.high == 1.0  # the same keys: their noise cancels
    before = relearn_ratio([run(1.0)] * 3, references)
    assert (before.value, before.ci.low, before.ci.high) == (0.0, 0.0, 0.0)
    quick = relearn_ratio([run(2.0, step=noisy, key=key) for key in KEYS], references)
    expected = np.mean([run(2.0, step=noisy, key=key).steps for key in KEYS]) / np.mean(quick.reference_steps)
    assert quick.value == pytest.approx(expected)
    assert quick.ci.low < quick.value < quick.ci.high < 0.6


def test_censored_runs_bound_the_ratio():
    slow, quick = [run(10.0, budget=10)] * 3, [run(2.0)] * 3
    assert relearn_ratio(slow, [quick]).bound == "lower"
    assert relearn_ratio(slow, [quick]).ci is None
    assert relearn_ratio(quick, [slow]).bound == "upper"
    assert relearn_ratio(slow, [slow]).bound == "unknown"
    assert math.isnan(relearn_ratio(quick, [[run(1.0)] * 3]).value)  # the references needed no step


def test_refusals():
    with pytest.raises(ValueError, match="3 or more keys"):
        relearn_ratio([run(2.0)] * 2, [[run(2.0)] * 2])
    with pytest.raises(ValueError, match=r"\[2\]"):
        relearn_ratio([run(2.0)] * 3, [[run(2.0)] * 2])
    with pytest.raises(ValueError, match="target = 0"):
        run(2.0, target=0.0)
    with pytest.raises(ValueError, match="steps must be"):
        relearning.train(halving, 1.0, KEYS[0], -1)


def test_inversion_reconstructs_and_sees_whether_an_image_is_remembered(x64):
    schedule = linear(1000)
    images = np.random.default_rng(0).uniform(-1, 1, (6, 4, 4, 1))
    shares = (0.0, 0.3, 1.0)
    probe = jax.jit(make_inversion_probe(make_predict(schedule, 0.05), schedule, steps=60, shares=shares, copies=8))
    full = weighted_set(images)
    results = {}
    for name, model in {"remembered": full, "retrained": full.without(0)}.items():
        out = np.asarray(probe(model, jnp.asarray(images[:1]), jax.random.key(0)))
        assert out.shape == (1, 3, 8, 4, 4, 1)
        results[name] = np.sqrt(np.mean((out - images[0]) ** 2, axis=(3, 4, 5)))[0]
    for name in results:
        assert np.ptp(results[name][0]) < 1e-9  # without fresh noise all copies are one
    assert np.median(results["remembered"][:2], axis=1).max() < 0.1  # comes back from around its own noise
    assert results["retrained"].min() > 0.3  # never does
    assert results["remembered"][2].mean() > 0.3  # from fresh noise alone: some image
    with pytest.raises(ValueError, match="shares"):
        make_inversion_probe(None, schedule, shares=(1.5,))
    with pytest.raises(ValueError, match="steps must be between 2"):
        make_inversion_probe(None, schedule, steps=1)


def test_noise_levels_of_the_inversion_are_even_in_log_snr():
    schedule = linear(1000)
    t = levels(schedule, 40)
    assert (t[0], t[-1]) == (0, 999)
    gaps = -np.diff(np.asarray(schedule.log_snr(t)))
    assert gaps.max() < 2 * (schedule.log_snr(0) - schedule.log_snr(999)) / 39
    assert len(levels(schedule, 1000)) < 1000  # equal ones are dropped
