"""Inception score: do samples look like one class each, and like all classes together?

``exp(mean KL(p(y|x) || p(y)))`` per chunk, here with a classifier that was trained in the run.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class InceptionScore(NamedTuple):
    """Score over chunks.

    Attributes:
      mean: mean over chunks; 1 (useless) to the number of classes.
      std: standard deviation over chunks (ddof 1); NaN for one chunk.
      chunks: number of chunks.
      n: number of samples used.
    """

    mean: float
    std: float
    chunks: int
    n: int


def inception_score(logits, chunks: int = 10, seed: int = 0) -> InceptionScore:
    """Inception score of logits [N, classes]; rows are permuted from the seed and split into ``chunks`` parts.

    Raises:
      ValueError: logits that are not finite, or fewer than two rows per chunk.

    >>> inception_score(np.zeros((100, 10))).mean
    1.0
    """
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2 or chunks < 1 or len(logits) < 2 * chunks:
        raise ValueError(
            f"the Inception score needs logits [N, classes] with N >= 2 x {chunks}, got shape {logits.shape}"
        )
    if not np.all(np.isfinite(logits)):
        raise ValueError("logits hold NaN or infinity")
    logits = logits - logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    order = np.random.default_rng(seed).permutation(len(logits))
    scores = []
    for part in np.array_split(log_p[order], chunks):
        p = np.exp(part)
        with np.errstate(divide="ignore"):
            log_marginal = np.log(p.mean(axis=0))
        difference = np.where(p > 0, part - log_marginal, 0.0)
        scores.append(np.exp(np.mean(np.sum(p * difference, axis=1))))
    scores = np.array(scores)
    return InceptionScore(
        float(scores.mean()), float(scores.std(ddof=1)) if chunks > 1 else float("nan"), chunks, len(logits)
    )
