"""The report for people: one HTML file without scripts, fonts or pictures from elsewhere."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from eval import figures
from eval.context import Column
from eval.records import Entry, find
from eval.references import References
from eval.report_pictures import figure_element, injections_section, samples_section
from eval.report_run import copies_section, run_section, selection_section
from eval.report_tables import tables_section
from eval.style import STYLE
from eval.wording import TITLES, number
from jaxunlearn.metrics import METRICS
from jaxunlearn.metrics.entries import columns_of

CAPTIONS = {
    "loss_forget": (
        "Loss on the forget images",
        "After unlearning it should reach the level of a retrained model, which for an ordinary image is that of held-out "
        "images. Small t tells most.",
    ),
    "loss_keep": ("Loss on the keep images", "It should not change."),
    "nearest_forget": (
        "Distance of samples to the forget set",
        "Copies lie left of the threshold. Share of samples on a logarithmic axis.",
    ),
    "nearest_keep": (
        "Distance of samples to the keep set",
        "Samples far from every keep image are broken or copies of the forget image; samples at zero copy a keep image.",
    ),
    "injection": (
        "Denoising injection",
        "The forget image is noised to t and denoised. A low curve means that it comes back. Band: 10 % to 90 %.",
    ),
}
LATENT_CAPTIONS = {
    "injection": (
        "Denoising injection",
        "The latents of the forget image are noised to t, denoised and decoded. A curve near the line of the autoencoder "
        "alone, or below it, means that the image comes back. Band: 10 % to 90 %.",
    ),
}
LABELS = {"pass": "passed", "fail": "failed", "inconclusive": "open", "not_run": "not run"}
OVERALL = {
    "passed": "All checks passed",
    "screening_passed": "Checks passed, without a retrained model",
    "failed": "A check failed",
    "incomplete": "Some checks are open",
}

MEANING = {
    "passed": "Every required claim passed, compared with retrained models. That bounds what is left, and proves no more.",
    "screening_passed": "What could be checked without a retrained model passed. Whether the model is like one that never "
    "saw the forget images is not known: retrain.enabled=True trains that yardstick.",
    "failed": "At least one claim failed. The reasons stand below it.",
    "incomplete": "No claim failed, but some are open or were not checked. The reasons stand below each.",
}


def render(
    report: Mapping[str, Any],
    columns: Mapping[str, Column],
    refs: References,
    log: Sequence[Mapping[str, Any]],
    selection_picture: str | None = None,
) -> str:
    """The page.

    Args:
      report: the report, with its headline.
      columns: column -> samples and arrays.
      refs: the data side, for grids of injections.
      log: lines of metrics.jsonl.
      selection_picture: the figure of an automatic selection as a data URI, or None.
    """
    sections = [
        _header(report),
        _cards(report),
        samples_section(report, columns),
        _verdicts(report),
        run_section(report, log),
        selection_section(report, selection_picture),
        _curves(report, columns, refs),
        injections_section(report, columns, refs),
        tables_section(report),
        copies_section(report),
        _details(report),
        _limits(report),
    ]
    return document(report["title"], sections)


def document(heading: str, sections: Sequence[str]) -> str:
    """A whole page around its sections: the style inside, nothing from elsewhere, no scripts."""
    title = html.escape(heading)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )


def _header(report) -> str:
    state = report["overall"]
    forget, keep = report["forget_set"], report["keep_set"]
    method = report["method"]["name"] or "unknown method"
    unique = "" if forget["unique"] == forget["n"] else f" ({forget['unique']} different)"
    facts = [
        f"method <b>{html.escape(str(method))}</b>",
        f"<b>{forget['n']:,}</b> forget image{'' if forget['n'] == 1 else 's'}{unique}",
        f"<b>{keep['n']:,}</b> keep images",
        f"<b>{report['settings']['num_samples']:,}</b> samples per model" + _of_prompts(report),
        f"{html.escape(report['created_utc'])}",
    ]
    return (
        f'<header><p class="kicker">{html.escape(report["title"])}</p><h1>{unbroken(html.escape(report["headline"]))}</h1>'
        f'<p><span class="badge {state}">{OVERALL[state]}</span></p>'
        f'<p class="facts">{" &middot; ".join(facts)}</p><p class="notice">{html.escape(report["notice"])}</p></header>'
    )


def unbroken(text: str) -> str:
    """Text whose numbers keep their percent sign on the line."""
    return re.sub(r"(?<=\d) %", "&nbsp;%", text)


def _of_prompts(report) -> str:
    """What the samples were asked for, where the model takes text."""
    text = report["text"]
    if text is None:
        return ""
    many = " and set of prompts" if text["keep_prompts"] else ""
    return f"{many}, guidance {text['guidance']:g}"


def _cards(report) -> str:
    """Four numbers, before -> after."""
    t = report["settings"]["injection_t"][0]
    loss_t = report["settings"]["loss_t"][0]
    quality = "fd_classifier" if _usable(report, "fd_classifier") else "fd_pixel"
    chosen = [
        ("Copies among samples", "copy_rate", {}),
        (f"Injection distance, t = {t}", "injection_distance", {"t": t}),
        (f"Loss on keep images, t = {loss_t}", "loss_keep", {"t": loss_t}),
        (TITLES[quality].replace("Frechet distance, ", "Frechet distance: "), quality, {}),
    ]
    cards = []
    for title, metric, protocol in chosen:
        columns = {name: entries for name, entries in columns_of(report).items() if name != "control"}
        values = [_short(find(entries, metric, **protocol), metric) for entries in columns.values()]
        arrow = '<span class="arrow">&rarr;</span>'.join(f"<b>{v}</b>" for v in values[:2])
        extra = f"<small>retrained {', '.join(values[2:])}</small>" if len(values) > 2 else ""
        wanted = {"lower": "lower is better", "higher": "higher is better"}.get(METRICS[metric].target, "")
        wanted = wanted or ("as after retraining" if metric != "copy_rate" else "none wanted")
        cards.append(
            f'<div class="card"><h3>{html.escape(title)}</h3><p>{arrow}</p><small>{wanted}</small>{extra}</div>'
        )
    return f'<section class="cards">{"".join(cards)}</section>'


def _usable(report, metric: str) -> bool:
    columns = columns_of(report)
    return all((find(columns[name], metric) or {}).get("status") == "ok" for name in ("before", "after"))


def _short(item: Entry | None, metric: str) -> str:
    if item is None or item["value"] is None:
        return "none" if item is None else item["status"].replace("_", " ")
    return number(item["value"], metric)


def _verdicts(report) -> str:
    """Each claim with its result, its reason and its rule; claims that were not checked for one reason stand together."""
    items, unchecked = [], {}
    for verdict in report["verdicts"]:
        if verdict["status"] == "not_run":
            unchecked.setdefault(verdict["reason"], []).append(verdict)
            continue
        reason = f"<p>{html.escape(_sentence(verdict['reason']))}</p>" if verdict["reason"] else ""
        items.append(
            f'<div class="check"><div><span class="badge {verdict["status"]}">{LABELS[verdict["status"]]}</span></div><div>'
            f"<b>{html.escape(_sentence(verdict['claim']))}</b>{reason}<small>Rule: {html.escape(verdict['rule'])}</small>"
            "</div></div>"
        )
    for reason, verdicts in unchecked.items():
        claims = "".join(
            f"<li>{html.escape(_sentence(v['claim']))}<br><small>Rule: {html.escape(v['rule'])}</small></li>"
            for v in verdicts
        )
        items.append(
            f'<div class="check"><div><span class="badge not_run">{LABELS["not_run"]}</span></div>'
            f"<div><p>{html.escape(_sentence(reason))}</p><ul>{claims}</ul></div></div>"
        )
    meaning = f"<p>{html.escape(MEANING[report['overall']])} All rules were fixed before the run.</p>"
    return f"<section><h2>Checks</h2>{meaning}{''.join(items)}</section>"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _curves(report, columns, refs) -> str:
    made = figures.curves(report, columns, refs)
    captions = CAPTIONS | (LATENT_CAPTIONS if report["autoencoder"] else {})
    parts = [
        figure_element(made[name], f"<b>{title}</b><br>{text}", title)
        for name, (title, text) in captions.items()
        if name in made
    ]
    return f'<section><h2>Curves</h2><div class="pair">{"".join(parts)}</div></section>' if parts else ""


def _details(report) -> str:
    calibration, tool = report["calibration"], report["tool"]
    low, high = min(calibration["threshold"]), max(calibration["threshold"])
    threshold = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
    near = report["forget_set"]["near_duplicates"]
    rows = {
        "Copy threshold": f"{threshold} rms on [0, 1] pixels: {calibration['rule']}",
        "Near duplicates": f"{near['found']} found among {near['searched']:,} images, {near['action']}",
        "Original model": f"{report['base_model']['path']}, {report['base_model']['params']:,} parameters, "
        f"SHA-256 of the parameters {report['base_model']['tree_sha256']}",
        "Unlearned model": f"{report['result_model']['path']}, {report['result_model']['tree_sha256']}",
        "Forget set": f"commitment {report['forget_set']['root']} (keyed: verify it with the key of the work directory)",
        "Configuration": f"SHA-256 {report['config_sha256']}",
        "Software": f"jaxunlearn {tool['version']}, jax {tool['packages']['jax']}, {tool['devices']}",
        "Time": ", ".join(f"{name} {seconds:g} s" for name, seconds in report["timings_seconds"].items()),
    }
    for model in report["reference"]["models"]:
        rows[f"Model {model['model'].replace('_', ' ')}"] = (
            f"{model['path']}, seed {model['seed']}, {model['tree_sha256']}"
        )
    method = report["method"]
    made = f"{method['name']}: objective {method['objective']}, combiner {method['combiner']}, seed {method['seed']}; "
    made += f"{method['steps'] or 'unknown'} steps; {method['stop_rule']}; {method['precision']}"
    rows["Method"] = made
    rows |= _pipeline_rows(report)
    body = "".join(f"<tr><th>{k}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
    return f'<section><h2>Protocol</h2><div class="scroll"><table class="details">{body}</table></div></section>'


def _pipeline_rows(report) -> dict[str, str]:
    """What stands between a pipeline's UNet and its pictures and texts."""
    rows, autoencoder, text = {}, report["autoencoder"], report["text"]
    if autoencoder:
        shape = " x ".join(map(str, autoencoder["latent_shape"]))
        rows["Autoencoder"] = (
            f"latents {shape}, scaling factor {autoencoder['scaling_factor']:g}; returns the forget images at rms "
            f"{autoencoder['rms_mean']:.4g} on average, {autoencoder['rms_max']:.4g} at most; SHA-256 {autoencoder['sha256']}"
        )
    if text:
        sets = [("forget", text["forget_prompts"]), ("keep", text["keep_prompts"])]
        if text["keep_prompts"] is None:
            sets = [("forget and keep", text["forget_prompts"])]
        asked = "; ".join(f"{which}: {block['n']:,} ({block['source']})" for which, block in sets)
        rows["Prompts"] = f"{asked}; guidance {text['guidance']:g} against the empty text"
        rows["Text encoder"] = f"SHA-256 {text['text_encoder_sha256']}"
    return rows


def _limits(report) -> str:
    def bullets(lines: Sequence[str]) -> str:
        return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"

    return (
        f"<section><h2>What this does not show</h2>{bullets(report['limitations'])}<h3>Not tested</h3>"
        f'{bullets(report["not_tested"])}<p class="notice">{html.escape(report["notice"])}</p></section>'
    )
