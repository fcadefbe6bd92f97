"""The quick evaluation on models whose samples and losses are known in closed form."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import forgetting
from jaxunlearn.objectives.probes import strata
from jaxunlearn.quick_evaluation import NOISES, STRATA, QuickEvaluation
from jaxunlearn.sampling import SamplerConfig
from jaxunlearn.schedule import linear
from jaxunlearn.types import Example

SCHEDULE = linear(1000)


def predict(params, x_t, t, cond=None):
    """The ideal denoiser of a data set of one image: every chain ends in it, and the loss is known."""
    alpha, sigma = (f(t).reshape(-1, 1, 1, 1) for f in (SCHEDULE.alpha, SCHEDULE.sigma))
    return (x_t - alpha * params) / sigma


def stand_in(**changes):
    """What the quick evaluation needs of a model."""
    parts = dict(predict=predict, predict_raw=predict, schedule=SCHEDULE, prediction_type="epsilon")
    parts |= dict(sampler=SamplerConfig("ddpm"), is_latent=False, takes_text=False)
    return types.SimpleNamespace(**{**parts, **changes})


@pytest.fixture(scope="module")
def images():
    """Two forget images (one twice) and keep images, uint8."""
    rng = np.random.default_rng(3)
    forget = rng.integers(0, 256, (2, 4, 4, 1), np.uint8)
    keep = rng.integers(0, 256, (40, 4, 4, 1), np.uint8)
    return np.concatenate([forget, forget[:1]]), keep


@pytest.fixture(scope="module")
def judge(images):
    return QuickEvaluation(stand_in(), *images, num_samples=6, sampling_steps=5, batch_size=4)


def as_params(image):
    return jnp.asarray(image, jnp.float32)[None] / 127.5 - 1


def test_a_model_of_a_forget_image_makes_copies_alone(judge, images):
    found = judge(as_params(images[0][1]))
    assert (found.samples, found.copies, found.copies_strict, found.broken) == (6, 6, 6, 0)
    assert found.nearest == pytest.approx(0, abs=1e-7)
    assert found.fd_name == "fd_pixel"


def test_a_model_of_a_keep_image_makes_none(judge, images):
    found = judge(as_params(images[1][0]))
    assert (found.copies, found.copies_strict) == (0, 0)
    apart = (images[1][0] - images[0].astype(float)) / 255
    assert found.nearest == pytest.approx(np.sqrt(np.mean(apart**2, axis=(1, 2, 3))).min())


def test_losses_are_those_of_the_closed_form(judge, images):
    """eps_hat - eps = alpha / sigma (x0 - y) for every noise: float64, no sampling."""
    alphas = np.asarray(SCHEDULE.alphas_cumprod, np.float64)[strata(1000, STRATA)]
    model_image = images[1][0].astype(float) / 127.5 - 1
    losses = judge.probe(as_params(images[1][0]))
    for part, found in (("forget", losses.forget), ("keep", losses.keep)):
        of = np.unique(images[0], axis=0) if part == "forget" else images[1]
        apart = np.mean((of.astype(float) / 127.5 - 1 - model_image) ** 2, axis=(1, 2, 3))
        expected = apart[:, None] * alphas / (1 - alphas)
        assert found.shape == (len(of), STRATA, NOISES)
        # float32 loses (sigma eps) against alpha (x0 - y) at the clean end, no more.
        np.testing.assert_allclose(np.sort(found.mean(axis=2), axis=0), np.sort(expected, axis=0), rtol=2e-3, atol=1e-6)
    figures = judge(as_params(images[1][0]))
    assert figures.forget_loss == pytest.approx(losses.forget.mean())
    assert figures.keep_loss == pytest.approx(losses.keep.mean())


def test_probes_are_those_of_the_forget_level(judge, images):
    """The same model is untouched, the target itself is at level 1."""
    start, target = (judge.probe(as_params(image)).forget for image in (images[0][0], images[1][0]))
    halfway = start + 0.5 * (target - start)
    assert forgetting.forget_level(halfway, start, target, paired=True).level == pytest.approx(0.5)


def test_frechet_distance_to_one_point_is_known(images):
    """All samples are one image: no covariance, so the distance is |m - y|^2 + tr C."""
    pixels = lambda x: x.reshape(len(x), -1) / 255.0  # noqa: E731
    judge = QuickEvaluation(
        stand_in(), *images, num_samples=4, sampling_steps=3, features=pixels, fd_name="fd_mine", loss_images=2
    )
    keep, y = pixels(images[1]), pixels(images[0][:1])[0]
    found = judge(as_params(images[0][0]))
    expected = np.sum((keep.mean(axis=0) - y) ** 2) + np.trace(np.cov(keep, rowvar=False))
    assert found.fd_name == "fd_mine"
    assert found.fd == pytest.approx(expected, rel=1e-6)


def test_samples_start_from_the_same_noise_however_they_are_batched(images):
    def weak(params, x_t, t, cond=None):
        return params * x_t

    made = []
    for batch_size in (3, 7):
        judge = QuickEvaluation(
            stand_in(predict=weak, predict_raw=weak), *images, num_samples=7, sampling_steps=2, batch_size=batch_size
        )
        made.append(judge.samples(jnp.float32(0.1)))
    assert made[0].shape == (7, 4, 4, 1)
    np.testing.assert_allclose(made[0], made[1], rtol=1e-5)
    assert len(np.unique(made[0].reshape(7, -1), axis=0)) == 7
    # The noise of sample i is that of the full evaluation: the first half of fold_in(fold_in(key(seed), 0), i).
    key = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 4))[0]
    start = jax.random.normal(key, (4, 4, 1))
    ratio = made[0][4] / start
    inside = np.abs(made[0][4]) < 0.5  # where no clipping acted
    assert np.ptp(ratio[inside]) < 1e-3 * abs(float(ratio[inside].mean()))


def test_programs_are_compiled_once(images):
    traced = []

    def counted(params, x_t, t, cond=None):
        traced.append(x_t.shape)
        return predict(params, x_t, t)

    judge = QuickEvaluation(
        stand_in(predict=counted, predict_raw=counted), *images, num_samples=5, sampling_steps=2, batch_size=2
    )
    judge(as_params(images[1][0]))
    first = len(traced)
    judge(as_params(images[1][1]))
    assert first
    assert len(traced) == first


def test_a_broken_model_is_a_finding_not_an_error(judge, images):
    found = judge(as_params(images[1][0]) * np.nan)
    assert (found.broken, found.copies) == (6, 0)
    assert np.isnan([found.nearest, found.fd, found.keep_loss, found.forget_loss]).all()


def test_a_data_set_gives_its_parts_and_leaves_near_duplicates_out_of_the_calibration(images):
    forget, keep = images
    near = forget[:1].copy()
    near[0, 0, 0, 0] ^= 1
    split = types.SimpleNamespace(
        images=np.concatenate([forget, keep, near]),
        forget=np.arange(3),
        keep=np.arange(3, 44),
        held_out=np.zeros(0, int),
        near_duplicates=types.SimpleNamespace(index=np.array([43])),
    )
    judge = QuickEvaluation.of_split(stand_in(), split, num_samples=2)
    assert len(judge.forget) == 2
    assert judge.calibration.closest.min() > 0.1  # else the near-duplicate would be the closest other image
    assert QuickEvaluation.of_split(stand_in(), split, copy_threshold=0.3).calibration.threshold.tolist() == [0.3] * 2


@pytest.mark.parametrize(
    ("changes", "options", "match"),
    [
        ({"is_latent": True}, {}, "works on latents: use python -m eval.main"),
        ({"takes_text": True}, {}, "takes text: use python -m eval.main"),
        ({}, {"num_samples": 1}, "num_samples >= 2"),
        ({}, {"loss_images": 0}, "loss_images >= 1"),
    ],
)
def test_what_cannot_be_judged_is_refused(images, changes, options, match):
    with pytest.raises(ValueError, match=match):
        QuickEvaluation(stand_in(**changes), *images, **options)


def test_empty_sets_are_refused(images):
    with pytest.raises(ValueError, match="need forget images and at least 2 keep images, got 0 and 1"):
        QuickEvaluation(stand_in(), images[0][:0], images[1][:1])


def test_the_ideal_denoiser_of_the_tests_has_zero_loss_on_its_image(judge, images):
    losses = forgetting.make_probe_losses(predict, SCHEDULE, jax.random.key(1), count=2, noises=2)
    found = losses(as_params(images[0][0]), Example(as_params(images[0][0])))
    np.testing.assert_allclose(found, 0, atol=1e-6)
