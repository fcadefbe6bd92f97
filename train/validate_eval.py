"""What can be wrong with ``config.eval``: the same rules as those of the evaluation, before anything is trained."""

from __future__ import annotations

from jaxunlearn import sampling
from jaxunlearn.io.feature_weights import FEATURE_WEIGHTS
from jaxunlearn.metrics import COPY_DETECTORS, MEMBERSHIP_SCORES
from jaxunlearn.metrics.resize import CONVENTIONS, SSCD_CONVENTIONS
from train.problems import Problems, is_number, rising, whole_numbers

PRESETS = ("smoke", "standard", "audit")
LEAST = {
    "num_samples": 2,
    "sampling_steps": 1,
    "batch_size": 1,
    "injection_copies": 1,
    "injection_images": 1,
    "loss_noises": 1,
    "loss_images": 2,
    "seed": 0,
    "classifier.steps": 1,
    "classifier.batch_size": 1,
    "quality.rows": 20,
    "quality.subsets": 2,
    "quality.subset_size": 2,
    "quality.batch_size": 1,
    "sscd.batch_size": 1,
    "sscd.calibration_images": 1,
    "photographs.samples": 1,
    "photographs.keep_images": 1,
    "photographs.batch_size": 1,
    "membership.noise_norm_images": 0,
    "nll.draws": 0,
    "nll.images": 1,
    "nll.held_out": 1,
    "nll.max_steps": 1,
    "inversion.copies": 0,
    "inversion.steps": 2,
    "gap.draws": 0,
    "gap.replicates": 8,
    "gap.images": 1,
    "relearn.budget": 1,
    "relearn.every": 1,
    "relearn.batch_size": 1,
    "relearn.images": 1,
    "relearn.benign_steps": 0,
}
"""Key below ``eval`` -> the least whole number."""


def check_eval(p: Problems) -> None:
    """Adds the problems of ``config.eval``."""
    num_steps = p.config.scheduler.get("num_train_timesteps", 1000)
    p.maybe_name("eval.preset", "preset", PRESETS)
    for key, least in LEAST.items():
        p.check(f"eval.{key}", f"{least} or more", lambda v, least=least: v >= least)
    p.check("eval.sampling_steps", f"at most {num_steps}", lambda v: v <= num_steps)
    p.name("eval.sampler", "sampler", sampling.KINDS)
    for key in ("injection_t", "loss_t"):
        p.check(
            f"eval.{key}",
            f"rising whole numbers in [0, {num_steps})",
            lambda v: whole_numbers(v) and len(v) > 0 and all(0 <= t < num_steps for t in v) and rising(v),
        )
    p.check("eval.guidance", "0 or more; 1 is none", lambda v: v >= 0)
    p.check(
        "eval.prompts",
        "None (the captions of the training images), or different texts, such as ('a cat', 'a dog')",
        lambda v: (
            v is None or (0 < len(v) == len(set(v)) and all(isinstance(text, str) and text.strip() for text in v))
        ),
    )
    p.maybe("eval.copy_threshold", "in (0, 1]", lambda v: 0 < v <= 1)
    p.check("eval.confidence", "in (0, 1)", lambda v: 0 < v < 1)
    p.check("eval.classifier.min_accuracy", "in [0, 1]", lambda v: 0 <= v <= 1)
    p.name("eval.quality.convention", "resize convention", CONVENTIONS)
    p.name("eval.sscd.convention", "resize convention", SSCD_CONVENTIONS)
    _check_names(p, "eval.weights.allow_unpinned", tuple(FEATURE_WEIGHTS))
    _check_names(p, "eval.membership.scores", MEMBERSHIP_SCORES)
    _check_names(p, "eval.extraction.detectors", COPY_DETECTORS)
    p.maybe("eval.nll.probes", "1 or more", lambda v: v >= 1)
    p.check("eval.nll.tolerance", "in (0, 1)", lambda v: 0 < v < 1)
    p.check(
        "eval.inversion.shares",
        "shares in [0, 1], such as (0.0,0.3)",
        lambda v: len(v) > 0 and all(is_number(share) and 0 <= share <= 1 for share in v),
    )
    p.check("eval.relearn.keys", "0 (none), or 3 or more", lambda v: v == 0 or v >= 3)
    p.check("eval.relearn.learning_rate", "positive", lambda v: v > 0)
    for key in ("weights.folder", "request.id", "request.received_utc", "request.operator", "request.basis"):
        p.maybe(f"eval.{key}", "a text", lambda v: bool(v.strip()))


def _check_names(p: Problems, key: str, known: tuple[str, ...]) -> None:
    p.check(key, f"some of {', '.join(known)}, each once", lambda v: set(v) <= set(known) and len(set(v)) == len(v))
