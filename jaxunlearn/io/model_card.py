"""The card of an exported model: Hugging Face's form (YAML front matter, then Markdown), filled from the run.

Everything is a function of the run's configuration and report; nothing is left as a template to fill in, except the
licence where the user did not name one, and then the card says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxunlearn.io.report import NOTICE
from jaxunlearn.metrics import METRICS
from jaxunlearn.metrics.entries import columns_of

_PERCENT = ("copy_rate", "copy_rate_strict", "injection_copies")
_CARD_METRICS = (
    "copy_rate",
    "copy_rate_strict",
    "nearest_forget_min",
    "injection_distance",
    "injection_copies",
    "loss_forget",
    "loss_keep",
    "loss_held_out",
    "forget_level",
    "fd_classifier",
    "fd_pixel",
    "inception_score",
)


def markdown_table(report: Mapping[str, Any]) -> str:
    """The numbers before and after (and retrained, if there is such a model) as a Markdown table.

    Of metrics with several t the smallest is shown. A number that does not exist says "not run" or "failed"; a metric
    that no column has a number for is left out, its reason is in the report.

    Args:
      report: content of ``unlearning_report.json``.
    """
    columns = columns_of(report)
    names = [name for name in columns if name != "control"]
    lines = [
        "| metric | " + " | ".join(name.replace("_", " ") for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for metric in _CARD_METRICS:
        entries = [_first(columns[name], metric) for name in names]
        if not any(item and item["value"] is not None for item in entries):
            continue
        t = next((item["protocol"].get("t") for item in entries if item), None)
        at = f", t = {t}" if isinstance(t, int) else ""
        lines.append(f"| {METRICS[metric].description}{at} | {' | '.join(_cell(item) for item in entries)} |")
    return "\n".join(lines) + "\n"


def model_card(config: Mapping[str, Any], report: Mapping[str, Any] | None, *, takes_text: bool = False) -> str:
    """The text of ``README.md`` of an exported model.

    Args:
      config: the run's resolved configuration, plain JSON values. ``export.license`` and ``export.base_model`` go into
        the front matter if they are set.
      report: content of ``unlearning_report.json``, or None if the run was not evaluated.
      takes_text: whether the model makes images of a prompt.
    """
    export = config.get("export") or {}
    parts = [_front_matter(export, report, takes_text), "# Unlearned diffusion model\n", _summary(config, report)]
    parts.append("## Use\n\n" + _USE.format(prompt='"a prompt", ' if takes_text else ""))
    parts.append("## Before and after\n\n" + (_results(report) if report else "This model was not evaluated.\n"))
    parts.append("## How it was made\n\n" + _method(config, report))
    parts.append("## Intended use and limits\n\n" + _limits(export, report))
    return "\n".join(parts)


_USE = """\
```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")
image = pipeline({prompt}num_inference_steps=50).images[0]
```
"""


def _front_matter(export: Mapping[str, Any], report: Mapping[str, Any] | None, takes_text: bool) -> str:
    lines = ["---"]
    if export.get("license"):
        lines.append(f"license: {json.dumps(export['license'])}")
    lines += ["library_name: diffusers", "tags:", "- diffusers", "- machine-unlearning", "- jax"]
    lines.append(f"pipeline_tag: {'text-to-image' if takes_text else 'unconditional-image-generation'}")
    if export.get("base_model"):
        lines.append(f"base_model: {json.dumps(export['base_model'])}")
    if report:
        found = {name: _first(report["evaluation"]["after"], name) for name in _CARD_METRICS}
        found = {name: item for name, item in found.items() if item and item["value"] is not None}
        if found:
            lines += ["metrics:", *(f"- {name}" for name in found)]
    return "\n".join([*lines, "---", ""])


def _summary(config: Mapping[str, Any], report: Mapping[str, Any] | None) -> str:
    name = (config.get("unlearn") or {}).get("method", "an unlearning method")
    text = f"A diffusion model from whose weights a set of training images was unlearned with `{name}` by jaxunlearn."
    if report:
        forget, keep = report["forget_set"]["n"], report["keep_set"]["n"]
        text += f"\n\n{report['headline']}\n\nForget set: {forget} images. Keep set: {keep} images."
    return text + "\n"


def _results(report: Mapping[str, Any]) -> str:
    checks = "".join(f"- {v['claim']}: **{v['status'].replace('_', ' ')}** ({v['rule']})\n" for v in report["verdicts"])
    return (
        f"{markdown_table(report)}\n{checks}\nFrechet distances and scores here come from a small classifier trained in "
        "the run or from pixels. They are not FID and compare only the columns of this table.\n"
    )


def _method(config: Mapping[str, Any], report: Mapping[str, Any] | None) -> str:
    text, settings = "", dict(config.get("unlearn") or {})
    if settings.get("prompt"):
        settings["prompt"] = "(not shown: it describes what was forgotten)"
    if report:
        base = report["base_model"]
        text += f"- base model: {base['params']} parameters, SHA-256 of the parameters `{base['tree_sha256']}`\n"
        text += f"- this model: SHA-256 of the parameters `{report['result_model']['tree_sha256']}`\n"
    text += f"- seed: {config.get('seed')}\n\nAll settings of the unlearning:\n\n"
    return text + "```json\n" + json.dumps(settings, indent=2, default=str) + "\n```\n"


def _limits(export: Mapping[str, Any], report: Mapping[str, Any] | None) -> str:
    lines = ["Use it as you would use the base model; nothing but the influence of the forget set was meant to change."]
    if report:
        lines += ["", *(f"- {line}" for line in report["limitations"])]
        lines += ["", "Not tested:", "", *(f"- {line}" for line in report["not_tested"])]
    if not export.get("license"):
        lines += ["", "No licence is stated: that of the base model and of its data holds. Add it before you publish."]
    return "\n".join([*lines, "", NOTICE, ""])


def _first(entries: list[Mapping[str, Any]], metric: str) -> Mapping[str, Any] | None:
    """The entry of a metric, at the smallest t if it has several."""
    found = [item for item in entries if item["metric"] == metric]
    return min(
        found, key=lambda item: item["protocol"]["t"] if isinstance(item["protocol"].get("t"), int) else 0, default=None
    )


def _cell(item: Mapping[str, Any] | None) -> str:
    if item is None:
        return ""
    if item["value"] is None:
        return item["status"].replace("_", " ")
    value, count = item["value"], item["protocol"].get("count")
    text = f"{100 * value:.3g} %" if item["metric"] in _PERCENT else f"{value:.4g}"
    return f"{text} ({count} of {item['n']})" if count is not None else text
