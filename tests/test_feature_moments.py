"""Streamed moments equal those of one batch; distances of few rows; stored moments of something else are refused."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.io.moments_cache import MomentsKey, data_sha256, load_moments, save_moments
from jaxunlearn.metrics import frechet
from jaxunlearn.metrics.feature_moments import FeatureStream, batch_sums
from jaxunlearn.parallel import make_mesh

KEY = MomentsKey("clean", "ab" * 32, "cd" * 32)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def features_of(params, pictures):
    """A small network far from zero: what float32 sums of squares would lose their digits on."""
    x = pictures.astype(jnp.float32).reshape(len(pictures), -1) / 255
    return jnp.tanh(x @ params) + 20.0


def reference(params, pictures):
    """float64 moments of the float32 features: only the sums are under test."""
    f = np.asarray(jax.jit(features_of)(params, pictures), np.float64)
    return f.mean(0), np.cov(f, rowvar=False)


@pytest.mark.parametrize("devices", [1, 8])
def test_streams_equal_one_batch_in_any_order_and_on_any_number_of_devices(rng, devices):
    params = rng.normal(size=(48, 5)).astype(np.float32)
    pictures = rng.integers(0, 256, (101, 4, 4, 3), np.uint8)
    mean, covariance = reference(params, pictures)
    mesh = None if devices == 1 else make_mesh(jax.devices()[:devices])
    for order in (np.arange(101), rng.permutation(101)):
        stream = FeatureStream(features_of, params, 30, mesh=mesh, keep_rows=40)  # 32 on 8 devices; a ragged end
        stream.add(pictures[order[:37]])
        stream.add(pictures[order[37:]])
        found = stream.moments()
        assert found.n == 101
        np.testing.assert_allclose(found.mean, mean, rtol=1e-9)
        np.testing.assert_allclose(found.covariance, covariance, rtol=0, atol=1e-6 * np.trace(covariance))
        assert stream.rows().shape == (40, 5)
        np.testing.assert_allclose(stream.rows(), features_of(params, pictures[order[:40]]), rtol=1e-6)
    exact = frechet.Moments(101, mean, covariance)
    other = frechet.Moments(101, mean + 0.1, 1.5 * covariance)
    assert frechet.frechet_distance(found, other) == pytest.approx(frechet.frechet_distance(exact, other), rel=1e-6)


def test_streams_of_one_network_compile_once(rng):
    traces = []

    def network(params, pictures):
        traces.append(pictures.shape)
        return pictures.reshape(len(pictures), -1) * params

    for _ in range(2):
        stream = FeatureStream(network, jnp.float32(2), 8)
        for n in (3, 8, 13):
            stream.add(rng.normal(size=(n, 2, 2, 1)).astype(np.float32))
    assert traces == [(8, 2, 2, 1)]


def test_padding_counts_nothing_even_where_it_is_not_finite(rng):
    features = rng.normal(size=(6, 3)).astype(np.float32)
    padded = np.concatenate([features, np.full((2, 3), np.nan, np.float32)])
    sums = batch_sums(jnp.asarray(padded), jnp.asarray([1.0] * 6 + [0.0] * 2))
    n, mean, scatter = sums.exact()
    assert n == 6
    np.testing.assert_allclose(mean, features.astype(np.float64).mean(0), rtol=1e-6)
    np.testing.assert_allclose(scatter, 5 * np.cov(features, rowvar=False), rtol=1e-5)


def test_sums_of_batches_are_the_rows_sums(rng):
    x = rng.normal(size=(50, 4)) + 100
    total = frechet.MomentSum(4)
    total.add(x[:7])
    for part in (x[7:20], x[20:50]):
        total.add_sums(len(part), part.mean(0), (len(part) - 1) * np.cov(part, rowvar=False))
    total.add_sums(0, np.full(4, np.nan), np.eye(4))
    np.testing.assert_allclose(total.moments().covariance, np.cov(x, rowvar=False), rtol=1e-9)
    np.testing.assert_allclose(total.moments().mean, x.mean(0), rtol=1e-12)
    with pytest.raises(ValueError, match="NaN"):
        total.add_sums(2, np.full(4, np.nan), np.eye(4))
    with pytest.raises(ValueError, match="length 4"):
        total.add_sums(2, np.zeros(3), np.eye(3))


@pytest.mark.parametrize(("n", "m"), [(15, 20), (200, 12), (60, 90)])
def test_every_form_of_the_distance_agrees(rng, n, m):
    x, y = rng.normal(size=(n, 40)), 2 * rng.normal(size=(m, 40)) + 0.3
    nuclear = frechet.nuclear_distance(x, y)
    assert frechet.frechet_distance(frechet.moments(x), frechet.moments(y)) == pytest.approx(nuclear, rel=1e-6)
    assert frechet.frechet_distance_rows(frechet.moments(x), y) == pytest.approx(nuclear, rel=1e-6)
    assert frechet.nuclear_distance(x, x) == pytest.approx(0, abs=1e-9 * np.sum(np.var(x, axis=0)))


def test_no_metric_uses_the_matrix_square_root_that_scipy_gives_up(repository):
    sources = [path for path in (repository / "jaxunlearn").rglob("*.py") if "sqrtm(" in path.read_text()]
    assert sources == []


def test_float32_features_cost_less_than_a_millionth(rng):
    x, y = rng.normal(size=(3000, 24)) + 3, 1.2 * rng.normal(size=(3000, 24))
    exact = frechet.frechet_distance(frechet.moments(x), frechet.moments(y))
    stream = FeatureStream(lambda _, z: z, {}, 512)
    stream.add(x.astype(np.float32))
    found = frechet.frechet_distance(stream.moments(), frechet.moments(y))
    assert found == pytest.approx(exact, rel=1e-6)


def test_streams_refuse_what_has_no_moments():
    with pytest.raises(ValueError, match="at least two"):
        FeatureStream(features_of, None, 4).moments()
    with pytest.raises(ValueError, match="keep_rows"):
        FeatureStream(features_of, None, 4).rows()
    with pytest.raises(ValueError, match="at least 1"):
        FeatureStream(features_of, None, 0)
    with pytest.raises(ValueError, match="NaN"):
        FeatureStream(lambda _, x: x.reshape(len(x), -1), {}, 4).add(np.full((2, 1, 1, 2), np.nan, np.float32))
    for function in (frechet.nuclear_distance, lambda a, b: frechet.frechet_distance_rows(frechet.moments(a), b)):
        with pytest.raises(ValueError, match="cannot be compared"):
            function(np.eye(4), np.eye(3))
        with pytest.raises(ValueError, match="finite"):
            function(np.eye(4), np.full((2, 4), np.nan))


def test_stored_moments_come_back_and_only_for_the_same_key(tmp_path, rng):
    moments = frechet.moments(rng.normal(size=(9, 3)))
    path = tmp_path / "cache" / KEY.file_name
    with pytest.raises(FileNotFoundError):
        load_moments(path, KEY)
    save_moments(path, moments, KEY)
    back = load_moments(path, KEY)
    assert back.n == 9
    np.testing.assert_array_equal(back.covariance, moments.covariance)
    assert list(path.parent.iterdir()) == [path]
    for field in ("convention", "weights_sha256", "data_sha256"):
        other = dataclasses.replace(KEY, **{field: "tf1"})
        assert other.file_name != KEY.file_name
        with pytest.raises(ValueError, match=f"{field} is .*, asked for tf1"):
            load_moments(path, other)
    with pytest.raises(ValueError) as error:
        load_moments(path, MomentsKey("a", "b", "c"))
    assert len(str(error.value).splitlines()) == 3
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="no stored moments"):
        load_moments(path, KEY)
    save_moments(path, moments._replace(mean=np.full(3, np.nan)), KEY)
    with pytest.raises(ValueError, match="finite"):
        load_moments(path, KEY)


def test_the_fingerprint_of_pictures_sees_shape_order_and_every_byte(rng):
    pictures = rng.integers(0, 256, (4, 2, 2, 1), np.uint8)
    changed = pictures.copy()
    changed[3, 1, 1, 0] ^= 1
    found = [data_sha256(x) for x in (pictures, pictures.copy(), changed, pictures[::-1], pictures.reshape(4, 4, 1, 1))]
    assert found[0] == found[1]
    assert len(set(found)) == 4
    assert data_sha256(pictures, np.array([2, 0])) == data_sha256(pictures[[2, 0]])
    with pytest.raises(TypeError, match="uint8"):
        data_sha256(pictures.astype(np.float32))
