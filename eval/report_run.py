"""Sections of the report about the run as a whole: forgetting against quality, its steps, its selection, remaining copies."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from eval import summary_figures
from eval.report_pictures import figure_element

COPY_WORDS = {
    "model": "model",
    "ema": "moving average of weights",
    "optimizer": "optimizer states",
    "checkpoint": "checkpoints",
    "export": "exported model",
    "feature_cache": "encoded images",
    "distilled": "distilled model",
    "samples": "pictures",
    "manifest": "list of the forget images",
}


def run_section(report: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> str:
    """Where the models stand between forgetting and quality, how far the result is from retrained models, and its steps."""
    parts = []
    picture = summary_figures.pareto(report)
    if picture is not None:
        retrained = bool(report["reference"]["models"])
        star = " Star: retrained." if retrained else " There is no retrained model, so copies are the measure."
        caption = f"<b>Forgetting against quality</b><br>Left and down is better. Cross: before. Dot: after.{star}"
        parts.append(figure_element(picture, caption, "Forgetting against quality"))
    bars = summary_figures.gap_bars(report)
    if bars is not None:
        caption = (
            "<b>Distance to retrained models</b><br>A ratio of 1 is the distance between two retrained models that differ in "
            "their seed only."
        )
        parts.append(figure_element(bars, caption, "Gap to retrained models over its floor"))
    losses, absent = summary_figures.training(log), ""
    if losses is None:
        absent = "<p><small>There are no logged losses of the unlearning stage, so their curve is missing.</small></p>"
    else:
        caption = "<b>Loss</b><br>Terms of the loss over the steps; thin: logged values, thick: running mean."
        parts.append(figure_element(losses, caption, "Loss over the steps of unlearning"))
    for title, picture in summary_figures.trajectories(log).values():
        caption = f"<b>{html.escape(title[:1].upper() + title[1:])}</b><br>Probed while the run went on."
        parts.append(figure_element(picture, caption, f"{title} over the steps of unlearning"))
    return _section("The run in pictures", f"<p>{html.escape(_sentence(report))}</p>{absent}", parts)


def _sentence(report: Mapping[str, Any]) -> str:
    method = report["method"]
    steps = "an unknown number of" if method["steps"] is None else f"{method['steps']:,}"
    return f"Method {method['name']}, {steps} steps. Stop rule: {method['stop_rule']}."


def selection_section(report: Mapping[str, Any], picture: str | None) -> str:
    """What an automatic rule chose, and why; nothing where everything was set by hand."""
    found = report["selection"]
    if found is None:
        return ""
    reasons = "".join(f"<li>{html.escape(str(line))}</li>" for line in found.get("reasons") or [])
    rule, summary = (html.escape(str(found.get(key))) for key in ("rule", "summary"))
    text = f"<p>The rule <code>{rule}</code> chose: {summary}</p>"
    parts = (
        [] if picture is None else [figure_element(picture, "What the choice rests on.", "Curves behind the selection")]
    )
    return _section("Which timesteps and frequencies", f"{text}<ul>{reasons}</ul>", parts)


def copies_section(report: Mapping[str, Any]) -> str:
    """Copies of the model and of the images in the work directory: the unlearning changed none but the unlearned model."""
    items = "".join(
        f'<div class="check"><div><span class="badge {"inconclusive" if item["action"] == "kept" else "pass"}">'
        f"{html.escape(item['action'])}</span></div><div>{html.escape(COPY_WORDS[item['copy']])} "
        f"<code>{html.escape(item['path'])}</code><small>{html.escape(item['reason'])}</small></div></div>"
        for item in report["lineage"]
    )
    text = (
        "<p>Unlearning changes one model. These are the copies found in the work directory; what is marked <b>kept</b> was "
        "made with the forget images and was not changed. Deleting it is up to you.</p>"
    )
    return f"<section><h2>Copies that remain</h2>{text}{items}</section>"


def _section(title: str, text: str, parts: Sequence[str]) -> str:
    if not parts and not text:
        return ""
    figures = f'<div class="pair">{"".join(parts)}</div>' if parts else ""
    return f"<section><h2>{title}</h2>{text}{figures}</section>"
