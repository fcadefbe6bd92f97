"""Masks against loops in float64 over the oracle's network."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxunlearn import filtered, low_pass, sum_squares
from jaxunlearn.masks import fisher_ratio_mask, largest, saliency_mask
from tests import oracle
from tests import tiny_model as tm
from tests.tiny_model import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")

TABLE = oracle.linear_table()


def batches(count, size=4, first_seed=0):
    """Batches for the library, and their arrays for the oracle."""
    raw = [tm.arrays(size, seed=first_seed + i) for i in range(count)]
    pairs = []
    for a in raw:
        batch, draw = tm.batch_and_draw(a)
        pairs.append((batch.forget, draw))
    return pairs, raw


def gradient(params, a):
    """Gradient of the mean over the rows of sum (eps_hat - eps)^2, float64, by the oracle's own backward pass."""
    a = {k: np.asarray(v, np.float64) if k != "t" else v for k, v in a.items()}
    alpha, sigma = oracle.alpha_sigma(TABLE, a["t"])
    a_t = oracle.noised(a["a0"], a["eps"], alpha, sigma)
    residual = oracle.net(params, a_t, a["t"]) - a["eps"]
    return oracle.net_gradient(params, a_t, a["t"], 2 * residual / len(residual))


def clipped(g):
    norm = np.sqrt(sum((v**2).sum() for v in g.values()))
    return {k: v / max(norm, 1) for k, v in g.items()}


def test_saliency_equals_the_loop():
    params = tm.params(hidden=6)
    wide = {k: np.float64(v) for k, v in params.items()}
    pairs, raw = batches(3)
    total = {k: np.zeros_like(v) for k, v in wide.items()}
    for a in raw:
        g = clipped(gradient(wide, a))
        total = {k: total[k] + g[k] for k in total}
    flat = np.abs(np.concatenate([total[k].ravel() for k in sorted(total)]))
    for fraction in (0.1, 0.5, 1.0):
        mask = saliency_mask(tm.predict, tm.SCHEDULE, params, pairs, fraction=fraction)
        got = np.concatenate([mask[k].ravel() for k in sorted(mask)])
        wanted = int(np.floor(fraction * flat.size))
        assert got.sum() == wanted
        assert set(np.flatnonzero(got)) == set(np.argsort(-flat)[:wanted])
    # A selection in frequency changes what is salient.
    selected = filtered(sum_squares, low_pass(0.3))
    other = saliency_mask(tm.predict, tm.SCHEDULE, params, pairs, fraction=0.5, error=selected)
    assert jax.tree.map(np.shape, other) == jax.tree.map(np.shape, params)


def test_the_largest_entries_ties_and_counts():
    scores = {"a": np.array([[1.0, 5.0], [2.0, 2.0]]), "b": np.array([2.0, 0.0])}
    assert jax.tree.map(lambda x: x.astype(int).tolist(), largest(scores, 0.5)) == {"a": [[0, 1], [1, 1]], "b": [0, 0]}
    assert all(x.all() for x in jax.tree.leaves(largest(scores, 1.0)))
    assert sum(x.sum() for x in jax.tree.leaves(largest(scores, 0.34))) == 2


@pytest.mark.parametrize(
    ("scores", "fraction", "message"),
    [
        (np.ones(4), 0.0, "fraction must lie in"),
        (np.ones(4), 1.1, "fraction must lie in"),
        (np.ones(4), 0.1, "less than one weight"),
        (np.zeros(4), 0.5, "not all 0"),
        (np.array([1.0, np.nan]), 0.5, "finite"),
    ],
)
def test_bad_scores_are_refused(scores, fraction, message):
    with pytest.raises(ValueError, match=message):
        largest({"w": scores}, fraction)


def test_the_fisher_ratio_equals_the_loop():
    params = tm.params(hidden=6)
    wide = {k: np.float64(v) for k, v in params.items()}
    (forget, raw_forget), (keep, raw_keep) = batches(3), batches(2, first_seed=50)

    def fisher(raw):
        squares = [{k: v**2 for k, v in clipped(gradient(wide, a)).items()} for a in raw]
        return {k: np.mean([s[k] for s in squares], axis=0) for k in wide}

    f, k_ = fisher(raw_forget), fisher(raw_keep)
    for threshold in (0.5, 1.0, 3.0):
        mask = fisher_ratio_mask(tm.predict, tm.SCHEDULE, params, forget, keep, threshold=threshold)
        for k in wide:
            ratio = (f[k] + 1e-15) / (k_[k] + 1e-15)
            sure = np.abs(ratio / threshold - 1) > 1e-3
            assert np.array_equal(mask[k][sure], (ratio >= threshold)[sure])
    with pytest.raises(ValueError, match=r"one size, got \[4, 6\]"):
        fisher_ratio_mask(tm.predict, tm.SCHEDULE, params, forget, batches(1, size=6)[0])
    with pytest.raises(ValueError, match="threshold must be positive"):
        fisher_ratio_mask(tm.predict, tm.SCHEDULE, params, forget, keep, threshold=0.0)
    with pytest.raises(ValueError, match="fisher_ratio_mask: keep needs at least one batch"):
        fisher_ratio_mask(tm.predict, tm.SCHEDULE, params, forget, [])
