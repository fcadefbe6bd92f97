"""Figures of what was measured, as data URIs: curves as SVG, sample grids as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from eval.context import Column
from eval.families.losses import LOSSES
from eval.figure_parts import COLOURS, INK, colour_of, legend, logarithmic, new_axes, png, svg
from eval.records import find
from eval.references import References

BORDER = (194, 65, 12)
ROUND_TRIP = {"color": "#64748b", "linewidth": 1, "linestyle": "-.", "label": "through the autoencoder alone"}
MAX_TILE = 96  # pixels; larger pictures are shown reduced


def curves(report: Mapping[str, Any], columns: Mapping[str, Column], refs: References) -> dict[str, str]:
    """All curves that the data allows: name -> SVG data URI."""
    good = {name: column for name, column in columns.items() if not column.failed}
    figures = {
        "loss_forget": _loss(report, good, "loss_forget"),
        "loss_keep": _loss(report, good, "loss_keep"),
        "nearest_forget": _nearest_forget(good, refs),
        "nearest_keep": _nearest_keep(report, good, refs),
        "injection": _injection(report, good, refs),
    }
    return {name: figure for name, figure in figures.items() if figure}


def _loss(report, columns: Mapping[str, Column], metric: str) -> str | None:
    """Loss per t of one set for each column; held-out images are the yardstick."""
    unit = "latent number" if report["autoencoder"] else "pixel"
    figure, axes = new_axes("timestep t (0 is cleanest)", f"denoising loss per {unit}")
    t = report["settings"]["loss_t"]
    for name, column in columns.items():
        title = name.replace("_", " ")
        for which, style, label in ((metric, "o-", title), (LOSSES["held_out"], "s:", f"held-out, {title}")):
            if which not in column.arrays or (which != metric and name != "before"):
                continue
            colour = colour_of(name) if which == metric else COLOURS["held-out"]
            axes.plot(t, column.arrays[which].mean(axis=0), style, color=colour, label=label, markersize=4)
    if not axes.lines:
        return None
    logarithmic(axes)
    legend(axes)
    return svg(figure)


def _histogram(axes, values: Mapping[str, np.ndarray]) -> None:
    top = max(float(v.max()) for v in values.values())
    bins = np.linspace(0, top * 1.02, 60)
    for name, distances in values.items():
        weights = np.full(len(distances), 1 / len(distances))
        axes.hist(distances, bins, weights=weights, histtype="stepfilled", alpha=0.15, color=colour_of(name))
        label = name.replace("_", " ")
        axes.hist(distances, bins, weights=weights, histtype="step", linewidth=1.6, color=colour_of(name), label=label)


def _nearest_forget(columns: Mapping[str, Column], refs: References) -> str | None:
    values = {name: c.arrays["nearest_forget"] for name, c in columns.items() if "nearest_forget" in c.arrays}
    if not values:
        return None
    figure, axes = new_axes("distance of a sample to the forget set (rms)", "share of samples")
    _histogram(axes, values)
    if len(refs.forget) == 1:
        threshold, strict = float(refs.calibration.threshold[0]), float(refs.calibration.strict_threshold[0])
        axes.axvline(threshold, color=INK, linewidth=1, linestyle="--", label="copy threshold")
        axes.axvline(strict, color=INK, linewidth=1, linestyle=":", label="strict threshold")
    if len(refs.forget) == 1 and refs.round_trip is not None:
        axes.axvline(float(refs.round_trip.rms[0]), **ROUND_TRIP)
    logarithmic(axes)
    legend(axes)
    return svg(figure)


def _nearest_keep(report, columns: Mapping[str, Column], refs: References) -> str | None:
    values = {name: c.arrays["nearest_keep"] for name, c in columns.items() if "nearest_keep" in c.arrays}
    if not values:
        return None
    figure, axes = new_axes("distance of a sample to its nearest keep image (rms)", "share of samples")
    _histogram(axes, values)
    control = find(report["evaluation"]["control"], "nearest_keep_median")
    if control is not None and control["value"] is not None:
        label = "held-out images, median"
        axes.axvline(control["value"], color=COLOURS["held-out"], linewidth=1.4, linestyle="--", label=label)
    legend(axes)
    return svg(figure)


def _injection(report, columns: Mapping[str, Column], refs: References) -> str | None:
    """Distance to the forget image after noising to t and denoising, mean and range over copies."""
    figure, axes = new_axes("noised to timestep t", "distance to the forget image (rms)")
    t = np.array(report["settings"]["injection_t"])
    for name, column in columns.items():
        distance = column.arrays.get("injection_distance")
        if distance is None or not np.all(np.isfinite(distance)):
            continue
        flat = distance.transpose(1, 0, 2).reshape(len(t), -1)
        low, high = np.quantile(flat, [0.1, 0.9], axis=1)
        axes.fill_between(t, low, high, color=colour_of(name), alpha=0.15, linewidth=0)
        axes.plot(t, flat.mean(axis=1), "o-", color=colour_of(name), label=name.replace("_", " "), markersize=4)
    if not axes.lines:
        return None
    if len(refs.forget) == 1:
        axes.axhline(
            float(refs.calibration.threshold[0]), color=INK, linewidth=1, linestyle="--", label="copy threshold"
        )
    if refs.round_trip is not None:
        axes.axhline(float(refs.round_trip.rms[refs.injected].mean()), **ROUND_TRIP)
    legend(axes)
    return svg(figure)


def grid(images: np.ndarray, marked: np.ndarray, *, columns: int = 8, hide: bool = True, width: int = 560) -> str:
    """A PNG data URI of images uint8 [N,H,W,C]; marked ones get a border, and are covered if ``hide``."""
    from PIL import Image, ImageDraw

    count, height, image_width, channels = images.shape
    tile_h, tile_w = _tile(height, image_width, max(1, (width // columns - 6) // image_width))
    smooth = tile_w < image_width
    cell_h, cell_w = tile_h + 6, tile_w + 6
    rows = -(-count // columns)
    canvas = Image.new("RGB", (cell_w * min(columns, count), cell_h * rows), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (image, mark) in enumerate(zip(images, marked)):
        x, y = index % columns * cell_w, index // columns * cell_h
        pixels = np.repeat(image, 3, axis=2) if channels == 1 else image
        how = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
        tile = Image.fromarray(pixels).resize((tile_w, tile_h), how)
        if mark:
            draw.rectangle((x, y, x + cell_w - 1, y + cell_h - 1), fill=BORDER)
            if hide:
                tile = Image.new("RGB", tile.size, (255, 237, 213))
                cross = ImageDraw.Draw(tile)
                for shift in range(-tile.height, tile.width, 8):
                    cross.line((shift, tile.height, shift + tile.height, 0), fill=(251, 191, 146), width=2)
        canvas.paste(tile, (x + 3, y + 3))
    return png(canvas)


def _tile(height: int, width: int, scale: int) -> tuple[int, int]:
    """Height and width of a picture in a grid: a whole multiple of its own, or reduced where it is larger than MAX_TILE."""
    longer = max(height, width)
    if longer <= MAX_TILE:
        return height * scale, width * scale
    return max(1, round(height * MAX_TILE / longer)), max(1, round(width * MAX_TILE / longer))
