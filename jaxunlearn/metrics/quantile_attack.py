"""Membership relative to how hard an image is: the score against a quantile predicted from the image itself.

Images differ in how easy they are, so one threshold for all is unfair. A regression on images that are known to be
non-members predicts a low quantile of the score from features of the image; a score below it is member-like
(Bertran et al. 2023; for diffusion models Tang et al. 2023, arXiv 2312.05140).
"""

from __future__ import annotations

import numpy as np

from jaxunlearn.metrics.distances import rows

GRID = 4


def least_public(quantile: float) -> int:
    """How many non-members the regression asks for: at least 200, and 30 of them below the quantile.

    With 100 of them the 0.1 quantile is fitted so closely that 0.23 of new non-members lie below it, with 300 it is 0.15.

    >>> least_public(0.1), least_public(0.5)
    (300, 200)
    """
    return max(200, int(np.ceil(30 / quantile - 1e-9)))


def image_features(images) -> np.ndarray:
    """Simple features of unit images [N,H,W,C] (uint8 or in [0, 1]): float64 [N, 4 + 16].

    Mean, standard deviation, mean absolute difference of vertical and of horizontal neighbours, and the brightness of
    a 4x4 grid of tiles (of fewer tiles where an image has fewer pixels).

    Raises:
      ValueError: as :func:`jaxunlearn.metrics.distances.rows`.
    """
    grey = rows(images).reshape(np.shape(images)).astype(np.float64).mean(axis=3)
    edges = [
        np.abs(np.diff(grey, axis=axis)).mean(axis=(1, 2)) if grey.shape[axis] > 1 else 0 * grey[:, 0, 0]
        for axis in (1, 2)
    ]
    tiles = [
        tile.mean(axis=(1, 2))
        for band in np.array_split(grey, min(GRID, grey.shape[1]), axis=1)
        for tile in np.array_split(band, min(GRID, grey.shape[2]), axis=2)
    ]
    return np.stack([grey.mean(axis=(1, 2)), grey.std(axis=(1, 2)), *edges, *tiles], axis=1)


def quantile_scores(
    public_features, public_scores, features, scores, *, quantile: float = 0.1, seed: int = 0
) -> np.ndarray:
    """``score - predicted quantile`` [n]: low is member-like, below 0 where only about the share ``quantile`` of
    non-members like it would lie.

    Gradient boosting with the quantile (pinball) loss.

    Args:
      public_features: [m, d] of images that the model never saw and that are not scored here.
      public_scores: [m] their scores, best on a logarithmic scale.
      features: [n, d] of the images to judge.
      scores: [n] theirs.
      quantile: which quantile, in (0, 1).
      seed: of the regression.

    Raises:
      ValueError: a quantile outside (0, 1), fewer non-members than :func:`least_public`, shapes that do not fit,
        values that are not finite.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile must lie strictly between 0 and 1, got {quantile}")
    x, y, new, given = (np.asarray(a, np.float64) for a in (public_features, public_scores, features, scores))
    if (
        x.ndim != 2
        or new.ndim != 2
        or x.shape[1] != new.shape[1]
        or y.shape != x.shape[:1]
        or given.shape != new.shape[:1]
    ):
        raise ValueError(
            "features must be [m, d] and [n, d] with scores [m] and [n]; "
            f"got {x.shape}, {new.shape} and {y.shape}, {given.shape}"
        )
    if len(x) < least_public(quantile):
        raise ValueError(
            f"{len(x)} non-members are too few to predict the {quantile:g} quantile; it needs {least_public(quantile)}"
        )
    if not all(np.all(np.isfinite(a)) for a in (x, y, new, given)):
        raise ValueError("features or scores hold NaN or infinity")
    from sklearn.ensemble import GradientBoostingRegressor

    model = GradientBoostingRegressor(
        loss="quantile",
        alpha=quantile,
        n_estimators=200,
        max_depth=2,
        learning_rate=0.1,
        min_samples_leaf=10,
        subsample=0.7,
        random_state=seed,
    )
    return given - model.fit(x, y).predict(new)
