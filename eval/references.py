"""What all columns are measured against: thresholds, reference features, image subsets. Computed once, from data only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from eval.classifier_training import TrainedClassifier, train_classifier
from jaxunlearn.io.forget import Split
from jaxunlearn.metrics.extraction import Calibration, calibrate
from jaxunlearn.metrics.frechet import Moments, PixelBasis, moments, pixel_basis

MAX_REFERENCE = 10_000  # keep images behind the Frechet distances
MAX_INJECTED = 16  # forget images of the injection test


@dataclasses.dataclass(frozen=True)
class References:
    """Arrays and functions made from the data.

    Attributes:
      forget: uint8 [F,H,W,C], the different forget images (copies counted once).
      keep: uint8 [N,H,W,C].
      held_out: uint8 [M,H,W,C]; may be empty.
      calibration: copy thresholds of ``forget``.
      injected: positions in ``forget`` of the images of the injection test.
      loss_sets: "forget", "keep", "held_out" -> uint8 images of the denoising loss.
      classifier: the run's classifier, or None.
      no_classifier: why there is none.
      reference: which keep images the Frechet distances compare with, in words and numbers.
      features: moments of the classifier's features of keep images, or None.
      basis: principal components of keep images.
      pixels: moments of their coordinates.
    """

    forget: np.ndarray
    keep: np.ndarray
    held_out: np.ndarray
    calibration: Calibration
    injected: np.ndarray
    loss_sets: Mapping[str, np.ndarray]
    classifier: TrainedClassifier | None
    no_classifier: str | None
    reference: Mapping[str, Any]
    features: Moments | None
    basis: PixelBasis
    pixels: Moments


def prepare(split: Split, settings: Mapping[str, Any], say: Callable[[str], None]) -> References:
    """Calibrates thresholds, trains the classifier and computes reference moments.

    Args:
      split: the data; its forget set is not empty.
      settings: the evaluation's settings.
      say: prints one line.

    Raises:
      ValueError: a forget image is equal to a kept one, or too few images to keep.
    """
    images, seed = split.images, settings["seed"]
    _, first = np.unique(split.digests[split.forget], axis=0, return_index=True)
    forget = images[split.forget[np.sort(first)]]
    keep, held_out = images[split.keep], images[split.held_out]
    others = np.setdiff1d(np.concatenate([split.keep, split.held_out]), split.near_duplicates.index)
    calibration = calibrate(forget, images[others], threshold=settings["copy_threshold"])

    count = settings["loss_images"]
    held = _some(held_out, count, seed)
    loss_sets = {"forget": _some(forget, count, seed), "keep": _some(keep, count, seed), "held_out": held}

    reference = _some(keep, MAX_REFERENCE, seed)
    basis = pixel_basis(reference, seed=seed)
    classifier, reason, features = _classifier(split, settings, say)
    if classifier is not None:
        features = moments(classifier.apply(reference)[1])
    return References(
        forget=forget,
        keep=keep,
        held_out=held_out,
        calibration=calibration,
        injected=np.unique(np.linspace(0, len(forget) - 1, min(len(forget), MAX_INJECTED)).round().astype(int)),
        loss_sets=loss_sets,
        classifier=classifier,
        no_classifier=reason,
        reference={"reference": "keep images", "reference_n": len(reference)},
        features=features,
        basis=basis,
        pixels=moments(basis(reference)),
    )


def _classifier(split: Split, settings: Mapping[str, Any], say: Callable[[str], None]):
    """The classifier, or the reason why there is none."""
    labels, options = split.labels, settings["classifier"]
    if labels is None:
        return None, "the data has no labels, so no classifier can be trained", None
    held_out = (split.images[split.held_out], labels[split.held_out]) if len(split.held_out) else None
    try:
        trained = train_classifier(
            split.images[split.keep],
            labels[split.keep],
            held_out,
            steps=options["steps"],
            batch_size=options["batch_size"],
            seed=settings["seed"],
        )
    except ValueError as error:
        return None, str(error), None
    accuracy = "unknown" if np.isnan(trained.held_out_accuracy) else f"{trained.held_out_accuracy:.1%}"
    say(f"classifier: {trained.train_images} keep images, held-out accuracy {accuracy}")
    return trained, None, None


def _some(images: np.ndarray, most: int, seed: int) -> np.ndarray:
    if len(images) <= most:
        return images
    return images[np.sort(np.random.default_rng([seed, 2]).choice(len(images), most, replace=False))]
