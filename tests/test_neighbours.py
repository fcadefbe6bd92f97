"""The search for neighbours equals brute force, refuses copies, and respects conditions."""

from __future__ import annotations

import numpy as np
import pytest

from jaxunlearn.io.hashing import tree_sha256
from jaxunlearn.objectives import neighbours
from jaxunlearn.objectives.neighbours import nearest


def images(forget=7, keep=90, shape=(5, 4, 3), seed=0):
    rng = np.random.default_rng(seed)
    base = rng.uniform(-1, 1, (keep, *shape)).astype(np.float32)
    return rng.uniform(-1, 1, (forget, *shape)).astype(np.float32), base


def brute(forget, keep, k, allowed=None):
    index, rms = [], []
    for i, image in enumerate(forget.astype(np.float64)):
        distance = [np.sqrt(((image - other) ** 2).mean()) for other in keep.astype(np.float64)]
        order = sorted((d, j) for j, d in enumerate(distance) if allowed is None or allowed[i, j])[:k]
        index.append([j for _, j in order])
        rms.append([d for d, _ in order])
    return np.array(index), np.array(rms)


@pytest.mark.parametrize("k", [1, 10, 90])
@pytest.mark.parametrize("chunk", [1, 1000, 64 << 20])
def test_it_is_brute_force_in_any_chunks(monkeypatch, k, chunk):
    monkeypatch.setattr(neighbours, "_CHUNK_BYTES", chunk)
    forget, keep = images()
    index, rms = brute(forget, keep, k)
    found = nearest(forget, keep, k)
    assert np.array_equal(found.index, index)
    np.testing.assert_allclose(found.rms, rms, rtol=1e-12)
    assert found.index.dtype == np.int64


def test_near_ties_are_measured_and_exact_ties_go_to_the_lower_position():
    forget, keep = images(forget=1)
    far = forget[0] + 0.5
    nearer = far.copy()
    nearer[0, 0, 0] -= 1e-6  # far below what a float32 product resolves
    keep[[11, 30, 50]] = far, nearer, far
    found = nearest(forget, keep, 90)
    at = found.index[0].tolist()
    assert at.index(30) + 1 == at.index(11)
    assert at.index(11) + 1 == at.index(50)


def test_the_order_of_the_images_does_not_matter():
    forget, keep = images()
    found = nearest(forget, keep, 5)
    order = np.random.default_rng(1).permutation(len(keep))
    shuffled = nearest(forget, keep[order], 5)
    assert np.array_equal(order[shuffled.index], found.index)
    assert np.array_equal(nearest(forget[::-1], keep, 5).index, found.index[::-1])


def test_only_images_of_the_same_condition_are_candidates():
    forget, keep = images()
    mine, theirs = np.arange(7) % 3, np.arange(90) % 3
    found = nearest(forget, keep, 30, forget_cond=mine, keep_cond=theirs)
    assert np.array_equal(found.index, brute(forget, keep, 30, mine[:, None] == theirs)[0])
    with pytest.raises(
        ValueError, match=r"k must lie in 1..30, the number of keep images of the same condition, got 31"
    ):
        nearest(forget, keep, 31, forget_cond=mine, keep_cond=theirs)


@pytest.mark.parametrize(("rms", "copy"), [(0.019, True), (0.021, False)])
def test_copies_are_refused(rms, copy):
    forget, keep = images()
    keep[40] = forget[3] + rms * np.where(np.arange(60).reshape(5, 4, 3) % 2, 1, -1)
    if not copy:
        assert nearest(forget, keep, 2).index[3, 0] == 40
        return
    with pytest.raises(ValueError, match=r'1 keep images are copies .*keep 40 of forget 3.*near_duplicates="forget"'):
        nearest(forget, keep, 2)
    # A copy under another condition is one too.
    with pytest.raises(ValueError, match="keep 40 of forget 3"):
        nearest(forget, keep, 2, forget_cond=np.zeros(7), keep_cond=np.where(np.arange(90) == 40, 1, 0))
    assert nearest(forget, keep, 2, copy_rms=0).index[3, 0] == 40


def test_one_changed_pixel_has_another_content_hash():
    """What a cache of the search is keyed by: contents, not names."""
    forget, keep = images()
    before = tree_sha256({"forget": forget, "keep": keep})
    assert tree_sha256({"forget": forget.copy(), "keep": keep.copy()}) == before
    keep[8, 2, 1, 0] = np.nextafter(keep[8, 2, 1, 0], 2, dtype=np.float32)
    assert tree_sha256({"forget": forget, "keep": keep}) != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must lie in 1..90"),
        ({"k": 91}, "k must lie in 1..90"),
        ({"keep": np.zeros((9, 5, 4, 3), np.uint8)}, "must be floating .*to_model"),
        ({"keep": np.zeros((0, 5, 4, 3))}, "N >= 1"),
        ({"keep": np.full((9, 5, 4, 3), np.nan)}, "must be finite"),
        ({"keep": np.zeros((9, 5, 4, 1))}, "must have one shape"),
        ({"forget_cond": np.zeros(7)}, "together, or neither"),
        ({"forget_cond": np.zeros(6), "keep_cond": np.zeros(90)}, r"must be \[F\] and \[N\]"),
    ],
)
def test_what_cannot_be_searched_is_refused(change, message):
    forget, keep = images()
    with pytest.raises(ValueError, match=message):
        nearest(**({"forget": forget, "keep": keep, "k": 3} | change))
