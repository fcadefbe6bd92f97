"""What can be wrong with ``config.eval``: the same rules as those of the evaluation, before anything is trained."""

from __future__ import annotations

from jaxunlearn import sampling
from jaxunlearn.io.feature_weights import FEATURE_WEIGHTS
from jaxunlearn.metrics import COPY_DETECTORS, MEMBERSHIP_SCORES
from jaxunlearn.metrics.resize import CONVENTIONS, SSCD_CONVENTIONS
from jaxunlearn.schedule import Schedule
from train.problems import Problems, is_number, rising, whole_numbers
from train.validate_steps import steps_of

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
    """Adds the problems of ``config.eval``, but for :func:`check_steps`."""
    p.maybe_name("eval.preset", "preset", PRESETS)
    for key, least in LEAST.items():
        p.check(f"eval.{key}", f"{least} or more", lambda v, least=least: v >= least)
    p.name("eval.sampler", "sampler", sampling.KINDS)
    for key in ("injection_t", "loss_t"):
        p.check(
            f"eval.{key}",
            "rising whole numbers, 0 or more",
            lambda v: whole_numbers(v) and len(v) > 0 and v[0] >= 0 and rising(v),
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
    p.check("eval.confidence", "in [0.95, 1)", lambda v: 0.95 <= v < 1)
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


def check_steps(p: Problems, schedule: Schedule | None = None) -> None:
    """Adds the problems of the timesteps and sampling steps of ``config.eval`` and ``config.log``.

    Args:
      p: where to.
      schedule: of the user's model; None where it is not loaded, or none is given.
    """
    steps = steps_of(p.config, schedule)
    for key in ("eval.sampling_steps", "log.sample_steps"):
        p.check(key, f"at most {steps.text}, the number of timesteps", lambda v: v <= steps.most)
    for key in ("eval.injection_t", "eval.loss_t"):
        p.check(key, f"in [0, {steps.text})", lambda v: not whole_numbers(v) or all(t < steps.most for t in v))


def _check_names(p: Problems, key: str, known: tuple[str, ...]) -> None:
    p.check(key, f"some of {', '.join(known)}, each once", lambda v: set(v) <= set(known) and len(set(v)) == len(v))
