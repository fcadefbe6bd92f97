"""``selection.png``: the curves behind an automatic choice, and what was chosen, in one picture."""

from __future__ import annotations

import io
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORGET, KEEP, CHOSEN, INK, LINE = "#c2410c", "#64748b", "#0f766e", "#1e293b", "#e2e8f0"


def draw_selection(path: pathlib.Path, selection: Any, num_steps: int, summary: str) -> None:
    """Draws the curves that there are: spectra, loss gap, resolved frequencies, shares.

    Args:
      path: the PNG file; it appears whole.
      selection: :class:`train.auto_select.Selection`.
      num_steps: T.
      summary: the title.
    """
    from matplotlib.figure import Figure

    curves, window = selection.curves, tuple(selection.select["window"])
    window = (0, num_steps) if window == (0, 0) else window
    panels = [
        draw
        for name, draw in (("bins", _spectra), ("gap", _gap), ("resolved_bins", _resolved), ("share", _share))
        if name in curves
    ]
    figure = Figure(figsize=(5.0 * len(panels), 3.9), layout="constrained", dpi=130)
    for axes, draw in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels):
        draw(axes, selection, window, num_steps)
        axes.grid(color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{selection.rule}: {summary}", color=INK, fontsize=11)
    save_figure(path, figure)


def save_figure(path: pathlib.Path, figure: Figure) -> None:
    """Writes a matplotlib figure as a PNG file, complete or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content.getvalue())
    temporary.replace(path)


def _spectra(axes, selection, window, num_steps) -> None:
    curves, select = selection.curves, selection.select
    bins = curves["bins"]
    for name, colour in (("forget", FORGET), ("keep", KEEP)):
        power = curves.get(f"{name}_power")
        if power is not None and np.any(power > 0):
            axes.plot(
                bins, np.where(power > 0, power, np.nan), "o-", color=colour, markersize=3, label=f"{name} images"
            )
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=":", label="white noise")
    last = bins[-1]
    cutoff = np.atleast_1d(select["cutoff"])
    if select["filter"] != "none" and len(cutoff) <= 2:
        # The zero frequency is shell 0; Nyquist is half the shorter side in bins, sqrt(2) of it the last shell.
        radii = cutoff * last / np.sqrt(2)
        low, high = {"low_pass": (0, radii[0]), "high_pass": (radii[0], last), "band": tuple(radii[[0, -1]])}[
            select["filter"]
        ]
        axes.axvspan(low, min(high, last), color=CHOSEN, alpha=0.12, label="unlearned frequencies")
    axes.set_yscale("log")
    axes.set_xlabel("radius in bins (cycles per image)")
    axes.set_ylabel("power")
    axes.set_title("what the images hold", fontsize=10)


def _span(axes, window, num_steps) -> None:
    axes.axvspan(*window, color=CHOSEN, alpha=0.12, label=f"window [{window[0]}, {window[1]})")
    axes.set_xlim(0, num_steps)
    axes.set_xlabel("t (0 is cleanest)")


def _gap(axes, selection, window, num_steps) -> None:
    t, gap, error = (selection.curves[name] for name in ("gap_t", "gap", "gap_error"))
    axes.fill_between(t, gap - 3 * error, gap + 3 * error, color=FORGET, alpha=0.2, label="3 standard errors")
    axes.plot(t, gap, "o-", color=FORGET, markersize=3, label="1 - loss(forget) / loss(held out)")
    axes.axhline(0, color=INK, linewidth=0.8)
    _span(axes, window, num_steps)
    axes.set_title("what the model knows of the forget images", fontsize=10)


def _resolved(axes, selection, window, num_steps) -> None:
    bins = selection.curves["resolved_bins"]
    axes.plot(np.arange(len(bins)), bins, color=KEEP, label="resolved radius of the forget images")
    last = selection.curves["bins"][-1]
    if np.ndim(selection.select["cutoff"]) == 1 and len(selection.select["cutoff"]) > 2:
        radii = np.asarray(selection.select["cutoff"]) * last / np.sqrt(2)
        axes.plot(np.arange(len(radii)), radii, color=CHOSEN, label="cutoff")
    axes.set_ylabel("radius in bins")
    _span(axes, window, num_steps)
    axes.set_title("what the noise leaves", fontsize=10)


def _share(axes, selection, window, num_steps) -> None:
    share = selection.curves["share"]
    axes.plot(np.arange(len(share)), share, color=FORGET, label="share of a forget image among all training images")
    for level in (0.05, 0.99):
        axes.axhline(level, color=INK, linewidth=0.8, linestyle=":")
    _span(axes, window, num_steps)
    axes.set_title("when it is decided that a forget image comes out", fontsize=10)
