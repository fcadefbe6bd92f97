"""Membership scores on a model whose training set is known: the closed-form denoiser of half of the digits."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxunlearn import closed_form, sampling
from jaxunlearn import schedule as schedules
from jaxunlearn.closed_form import WeightedSet, weighted_set
from jaxunlearn.images import to_uint8
from jaxunlearn.metrics import denoising_loss as dl
from jaxunlearn.metrics import membership, noise_norm, quantile_attack, roc, set_test, ulira
from jaxunlearn.metrics.distances import pairwise
from jaxunlearn.metrics.extraction import calibrate, copies, copy_rate
from jaxunlearn.schedule import per_example
from tests.fast_memory import make_predict

SCHEDULE = schedules.linear(1000)
COUNT = 600


predict = make_predict(SCHEDULE)


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    images = load_digits().images[np.random.default_rng(0).permutation(1797)]
    return (images / 8.0 - 1.0).astype(np.float32)[..., None]


@pytest.fixture(scope="module")
def members(digits):
    return digits[:COUNT]


@pytest.fixture(scope="module")
def others(digits):
    return digits[COUNT : 2 * COUNT]


@pytest.fixture(scope="module")
def params(members):
    return weighted_set(members)


def area(rows, params, members, others, *more):
    scores = [membership.score_images(rows, params, x, *(a[: len(x)] for a in more)) for x in (members, others)]
    return roc.auc(*scores)


def losses(params, images, t, noises=2):
    rows = jax.jit(dl.make_loss_rows(predict, SCHEDULE, "sum_squares"))
    return dl.denoising_loss(rows, params, images, jax.random.key(1), t, noises)


def test_loss_tells_members_apart_at_small_t_only(params, members, others):
    t = (50, 100, 600)
    found = [roc.auc(a, b) for a, b in zip(losses(params, members, t).T, losses(params, others, t).T)]
    assert found[0] >= 0.999
    assert found[1] >= 0.999
    assert 0.45 <= found[2] <= 0.6


def test_sima_tells_members_apart(params, members, others):
    rows = jax.jit(membership.make_sima(predict))
    t = (50, 100, 200, 400)
    ours, theirs = (membership.sima_sweep(rows, params, x, t) for x in (members, others))
    found = [roc.auc(a, b) for a, b in zip(ours.T, theirs.T)]
    assert min(found[:3]) >= 0.999
    assert 0.85 <= found[3] <= 0.95
    assert membership.best_t(ours[::2], theirs[::2]) < 3
    # One image at one t, from the definition.
    expected = np.sum(
        np.asarray(closed_form.make_predict(SCHEDULE)(params, members[:1], np.array([200]), None), np.float64) ** 4
    )
    assert ours[0, 2] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("t", "normalised"), [(200, False), (300, False), (200, True)])
def test_pia_tells_members_apart(params, members, others, t, normalised):
    rows = jax.jit(membership.make_pia(predict, SCHEDULE, t, normalised=normalised))
    assert area(rows, params, members, others) >= (0.9 if normalised else 0.999)


def test_secmi_tells_members_apart(params, members, others):
    rows = jax.jit(membership.make_secmi(predict, SCHEDULE))
    assert area(rows, params, members, others) >= 0.97


def test_secmi_equals_its_steps_in_float64(digits, x64):
    """A linear model, for which every DDIM step is a number."""
    slope, x0 = 0.3, digits[:2].astype(np.float64)
    alpha, sigma = np.sqrt(SCHEDULE.alphas_cumprod), np.sqrt(1 - SCHEDULE.alphas_cumprod)

    def move(x, now, then):
        e = slope * x
        return alpha[then] * (x - sigma[now] * e) / alpha[now] + sigma[then] * e

    z = x0
    for now in (0, 20, 40):
        z = move(z, now, now + 20)
    expected = np.sum((z - move(move(z, 60, 80), 80, 60)) ** 2, axis=(1, 2, 3))
    rows = membership.make_secmi(lambda p, x, t: p * x, SCHEDULE, t=80, step=20)
    np.testing.assert_allclose(rows(slope, jnp.asarray(x0)), expected, rtol=1e-9)


def test_pian_gives_the_first_answer_the_scale_of_noise(digits):
    """The second question is asked at alpha x0 + sigma e with mean |e| = sqrt(2 / pi), whatever the model's scale."""
    seen = []

    def loud(params, x, t):
        seen.append((np.asarray(x), np.asarray(t)))
        return params * x

    rows = membership.make_pia(loud, SCHEDULE, 200, power=2, normalised=True)
    score = rows(7.0, digits[:3])
    (first, zero), (second, later) = seen
    np.testing.assert_array_equal(first, digits[:3])
    assert (zero.tolist(), later.tolist()) == ([0] * 3, [200] * 3)
    e = (second - float(SCHEDULE.alpha(200)) * digits[:3]) / float(SCHEDULE.sigma(200))
    np.testing.assert_allclose(np.abs(e).mean(axis=(1, 2, 3)), math.sqrt(2 / math.pi), rtol=1e-4)
    np.testing.assert_allclose(score, np.sum((e - 7 * second) ** 2, axis=(1, 2, 3)), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("make", [membership.make_secmi, membership.make_pia])
def test_scores_compiled_equal_scores_step_by_step(make, params, members):
    # t = 600, where members are not yet told apart: at small t their scores are rounding.
    rows, few = make(predict, SCHEDULE, t=600, **({"step": 200} if make is membership.make_secmi else {})), members[:3]
    np.testing.assert_allclose(jax.jit(rows)(params, few), rows(params, few), rtol=2e-3)


def test_scores_do_not_depend_on_the_batch(params, members):
    rows = jax.jit(membership.make_pia(predict, SCHEDULE))
    whole = membership.score_images(rows, params, members[:10], batch_size=100)
    np.testing.assert_allclose(membership.score_images(rows, params, members[:10], batch_size=4), whole, rtol=1e-3)
    with pytest.raises(ValueError, match=r"\[3, 2\] rows"):
        membership.score_images(rows, params, members[:3], np.zeros(2))
    with pytest.raises(ValueError, match=r"\[0\] rows"):
        membership.score_images(rows, params, members[:0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: membership.make_secmi(predict, SCHEDULE, t=105), "multiple of the step"),
        (lambda: membership.make_secmi(predict, SCHEDULE, t=1000), "below 1000"),
        (lambda: membership.make_pia(predict, SCHEDULE, t=1000), r"0\.\.999"),
        (lambda: membership.make_pia(predict, SCHEDULE, power=0), "positive"),
        (lambda: membership.make_sima(predict, power=-1), "positive"),
        (lambda: membership.best_t(np.ones((3, 2)), np.ones((3, 4))), "same T"),
    ],
)
def test_scores_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_clid_is_low_where_the_condition_helps(members):
    """A model whose condition is how much of the image it is told."""

    def told(params, x, t, cond):
        clean = per_example(cond[:, 0], x) * params
        return (x - per_example(SCHEDULE.alpha(t), x) * clean) / per_example(SCHEDULE.sigma(t), x)

    rows, three = jax.jit(dl.make_loss_rows(told, SCHEDULE)), np.repeat(members[:1], 3, axis=0)
    told_all, nothing = np.array([[1.0], [0.5], [0.0]], np.float32), np.zeros((3, 1), np.float32)
    score = membership.clid(
        *(
            dl.denoising_loss(rows, members[:1], three, jax.random.key(0), (100, 300), 2, batch_size=12, cond=cond)
            for cond in (told_all, nothing)
        )
    )
    with pytest.raises(ValueError, match="twice"):
        membership.clid(np.ones((2, 3)), np.ones((2, 4)))
    assert score[0] < score[1] < score[2] == 0.0


def test_noise_norm_is_the_distance_of_the_two_answers(digits):
    """The answers differ by the condition everywhere, whatever x is: sqrt(64) times it."""
    config = sampling.SamplerConfig("ddim", clip_sample=False)
    steps = sampling.trajectory(SCHEDULE, config, 5)

    def shifted(params, x, t, cond):
        return params * x + per_example(cond, x)

    rows = noise_norm.make_noise_norm(shifted, SCHEDULE, config, steps, guidance=2.0)
    start = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    cond = np.array([0.0, 0.5, 2.0], np.float32)
    np.testing.assert_allclose(jax.jit(rows)(0.1, start, cond, 0 * cond), 8 * cond, rtol=1e-4, atol=1e-5)

    # The path is that of guided sampling: the fourth question is where three guided steps lead.
    asked = []

    def watched(params, x, t, cond):
        jax.debug.callback(lambda value: asked.append(np.asarray(value)), x[: len(x) // 2], ordered=True)
        return shifted(params, x, t, cond)

    noise_norm.make_noise_norm(watched, SCHEDULE, config, steps, guidance=2.0)(0.1, start, cond, 0 * cond)
    jax.effects_barrier()
    three = sampling.Trajectory(steps.t[:3], steps.t_prev[:3])
    lead = sampling.sample(
        lambda p, x, t, c: p * x + 2.0 * per_example(c, x), 0.1, start, None, SCHEDULE, config, three, cond=cond
    )
    assert len(asked) == 5
    np.testing.assert_allclose(asked[3], lead, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="ddim"):
        noise_norm.make_noise_norm(shifted, SCHEDULE, sampling.SamplerConfig("ddpm"), steps)


def test_quantile_scores_level_the_difficulty_of_images():
    """Scores that depend on the image far more than on membership: the raw AUC is poor, the levelled one is good."""
    rng = np.random.default_rng(0)
    features = rng.uniform(-1, 1, (900, 3))
    scores = 4 * features[:, 0] + rng.normal(0, 0.3, 900)
    scores[:150] -= 1.0  # members
    levelled = quantile_attack.quantile_scores(features[300:], scores[300:], features[:300], scores[:300])
    assert roc.auc(scores[:150], scores[150:300]) < 0.75
    assert roc.auc(levelled[:150], levelled[150:]) > 0.9
    assert 0.02 < np.mean(levelled[150:] < 0) < 0.3
    with pytest.raises(ValueError, match="299 non-members.*300"):
        quantile_attack.quantile_scores(features[:299], scores[:299], features, scores)
    with pytest.raises(ValueError, match="quantile must"):
        quantile_attack.quantile_scores(features, scores, features, scores, quantile=1.0)


def test_image_features_say_what_they_are():
    images = np.zeros((2, 8, 8, 1), np.uint8)
    images[1, :, 4:] = 255
    found = quantile_attack.image_features(images)
    assert found.shape == (2, 20)
    np.testing.assert_array_equal(found[0], 0.0)
    np.testing.assert_allclose(found[1, :4], [0.5, 0.5, 0.0, 1 / 7])
    np.testing.assert_allclose(found[1, 4:].reshape(4, 4), [[0, 0, 1, 1]] * 4)


@pytest.mark.slow
def test_share_of_copies_lies_in_its_interval(members):
    """A model of 300 digits of which one counts 30 times: samples copy it in proportion."""
    config = sampling.SamplerConfig("ddim", clip_sample=False)
    steps = sampling.trajectory(SCHEDULE, config, 50)
    model = weighted_set(members[:300]).weighted(0, 30.0)
    start = jax.random.normal(jax.random.key(4), (600, 8, 8, 1))
    sample = jax.jit(lambda m, x: sampling.sample(predict, m, x, None, SCHEDULE, config, steps))
    pictures = to_uint8(sample(model, start))
    forget, keep = to_uint8(members[:1]), to_uint8(members[1:300])
    flags = copies(pairwise(pictures, forget), calibrate(forget, keep).strict_threshold)
    found = copy_rate(flags)
    assert found.ci.low < 30 / 329 < found.ci.high
    assert found.count > 30
    retrained = to_uint8(sample(model.without(0), start))
    assert not copies(pairwise(retrained, forget), calibrate(forget, keep).strict_threshold).any()


def set_scores(params, images):
    """A few scores of each image, as columns."""
    sima = membership.sima_sweep(jax.jit(membership.make_sima(predict)), params, images, (100, 400))
    return np.log(np.concatenate([losses(params, images, (400, 600)), sima], axis=1) + 1e-6)


def test_set_test_finds_members_and_refuses_few(params, members, others):
    found = set_test.cdi(set_scores(params, members[:40]), set_scores(params, others[:100]))
    assert found.p < 0.01
    assert (len(found.forget), len(found.others)) == (40, 100)
    with pytest.raises(ValueError, match="19 forget and 30 held-out.*20"):
        set_test.cdi(np.ones((19, 2)), np.ones((30, 2)))


def test_regressions_of_the_set_test_equal_scikit_learns():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(2)
    x, label = rng.normal(size=(4, 70, 3)), np.arange(70) < 20
    x[:, :20, 0] += np.array([0.0, 0.5, 2.0, 6.0])[:, None]  # the last is separable
    weights, offset = set_test._logistic(x, label)
    for i in range(4):
        fitted = LogisticRegression(class_weight="balanced", tol=1e-8, max_iter=1000).fit(x[i], label)
        np.testing.assert_allclose(weights[i], fitted.coef_[0], atol=0.02)
        np.testing.assert_allclose(offset[i], fitted.intercept_[0], atol=0.05)


def test_set_test_leaves_each_image_out_of_its_own_regression():
    """Changing one image's scores changes the log odds of its own fold only through itself."""
    rng = np.random.default_rng(3)
    forget, others = rng.normal(size=(20, 2)), rng.normal(size=(25, 2))
    plain = set_test.cdi(forget, others, permutations=1)
    moved = forget.copy()
    moved[0] += 100.0
    far = set_test.cdi(moved, others, permutations=1)
    same = np.isclose(far.forget, plain.forget)
    assert same.sum() == 3  # the four of the image's fold without itself keep their regression
    assert not same[0]


@pytest.mark.slow
def test_set_test_is_uniform_without_an_effect():
    """The p-value by permutations is; the t distribution's is not, which is why it is not the answer."""
    rng = np.random.default_rng(5)
    found = [
        set_test.cdi(rng.normal(size=(30, 3)), rng.normal(size=(60, 3)), permutations=199, seed=i) for i in range(200)
    ]
    assert stats.kstest([one.p for one in found], "uniform").pvalue > 0.01
    assert stats.kstest([one.welch_p for one in found], "uniform").pvalue < 1e-3


def shadow_losses(images, candidates, omegas, seed):
    """Log loss at t = 50 of each candidate under 32 models of a random half of the rest, its own weight being omega."""
    rng = np.random.default_rng(seed)
    rows = dl.make_loss_rows(predict, SCHEDULE)

    def one(c, index, key):
        x0 = jnp.repeat(jnp.asarray(images)[index][None], 2, axis=0)
        return jnp.log(jnp.mean(rows(WeightedSet(images, c), x0, jnp.full(2, 50), jnp.arange(2), key)) + 1e-20)

    weights = np.where(rng.random((candidates, 32, len(images))) < 0.5, 0.0, -np.inf)
    weights[np.arange(candidates), :, np.arange(candidates)] = np.log(omegas) if omegas else -np.inf
    index = np.repeat(np.arange(candidates), 32)
    keys = jax.random.split(jax.random.key(seed), len(index))
    out = jax.jit(jax.vmap(one))(weights.reshape(len(index), -1).astype(np.float32), index, keys)
    return np.asarray(out, np.float64).reshape(candidates, 32)


def test_shadow_attack_on_closed_form_models(members):
    """A dimmed image is found; models that never saw it cannot be told from each other."""
    images = members[:60]
    never = shadow_losses(images, 16, 0, seed=0)
    assert ulira.ulira(shadow_losses(images, 16, 1e-2, seed=1), never, resamples=50).auc > 0.95
    assert ulira.ulira(shadow_losses(images, 16, 0, seed=2), never, resamples=50).auc == pytest.approx(0.5, abs=0.05)
