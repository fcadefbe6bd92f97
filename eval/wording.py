"""Sentences of the report, made from its numbers only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval.records import find
from eval.references import References
from jaxunlearn.metrics import METRICS
from jaxunlearn.metrics.entries import columns_of, references

TITLES = {
    "copy_rate": "Copies of the forget set among samples",
    "copy_rate_strict": "Strict copies among samples",
    "nearest_forget_min": "Closest sample to a forget image",
    "nearest_forget_median": "Median distance of samples to the forget set",
    "nearest_keep_min": "Closest sample to a keep image",
    "nearest_keep_median": "Median distance of samples to their nearest keep image",
    "injection_distance": "Injection: distance to the forget image",
    "injection_similarity": "Injection: similarity to the forget image",
    "injection_copies": "Injection: share that comes back as a copy",
    "loss_forget": "Denoising loss, forget images",
    "loss_keep": "Denoising loss, keep images",
    "loss_held_out": "Denoising loss, held-out images",
    "rank_p": "Rank of the forget loss among held-out losses",
    "forget_level": "Forget level (0 untouched, 1 as retrained)",
    "fd_classifier": "Frechet distance, features of the run's classifier",
    "fd_pixel": "Frechet distance, principal components of pixels",
    "inception_score": "Inception score of the run's classifier",
    "kd_classifier": "Kernel distance, features of the run's classifier",
    "precision_classifier": "Precision, features of the run's classifier",
    "recall_classifier": "Recall, features of the run's classifier",
    "density_classifier": "Density, features of the run's classifier",
    "coverage_classifier": "Coverage, features of the run's classifier",
    "fid": "FID",
    "kid": "KID",
    "precision": "Precision, Inception features",
    "recall": "Recall, Inception features",
    "density": "Density, Inception features",
    "coverage": "Coverage, Inception features",
    "inception_score_imagenet": "Inception score, 1008 classes",
    "copy_carlini": "Copies by the ratio to the nearest training images",
    "copy_ratio": "Copies by the ratio to the nearest keep image",
    "copy_patch": "Copies tile by tile",
    "copy_ssim": "Copies by structural similarity",
    "mia/loss_t": "Denoising loss",
    "mia/secmi": "SecMI",
    "mia/pia": "PIA",
    "mia/pian": "PIAN",
    "mia/sima": "SimA",
    "mia/clid": "CLiD",
    "mia/quantile": "Denoising loss for such an image",
    "cdi_p": "The whole set, all scores together",
    "ulira": "Shadow models (U-LiRA)",
    "noise_norm": "Pull of the forget prompts",
    "sscd": "Injection: SSCD similarity to the forget image",
    "sscd_calibrated": "Injection: SSCD similarity, calibrated",
    "copy_sscd": "Copies among samples by SSCD",
    "clip_iqa": "CLIP-IQA",
    "aesthetic": "Aesthetic score",
    "sscd_projected": "Injection: SSCD similarity at a fixed distance towards the output",
    "sscd_dissimilarity_rate": "Injection: SSCD dissimilarity per distance moved",
    "sscd_direction": "Injection: direction of the SSCD descriptor's move",
    "nll_bpd_uniform_deq": "Negative log-likelihood, forget images",
    "nll_latent": "Negative log-likelihood, latents of forget images",
    "nll_held_out": "Negative log-likelihood, held-out images",
    "inversion_distance": "Inversion: distance to the forget image",
    "gap_kl_forget": "Distance to retrained models near the forget images",
    "elbo_gap": "Likelihood of the forget images over that under retrained models",
    "gap_kl_samples": "Distance to retrained models at the model's own samples",
    "relearn_steps": "Steps until the forget images are learned again",
    "relearn_ratio": "Relearning ratio (1 as after retraining, 0 at once)",
    "relearn_benign": "Forget loss after training on keep images, over that of retrained models",
    "benign_copy_rate": "Copies among samples after training on keep images",
    "sharpness": "Sharpness (variance of the Laplacian)",
    "total_variation": "Total variation",
    "high_band_energy": "Energy above half the Nyquist frequency",
    "noise_sigma": "White noise",
}
"""Metric -> title for people."""

FAMILY_TITLES = {
    "injection": "Denoising injection: what comes back",
    "losses": "Denoising loss",
    "extraction": "Copies by other detectors",
    "membership": "Membership: can the forget images be told from held-out ones?",
    "classifier_features": "Quality on features of the run's classifier",
    "inception_features": "Quality on Inception features",
    "copy_detector": "SSCD, the copy detector",
    "sscd_variants": "Variants of the SSCD similarity (reconstructions)",
    "likelihood": "Likelihood",
    "inversion": "Inversion: what comes back from around its own noise",
    "gap": "Distance to retrained models",
    "relearning": "Relearning: how soon the images come back",
}
"""Family of metrics -> title of its table."""


def title(metric: str) -> str:
    """The title of a metric; where it has none, its description."""
    return TITLES.get(metric) or METRICS[metric].description


SHARES = (
    "copy_rate",
    "copy_rate_strict",
    "injection_copies",
    "copy_carlini",
    "copy_ratio",
    "copy_patch",
    "copy_ssim",
    "copy_sscd",
    "benign_copy_rate",
)
"""Metrics that are printed in percent."""


def number(value: float, metric: str = "") -> str:
    """A value with the digits that it deserves.

    >>> number(0.0512, "copy_rate"), number(0.00149705, "copy_rate"), number(0.318234), number(1234.5)
    ('5.1 %', '0.15 %', '0.318', '1234')
    """
    if metric in SHARES:
        digits = 0 if value in (0, 1) else 1 if value >= 0.01 else 2
        return f"{100 * value:.{digits}f} %"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def headline(report: Mapping[str, Any]) -> str:
    """The result in one or two plain sentences."""
    columns = columns_of(report)
    before, after = (find(columns[name], "copy_rate") for name in ("before", "after"))
    unique = report["forget_set"]["unique"]
    noun = "The forget image was" if unique == 1 else f"Copies of the {unique} forget images were"
    of_prompts = ""
    if report["text"] is not None:
        block = report["text"]["forget_prompts"]
        whose = "the given" if block["source"] == "eval.prompts" else "its" if unique == 1 else "their"
        of_prompts = f" of {whose} prompt{'' if block['n'] == 1 else 's'}"
    for name, found in (("original", before), ("unlearned", after)):
        if found["status"] != "ok":
            return f"The {name} model could not be measured: {found['reason']}."
    count, total = after["protocol"]["count"], after["n"]
    level = f"{100 * report['settings']['confidence']:g} %"
    upper = number(after["protocol"]["upper_one_sided"], "copy_rate")
    text = (
        f"{noun} {number(before['value'], 'copy_rate')} of samples{of_prompts} before and {count} of {total:,} after "
        f"(at most {upper} with {level} confidence)."
    )
    without = "it" if unique == 1 else "them"
    for name in references(columns)[:1]:
        retrained = find(columns[name], "copy_rate")
        if retrained is not None and retrained["status"] == "ok":
            text += (
                f" A model retrained without {without} gives {retrained['protocol']['count']} of {retrained['n']:,}."
            )
    return text


NOT_TESTED = {
    (
        "mia/",
        "cdi_p",
    ): "Membership scores: whether an attacker can tell from losses that the images were once trained on.",
    ("ulira",): "Membership inference with shadow models, the strongest known attack of this kind.",
    ("relearn_ratio",): "Relearning: how quickly the images come back when training goes on.",
    ("gap_kl_forget",): "The gap to retrained models near the forget images, the most sensitive test of all.",
    ("nll_",): "Likelihood of the forget images.",
    ("fid",): "FID on Inception features: its network was not used.",
    ("sscd", "copy_sscd"): "SSCD copy similarity: its network was not used.",
    ("copy_sscd",): "Copies that are shifted, mirrored, cropped or recoloured: distances of pixels do not see them.",
}
"""Beginnings of metrics -> what is not known if none of them has a value."""


def not_tested(entries: Mapping[str, list[dict[str, Any]]], text: bool, settings: Mapping[str, Any]) -> list[str]:
    """Tests that this evaluation does not contain; never empty.

    Args:
      entries: column -> entries.
      text: whether the model takes text.
      settings: the evaluation's settings.
    """
    measured = {item["metric"] for item in entries["after"] if item["status"] == "ok"}
    out = []
    if not references(entries):
        out.append(
            "Comparison with a model retrained without the forget set, the yardstick of every forgetting metric."
        )
    out += [line for starts, line in NOT_TESTED.items() if not any(name.startswith(starts) for name in measured)]
    if text:
        out.append("Other prompts, guidance scales and negative prompts, and prompts made to bring an image back.")
        out.append("Whether samples follow their prompts.")
    out.append(f"Samplers other than {settings['sampler']} with {settings['sampling_steps']} steps.")
    out.append("Whether plain fine-tuning on the keep images would have done as well.")
    out.append("Copies of the model outside this work directory, and the training data themselves.")
    return out


def limitations(
    refs: References, settings: Mapping[str, Any], near_duplicates: int, text: Mapping[str, Any] | None
) -> list[str]:
    """What the numbers do not show.

    Args:
      refs: what the columns were measured against.
      settings: the evaluation's settings.
      near_duplicates: number of near duplicates in the data.
      text: the report's ``text`` block, None for models without text.
    """
    sampler = f"this sampler ({settings['sampler']}, {settings['sampling_steps']} steps)"
    if text is None:
        bound = f"unconditional samples of {sampler}"
    else:
        count = text["forget_prompts"]["n"]
        asked = "the one prompt" if count == 1 else f"the {count} prompts"
        bound = f"samples of {asked} with guidance {settings['guidance']:g} and {sampler}"
    out = [
        f"The bound on copies holds for {bound}, not for other ways of asking the model.",
        "A copy is found by its distance alone. Broken samples (noise, flat grey) can lie below the copy threshold of a "
        "grey image as well; the strict count and the sample grids tell them apart.",
        "A dimmed memory can pass the counts and the tests at large t; look at the smallest t of injection and loss.",
        "A forget loss above the level of a retrained model is a trace of its own, not better forgetting.",
        "The rank of a forget image has no absolute meaning; compare it with a retrained model.",
        "Distances and scores of classifier features are those of a small classifier trained in this run. They and the "
        "distance of pixels compare the columns of this report and nothing else. Frechet distances are biased upward for "
        "few samples.",
        "Thresholds of the verdicts are this project's own and were fixed before the run.",
    ]
    if refs.round_trip is not None:
        out += _latent_limitations(refs)
    if text is not None:
        out += _text_limitations(text)
    if len(refs.forget) == 1:
        out.append("There is one forget image: intervals of the injection test span noises, not images.")
    if near_duplicates:
        out.append(f"{near_duplicates} near duplicates of forget images were found in the data, see forget_set.")
    return out


def _latent_limitations(refs: References) -> list[str]:
    rms, count = refs.round_trip.rms, len(refs.forget)
    out = [
        f"The model works on latents. Its autoencoder alone returns the forget images at rms {rms.mean():.3g} on average "
        f"({rms.max():.3g} at most), so distances of perfect copies are no smaller. The keep images that samples are "
        "compared with did not go through it."
    ]
    if refs.beyond_reach:
        which = "the forget image" if count == 1 else f"{refs.beyond_reach} of the {count} forget images"
        out.append(
            f"The autoencoder's own reconstruction of {which} lies beyond the copy threshold. A sample is therefore also "
            "compared with the reconstruction, by a threshold of its own; distances to the image itself say little."
        )
    return out


def _text_limitations(text: Mapping[str, Any]) -> list[str]:
    out = []
    asked, available = (text["forget_prompts"][key] for key in ("n", "available"))
    if asked < available:
        out.append(f"Only {asked} of {available} forget prompts were sampled: there are fewer samples than prompts.")
    if text["truncated_texts"]:
        out.append(f"{text['truncated_texts']} texts are longer than the text encoder takes, and were cut.")
    return out
