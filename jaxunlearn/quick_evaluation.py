"""A few numbers about a pixel model within a second or so, without a work directory, for loops over many models.

The full evaluation stands in the ``eval`` launcher; this judges parameters in the process that made them, as often as wanted:
how many samples are copies, how good the samples are, and the losses on fixed probes. All of its programs are compiled once,
and every model starts from the same noise, so differences between models are paired. Thresholds, samples and distances follow
the full evaluation; with its numbers of samples and steps the same model gives the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from jaxunlearn import sampling
from jaxunlearn.forgetting import make_probe_losses
from jaxunlearn.images import to_model, to_uint8
from jaxunlearn.metrics import distances, extraction, frechet
from jaxunlearn.types import Example, PyTree

if TYPE_CHECKING:
    from jaxunlearn.io.diffusers import DiffusersModel
    from jaxunlearn.io.forget import Split

MAX_REFERENCE = 10_000
"""Keep images behind the Frechet distance, at most."""
STRATA, NOISES = 16, 4
"""Timesteps of the probes, and noises at each of them."""
SAMPLING, PROBES = 0, 1  # streams of the key


class QuickFigures(NamedTuple):
    """What a model does.

    Attributes:
      samples: how many samples were made.
      copies: how many of them are copies of a forget image, by the calibrated threshold.
      copies_strict: how many lie below half of the calibration distance.
      nearest: rms distance of the closest sample to a forget image, on [0, 1] pixels; NaN if every sample is broken.
      fd: Frechet distance of the samples to keep images; NaN if a sample is broken.
      fd_name: on which features: ``fd_pixel`` or the given name.
      keep_loss: denoising loss on fixed keep images and probes, mean square per pixel.
      forget_loss: likewise on the forget images.
      broken: how many samples hold NaN or infinity.
    """

    samples: int
    copies: int
    copies_strict: int
    nearest: float
    fd: float
    fd_name: str
    keep_loss: float
    forget_loss: float
    broken: int = 0


class ProbedLosses(NamedTuple):
    """Denoising losses on the same probes, for :func:`jaxunlearn.forgetting.forget_level` and for keep ratios.

    Attributes:
      forget: float64 [F, STRATA, NOISES].
      keep: float64 [K, STRATA, NOISES].
    """

    forget: np.ndarray
    keep: np.ndarray


class QuickEvaluation:
    """Judges parameters of one architecture; make it once and call it for every model.

    Attributes:
      calibration: the copy thresholds, see :func:`jaxunlearn.metrics.extraction.calibrate`.
      fd_name: name of the Frechet distance.
      num_samples: how many samples are made.
      forget: uint8 [F,H,W,C], the different forget images.
    """

    def __init__(
        self,
        model: DiffusersModel,
        forget: np.ndarray,
        keep: np.ndarray,
        *,
        others: np.ndarray | None = None,
        num_samples: int = 500,
        sampling_steps: int = 25,
        batch_size: int = 250,
        seed: int = 0,
        features: Callable[[np.ndarray], np.ndarray] | None = None,
        fd_name: str = "fd_features",
        loss_images: int = 64,
        copy_threshold: float | None = None,
    ):
        """Computes thresholds and reference moments; nothing is compiled before it is asked for.

        Args:
          model: a model of pixels: its architecture, schedule and sampler (DDIM with its clipping and spacing); the
            parameters are not used.
          forget: uint8 [F,H,W,C]; equal images count once.
          keep: uint8 [M,H,W,C], at least 2.
          others: uint8, the images that copies are told from: keep and held-out images without near-duplicates of forget
            images. None: keep.
          num_samples: at least 2. The Frechet distance is biased in 1/n: compare only equal numbers.
          sampling_steps: DDIM steps.
          batch_size: samples at a time.
          seed: of all noise and of the choice of images.
          features: ``uint8 [N,H,W,C] -> [N, d]``; None: 64 principal components of the keep images' pixels.
          fd_name: name of the distance on the given features.
          loss_images: at most so many keep and so many forget images for the losses.
          copy_threshold: rms distance in (0, 1] in place of the calibrated one.

        Raises:
          ValueError: a model of latents or text; numbers out of range; images that cannot be calibrated.
        """
        problems = []
        if model.is_latent or model.takes_text:
            kind = "works on latents" if model.is_latent else "takes text"
            problems.append(f"the quick evaluation judges models of pixels; this one {kind}: use python -m eval.main")
        if num_samples < 2 or batch_size < 1 or loss_images < 1:
            problems.append(
                f"need num_samples >= 2, batch_size >= 1 and loss_images >= 1, got {num_samples}, {batch_size}, {loss_images}"
            )
        if not len(forget) or len(keep) < 2:
            problems.append(f"need forget images and at least 2 keep images, got {len(forget)} and {len(keep)}")
        if problems:
            raise ValueError("\n".join(problems))
        _, first = np.unique(forget, axis=0, return_index=True)
        self.forget = forget[np.sort(first)]
        self.calibration = extraction.calibrate(
            self.forget, keep if others is None else others, threshold=copy_threshold
        )
        self.num_samples = num_samples
        self._batch = min(batch_size, num_samples)
        self._shape = keep.shape[1:]
        self._key = jax.random.key(seed)
        rng = np.random.default_rng([seed, 2])
        reference = _some(rng, keep, MAX_REFERENCE)
        self.fd_name = "fd_pixel" if features is None else fd_name
        self._features = frechet.pixel_basis(reference, seed=seed) if features is None else features
        self._reference = frechet.moments(self._features(reference))
        parts = (_some(rng, self.forget, loss_images), _some(rng, keep, loss_images))
        self._num_forget = len(parts[0])
        self._probed = Example(np.asarray(to_model(np.concatenate(parts))))
        self._losses = make_probe_losses(
            model.predict, model.schedule, jax.random.fold_in(self._key, PROBES), count=STRATA, noises=NOISES
        )
        self._sample = _sampling_program(model, self._key, sampling_steps, self._shape)

    @classmethod
    def of_split(cls, model: DiffusersModel, split: Split, **options) -> QuickEvaluation:
        """For the images of a data set; ``options`` as for the class.

        Raises:
          ValueError: as the class.
        """
        others = np.setdiff1d(np.concatenate([split.keep, split.held_out]), split.near_duplicates.index)
        images = split.images
        return cls(model, images[split.forget], images[split.keep], others=images[others], **options)

    def samples(self, params: PyTree) -> np.ndarray:
        """float32 [num_samples,H,W,C], about [-1, 1], not clipped: sample i starts from the same noise for every model."""
        parts = []
        for start in range(0, self.num_samples, self._batch):
            indices = np.minimum(np.arange(start, start + self._batch), self.num_samples - 1).astype(np.int32)
            parts.append(np.asarray(self._sample(params, indices)))
        return np.concatenate(parts)[: self.num_samples]

    def probe(self, params: PyTree) -> ProbedLosses:
        """The losses on the fixed probes alone: much cheaper than samples."""
        losses = self._losses(params, self._probed)
        return ProbedLosses(losses[: self._num_forget], losses[self._num_forget :])

    def __call__(self, params: PyTree) -> QuickFigures:
        """All figures of a model. A collapsed model gives NaN, never an error."""
        losses, samples = self.probe(params), self.samples(params)
        sound = np.all(np.isfinite(samples), axis=(1, 2, 3))
        copies = strict = 0
        nearest = fd = math.nan
        if sound.any():
            pictures = to_uint8(samples[sound])
            distance = distances.pairwise(pictures, self.forget)
            copies = int(np.sum(extraction.copies(distance, self.calibration.threshold)))
            strict = int(np.sum(extraction.copies(distance, self.calibration.strict_threshold)))
            nearest = float(distance.min())
            if sound.all():
                fd = frechet.frechet_distance(frechet.moments(self._features(pictures)), self._reference)
        return QuickFigures(
            self.num_samples,
            copies,
            strict,
            nearest,
            fd,
            self.fd_name,
            float(losses.keep.mean()),
            float(losses.forget.mean()),
            int(np.sum(~sound)),
        )


def _some(rng: np.random.Generator, images: np.ndarray, most: int) -> np.ndarray:
    """At most so many images, in their order."""
    if len(images) <= most:
        return images
    return images[np.sort(rng.choice(len(images), most, replace=False))]


def _sampling_program(model: DiffusersModel, key: jax.Array, num_steps: int, shape: tuple[int, ...]) -> Callable:
    """``(params, indices [B]) -> [B,H,W,C]`` by deterministic DDIM."""
    config = model.sampler.with_kind("ddim", model.schedule, num_steps)
    steps = sampling.trajectory(model.schedule, config, num_steps)

    @jax.jit
    def sample(params, indices):
        keys = sampling.example_keys(jax.random.fold_in(key, SAMPLING), indices)
        start = jax.vmap(lambda one: jax.random.normal(jax.random.split(one)[0], shape))(keys)
        kind = model.prediction_type
        return sampling.sample(
            model.predict_raw, params, start, None, model.schedule, config, steps, prediction_type=kind
        )

    return sample
