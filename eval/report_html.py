"""The report for people: one HTML file without scripts, fonts or pictures from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval import figures
from eval.measure import Column
from eval.records import Entry, find
from eval.references import References
from eval.style import STYLE
from eval.wording import SHARES, TITLES, number
from jaxunlearn.images import to_uint8
from jaxunlearn.metrics import METRICS

GRID_SAMPLES = 64
STRIP = 16
GROUPS = {
    "Extraction: what samples show": (
        "copy_rate",
        "copy_rate_strict",
        "nearest_forget_min",
        "nearest_forget_median",
        "nearest_keep_min",
        "nearest_keep_median",
    ),
    "Denoising injection: what comes back": ("injection_distance", "injection_similarity", "injection_copies"),
    "Denoising loss": ("loss_forget", "loss_keep", "loss_held_out", "rank_p", "forget_level"),
    "Quality of samples": ("fd_classifier", "fd_pixel", "inception_score"),
}
CAPTIONS = {
    "training": (
        "Unlearning",
        "Terms of the loss over the steps of unlearning; thin: logged values, thick: running mean.",
    ),
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
LABELS = {"pass": "passed", "fail": "failed", "inconclusive": "open", "not_run": "not run"}
OVERALL = {
    "passed": "All checks passed",
    "screening_passed": "Checks passed, without a retrained model",
    "failed": "A check failed",
    "incomplete": "Some checks are open",
}


def render(
    report: Mapping[str, Any],
    columns: Mapping[str, Column],
    refs: References,
    log: Sequence[Mapping[str, Any]],
) -> str:
    """The page.

    Args:
      report: the report, with its headline.
      columns: column -> samples and arrays.
      refs: the data side, for grids of injections.
      log: lines of metrics.jsonl.
    """
    sections = [
        _header(report),
        _cards(report),
        _samples(report, columns),
        _verdicts(report),
        _curves(report, columns, refs, log),
        _injections(report, columns, refs),
        _tables(report),
        _details(report),
        _limits(report),
    ]
    title = html.escape(report["title"])
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
        f"<b>{forget['n']:,}</b> forget images{unique}",
        f"<b>{keep['n']:,}</b> keep images",
        f"<b>{report['settings']['num_samples']:,}</b> samples per model",
        f"{html.escape(report['created_utc'])}",
    ]
    return (
        f'<header><p class="kicker">{html.escape(report["title"])}</p><h1>{html.escape(report["headline"])}</h1>'
        f'<p><span class="badge {state}">{OVERALL[state]}</span></p>'
        f'<p class="facts">{" &middot; ".join(facts)}</p><p class="notice">{html.escape(report["notice"])}</p></header>'
    )


def _columns(report) -> list[str]:
    return [name for name in ("before", "after", "retrained") if report["evaluation"][name]]


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
        values = [_short(find(report["evaluation"][name], metric, **protocol), metric) for name in _columns(report)]
        arrow = '<span class="arrow">&rarr;</span>'.join(f"<b>{v}</b>" for v in values[:2])
        extra = f"<small>retrained {values[2]}</small>" if len(values) > 2 else ""
        wanted = {"lower": "lower is better", "higher": "higher is better"}.get(METRICS[metric].target, "")
        wanted = wanted or ("as after retraining" if metric != "copy_rate" else "none wanted")
        cards.append(
            f'<div class="card"><h3>{html.escape(title)}</h3><p>{arrow}</p><small>{wanted}</small>{extra}</div>'
        )
    return f'<section class="cards">{"".join(cards)}</section>'


def _usable(report, metric: str) -> bool:
    return all((find(report["evaluation"][name], metric) or {}).get("status") == "ok" for name in _columns(report))


def _short(item: Entry | None, metric: str) -> str:
    if item is None or item["value"] is None:
        return "none" if item is None else item["status"].replace("_", " ")
    return number(item["value"], metric)


def _samples(report, columns: Mapping[str, Column]) -> str:
    good = {name: column for name, column in columns.items() if column.samples is not None}
    if not good:
        return ""
    hide = not report["settings"]["include_images"]
    count = min(GRID_SAMPLES, min(len(column.samples) for column in good.values()))
    grids = []
    for name, column in good.items():
        picture = figures.grid(column.samples[:count], column.flags[:count], hide=hide)
        marked = int(column.flags[:count].sum())
        caption = f"<b>{name}</b>: {marked} of these {count} are copies"
        grids.append(_figure(picture, caption, f"{count} samples of the model {name}", pixelated=True))
    note = "Copies of forget images have an orange border"
    note += " and are covered; <code>eval.include_images=True</code> shows them." if hide else "."
    body = f'<div class="pair">{"".join(grids)}</div>'
    body += _strip(good, hide)
    return f"<section><h2>Samples from the same noise</h2><p>{note}</p>{body}</section>"


def _strip(columns: Mapping[str, Column], hide: bool) -> str:
    """The samples that were copies before, and what the same noise gives after."""
    if not {"before", "after"} <= set(columns):
        return ""
    chosen = np.flatnonzero(columns["before"].flags)[:STRIP]
    if not len(chosen):
        return ""
    parts = []
    for name, column in columns.items():
        if name == "before" and hide:
            continue
        picture = figures.grid(column.samples[chosen], column.flags[chosen], columns=8, hide=hide)
        parts.append(_figure(picture, f"<b>{name}</b>", f"samples of the model {name}", pixelated=True))
    text = f"The first {len(chosen)} samples that were copies before, and what the same noise gives now:"
    return f'<p>{text}</p><div class="pair">{"".join(parts)}</div>'


def _verdicts(report) -> str:
    rows = []
    for verdict in report["verdicts"]:
        reason = f"<br><small>{html.escape(verdict['reason'])}</small>" if verdict["reason"] else ""
        rows.append(
            f'<tr><td>{html.escape(verdict["claim"])}{reason}</td><td><span class="badge {verdict["status"]}">'
            f"{LABELS[verdict['status']]}</span></td><td><small>{html.escape(verdict['rule'])}</small></td></tr>"
        )
    head = "<tr><th>Claim</th><th>Result</th><th>Rule, fixed before the run</th></tr>"
    return f'<section><h2>Checks</h2><div class="scroll"><table>{head}{"".join(rows)}</table></div></section>'


def _curves(report, columns, refs, log) -> str:
    made = figures.curves(report, columns, refs, log)
    parts = [
        _figure(made[name], f"<b>{title}</b><br>{text}", title)
        for name, (title, text) in CAPTIONS.items()
        if name in made
    ]
    absent = ""
    if "training" not in made:
        absent = "<p><small>There are no logged losses of the unlearning stage, so their curve is missing.</small></p>"
    return f'<section><h2>Curves</h2><div class="pair">{"".join(parts)}</div>{absent}</section>'


def _injections(report, columns: Mapping[str, Column], refs: References) -> str:
    """What the first forget image becomes, row by row; only where its picture may be shown."""
    good = {name: c for name, c in columns.items() if np.all(np.isfinite(c.arrays.get("injected", np.nan)))}
    if not good:
        return ""
    if not report["settings"]["include_images"]:
        note = "Pictures of injections show the forget images, so they are left out: <code>eval.include_images=True</code>."
        return f"<section><h2>Injections</h2><p>{note}</p></section>"
    times = report["settings"]["injection_t"]
    first = refs.forget[refs.injected[0]][None]
    parts = [
        _figure(figures.grid(first, [False], columns=8, hide=False), "<b>the forget image</b>", "", pixelated=True)
    ]
    for name, column in good.items():
        shown = to_uint8(column.arrays["injected"][:, :8])
        rows = shown.reshape(-1, *shown.shape[2:])
        picture = figures.grid(rows, [False] * len(rows), columns=shown.shape[1], hide=False)
        caption = f"<b>{name}</b>, rows: t = {', '.join(map(str, times))}"
        parts.append(_figure(picture, caption, f"injections into the model {name}", pixelated=True))
    text = "The forget image is noised to t and denoised by each model, with the same noises."
    return f'<section><h2>Injections</h2><p>{text}</p><div class="pair">{"".join(parts)}</div></section>'


def _tables(report) -> str:
    names = _columns(report)
    control = report["evaluation"]["control"]
    parts = []
    for title, metrics in GROUPS.items():
        rows = []
        for metric in metrics:
            for protocol in _protocols(report, metric, names):
                cells = [_cell(find(report["evaluation"][name], metric, **protocol), metric) for name in names]
                cells.append(_cell(find(control, metric, **protocol), metric))
                suffix = f", t = {protocol['t']}" if protocol else ""
                unit = "" if metric in SHARES else f"<br><small>{html.escape(METRICS[metric].unit)}</small>"
                rows.append(
                    f'<tr><td title="{html.escape(METRICS[metric].description)}">{html.escape(TITLES[metric])}{suffix}'
                    f"{unit}</td>{''.join(cells)}</tr>"
                )
        head = "".join(f"<th>{name}</th>" for name in [*names, "held-out images"])
        parts.append(
            f'<h3>{title}</h3><div class="scroll"><table class="numbers"><tr><th>Metric</th>{head}</tr>'
            f"{''.join(rows)}</table></div>"
        )
    legend = (
        "Small print: interval with its level, and n. The target of every metric of forgetting is the value of a retrained "
        "model, not the highest or lowest one. Reasons of missing numbers stand in their cells."
    )
    return f"<section><h2>All numbers</h2><p>{legend}</p>{''.join(parts)}</section>"


def _protocols(report, metric: str, names: list[str]) -> list[dict[str, Any]]:
    """One row per t for metrics that have one."""
    entries = [e for name in names for e in report["evaluation"][name] if e["metric"] == metric]
    times = sorted({e["protocol"]["t"] for e in entries if isinstance(e["protocol"].get("t"), int)})
    return [{"t": t} for t in times] if times else [{}]


def _cell(item: Entry | None, metric: str) -> str:
    if item is None:
        return '<td class="empty"></td>'
    if item["status"] != "ok":
        word = {"not_run": "not run", "failed": "failed"}[item["status"]]
        return f'<td class="missing">{word}<br><small>{html.escape(item["reason"] or "")}</small></td>'
    count = item["protocol"].get("count")
    size = f"{count:,} of {item['n']:,}" if count is not None else f"n = {item['n']:,}"
    interval = ""
    if item["ci"] is not None:
        low, high = (number(item["ci"][end], metric) for end in ("low", "high"))
        interval = f"{low} to {high} ({item['ci']['level']:.0%})<br>"
        size = f'<span title="{html.escape(item["ci"]["method"])}">{size}</span>'
    return f"<td><b>{number(item['value'], metric)}</b><br><small>{interval}{size}</small></td>"


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
        rows["Retrained model"] = f"{model['path']}, {model['tree_sha256']}"
    body = "".join(f"<tr><th>{k}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
    return f'<section><h2>Protocol</h2><div class="scroll"><table class="details">{body}</table></div></section>'


def _limits(report) -> str:
    def bullets(lines: Sequence[str]) -> str:
        return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"

    return (
        f"<section><h2>What this does not show</h2>{bullets(report['limitations'])}<h3>Not tested</h3>"
        f'{bullets(report["not_tested"])}<p class="notice">{html.escape(report["notice"])}</p></section>'
    )


def _figure(source: str, caption: str, alt: str, *, pixelated: bool = False) -> str:
    kind = ' class="pixels"' if pixelated else ""
    return f'<figure><img{kind} src="{source}" alt="{html.escape(alt)}"><figcaption>{caption}</figcaption></figure>'
