"""What all figures share: colours, axes, and pictures as data URIs. No network, no fonts from elsewhere."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np

COLOURS = {"before": "#c2410c", "after": "#0f766e", "retrained": "#4f46e5", "held-out": "#64748b"}
FURTHER = ("#818cf8", "#a78bfa", "#c084fc", "#6366f1")
"""retrained_2 and so on."""
INK, GRID_LINE, SPINE = "#1e293b", "#e2e8f0", "#94a3b8"


def colour_of(column: str) -> str:
    """The colour of a column; retrained models have relatives of one colour."""
    if column in COLOURS:
        return COLOURS[column]
    number = column.rpartition("_")[2]
    return FURTHER[int(number) % len(FURTHER)] if number.isdigit() else COLOURS["held-out"]


def new_axes(x: str, y: str, size: tuple[float, float] = (5.4, 3.5)):
    """A figure with one pair of axes: ``(figure, axes)``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(color=GRID_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(SPINE)
    return figure, axes


def logarithmic(axes) -> None:
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


def legend(axes, **options: Any) -> None:
    """A legend, where something is named."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, **options)


def svg(figure) -> str:
    """A figure as an SVG data URI, the same bytes each time."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "jaxunlearn", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return data_uri(buffer.getvalue(), "image/svg+xml")


def png(image) -> str:
    """A PIL image as a PNG data URI."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return data_uri(buffer.getvalue(), "image/png")


def data_uri(data: bytes, kind: str) -> str:
    """Bytes as the address of a picture inside the page."""
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def finite(value: Any) -> bool:
    """Whether a value of the log is a finite number."""
    return isinstance(value, int | float) and bool(np.isfinite(value))
