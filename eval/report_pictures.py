"""Pictures of the report: grids of samples with common noise, and injections."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import numpy as np

from eval import figures
from eval.context import Column
from eval.references import References

GRID_SAMPLES = 64
STRIP = 16
PIXELATED = 64  # pictures of at most this width are shown with sharp pixels


def samples_section(report, columns: Mapping[str, Column]) -> str:
    """The first samples of all columns, copies marked."""
    good = _shown({name: column for name, column in columns.items() if column.samples is not None})
    if not good:
        return ""
    hide = not report["settings"]["include_images"]
    note = "Copies of forget images have an orange border"
    note += " and are covered; <code>eval.include_images=True</code> shows them." if hide else "."
    first = {name: (column.samples, column.flags) for name, column in good.items()}
    second = {name: (c.keep_samples, c.keep_flags) for name, c in good.items() if c.keep_samples is not None}
    if not second:
        asked = report["text"] and f"<p>For copies and quality alike: {_prompts(report['text']['forget_prompts'])}</p>"
        body = (asked or "") + _grids(first, hide, "") + _strip(first, hide)
        return f"<section><h2>Samples from the same noise</h2><p>{note}</p>{body}</section>"
    blocks = {"forget": report["text"]["forget_prompts"], "keep": report["text"]["keep_prompts"]}
    parts = []
    for which, samples in (("forget", first), ("keep", second)):
        parts.append(f"<h3>Prompts of the {which} images</h3><p>{_prompts(blocks[which])}</p>")
        parts.append(_grids(samples, hide, f" of the prompts of the {which} images"))
        if which == "forget":
            parts.append(_strip(samples, hide))
    note += " Each place has the same noise in all grids."
    return f"<section><h2>Samples from the same noise</h2><p>{note}</p>{''.join(parts)}</section>"


def _shown(columns: Mapping[str, Column]) -> dict[str, Column]:
    """Of several retrained models the pictures of the first one."""
    return {name: column for name, column in columns.items() if name in ("before", "after", "retrained")}


def _prompts(block: Mapping[str, Any]) -> str:
    """How many prompts there are and where they come from; the first of them, where they may be shown."""
    count = "One prompt" if block["n"] == 1 else f"{block['n']:,} prompts"
    texts = block.get("texts") or []
    shown = ", ".join(f"<q>{html.escape(text)}</q>" for text in texts[:8]) + (", ..." if len(texts) > 8 else "")
    return f"{count} ({html.escape(block['source'])}){': ' + shown if shown else '.'}"


def _grids(samples: Mapping[str, tuple[np.ndarray, np.ndarray]], hide: bool, what: str) -> str:
    """One grid per column: name -> (images, which are copies)."""
    count = min(GRID_SAMPLES, min(len(images) for images, _ in samples.values()))
    grids = []
    for name, (images, flags) in samples.items():
        picture = figures.grid(images[:count], flags[:count], hide=hide)
        marked = int(flags[:count].sum())
        caption = f"<b>{name}</b>: {marked} of these {count} are copies"
        alt = f"{count} samples{what} of the model {name}"
        grids.append(figure_element(picture, caption, alt, pixelated=_is_small(images)))
    return f'<div class="pair">{"".join(grids)}</div>'


def _is_small(images: np.ndarray) -> bool:
    """Whether images [N,H,W,C] are shown with sharp pixels."""
    return images.shape[2] <= PIXELATED


def _strip(samples: Mapping[str, tuple[np.ndarray, np.ndarray]], hide: bool) -> str:
    """The samples that were copies before, and what the same noise gives after."""
    if not {"before", "after"} <= set(samples):
        return ""
    chosen = np.flatnonzero(samples["before"][1])[:STRIP]
    if not len(chosen):
        return ""
    parts = []
    for name, (images, flags) in samples.items():
        if name == "before" and hide:
            continue
        picture = figures.grid(images[chosen], flags[chosen], columns=8, hide=hide)
        alt = f"samples of the model {name}"
        parts.append(figure_element(picture, f"<b>{name}</b>", alt, pixelated=_is_small(images)))
    text = f"The first {len(chosen)} samples that were copies before, and what the same noise gives now:"
    return f'<p>{text}</p><div class="pair">{"".join(parts)}</div>'


def injections_section(report, columns: Mapping[str, Column], refs: References) -> str:
    """What the first forget image becomes, row by row; only where its picture may be shown."""
    good = _shown({name: column for name, column in columns.items() if column.injected is not None})
    if not good:
        return ""
    if not report["settings"]["include_images"]:
        note = "Pictures of injections show the forget images, so they are left out: <code>eval.include_images=True</code>."
        return f"<section><h2>Injections</h2><p>{note}</p></section>"
    times = report["settings"]["injection_t"]
    first = refs.forget[refs.injected[:1]]
    small = _is_small(first)
    shown = {"the forget image": first}
    if refs.round_trip is not None:
        shown["through the autoencoder alone"] = refs.round_trip.images[refs.injected[:1]]
    parts = [
        figure_element(figures.grid(image, [False], columns=8, hide=False), f"<b>{title}</b>", "", pixelated=small)
        for title, image in shown.items()
    ]
    for name, column in good.items():
        rows = column.injected.reshape(-1, *column.injected.shape[2:])
        picture = figures.grid(rows, [False] * len(rows), columns=column.injected.shape[1], hide=False)
        caption = f"<b>{name}</b>, rows: t = {', '.join(map(str, times))}"
        parts.append(figure_element(picture, caption, f"injections into the model {name}", pixelated=small))
    text = "The forget image is noised to t and denoised by each model, with the same noises."
    if refs.round_trip is not None:
        text = (
            "The latents of the forget image are noised to t, denoised by each model with the same noises, and decoded."
        )
    return f'<section><h2>Injections</h2><p>{text}</p><div class="pair">{"".join(parts)}</div></section>'


def figure_element(source: str, caption: str, alt: str, *, pixelated: bool = False) -> str:
    """A picture with its caption."""
    kind = ' class="pixels"' if pixelated else ""
    return f'<figure><img{kind} src="{source}" alt="{html.escape(alt)}"><figcaption>{caption}</figcaption></figure>'
