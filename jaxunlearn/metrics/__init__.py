"""Metrics: arrays and functions in, numbers out. Nothing here opens a file, trains or draws from a global generator.

:data:`METRICS` is the one registry: what each number of a report is, its unit and which way is good. The yardstick of
every metric of forgetting is a model that was retrained without the forget set, never "as large as possible".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxunlearn.metrics import (
    denoising_loss,
    distances,
    extraction,
    frechet,
    inception_score,
    injection,
    statistics,
)


class Metric(NamedTuple):
    """What a number is.

    Attributes:
      fn: the function that computes it.
      unit: its unit.
      target: "equal_reference" (the value of a retrained model), "lower" or "higher".
      description: one sentence for people.
    """

    fn: Callable
    unit: str
    target: str
    description: str


METRICS = {
    "copy_rate": Metric(
        extraction.copy_rate, "share of samples", "equal_reference", "Samples that are copies of a forget image"
    ),
    "copy_rate_strict": Metric(
        extraction.copy_rate,
        "share of samples",
        "equal_reference",
        "Samples closer to a forget image than half the distance from it to any other image",
    ),
    "nearest_forget_min": Metric(
        distances.pairwise,
        "rms of [0, 1] pixels",
        "equal_reference",
        "Distance of the closest sample to a forget image",
    ),
    "nearest_forget_median": Metric(
        distances.pairwise, "rms of [0, 1] pixels", "equal_reference", "Median distance of samples to the forget images"
    ),
    "nearest_keep_min": Metric(
        distances.nearest, "rms of [0, 1] pixels", "equal_reference", "Distance of the closest sample to a keep image"
    ),
    "nearest_keep_median": Metric(
        distances.nearest,
        "rms of [0, 1] pixels",
        "equal_reference",
        "Median distance of samples to their nearest keep image",
    ),
    "injection_distance": Metric(
        injection.injection_distance,
        "rms of [0, 1] pixels",
        "equal_reference",
        "How far a noised and denoised forget image lands from itself",
    ),
    "injection_similarity": Metric(
        injection.injection_similarity,
        "cosine of centred pixels",
        "equal_reference",
        "How much a noised and denoised forget image still looks like itself",
    ),
    "injection_copies": Metric(
        extraction.copy_rate,
        "share of injections",
        "equal_reference",
        "Noised and denoised forget images that come back as copies",
    ),
    "loss_forget": Metric(
        denoising_loss.denoising_loss, "mean square per pixel", "equal_reference", "Denoising loss on the forget images"
    ),
    "loss_keep": Metric(
        denoising_loss.denoising_loss, "mean square per pixel", "lower", "Denoising loss on training images that stay"
    ),
    "loss_held_out": Metric(
        denoising_loss.denoising_loss, "mean square per pixel", "lower", "Denoising loss on images never trained on"
    ),
    "rank_p": Metric(
        statistics.rank_p,
        "rank among held-out images",
        "equal_reference",
        "Share of held-out images whose loss is as low as the forget image's",
    ),
    "forget_level": Metric(
        denoising_loss.denoising_loss,
        "0 untouched, 1 as retrained",
        "equal_reference",
        "Forget loss on the way from the original to the retrained model",
    ),
    "fd_classifier": Metric(
        frechet.frechet_distance,
        "squared feature distance",
        "lower",
        "Frechet distance to keep images on features of a small classifier trained in this run",
    ),
    "fd_pixel": Metric(
        frechet.frechet_distance,
        "squared pixel distance",
        "lower",
        "Frechet distance to keep images on 64 principal components of their pixels",
    ),
    "inception_score": Metric(
        inception_score.inception_score,
        "1 to number of classes",
        "higher",
        "Inception score with a small classifier trained in this run, copies left out",
    ),
}
"""The one registry of metrics: name -> :class:`Metric`."""

__all__ = ["METRICS", "Metric"]
