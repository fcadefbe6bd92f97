"""Sentences of the report, made from its numbers only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval.records import find
from eval.references import References

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
}
"""Metric -> title for people."""

SHARES = ("copy_rate", "copy_rate_strict", "injection_copies")
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
    columns = report["evaluation"]
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
    level = f"{report['settings']['confidence']:.0%}".replace("%", " %")
    upper = number(after["protocol"]["upper_one_sided"], "copy_rate")
    text = (
        f"{noun} {number(before['value'], 'copy_rate')} of samples{of_prompts} before and {count} of {total:,} after "
        f"(at most {upper} with {level} confidence)."
    )
    retrained = find(columns["retrained"], "copy_rate")
    if retrained is not None and retrained["status"] == "ok":
        text += f" A model retrained without it gives {retrained['protocol']['count']} of {retrained['n']:,}."
    return text


def not_tested(retrained: bool, text: bool = False) -> list[str]:
    """Tests that this evaluation does not contain.

    Args:
      retrained: whether there is a retrained model.
      text: whether the model takes text.
    """
    out = [
        "Membership inference with shadow models: whether an attacker can tell that the images were once trained on.",
        "Relearning: how quickly the images come back when training goes on.",
        "Likelihood of the forget images.",
        "FID on Inception features, SSCD copy similarity: their networks are not part of this evaluation.",
        "Copies that are shifted, mirrored, cropped or recoloured: pixel distances do not see them.",
    ]
    if text:
        out.append("Other prompts, guidance scales and negative prompts, and prompts made to bring an image back.")
        out.append("Whether samples follow their prompts.")
    if not retrained:
        out.insert(
            0, "Comparison with a model retrained without the forget set, the yardstick of every forgetting metric."
        )
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
        "Frechet distances and scores are those of a small classifier trained in this run, or of pixels. They compare "
        "the columns of this report and nothing else. The distance is biased upward for few samples.",
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
