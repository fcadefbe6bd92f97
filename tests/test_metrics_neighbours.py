"""Kernel distance, manifolds and copy detectors: against double loops and hand-made cases."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.metrics import copy_detectors as detectors
from jaxunlearn.metrics import distances, extraction, kid, sscd_variants
from jaxunlearn.metrics.prdc import prdc
from jaxunlearn.metrics.ssim import ssim, window_size


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def kernel(a, b):
    return (np.dot(a, b) / len(a) + 1) ** 3


def test_kernel_distance_is_the_double_loop_over_pairs(rng):
    x, y = rng.normal(size=(7, 4)), rng.normal(0.3, 1, size=(9, 4))
    within = [np.mean([kernel(v[i], v[j]) for i in range(len(v)) for j in range(len(v)) if i != j]) for v in (x, y)]
    across = np.mean([kernel(a, b) for a in x for b in y])
    assert kid.mmd_squared(x, y) == pytest.approx(sum(within) - 2 * across, rel=1e-12)
    # One subset of all rows of two sets of one size is the same thing.
    whole = kid.kernel_distance(x, y[:7], subsets=1, size=100)
    assert whole.mean == pytest.approx(kid.mmd_squared(x, y[:7]))
    assert (whole.size, whole.first, whole.second) == (7, 7, 7)


def test_kernel_distance_is_unbiased_and_not_clipped(rng):
    values = [kid.mmd_squared(*rng.normal(size=(2, 20, 3))) for _ in range(300)]
    assert np.min(values) < 0
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)
    far = kid.kernel_distance(rng.normal(size=(60, 3)), rng.normal(1, 1, size=(80, 3)), subsets=20, size=50)
    assert far.mean > 3 * far.std > 0
    assert far.size == 50


def _again(n, m):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 3)), rng.normal(size=(m, 3))


def test_kernel_distance_depends_on_its_seed_alone():
    x, y = _again(30, 40)
    assert kid.kernel_distance(x, y, subsets=5, size=10) == kid.kernel_distance(x, y, subsets=5, size=10)
    assert kid.kernel_distance(x, y, subsets=5, size=10) != kid.kernel_distance(x, y, subsets=5, size=10, seed=1)


@pytest.mark.parametrize(
    ("x", "kwargs", "message"),
    [
        (np.ones((1, 3)), {}, "two feature rows"),
        (np.ones((4, 2)), {}, "one length"),
        (np.full((4, 3), np.nan), {}, "NaN"),
        (np.ones((4, 3)), {"subsets": 0}, "at least 1 subset"),
    ],
)
def test_kernel_distance_refuses(x, kwargs, message):
    with pytest.raises(ValueError, match=message):
        kid.kernel_distance(x, np.ones((5, 3)), **kwargs)


def manifolds_by_loops(real, made, k, k_density):
    def radius(points, i, k):
        return sorted(np.linalg.norm(points[i] - points[j]) for j in range(len(points)) if j != i)[k - 1]

    def inside(centres, point, k, closed):
        out = []
        for i in range(len(centres)):
            d, r = np.linalg.norm(centres[i] - point), radius(centres, i, k)
            out.append(d <= r if closed else d < r)
        return out

    hits = np.array([inside(real, point, k_density, False) for point in made])
    return (
        np.mean([any(inside(real, point, k, True)) for point in made]),
        np.mean([any(inside(made, point, k, True)) for point in real]),
        hits.sum() / (k_density * len(made)),
        hits.any(axis=0).mean(),
    )


def test_manifolds_equal_the_loops_with_ties_and_duplicates(rng):
    real = rng.integers(0, 4, (17, 2)).astype(float)  # on a grid: ties at the edge of balls, and duplicates
    made = rng.integers(1, 6, (13, 2)).astype(float)
    for k, k_density, chunk in ((3, 5, 1000), (1, 2, 4)):
        found = prdc(real, made, k=k, k_density=k_density, chunk=chunk)
        np.testing.assert_allclose(found[:4], manifolds_by_loops(real, made, k, k_density), rtol=1e-12)


def test_manifolds_of_copies_of_shifted_and_of_collapsed_points(rng):
    real = rng.normal(size=(200, 8))
    same = prdc(real, real.copy())
    assert (same.precision, same.recall, same.coverage) == (1.0, 1.0, 1.0)
    assert prdc(real, real + 100)[:4] == (0.0, 0.0, 0.0, 0.0)
    collapsed = prdc(real, real[:1] + 1e-3 * rng.normal(size=(200, 8)))
    assert collapsed.precision == 1.0
    assert collapsed.recall < 0.05
    assert collapsed.coverage < 0.2
    other = prdc(real, rng.normal(size=(200, 8)))
    assert other.density == pytest.approx(1.0, abs=0.2)


def test_manifolds_refuse():
    with pytest.raises(ValueError, match="less than the number of points"):
        prdc(np.ones((5, 2)), np.ones((9, 2)))
    with pytest.raises(ValueError, match="NaN"):
        prdc(np.full((9, 2), np.inf), np.ones((9, 2)))
    with pytest.raises(ValueError, match="one length"):
        prdc(np.ones((9, 2)), np.ones((9, 3)))


def test_k_nearest_equals_the_sorted_distances(rng):
    x, y = (rng.integers(0, 256, (n, 5, 4, 3), np.uint8) for n in (11, 37))
    expected = np.sort(distances.pairwise(x, y), axis=1)
    np.testing.assert_allclose(distances.k_nearest(x, y, 6, chunk=4, reference_chunk=8), expected[:, :6], atol=1e-5)
    assert distances.k_nearest(x, y[:3], 6).shape == (11, 3)
    with pytest.raises(ValueError, match="0 references"):
        distances.k_nearest(x, y[:0], 3)


def test_adaptive_ratio_by_hand():
    # Neighbours, the forget image among them, at a mean distance of 1.
    for distance, expected in ((0.2, 0.4), (0.6, 1.2)):
        others = np.full((1, 50), (50 - distance) / 49)
        assert detectors.carlini_ratio(np.array([[distance]]), others)[0, 0] == pytest.approx(expected)
    far = np.full((1, 60), 1.0)
    assert detectors.carlini_ratio(np.array([[3.0]]), far)[0, 0] == pytest.approx(6.0)  # not among its neighbours
    assert detectors.carlini_ratio(np.array([[0.0]]), far)[0, 0] == 0.0


def test_adaptive_ratio_equals_the_sorted_union(rng):
    samples, keep, forget = (rng.uniform(size=(n, 4, 4, 1)) for n in (6, 70, 2))
    keep[:20] = 0.5 + 0.1 * (keep[:20] - 0.5)  # a crowd
    to_forget, to_keep = distances.pairwise(samples, forget), distances.pairwise(samples, keep)
    for n in (70, 30):
        near = distances.k_nearest(samples, keep[:n], 50)
        for i, f in np.ndindex(6, 2):
            union = np.sort(np.append(to_keep[i, :n], to_forget[i, f]))[:50]
            expected = to_forget[i, f] / (0.5 * union.mean())
            assert detectors.carlini_ratio(to_forget, near)[i, f] == pytest.approx(expected, rel=1e-4)


def test_neighbour_ratio_ignores_other_forget_images():
    to_forget, keep = np.array([[0.1, 0.11], [0.6, 0.7], [0.0, 1.0]]), np.array([0.4, 0.5, 0.0])
    np.testing.assert_allclose(detectors.neighbour_ratio(to_forget, keep), [0.25, 1.2, 1.0])
    with pytest.raises(ValueError, match="same samples"):
        detectors.neighbour_ratio(to_forget, keep[:2])


def test_tiles_see_a_small_change_on_an_empty_background(rng):
    plain = np.zeros((1, 12, 10, 1))
    marked = plain.copy()
    marked[0, :3, :2] = 1.0
    assert distances.pairwise(marked, plain)[0, 0] < 0.25
    assert detectors.tile_distance(marked, plain)[0, 0] == pytest.approx(np.sqrt(6 / 9))  # a tile is 3 x 3 there
    x, y = rng.uniform(size=(3, 8, 8, 2)), rng.uniform(size=(2, 8, 8, 2))
    for i, j in np.ndindex(3, 2):
        worst = max(
            np.sqrt(np.mean((x[i, a : a + 2, b : b + 2] - y[j, a : a + 2, b : b + 2]) ** 2))
            for a in range(0, 8, 2)
            for b in range(0, 8, 2)
        )
        assert detectors.tile_distance(x, y)[i, j] == pytest.approx(worst, abs=1e-6)
    np.testing.assert_allclose(detectors.tile_distance(x, y, tiles=1), distances.pairwise(x, y))


def ssim_by_loops(a, b):
    """Float64, window by window, from the definitions of weighted moments."""
    size = window_size(*a.shape[:2])
    axis = np.arange(size) - size // 2
    weights = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for c in range(a.shape[2]):
        for i in range(a.shape[0] - size + 1):
            for j in range(a.shape[1] - size + 1):
                p, q = (v[i : i + size, j : j + size, c] for v in (a, b))
                m, n = (weights * p).sum(), (weights * q).sum()
                s, r = (weights * (p - m) ** 2).sum(), (weights * (q - n) ** 2).sum()
                both = (weights * (p - m) * (q - n)).sum()
                values.append((2 * m * n + 1e-4) * (2 * both + 9e-4) / ((m**2 + n**2 + 1e-4) * (s + r + 9e-4)))
    return np.mean(values)


@pytest.mark.parametrize("shape", [(16, 13, 2), (8, 8, 1), (3, 12, 1)])
def test_ssim_equals_the_loop(rng, shape):
    a = rng.uniform(size=(3, *shape))
    b = np.clip(a + 0.2 * rng.normal(size=a.shape), 0, 1)
    found = np.asarray(jax.jit(ssim)(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)))
    np.testing.assert_allclose(found, [ssim_by_loops(*pair) for pair in zip(a, b)], atol=1e-5)
    np.testing.assert_allclose(detectors.ssim_distance(a, b, chunk=2), 1 - found, atol=1e-5)


def test_ssim_of_equal_inverted_and_flat_images(rng):
    a = rng.uniform(size=(2, 12, 12, 1)).astype(np.float32)
    np.testing.assert_allclose(detectors.ssim_distance(a, a), 0.0, atol=1e-6)
    assert np.all(detectors.ssim_distance(a, 1 - a) > 1)
    bright = np.full((2, 12, 12, 1), 0.9, np.float32)
    assert np.all(detectors.ssim_distance(bright, bright - 0.1) < 0.02)  # brightness counts little
    with pytest.raises(ValueError, match="one shape"):
        ssim(a, a[:1])


def test_copies_of_the_noisiest_detector_are_still_rare(rng):
    """None of the detectors flags what is not a copy, all of them flag a faint copy."""
    forget, keep = rng.uniform(size=(1, 16, 16, 1)), rng.uniform(size=(300, 16, 16, 1))
    copy = np.clip(forget + 0.02 * rng.normal(size=forget.shape), 0, 1)
    samples = np.concatenate([copy, rng.uniform(size=(50, 16, 16, 1))])
    to_forget = distances.pairwise(samples, forget)
    near = distances.k_nearest(samples, keep, 50)
    flags = {
        "carlini": detectors.carlini_ratio(to_forget, near).min(axis=1) < 1,
        "ratio": detectors.neighbour_ratio(to_forget, near[:, 0]) < detectors.RATIO_THRESHOLD,
        "tile": detectors.tile_distance(samples, forget)[:, 0]
        < extraction.COPY_FRACTION * detectors.tile_distance(keep, forget).min(),
        "ssim": detectors.ssim_distance(samples, np.repeat(forget, 51, axis=0))
        < extraction.COPY_FRACTION * detectors.ssim_distance(keep, np.repeat(forget, 300, axis=0)).min(),
    }
    for name, found in flags.items():
        assert found[0], name
        assert found[1:].sum() == 0, name


def descriptor(images):
    """Unit vectors that differ for different images."""
    flat = images.reshape(len(images), -1) - 0.4
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(flat.shape[1], 6)), flat.dtype)
    out = flat @ weights
    return out / jnp.linalg.norm(out, axis=1, keepdims=True)


projected = jax.jit(functools.partial(sscd_variants.sscd_projected, descriptor))
rate_of = jax.jit(functools.partial(sscd_variants.sscd_dissimilarity_rate, descriptor))
direction = jax.jit(functools.partial(sscd_variants.sscd_direction, descriptor))


def test_projected_similarity_does_not_depend_on_the_step_length(rng):
    forget = 0.3 + 0.4 * rng.uniform(size=(4, 5, 5, 1)).astype(np.float32)
    way = 0.02 * rng.normal(size=forget.shape).astype(np.float32)
    short, long = (projected(forget, forget + s * way, 0.4) for s in (1.0, 3.0))
    np.testing.assert_allclose(short, long, atol=1e-5)
    radius = sscd_variants.median_radius(forget, forget + way)
    lengths = np.sqrt(np.sum(way**2, axis=(1, 2, 3)))
    assert radius == pytest.approx(np.median(lengths), rel=1e-4)
    own = projected(forget, forget + way, lengths)  # its own length: the output itself
    np.testing.assert_allclose(own, jnp.sum(descriptor(forget) * descriptor(forget + way), axis=1), atol=1e-5)
    with pytest.raises(ValueError, match="positive"):
        sscd_variants.sscd_projected(descriptor, forget, forget, 0.0)


def test_variants_are_finite_where_nothing_moved(rng):
    forget = rng.uniform(size=(2, 5, 5, 1)).astype(np.float32)
    other = rng.uniform(size=(2, 5, 5, 1)).astype(np.float32)
    np.testing.assert_allclose(projected(forget, forget, 1.0), 1.0, atol=1e-6)
    np.testing.assert_array_equal(rate_of(forget, forget), 0.0)
    np.testing.assert_array_equal(direction(forget, other, other), 0.0)
    np.testing.assert_allclose(direction(forget, other, forget), 1.0, atol=1e-6)
    rate = rate_of(forget, other)
    apart = 1 - np.sum(np.asarray(descriptor(forget)) * np.asarray(descriptor(other)), axis=1)
    np.testing.assert_allclose(rate, apart / np.linalg.norm((other - forget).reshape(2, -1), axis=1), rtol=1e-4)


def test_calibrated_similarity_at_its_anchors():
    assert sscd_variants.sscd_calibrated(0.8, 0.8, 0.1) == 1.0
    assert sscd_variants.sscd_calibrated(0.1, 0.8, 0.1) == 0.0
    assert sscd_variants.sscd_calibrated(0.0, 0.8, 0.1) < 0
    with pytest.raises(ValueError, match="nothing to calibrate"):
        sscd_variants.sscd_calibrated(0.1, 0.3, 0.3)
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        sscd_variants.sscd_calibrated(1.1, 0.3, 0.2)
