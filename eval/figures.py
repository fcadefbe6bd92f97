"""Figures of the report as data URIs: curves as SVG, sample grids as PNG. No network, no fonts from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.measure import LOSSES, Column
from eval.records import find
from eval.references import References

COLOURS = {"before": "#c2410c", "after": "#0f766e", "retrained": "#4f46e5", "held-out": "#64748b"}
INK, GRID_LINE = "#1e293b", "#e2e8f0"
BORDER = (194, 65, 12)
ROUND_TRIP = {"color": "#64748b", "linewidth": 1, "linestyle": "-.", "label": "through the autoencoder alone"}
MAX_TILE = 96  # pixels; larger pictures are shown reduced


def curves(
    report: Mapping[str, Any], columns: Mapping[str, Column], refs: References, log: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """All curves that the data allows: name -> SVG data URI."""
    import matplotlib

    matplotlib.use("Agg")
    good = {name: column for name, column in columns.items() if not column.failed}
    figures = {
        "training": _training(log),
        "loss_forget": _loss(report, good, "loss_forget"),
        "loss_keep": _loss(report, good, "loss_keep"),
        "nearest_forget": _nearest_forget(good, refs),
        "nearest_keep": _nearest_keep(report, good, refs),
        "injection": _injection(report, good, refs),
    }
    return {name: figure for name, figure in figures.items() if figure}


def _axes(x: str, y: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(color=GRID_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#94a3b8")
    return figure, axes


def _logarithmic(axes) -> None:
    """A logarithmic y axis with plain numbers, where the values span enough for one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    data = [line.get_ydata() for line in axes.lines if len(line.get_ydata()) > 2]
    if data and min(map(np.min, data)) > 0 and max(map(np.max, data)) / min(map(np.min, data)) < 4:
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 3.0, 5.0)))
    axes.yaxis.set_minor_formatter(plain if high / low < 100 else NullFormatter())
    axes.tick_params(which="minor", colors=INK, labelsize=9)


def _svg(figure) -> str:
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "jaxunlearn", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _legend(axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def _training(log: Sequence[Mapping[str, Any]]) -> str | None:
    """Loss parts of the unlearning stage over its steps."""
    rows = [row for row in log if row.get("stage") == "unlearn" and "step" in row]
    parts = sorted({key for row in rows for key in row if key.startswith("loss/")})
    series = {part: [(row["step"], row[part]) for row in rows if _finite(row.get(part))] for part in parts}
    series = {part: np.array(points) for part, points in series.items() if len(points) > 1}
    if not series:
        return None
    figure, axes = _axes("unlearning step", "loss per term")
    colours = {"loss/forget": COLOURS["before"], "loss/keep": COLOURS["after"]}
    for part, points in series.items():
        line = axes.plot(*points.T, color=colours.get(part), alpha=0.3, linewidth=1.0)[0]
        window = max(1, len(points) // 25)
        smooth = np.convolve(points[:, 1], np.ones(window) / window, mode="valid")
        at = points[window - 1 :, 0]
        axes.plot(at, smooth, color=line.get_color(), linewidth=2, label=part.removeprefix("loss/"))
    if all(np.all(points[:, 1] > 0) for points in series.values()):
        _logarithmic(axes)
    _legend(axes)
    return _svg(figure)


def _loss(report, columns: Mapping[str, Column], metric: str) -> str | None:
    """Loss per t of one set for each column; held-out images are the yardstick."""
    unit = "latent number" if report["autoencoder"] else "pixel"
    figure, axes = _axes("timestep t (0 is cleanest)", f"denoising loss per {unit}")
    t = report["settings"]["loss_t"]
    for name, column in columns.items():
        for which, style, label in ((metric, "o-", name), (LOSSES["held_out"], "s:", f"held-out, {name}")):
            if which not in column.arrays or (which != metric and name != "before"):
                continue
            colour = COLOURS[name] if which == metric else COLOURS["held-out"]
            axes.plot(t, column.arrays[which].mean(axis=0), style, color=colour, label=label, markersize=4)
    if not axes.lines:
        return None
    _logarithmic(axes)
    _legend(axes)
    return _svg(figure)


def _histogram(axes, values: Mapping[str, np.ndarray]) -> None:
    top = max(float(v.max()) for v in values.values())
    bins = np.linspace(0, top * 1.02, 60)
    for name, distances in values.items():
        weights = np.full(len(distances), 1 / len(distances))
        axes.hist(distances, bins, weights=weights, histtype="stepfilled", alpha=0.15, color=COLOURS[name])
        axes.hist(distances, bins, weights=weights, histtype="step", linewidth=1.6, color=COLOURS[name], label=name)


def _nearest_forget(columns: Mapping[str, Column], refs: References) -> str | None:
    values = {name: c.arrays["nearest_forget"] for name, c in columns.items() if "nearest_forget" in c.arrays}
    if not values:
        return None
    figure, axes = _axes("distance of a sample to the forget set (rms)", "share of samples")
    _histogram(axes, values)
    if len(refs.forget) == 1:
        threshold, strict = float(refs.calibration.threshold[0]), float(refs.calibration.strict_threshold[0])
        axes.axvline(threshold, color=INK, linewidth=1, linestyle="--", label="copy threshold")
        axes.axvline(strict, color=INK, linewidth=1, linestyle=":", label="strict threshold")
    if len(refs.forget) == 1 and refs.round_trip is not None:
        axes.axvline(float(refs.round_trip.rms[0]), **ROUND_TRIP)
    _logarithmic(axes)
    _legend(axes)
    return _svg(figure)


def _nearest_keep(report, columns: Mapping[str, Column], refs: References) -> str | None:
    values = {name: c.arrays["nearest_keep"] for name, c in columns.items() if "nearest_keep" in c.arrays}
    if not values:
        return None
    figure, axes = _axes("distance of a sample to its nearest keep image (rms)", "share of samples")
    _histogram(axes, values)
    control = find(report["evaluation"]["control"], "nearest_keep_median")
    if control is not None and control["value"] is not None:
        label = "held-out images, median"
        axes.axvline(control["value"], color=COLOURS["held-out"], linewidth=1.4, linestyle="--", label=label)
    _legend(axes)
    return _svg(figure)


def _injection(report, columns: Mapping[str, Column], refs: References) -> str | None:
    """Distance to the forget image after noising to t and denoising, mean and range over copies."""
    figure, axes = _axes("noised to timestep t", "distance to the forget image (rms)")
    t = np.array(report["settings"]["injection_t"])
    for name, column in columns.items():
        distance = column.arrays.get("injection_distance")
        if distance is None or not np.all(np.isfinite(distance)):
            continue
        flat = distance.transpose(1, 0, 2).reshape(len(t), -1)
        low, high = np.quantile(flat, [0.1, 0.9], axis=1)
        axes.fill_between(t, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
        axes.plot(t, flat.mean(axis=1), "o-", color=COLOURS[name], label=name, markersize=4)
    if not axes.lines:
        return None
    if len(refs.forget) == 1:
        axes.axhline(
            float(refs.calibration.threshold[0]), color=INK, linewidth=1, linestyle="--", label="copy threshold"
        )
    if refs.round_trip is not None:
        axes.axhline(float(refs.round_trip.rms[refs.injected].mean()), **ROUND_TRIP)
    _legend(axes)
    return _svg(figure)


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


def png(image) -> str:
    """A PIL image as a PNG data URI."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))
