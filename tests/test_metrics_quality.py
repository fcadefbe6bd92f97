"""Frechet distance, Inception score and the classifier: closed forms, invariances and refusals."""

from __future__ import annotations

import numpy as np
import pytest

from jaxunlearn.metrics import frechet
from jaxunlearn.metrics.inception_score import inception_score


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def test_diagonal_gaussians_have_the_closed_form(rng):
    m1, m2, s1, s2 = rng.normal(size=6), rng.normal(size=6), rng.uniform(0.1, 3, 6), rng.uniform(0.1, 3, 6)
    first, second = frechet.Moments(9, m1, np.diag(s1**2)), frechet.Moments(9, m2, np.diag(s2**2))
    expected = np.sum((m1 - m2) ** 2) + np.sum((s1 - s2) ** 2)
    assert frechet.frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)
    assert frechet.frechet_distance(second, first) == pytest.approx(expected, rel=1e-12)


def test_equal_moments_give_zero_and_rotations_change_nothing(rng):
    x, y = rng.normal(size=(300, 8)), rng.normal(size=(200, 8)) @ rng.normal(size=(8, 8))
    distance = frechet.frechet_distance(frechet.moments(x), frechet.moments(y))
    assert frechet.frechet_distance(frechet.moments(x), frechet.moments(x)) == pytest.approx(0.0, abs=1e-9)
    q, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    assert frechet.frechet_distance(frechet.moments(x @ q), frechet.moments(y @ q)) == pytest.approx(distance)


def test_fewer_rows_than_features_agrees_with_the_nuclear_norm(rng):
    x, y = rng.normal(size=(15, 40)), rng.normal(size=(20, 40)) + 0.5
    a, b = (z - z.mean(0) for z in (x, y))
    a, b = a / np.sqrt(14), b / np.sqrt(19)
    nuclear = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.sum(a**2) + np.sum(b**2) - 2 * nuclear
    assert frechet.frechet_distance(frechet.moments(x), frechet.moments(y)) == pytest.approx(expected, rel=1e-6)


def test_streaming_equals_one_batch_in_any_order(rng):
    x = (rng.normal(size=(1003, 5)) + 1e4).astype(np.float32)
    whole = frechet.moments(x, batch_size=10_000)
    ragged = frechet.moments(rng.permutation(x), batch_size=64)
    np.testing.assert_allclose(whole.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9)
    np.testing.assert_allclose(ragged.covariance, whole.covariance, rtol=1e-9)
    np.testing.assert_allclose(ragged.mean, whole.mean, rtol=1e-12)
    assert ragged.n == whole.n == 1003


def test_moments_refuse_what_has_no_moments():
    with pytest.raises(ValueError, match="NaN"):
        frechet.moments(np.array([[1.0, np.nan], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="two feature rows"):
        frechet.moments(np.ones((1, 3)))
    with pytest.raises(ValueError, match="cannot be compared"):
        frechet.frechet_distance(frechet.moments(np.eye(3)), frechet.moments(np.eye(4)))


def test_distance_grows_with_the_share_of_foreign_images(rng):
    real = rng.uniform(size=(400, 6, 6, 1))
    basis = frechet.pixel_basis(real, 16)
    np.testing.assert_allclose(basis.basis.T @ basis.basis, np.eye(16), atol=1e-12)
    values = []
    for foreign in (0, 20, 100):
        mixed = rng.uniform(size=(400, 6, 6, 1))
        mixed[:foreign] = 0.0
        values.append(frechet.frechet_distance(frechet.moments(basis(mixed)), frechet.moments(basis(real))))
    assert values[0] < values[1] < values[2]


def test_pixel_basis_is_drawn_from_the_seed(rng):
    images = rng.uniform(size=(50, 4, 4, 1))
    first, again, other = (frechet.pixel_basis(images, 4, max_images=20, seed=s).basis for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


@pytest.mark.parametrize("classes", [2, 10])
def test_inception_score_ends(classes):
    assert inception_score(np.zeros((200, classes))).mean == pytest.approx(1.0)
    sure = np.tile(1e3 * np.eye(classes), (500, 1))
    assert inception_score(sure, chunks=1).mean == pytest.approx(classes)
    assert inception_score(sure, chunks=10).mean == pytest.approx(classes, rel=0.05)


def test_inception_score_equals_its_definition(rng):
    logits = rng.normal(size=(300, 5)) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), axis=1)))
    found = inception_score(logits + 100.0, chunks=1)
    assert found.mean == pytest.approx(expected)
    assert np.isnan(found.std)


def test_inception_score_refuses_too_few_rows_and_nan():
    with pytest.raises(ValueError, match="2 x 10"):
        inception_score(np.zeros((19, 3)))
    with pytest.raises(ValueError, match="NaN"):
        inception_score(np.full((40, 3), np.nan))


def test_classifier_shapes_and_deterministic_parameters():
    import jax

    from jaxunlearn.models.classifier import Classifier, init_params

    for shape in ((8, 8, 1), (28, 28, 1), (70, 64, 3)):
        module = Classifier(7)
        params = init_params(module, shape, seed=3)
        logits, features = jax.eval_shape(module.apply, {"params": params}, np.zeros((5, *shape)))
        assert logits.shape == (5, 7)
        assert features.shape == (5, 64)
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) < 350_000
    again = init_params(Classifier(7), (70, 64, 3), seed=3)
    jax.tree.map(np.testing.assert_array_equal, params, again)
