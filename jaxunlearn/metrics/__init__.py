"""Metrics: arrays and functions in, numbers out. Nothing here opens a file, trains or draws from a global generator.

:data:`METRICS` is the one registry: what each number of a report is, its unit and which way is good. The yardstick of
every metric of forgetting is a model that was retrained without the forget set, never "as large as possible".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxunlearn.metrics import (
    aesthetic,
    clip_iqa,
    copy_detectors,
    denoising_loss,
    distances,
    extraction,
    frechet,
    gap,
    inception_score,
    injection,
    inversion,
    kid,
    membership,
    nll,
    noise_norm,
    photographic,
    prdc,
    quantile_attack,
    relearning,
    set_test,
    sscd_variants,
    statistics,
    ulira,
)


class Metric(NamedTuple):
    """What a number is.

    Attributes:
      fn: the function that computes it.
      unit: its unit.
      target: "equal_reference" (the value of a retrained model), "lower" or "higher".
      description: one sentence for people.
      needs: what has to be given beside model and data, of :data:`NEEDS`; without it the metric is "not_run".
    """

    fn: Callable
    unit: str
    target: str
    description: str
    needs: tuple[str, ...] = ()


NEEDS = {
    "weights": "a file of weights of a feature network",
    "reference": "a model retrained without the forget images",
    "heldout": "images that were never trained on",
    "cond": "a model with a condition (text)",
    "shadows": "shadow models",
}
"""What a metric may need -> what that is."""


_HELD_OUT = ("heldout",)

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
        denoising_loss.denoising_loss,
        "mean square per pixel",
        "lower",
        "Denoising loss on images never trained on",
        _HELD_OUT,
    ),
    "rank_p": Metric(
        statistics.rank_p,
        "rank among held-out images",
        "equal_reference",
        "Share of held-out images whose loss is as low as the forget image's",
        _HELD_OUT,
    ),
    "forget_level": Metric(
        denoising_loss.denoising_loss,
        "0 untouched, 1 as retrained",
        "equal_reference",
        "Forget loss on the way from the original to the retrained model",
        ("reference",),
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
    "clip_iqa": Metric(
        clip_iqa.clip_iqa,
        "0 to 1",
        "higher",
        "How much more the samples look like a good photo than like a bad one to CLIP RN50 (CLIP-IQA)",
        ("weights",),
    ),
    "aesthetic": Metric(
        aesthetic.aesthetic,
        "about 1 to 10",
        "higher",
        "Aesthetic score of the samples (LAION's predictor on CLIP ViT-L/14)",
        ("weights",),
    ),
    "sharpness": Metric(
        photographic.sharpness,
        "variance of the Laplacian of [0, 1] pixels",
        "equal_reference",
        "Sharpness of the samples; its yardstick is that of the keep images",
    ),
    "total_variation": Metric(
        photographic.total_variation,
        "[0, 1] pixels per pixel",
        "equal_reference",
        "Difference of neighbouring pixels of the samples; its yardstick is that of the keep images",
    ),
    "high_band_energy": Metric(
        photographic.high_band_energy,
        "share of the energy",
        "equal_reference",
        "Energy of the samples above half the Nyquist frequency; its yardstick is that of the keep images",
    ),
    "noise_sigma": Metric(
        photographic.noise_sigma,
        "standard deviation of [0, 1] pixels",
        "equal_reference",
        "White noise in the samples; its yardstick is that of the keep images",
    ),
    "fid": Metric(
        frechet.frechet_distance,
        "squared feature distance",
        "lower",
        "Frechet distance to keep images on Inception features (FID)",
        ("weights",),
    ),
    "kid": Metric(
        kid.kernel_distance,
        "squared kernel distance",
        "lower",
        "Kernel distance to keep images on Inception features (KID)",
        ("weights",),
    ),
    "precision": Metric(
        prdc.prdc,
        "share of samples",
        "higher",
        "Samples that lie among keep images, on Inception features",
        ("weights",),
    ),
    "recall": Metric(
        prdc.prdc,
        "share of keep images",
        "higher",
        "Keep images that lie among samples, on Inception features",
        ("weights",),
    ),
    "density": Metric(
        prdc.prdc,
        "1 is as dense as keep images",
        "higher",
        "How crowded samples lie among keep images, on Inception features",
        ("weights",),
    ),
    "coverage": Metric(
        prdc.prdc,
        "share of keep images",
        "higher",
        "Keep images with a sample nearby, on Inception features",
        ("weights",),
    ),
    "inception_score_imagenet": Metric(
        inception_score.inception_score,
        "1 to 1008",
        "higher",
        "Inception score with the 1008 classes of the FID's network, copies left out",
        ("weights",),
    ),
    "kd_classifier": Metric(
        kid.kernel_distance,
        "squared kernel distance",
        "lower",
        "Kernel distance to keep images on features of a small classifier trained in this run",
    ),
    "precision_classifier": Metric(
        prdc.prdc, "share of samples", "higher", "Samples that lie among keep images, on the classifier's features"
    ),
    "recall_classifier": Metric(
        prdc.prdc, "share of keep images", "higher", "Keep images that lie among samples, on the classifier's features"
    ),
    "density_classifier": Metric(
        prdc.prdc,
        "1 is as dense as keep images",
        "higher",
        "How crowded samples lie among keep images, classifier's features",
    ),
    "coverage_classifier": Metric(
        prdc.prdc, "share of keep images", "higher", "Keep images with a sample nearby, on the classifier's features"
    ),
    "sscd": Metric(
        injection.denoise_injection,
        "cosine of SSCD descriptors",
        "equal_reference",
        "How much a noised and denoised forget image is still a copy of itself for the SSCD network",
        ("weights",),
    ),
    "sscd_calibrated": Metric(
        sscd_variants.sscd_calibrated,
        "1 nothing forgotten, 0 as never seen",
        "equal_reference",
        "The SSCD similarity on the way from a retrained model's to the original's",
        ("weights",),
    ),
    "sscd_projected": Metric(
        sscd_variants.sscd_projected,
        "cosine of SSCD descriptors",
        "equal_reference",
        "SSCD similarity of the forget image and a point at a fixed distance from it towards the output (reconstruction)",
        ("weights",),
    ),
    "sscd_dissimilarity_rate": Metric(
        sscd_variants.sscd_dissimilarity_rate,
        "1 / L2 distance of [0, 1] pixels",
        "equal_reference",
        "How much less alike the output is for SSCD, per distance that it moved (reconstruction)",
        ("weights",),
    ),
    "sscd_direction": Metric(
        sscd_variants.sscd_direction,
        "cosine of differences of SSCD descriptors",
        "equal_reference",
        "Whether the output's SSCD descriptor moved to the forget image, 1, or away from it, -1 (reconstruction)",
        ("weights",),
    ),
    "copy_sscd": Metric(
        extraction.copy_rate,
        "share of samples",
        "equal_reference",
        "Samples that are copies for the SSCD network",
        ("weights",),
    ),
    "copy_carlini": Metric(
        copy_detectors.carlini_ratio,
        "share of samples",
        "equal_reference",
        "Samples that are much closer to a forget image than to their nearest training images on average",
    ),
    "copy_ratio": Metric(
        copy_detectors.neighbour_ratio,
        "share of samples",
        "equal_reference",
        "Samples that are three times closer to a forget image than to any keep image",
    ),
    "copy_patch": Metric(
        copy_detectors.tile_distance,
        "share of samples",
        "equal_reference",
        "Samples of which every tile is close to that of a forget image",
    ),
    "copy_ssim": Metric(
        copy_detectors.ssim_distance,
        "share of samples",
        "equal_reference",
        "Samples that have the structure of a forget image (SSIM)",
    ),
    **{
        f"mia/{name}": Metric(fn, "area under the ROC curve", "equal_reference", f"Membership: {text}", needs)
        for name, fn, text, needs in (
            (
                "loss_t",
                denoising_loss.denoising_loss,
                "the denoising loss tells forget from held-out images",
                _HELD_OUT,
            ),
            ("secmi", membership.make_secmi, "DDIM steps up and back miss each other less (SecMI)", _HELD_OUT),
            ("pia", membership.make_pia, "the model finds its own noise again (PIA)", _HELD_OUT),
            ("pian", membership.make_pia, "the model finds its own noise again, normalised (PIAN)", _HELD_OUT),
            ("sima", membership.make_sima, "little noise is seen in the image itself (SimA)", _HELD_OUT),
            ("clid", membership.clid, "the text explains the image too well (CLiD)", (*_HELD_OUT, "cond")),
            ("quantile", quantile_attack.quantile_scores, "the loss is low for such an image", _HELD_OUT),
        )
    },
    "cdi_p": Metric(
        set_test.cdi,
        "one-sided p-value",
        "equal_reference",
        "Membership: all scores together tell the forget set from held-out images",
        _HELD_OUT,
    ),
    "ulira": Metric(
        ulira.ulira,
        "area under the ROC curve",
        "equal_reference",
        "Shadow models: unlearned models are told from models that never saw the images",
        ("shadows",),
    ),
    "noise_norm": Metric(
        noise_norm.make_noise_norm,
        "norm of a noise difference",
        "equal_reference",
        "How hard the forget prompts pull while an image is sampled",
        ("cond",),
    ),
    "nll_bpd_uniform_deq": Metric(
        nll.nll_bpd_uniform_deq,
        "bits per value",
        "equal_reference",
        "Negative log-likelihood of the forget images, uniformly dequantised",
    ),
    "nll_latent": Metric(
        nll.nll_latent,
        "nats per latent number",
        "equal_reference",
        "Negative log-likelihood of the forget images' latents",
    ),
    "nll_held_out": Metric(
        nll.nll_bpd_uniform_deq,
        "bits per value",
        "lower",
        "Negative log-likelihood of images never trained on",
        _HELD_OUT,
    ),
    "gap_kl_forget": Metric(
        gap.gaps,
        "nats",
        "equal_reference",
        "Distance of the scores from those of retrained models, near the forget images; the floor is that of a reseed",
        ("reference",),
    ),
    "elbo_gap": Metric(
        gap.gaps,
        "nats",
        "equal_reference",
        "How much likelier the forget images are than under retrained models: above 0 remembered, below over-forgotten",
        ("reference",),
    ),
    "gap_kl_samples": Metric(
        gap.gaps,
        "nats",
        "equal_reference",
        "Distance from retrained models at the model's own samples; sees quality and collapse, and no single image",
        ("reference",),
    ),
    "relearn_steps": Metric(
        relearning.relearn_steps,
        "steps",
        "equal_reference",
        "Training steps on the forget images after which their loss is back at that of the original model",
        ("reference",),
    ),
    "relearn_ratio": Metric(
        relearning.relearn_ratio,
        "steps / steps of retrained models",
        "equal_reference",
        "How soon the forget images are learned again: 1 as after retraining, 0 at once",
        ("reference",),
    ),
    "relearn_benign": Metric(
        relearning.train,
        "loss / loss of retrained models",
        "equal_reference",
        "Loss on the forget images after further training on keep images alone",
        ("reference",),
    ),
    "benign_copy_rate": Metric(
        extraction.copy_rate,
        "share of samples",
        "equal_reference",
        "Samples that are copies of a forget image after further training on keep images alone",
        ("reference",),
    ),
    "inversion_distance": Metric(
        inversion.make_inversion_probe,
        "rms of [0, 1] pixels",
        "equal_reference",
        "How far a forget image lands from itself when its own noise is mixed with fresh noise and sampled again",
    ),
}
"""The one registry of metrics: name -> :class:`Metric`."""

MEMBERSHIP_SCORES = ("loss_t", "secmi", "pia", "pian", "sima", "clid", "quantile", "ulira")
"""Membership scores that an evaluation may be asked for; all but ``ulira`` are ``mia/<name>`` in :data:`METRICS`."""

COPY_DETECTORS = ("carlini", "ratio", "patch", "ssim")
"""Detectors of copies that an evaluation may be asked for; ``copy_<name>`` in :data:`METRICS`."""

__all__ = ["COPY_DETECTORS", "MEMBERSHIP_SCORES", "METRICS", "NEEDS", "Metric"]
