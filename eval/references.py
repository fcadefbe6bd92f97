"""What all columns are measured against: thresholds, reference features, image subsets. Computed once, from data only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from eval.parts import MAX_NUMBERS, in_parts
from eval.prompts import Conditions, image_texts
from eval.spaces import Space, round_trip_rms
from jaxunlearn.classifier_training import TrainedClassifier, train_classifier
from jaxunlearn.images import to_uint8
from jaxunlearn.io.forget import Split
from jaxunlearn.metrics import distances
from jaxunlearn.metrics.extraction import COPY_FRACTION, STRICT_FRACTION, Calibration, calibrate
from jaxunlearn.metrics.frechet import Moments, PixelBasis, moments, pixel_basis

MAX_REFERENCE = 10_000  # keep images behind the Frechet distances
NEIGHBOURS, MAX_NEIGHBOURS = 16, 1024  # other images that go through the autoencoder: for each forget image, in all


class Encoded(NamedTuple):
    """Images as the model takes them.

    Attributes:
      x: float32 [N,...] in the model's space.
      rows: int32 [N], their conditions.
    """

    x: np.ndarray
    rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class RoundTrip:
    """What the autoencoder of a latent model makes of the forget images: the best that its samples can reach.

    Attributes:
      images: uint8 [F,H,W,C].
      rms: float64 [F], distance to the forget image on [0, 1] pixels.
      calibration: copy thresholds of ``images``: a sample close to one of them is a copy as well.
    """

    images: np.ndarray
    rms: np.ndarray
    calibration: Calibration


@dataclasses.dataclass(frozen=True)
class References:
    """Arrays and functions made from the data.

    Attributes:
      forget: uint8 [F,H,W,C], the different forget images (copies counted once).
      keep: uint8 [N,H,W,C].
      held_out: uint8 [M,H,W,C]; may be empty.
      calibration: copy thresholds of ``forget``.
      round_trip: for a latent model, the forget images after its autoencoder; None for a model of pixels.
      injected: positions in ``forget`` of the images of the injection test.
      injection_inputs: these images as the model takes them.
      loss_inputs: "forget", "keep", "held_out" -> images of the denoising loss as the model takes them; none is empty.
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
    round_trip: RoundTrip | None
    injected: np.ndarray
    injection_inputs: Encoded
    loss_inputs: Mapping[str, Encoded]
    classifier: TrainedClassifier | None
    no_classifier: str | None
    reference: Mapping[str, Any]
    features: Moments | None
    basis: PixelBasis
    pixels: Moments

    @property
    def beyond_reach(self) -> int:
        """How many forget images their own reconstruction would not count as a copy of, by its distance to the image."""
        return 0 if self.round_trip is None else int(np.sum(self.round_trip.rms >= self.calibration.threshold))


class Chosen(NamedTuple):
    """Which images are measured one by one.

    Attributes:
      forget: int64 [F], positions of the different forget images in the data.
      injected: positions in ``forget`` of the images of the injection test.
      loss: "forget", "keep", "held_out" -> positions in the data; none is empty.
    """

    forget: np.ndarray
    injected: np.ndarray
    loss: Mapping[str, np.ndarray]

    @property
    def positions(self) -> np.ndarray:
        """Positions in the data of all images that a model is given."""
        return np.unique(np.concatenate([self.forget[self.injected], *self.loss.values()]))


def choose(split: Split, settings: Mapping[str, Any]) -> Chosen:
    """The images of the injection test and of the losses, the same for all models."""
    _, first = np.unique(split.digests[split.forget], axis=0, return_index=True)
    forget = split.forget[np.sort(first)]
    injected = np.unique(
        np.linspace(0, len(forget) - 1, min(len(forget), settings["injection_images"])).round().astype(int)
    )
    sets = {"forget": forget, "keep": split.keep, "held_out": split.held_out}
    loss = {name: some(positions, settings["loss_images"], settings["seed"]) for name, positions in sets.items()}
    return Chosen(forget, injected, {name: positions for name, positions in loss.items() if len(positions)})


def prepare(
    split: Split,
    chosen: Chosen,
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    space: Space,
    conditions: Conditions,
    say: Callable[[str], None],
) -> References:
    """Calibrates thresholds, trains the classifier and computes reference moments.

    Args:
      split: the data; its forget set is not empty.
      chosen: the images of the injection test and of the losses.
      config: the run's configuration, for the texts of images.
      settings: the evaluation's settings.
      space: where the models work.
      conditions: what they are conditioned on.
      say: prints one line.

    Raises:
      ValueError: a forget image is equal to a kept one, too few images to keep, or a broken autoencoder.
    """
    images, seed = split.images, settings["seed"]
    forget, keep, held_out = images[chosen.forget], images[split.keep], images[split.held_out]
    others = images[np.setdiff1d(np.concatenate([split.keep, split.held_out]), split.near_duplicates.index)]

    def encoded(positions: np.ndarray) -> Encoded:
        return Encoded(space.encode(images[positions]), conditions.rows(image_texts(config, split, positions)))

    if space.latent:
        calibration, round_trip = _calibrate_latent(forget, others, space, settings["copy_threshold"])
        say(f"autoencoder: the forget images come back at rms {round_trip.rms.mean():.3g}")
    else:
        calibration, round_trip = calibrate(forget, others, threshold=settings["copy_threshold"]), None

    reference = images[reference_positions(split, seed)]
    numbers = int(np.prod(images.shape[1:]))
    basis = pixel_basis(reference, max_images=max(2, min(2000, MAX_NUMBERS // numbers)), seed=seed)
    classifier, reason, features = _classifier(split, settings, say)
    if classifier is not None:
        features = moments(in_parts(lambda part: classifier.apply(part)[1], reference))
    return References(
        forget=forget,
        keep=keep,
        held_out=held_out,
        calibration=calibration,
        round_trip=round_trip,
        injected=chosen.injected,
        injection_inputs=encoded(chosen.forget[chosen.injected]),
        loss_inputs={name: encoded(positions) for name, positions in chosen.loss.items()},
        classifier=classifier,
        no_classifier=reason,
        reference={"reference": "keep images", "reference_n": len(reference)},
        features=features,
        basis=basis,
        pixels=moments(in_parts(basis, reference)),
    )


def _calibrate_latent(forget, others, space: Space, threshold: float | None) -> tuple[Calibration, RoundTrip]:
    """Copy thresholds for samples that come out of an autoencoder.

    A perfect copy is then the reconstruction of a forget image, so it has a threshold of its own. Ordinary samples look
    like reconstructions as well: none of the nearest other images is flagged, neither itself nor its reconstruction.
    """
    decoded = space.decode(space.encode(forget))
    if not np.all(np.isfinite(decoded)):
        raise ValueError("the autoencoder makes NaN or infinity of the forget images; its weights are broken")
    made = to_uint8(decoded)
    near = others[_nearest_others(forget, made, others)]
    both = (others, to_uint8(space.decode(space.encode(near))))
    first, second = (calibrate(forget, part, threshold=threshold) for part in both)
    rule = first.rule if threshold is not None else f"{first.rule}, before or after the autoencoder"
    calibration = Calibration(*(np.minimum(*pair) for pair in zip(first[:3], second[:3])), rule)
    closest = np.minimum(*(distances.nearest(made, part).distance for part in both))
    values = COPY_FRACTION * closest if threshold is None else np.full(len(closest), float(threshold))
    own = Calibration(closest, values, np.minimum(STRICT_FRACTION * closest, values), rule)
    return calibration, RoundTrip(made, round_trip_rms(forget, decoded), own)


def _nearest_others(forget, made, others) -> np.ndarray:
    """Positions of the images that are nearest to a forget image or to its reconstruction: a few for each."""
    count = min(max(1, min(NEIGHBOURS, MAX_NEIGHBOURS // len(forget))), len(others))
    distance = in_parts(
        lambda part: np.minimum(distances.pairwise(part, forget), distances.pairwise(part, made)), others
    )
    return np.unique(np.argpartition(distance, count - 1, axis=0)[:count])


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


def reference_positions(split: Split, seed: int) -> np.ndarray:
    """Positions of the keep images that distances of features compare with: at most MAX_REFERENCE, in their order."""
    return some(split.keep, MAX_REFERENCE, seed)


def some(positions: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most so many positions, in their order."""
    if len(positions) <= most:
        return positions
    return positions[np.sort(np.random.default_rng([seed, 2]).choice(len(positions), most, replace=False))]
