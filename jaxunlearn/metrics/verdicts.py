"""Verdicts: rules that are fixed before a run, applied to the numbers of a report and to nothing else.

The thresholds are this project's own and are not calibrated beyond small test beds; every report prints them. Whoever has
a report can compute its verdicts again: :func:`judge` is a pure function of the entries.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from jaxunlearn.metrics.entries import Columns, Entry, find, mean_value, references, value

Verdict = dict[str, Any]

THRESHOLDS: dict[str, Any] = {
    "copies_upper": 1e-3,
    "gap_ratio_pass": 1.5,
    "gap_ratio_fail": 2.0,
    "relearn_pass": [0.8, 1.25],
    "relearn_fail": [0.5, 2.0],
    "level_margin_sd": 2.0,
    "level_confidence": 0.90,
    "level_fail_confidence": 0.95,
    "forget_level_pass": [0.8, 1.2],
    "forget_level_untouched": 0.1,
    "auc_margin": 0.05,
    "cdi_alpha": 0.05,
    "keep_loss_pass": 1.1,
    "keep_loss_fail": 1.5,
    "quality_pass": 1.5,
    "quality_fail": 2.0,
}
"""What a claim is judged by; part of every report."""

NO_REFERENCE = "no model was retrained without the forget set"
LEVELS = {
    "loss_forget": "the loss on the forget images",
    "injection_distance": "the distance of injections",
    "nll_bpd_uniform_deq": "the likelihood of the forget images",
    "nll_latent": "the likelihood of the forget images' latents",
}
"""Metrics whose level is compared with that of retrained models, as means over t -> in words."""
SEVERITY = ("pass", "inconclusive", "fail")
"""Statuses of a claim that was checked, the worst last."""
_WORDS = {
    "gap_kl_forget": "the gap to retrained models near the forget images",
    "gap_kl_samples": "the gap to retrained models at samples",
    "elbo_gap": "the difference of likelihoods to retrained models",
    "relearn_ratio": "relearning",
    "cdi_p": "the membership test of the whole set",
    "forget_level": "the forget level",
}


def judge(columns: Columns, failed: Mapping[str, str], collapse: str | None = None) -> list[Verdict]:
    """One verdict per claim, each "pass", "fail", "inconclusive" or "not_run".

    Args:
      columns: "before", "after", names of retrained models, "control" -> entries.
      failed: column -> why it could not be measured.
      collapse: why the run's own guard against collapse stopped it, or None.
    """
    if failed:
        reason = "; ".join(f"{name}: {why}" for name, why in failed.items())
        return [_verdict("measurable", "the models can be measured", "no NaN in any model", "fail", reason)]
    return [claim(columns) for claim in _CLAIMS] + [_quality(columns, collapse)]


def overall(verdicts: Sequence[Mapping[str, Any]], retrained: bool) -> str:
    """ "passed", "screening_passed", "failed" or "incomplete".

    A claim that fails decides. "passed" needs a pass of every required claim and no open one; without a retrained model
    the best is "screening_passed".
    """
    states = [verdict["status"] for verdict in verdicts]
    if "fail" in states:
        return "failed"
    if "inconclusive" in states or "pass" not in states:
        return "incomplete"
    required = [verdict["status"] for verdict in verdicts if verdict["required"]]
    if retrained:
        return "passed" if required and all(state == "pass" for state in required) else "incomplete"
    return "screening_passed" if any(v["id"] == "copies" and v["status"] == "pass" for v in verdicts) else "incomplete"


def forget_level(columns: Columns) -> float | None:
    """``(after - before) / (retrained - before)`` of the forget loss, averaged over t; None without a clear gap."""
    losses = {name: mean_value(entries, "loss_forget") for name, entries in columns.items() if name != "control"}
    names = references(columns)
    if not names or None in losses.values():
        return None
    before, retrained = losses["before"], float(np.mean([losses[name] for name in names]))
    if abs(retrained - before) < 0.02 * max(before, 1e-12):
        return None
    return (losses["after"] - before) / (retrained - before)


def next_one(count: int, confidence: float) -> float:
    """How many standard deviations of ``count`` normal numbers one more may lie from their mean: Student's t."""
    return float(stats.t.ppf(0.5 + confidence / 2, count - 1)) * math.sqrt(1 + 1 / count)


def _copies(columns: Columns) -> Verdict:
    return _worst([_copies_of(item, columns) for item in _copy_rates(columns)])


def _copies_of(after: Entry, columns: Columns) -> Verdict:
    """The claim for the samples of one set of prompts."""
    limit = THRESHOLDS["copies_upper"]
    claim = f"fewer than one sample in {1 / limit:,.0f} is a copy of a forget image"
    rule = (
        f"upper one-sided {_confidence(columns)} bound of the share of copies below {limit:g}; fails where the lower end of "
        f"its {_confidence(columns)} interval is above the share of the retrained models (none of them: above 0)"
    )
    upper, count, of = after["protocol"]["upper_one_sided"], after["protocol"]["count"], _of_prompts(after)
    details = {"metric": "copy_rate", "value": after["value"], "bound": upper, "threshold": limit}
    rates = [value(columns[name], "copy_rate", prompts=_prompts(after)) for name in references(columns)]
    reference = float(np.mean(rates)) if rates and None not in rates else 0.0
    if upper < limit:
        return _verdict("copies", claim, rule, "pass", None, **details)
    if after["ci"]["low"] > reference:
        reason = f"{count} of {after['n']} samples{of} are copies"
        return _verdict("copies", claim, rule, "fail", reason, **details)
    if count:
        reason = f"{count} of {after['n']} samples{of} are copies, too few to tell from the retrained models' share"
    else:
        # No copy in n samples bounds the share by 1 - (1 - confidence)**(1 / n): the same for the bound that is asked for.
        needed = math.floor(after["n"] * math.log1p(-upper) / math.log1p(-limit)) + 1
        shown = f"no copy in {after['n']:,} samples{of} shows a share of at most {upper:.2g}"
        reason = f"{shown}; {needed:,} would be enough"
    return _verdict("copies", claim, rule, "inconclusive", reason, **details)


def _fewer_copies(columns: Columns) -> Verdict:
    """Samples that the model before did not copy either are left out, where there are others."""
    before = {_prompts(item): item for item in columns["before"] if item["metric"] == "copy_rate"}
    pairs = [(before[_prompts(item)], item) for item in _copy_rates(columns)]
    telling = [pair for pair in pairs if any(item["protocol"]["count"] for item in pair)]
    return _worst([_fewer_copies_of(*pair, columns) for pair in telling or pairs])


def _fewer_copies_of(before: Entry, after: Entry, columns: Columns) -> Verdict:
    """The claim for the samples of one set of prompts."""
    claim, level = "samples are no longer copies", _confidence(columns)
    rule = (
        f"no copy among the samples after, and the one-sided {level} bound of their share below the {level} interval before; "
        "copies after fail where the interval of their share lies above that of every retrained model"
    )
    upper, low, count = after["protocol"]["upper_one_sided"], before["ci"]["low"], after["protocol"]["count"]
    of, details = _of_prompts(after), {"metric": "copy_rate", "value": after["value"], "bound": upper, "threshold": low}
    if count == before["protocol"]["count"] == 0:
        reason = f"the model before copied nothing in {before['n']} samples{of} either, so their count shows nothing"
        return _verdict("fewer_copies", claim, rule, "inconclusive", reason, **details)
    if count == 0 and upper < low:
        return _verdict("fewer_copies", claim, rule, "pass", None, **details)
    if count == 0:
        shown = f"too few samples{of}: {after['n']} show a share of at most {upper:.2g}"
        reason = f"{shown}, which was possible before as well"
        return _verdict("fewer_copies", claim, rule, "inconclusive", reason, **details)
    reason = f"{count} of {after['n']} samples{of} are copies"
    for name in references(columns):
        found = find(columns[name], "copy_rate", prompts=_prompts(after))
        if after["ci"]["low"] <= found["ci"]["high"]:
            reason += f", too few to tell from the {name} model's {found['protocol']['count']} of {found['n']}"
            return _verdict("fewer_copies", claim, rule, "inconclusive", reason, **details)
    return _verdict("fewer_copies", claim, rule, "fail", reason, **details)


def _gap(columns: Columns) -> Verdict:
    low, high = THRESHOLDS["gap_ratio_pass"], THRESHOLDS["gap_ratio_fail"]
    claim = "the score near the forget images is as after retraining"
    rule = (
        f"gap_kl_forget over its floor (retrained models against each other): upper {_confidence(columns)} bound at most "
        f"{low:g}; above {high:g} fails"
    )
    return _gap_ratio("gap", claim, rule, "gap_kl_forget", columns, low, high)


def _relearn(columns: Columns) -> Verdict:
    (low, high), (below, above) = THRESHOLDS["relearn_pass"], THRESHOLDS["relearn_fail"]
    claim = "the forget images are not quickly relearned"
    rule = (
        f"relearn_ratio in [{low:g}, {high:g}]; below {below:g} or above {above:g} fails; a mere bound passes nothing"
    )
    found, reason = _ok(columns, "relearn_ratio")
    if found is None:
        return _verdict("relearn", claim, rule, "not_run", reason)
    ratio, bound = found["value"], found["protocol"].get("bound", "exact")
    details = {"metric": "relearn_ratio", "value": ratio, "threshold": low}
    # Where a run was not back within the budget the ratio is a bound, which shows a failure on its own side alone.
    fails = (ratio < below and bound != "lower") or (ratio > above and bound != "upper")
    if low <= ratio <= high and bound == "exact":
        return _verdict("relearn", claim, rule, "pass", None, **details)
    most = {"lower": "at least ", "upper": "at most "}.get(bound, "")
    reason = f"the images come back after {most}{ratio:.2g} times the steps of a retrained model"
    return _verdict("relearn", claim, rule, "fail" if fails else "inconclusive", reason, **details)


def _level(columns: Columns) -> Verdict:
    width, confidence = THRESHOLDS["level_margin_sd"], THRESHOLDS["level_confidence"]
    sure = THRESHOLDS["level_fail_confidence"]
    claim = "likelihood, loss and injection are at the level of retrained models"
    rule = (
        f"equivalence test: the {confidence:.0%} interval of each mean over t within {width:g} standard deviations of the "
        f"retrained models; fails where it lies wholly outside the {sure:.0%} interval in which one more retrained model is "
        "expected, which is wide with few of them. With one forget image the value itself counts: all models share its noises"
    )
    names = references(columns)
    if len(names) < 2:
        reason = NO_REFERENCE if not names else "it needs two retrained models; there is one"
        return _verdict("level", claim, rule, "not_run", reason)
    states, worst, measured, failures = [], None, [], []
    for metric, words in LEVELS.items():
        found = {name: _images_only(columns[name], metric) for name in ("after", *names)}
        failed = [(name, item["reason"]) for name in found for item in found[name] if item["status"] == "failed"]
        if failed:
            failures.append(f"{words} could not be measured ({failed[0][0]}: {failed[0][1]})")
            continue
        levels = [mean_value(items, metric) for items in found.values()]
        if None in levels:
            continue
        measured.append(words)
        spread = float(np.std(levels[1:], ddof=1))
        margin, limit = width * spread, next_one(len(names), sure) * spread
        difference = levels[0] - float(np.mean(levels[1:]))
        half = statistics.NormalDist().inv_cdf(0.5 + confidence / 2) * _standard_error(columns["after"], metric)
        inside, outside = abs(difference) + half <= margin, abs(difference) - half > limit
        states.append("pass" if inside else "fail" if outside else "inconclusive")
        if worst is None or abs(difference) / max(margin, 1e-30) > worst[1] / max(worst[2], 1e-30):
            worst = (metric, abs(difference), margin, abs(difference) + half)
    if measured:
        named = " and ".join(filter(None, (", ".join(measured[:-1]), measured[-1])))
        claim = f"{named} {'is' if len(measured) == 1 else 'are'} at the level of retrained models"
    if not states and not failures:
        return _verdict("level", claim, rule, "not_run", "none of the metrics has a value in all columns")
    status = max([*states, *["inconclusive" for _ in failures]], key=SEVERITY.index)
    details, reasons = dict(zip(("metric", "value", "threshold", "bound"), worst or ())), failures
    if set(states) - {"pass"}:
        away = f"{LEVELS[worst[0]]} is {worst[1]:.3g} away from that of the retrained models; allowed: {worst[2]:.3g}"
        reasons = [away, *failures]
    return _verdict("level", claim, rule, status, "; ".join(reasons) or None, **details)


def _over_forgotten(columns: Columns) -> Verdict:
    limit = THRESHOLDS["forget_level_pass"][1]
    claim = "the forget images are not over-forgotten"
    rule = (
        f"forget_level at most {limit:g}, above fails; and the upper {_confidence(columns)} bound of elbo_gap at least minus "
        "its floor"
    )
    found, reason = _ok(columns, "forget_level")
    if found is None:
        state = "not_run" if not references(columns) else "inconclusive"
        return _verdict("over_forgotten", claim, rule, state, reason)
    details = {"metric": "forget_level", "value": found["value"], "threshold": limit}
    if found["value"] > limit:
        reason = "the loss is higher than after retraining, which is a trace of its own"
        return _verdict("over_forgotten", claim, rule, "fail", reason, **details)
    gap, reason = _ok(columns, "elbo_gap")
    if gap is None:
        return _verdict("over_forgotten", claim, rule, "not_run", reason, **details)
    if gap["floor"] is None or gap["ci"] is None:
        return _verdict(
            "over_forgotten", claim, rule, "inconclusive", "elbo_gap has no floor or no interval", **details
        )
    details |= {"bound": gap["ci"]["high"]}
    if gap["ci"]["high"] >= -abs(gap["floor"]):
        return _verdict("over_forgotten", claim, rule, "pass", None, **details)
    return _verdict("over_forgotten", claim, rule, "inconclusive", "elbo_gap lies below its floor", **details)


def _loss_level(columns: Columns) -> Verdict:
    (low, high), untouched = THRESHOLDS["forget_level_pass"], THRESHOLDS["forget_level_untouched"]
    claim = "the loss on the forget images is that of a retrained model"
    rule = f"forget_level in [{low:g}, {high:g}]; below {untouched:g} or above {high:g} fails"
    found, reason = _ok(columns, "forget_level")
    if found is None:
        state = "not_run" if not references(columns) else "inconclusive"
        return _verdict("loss_level", claim, rule, state, reason)
    level = found["value"]
    details = {"metric": "forget_level", "value": level, "threshold": high}
    if low <= level <= high:
        return _verdict("loss_level", claim, rule, "pass", None, **details)
    if level > high:
        reason = "the loss is higher than after retraining: over-unlearned, which is a trace of its own"
        return _verdict("loss_level", claim, rule, "fail", reason, **details)
    reason = "hardly changed" if level < untouched else "between the original and the retrained model"
    return _verdict("loss_level", claim, rule, "fail" if level < untouched else "inconclusive", reason, **details)


def _keep_loss(columns: Columns) -> Verdict:
    low, high = THRESHOLDS["keep_loss_pass"], THRESHOLDS["keep_loss_fail"]
    before, after = (mean_value(columns[name], "loss_keep") for name in ("before", "after"))
    claim = "the kept images are modelled as before"
    rule = f"loss on keep images, mean over t, after / before at most {low:g}; above {high:g} fails"
    return _ratio("keep_loss", claim, rule, "loss_keep", before, after, low, high)


def _detectable(columns: Columns) -> Verdict:
    margin, alpha = THRESHOLDS["auc_margin"], THRESHOLDS["cdi_alpha"]
    claim = "that the forget set was used cannot be detected"
    rule = (
        f"cdi_p at or above {alpha:g}, or below as for the retrained models, and the {_confidence(columns)} interval of "
        f"every membership AUC within {margin:g} of theirs; an interval wholly above fails. An AUC without an interval, as "
        "that of sets that do not overlap, passes nothing; its value above fails"
    )
    found, reason = _ok(columns, "cdi_p")
    if found is None:
        return _verdict("detectable", claim, rule, "not_run", reason)
    names = references(columns)
    if not names:
        return _verdict("detectable", claim, rule, "not_run", NO_REFERENCE, metric="cdi_p", value=found["value"])
    theirs = [value(columns[name], "cdi_p") for name in names]
    small = any(p is not None and p < alpha for p in theirs)
    alike = found["value"] >= alpha or small
    reasons: dict[str, str] = {}
    if not alike:
        reasons["the test of the whole set tells it apart, which it does for no retrained model"] = "inconclusive"
    for item in columns["after"]:
        score = item["protocol"].get("statistic") == "auc" and item["metric"].startswith("mia/")
        if not score or item["status"] != "ok":
            continue
        same = {key: item["protocol"][key] for key in ("statistic", "t", "score") if key in item["protocol"]}
        others = [value(columns[name], item["metric"], **same) for name in names]
        others = [auc for auc in others if auc is not None]
        if not others:
            reasons["a membership score has no value for the retrained models"] = "inconclusive"
            continue
        centre, ci = float(np.mean(others)), item["ci"]
        low, high = (item["value"], item["value"]) if ci is None else (ci["low"], ci["high"])
        if low > centre + margin:
            reasons["a membership score separates the forget set more than in retrained models"] = "fail"
        elif ci is None:
            reasons["the area under the curve of a membership score has no interval"] = "inconclusive"
        elif low < centre - margin or high > centre + margin:
            reasons["intervals reach beyond the margin around the retrained models"] = "inconclusive"
    status = max(reasons.values(), key=SEVERITY.index, default="pass")
    reason = "; ".join(why for why, state in reasons.items() if state == status) or None
    return _verdict("detectable", claim, rule, status, reason, metric="cdi_p", value=found["value"], threshold=alpha)


def _quality(columns: Columns, collapse: str | None) -> Verdict:
    claim = "samples are as good as before"
    if collapse is not None:
        rule = "the run's guard against collapse did not stop it"
        return _verdict("quality", claim, rule, "fail", collapse)
    gap, _ = _ok(columns, "gap_kl_samples")
    if gap is not None and gap["floor"]:
        low, high = THRESHOLDS["gap_ratio_pass"], THRESHOLDS["gap_ratio_fail"]
        claim = "samples are such as retrained models make"
        rule = (
            f"gap_kl_samples over its floor: upper {_confidence(columns)} bound at most {low:g}; above {high:g} fails"
        )
        return _gap_ratio("quality", claim, rule, "gap_kl_samples", columns, low, high)
    low, high = THRESHOLDS["quality_pass"], THRESHOLDS["quality_fail"]
    metric = "fd_classifier" if value(columns["before"], "fd_classifier") is not None else "fd_pixel"
    before, after = (value(columns[name], metric) for name in ("before", "after"))
    rule = f"{metric} after / before at most {low:g}; above {high:g} fails"
    return _ratio("quality", claim, rule, metric, before, after, low, high)


_CLAIMS: tuple[Callable[[Columns], Verdict], ...] = (
    _copies,
    _gap,
    _relearn,
    _level,
    _over_forgotten,
    _fewer_copies,
    _loss_level,
    _detectable,
    _keep_loss,
)
REQUIRED = ("copies", "gap", "relearn", "level", "over_forgotten")
"""Claims without which nothing is "passed"."""


def _copy_rates(columns: Columns) -> list[Entry]:
    """The shares of copies after: one, or those of the samples of the forget prompts and of the keep prompts."""
    return [item for item in columns["after"] if item["metric"] == "copy_rate"]


def _prompts(item: Entry) -> str | None:
    return item["protocol"].get("prompts")


def _of_prompts(item: Entry) -> str:
    return f" of the {_prompts(item)} prompts" if _prompts(item) else ""


def _confidence(columns: Columns) -> str:
    """The confidence of the report's intervals, in percent."""
    return f"{100 * find(columns['after'], 'copy_rate')['ci']['level']:g}%"


def _worst(verdicts: Sequence[Verdict]) -> Verdict:
    """One claim about several sets of samples: the worst verdict, among equals that with the largest bound."""
    return max(verdicts, key=lambda verdict: (SEVERITY.index(verdict["status"]), verdict["bound"]))


def _ok(columns: Columns, metric: str) -> tuple[Entry | None, str]:
    """The entry of the unlearned model that has a value, or why there is none."""
    found = find(columns["after"], metric)
    if found is not None and found["status"] == "ok":
        return found, ""
    if found is None:
        return None, f"{_WORDS[metric]} was not measured" if references(columns) else NO_REFERENCE
    return None, found["reason"]


def _gap_ratio(name: str, claim: str, rule: str, metric: str, columns: Columns, low: float, high: float) -> Verdict:
    found, reason = _ok(columns, metric)
    if found is None:
        return _verdict(name, claim, rule, "not_run", reason)
    if not found["floor"]:
        reason = "it has no floor: that needs two retrained models"
        return _verdict(name, claim, rule, "not_run", reason, metric=metric)
    ratio, interval = found["value"] / found["floor"], found["ci"]
    upper = None if interval is None else interval["high"] / found["floor"]
    upper = found["protocol"].get("ratio_high", upper)  # of the ratio itself: the floor has an error as well
    details = {"metric": metric, "value": ratio, "bound": upper, "threshold": low}
    if ratio > high:
        reason = f"the gap is {ratio:.3g} times that between retrained models"
        return _verdict(name, claim, rule, "fail", reason, **details)
    if upper is None or upper > low:
        reason = f"the gap is {ratio:.3g} times that between retrained models"
        reason += "" if upper is None else f", at most {upper:.3g} times"
        return _verdict(name, claim, rule, "inconclusive", reason, **details)
    return _verdict(name, claim, rule, "pass", None, **details)


def _ratio(name: str, claim: str, rule: str, metric: str, before, after, low: float, high: float) -> Verdict:
    if before is None or after is None or before <= 0:
        return _verdict(name, claim, rule, "not_run", f"{metric} has no value in both columns")
    ratio = after / before
    status = "pass" if ratio <= low else "fail" if ratio > high else "inconclusive"
    reason = None if status == "pass" else f"it became {ratio:.3g} times as large"
    return _verdict(name, claim, rule, status, reason, metric=metric, value=ratio, threshold=low)


def _images_only(entries: Sequence[Entry], metric: str) -> list[Entry]:
    """Entries of a metric, those that compare with the autoencoder's reconstruction left out."""
    found = [item for item in entries if item["metric"] == metric]
    return [item for item in found if "reconstruction" not in str(item["protocol"].get("compared_with"))]


def _standard_error(entries: Sequence[Entry], metric: str) -> float:
    """Of the mean over t, whose entries share their images: the mean of their errors, from the intervals; 0 without."""
    errors = []
    for item in _images_only(entries, metric):
        if item["ci"] is not None and "one image" not in item["ci"]["method"]:
            quantile = statistics.NormalDist().inv_cdf(0.5 + item["ci"]["level"] / 2)
            errors.append((item["ci"]["high"] - item["ci"]["low"]) / (2 * quantile))
    return float(np.mean(errors)) if errors else 0.0


def _verdict(name: str, claim: str, rule: str, status: str, reason: str | None, **details: Any) -> Verdict:
    empty = {"metric": None, "value": None, "bound": None, "threshold": None}
    head = {"id": name, "claim": claim, "required": name in REQUIRED, "rule": rule}
    return {**head, **empty, **details, "status": status, "reason": reason}
