"""Membership: whether scores of the forget images can be told from those of held-out images.

From 10 forget images on, each score gives an area under the ROC curve; below, the mean rank of the images among the
held-out ones. From 20 on, all scores together test the whole set (``cdi_p``). Every third held-out image serves to choose
(t of sima, the regression of ``quantile``), the others to judge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from eval.context import Column, Context
from eval.families.losses import CONDITION
from eval.membership_scores import TINY, Scored, Sets, score_all, sets_of
from eval.records import Entry, entry, missing
from jaxunlearn import sampling
from jaxunlearn.metrics import MEMBERSHIP_SCORES, roc, set_test, significance, statistics
from jaxunlearn.metrics.noise_norm import make_noise_norm

METRICS = (*(score if score == "ulira" else f"mia/{score}" for score in MEMBERSHIP_SCORES), "cdi_p", "noise_norm")
LEAST_FOR_AUC = 10
NOISE_NORM_PROMPTS = 16
NO_SHADOWS = "it needs 64 models of random halves of the data; jaxunlearn.metrics.ulira takes their losses"


def failed_entries(settings: Mapping[str, Any]) -> list[Entry]:
    """Every metric without a value."""
    names = [_name(score) for score in settings["membership"]["scores"] or MEMBERSHIP_SCORES]
    return [missing(name, "", status="failed") for name in (*names, "cdi_p", "noise_norm")]


def measure(column: Column, context: Context) -> None:
    """Scores of forget and held-out images, the test of the set, and the guidance norm of the forget prompts."""
    settings = context.settings
    chosen, sets = settings["membership"]["scores"], sets_of(context.refs.loss_inputs)
    if isinstance(sets, str):
        column.entries += [missing(_name(score), sets) for score in (*chosen, "cdi_p")]
    else:
        scored = score_all(column, context, sets)
        column.entries += _score_entries(column, scored, context)
        if "ulira" in chosen:
            column.entries.append(missing("ulira", NO_SHADOWS))
        column.entries.append(_set_entry(sets, scored, settings))
    column.entries.append(_noise_norm(context))


def _name(score: str) -> str:
    return score if f"mia/{score}" not in METRICS else f"mia/{score}"


def _score_entries(column: Column, scored: list[Scored], context: Context) -> list[Entry]:
    """One entry for each score; their p-values are corrected together (Holm)."""
    settings, out, tests = context.settings, [], []
    common = {"condition": CONDITION} if context.runner.takes_text else {}
    for one in scored:
        name, protocol = _name(one.score), {**one.protocol, **common}
        if one.reason is not None:
            out.append(missing(name, one.reason, protocol=protocol))
            continue
        if not (np.all(np.isfinite(one.forget)) and np.all(np.isfinite(one.judged))):
            out.append(missing(name, "a score is not a finite number", status="failed", protocol=protocol))
            continue
        where = f"_t{one.protocol['t']}" if one.score == "loss_t" else ""
        column.arrays[f"mia_{one.score}{where}_forget"] = one.forget
        column.arrays[f"mia_{one.score}{where}_held_out"] = one.judged
        protocol["p"] = roc.p_value(one.forget, one.judged)
        protocol["forget_images"], protocol["held_out_images"] = len(one.forget), len(one.judged)
        out.append(_compared(name, one, protocol, settings))
        tests.append(out[-1])
    if tests:
        adjusted = significance.holm([item["protocol"]["p"] for item in tests])
        for item, p in zip(tests, adjusted):
            item["protocol"] |= {"p_holm": float(p), "tests_in_family": len(tests)}
    return out


def _compared(name: str, one: Scored, protocol: dict[str, Any], settings: Mapping[str, Any]) -> Entry:
    if len(one.forget) < LEAST_FOR_AUC:
        ranks = [statistics.rank_p(score, one.judged) for score in one.forget]
        protocol |= {"statistic": "rank_p", "ranks": ranks}
        return entry(name, np.mean(ranks), n=len(one.judged), protocol=protocol, unit="rank among held-out images")
    protocol |= {"statistic": "auc", "balanced_accuracy": roc.balanced_accuracy(one.forget, one.judged)}
    if len(one.judged) >= roc.needed_others(0.01):
        protocol["tpr_at_fpr_0.01"] = roc.tpr_at_fpr(one.forget, one.judged, 0.01)
    interval = roc.auc_interval(one.forget, one.judged, settings["confidence"], seed=settings["seed"])
    if interval is None:
        protocol["no_interval"] = "the sets are separated, so that resampling shows no spread"
    return entry(name, roc.auc(one.forget, one.judged), n=len(one.forget), ci=interval, protocol=protocol)


def _set_entry(sets: Sets, scored: list[Scored], settings: Mapping[str, Any]) -> Entry:
    """All scores together: is the forget set told from held-out images?"""
    usable = [one for one in scored if one.reason is None and one.score != "quantile"]
    names = [one.score if one.score != "loss_t" else f"loss_t {one.protocol['t']}" for one in usable]
    protocol = {"scores": names, "folds": 5, "forget_images": len(sets.forget), "held_out_images": len(sets.judged)}
    least = set_test.LEAST_IMAGES
    if len(sets.forget) < least or len(sets.judged) < least:
        reason = (
            f"{len(sets.forget)} forget and {len(sets.judged)} held-out images; the test of a set needs {least} of each"
        )
        return missing("cdi_p", reason, protocol=protocol)
    if not usable:
        return missing("cdi_p", "no score could be computed", protocol=protocol)
    columns = [[_logarithm(one, part) for one in usable] for part in ("forget", "judged")]
    forget, judged = (np.stack(part, axis=1) for part in columns)
    if not (np.all(np.isfinite(forget)) and np.all(np.isfinite(judged))):
        return missing("cdi_p", "a score is not a finite number", status="failed", protocol=protocol)
    found = set_test.cdi(forget, judged, seed=settings["seed"])
    protocol |= {"permutations": found.permutations, "welch_p": found.welch_p, "welch_t": found.t}
    return entry("cdi_p", found.p, n=len(forget), protocol=protocol)


def _logarithm(one: Scored, part: str) -> np.ndarray:
    """Scores are positive and spread over decades, but for clid, which is a difference."""
    values = getattr(one, part)
    return values if one.score == "clid" else np.log(values + TINY)


def _noise_norm(context: Context) -> Entry:
    """How hard the forget prompts pull: the mean over prompts, a few images of each."""
    runner, settings = context.runner, context.settings
    count = settings["membership"]["noise_norm_images"]
    if not runner.takes_text:
        return missing("noise_norm", "the model takes no text")
    if not count:
        return missing("noise_norm", "not part of these settings; eval.membership.noise_norm_images switches it on")
    texts = list(dict.fromkeys(context.prompts.forget))[:NOISE_NORM_PROMPTS]
    schedule, steps = runner.schedule, settings["sampling_steps"]
    config = context.model.sampler.with_kind("ddim", schedule, steps)
    chain = sampling.trajectory(schedule, config, steps)
    rows = jax.jit(make_noise_norm(runner.predict, schedule, config, chain, settings["guidance"]))
    shape = runner.space.shape(context.refs.keep.shape[1:])
    start = jax.random.normal(context.key, (count, *shape))
    norms = []
    for number, text in enumerate(texts):
        context.tick("noise norm", number / len(texts))
        cond, uncond = (runner.conditions.at(np.repeat(runner.conditions.rows([one]), count)) for one in (text, ""))
        norms.append(np.asarray(rows(context.params, start, cond, uncond)).mean())
    context.tick("noise norm", 1.0)
    protocol = {
        "images": count,
        "prompts": len(texts),
        "steps": steps,
        "guidance": settings["guidance"],
        "sampler": "ddim",
    }
    value = float(np.mean(norms))
    interval = statistics.mean_interval(norms, settings["confidence"]) if math.isfinite(value) else None
    return entry("noise_norm", value, n=len(texts), ci=interval, protocol=protocol)
