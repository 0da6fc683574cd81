"""The parts of every figure: axes, lines with their marks, legends, and the bytes of a finished figure."""

import io
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from periln.eval.figures.plots import Plot
from periln.eval.figures.selection import View
from periln.runkit.figure_style import STYLE

WIDTH, DPI = 7.5, 120  # 900 pixels
DARK = "#444444"
DEPTH = "layer (attention at the half, MLP at the whole)"
DEPTH_CROSS = "Dotted: a run that diverged, with a cross at its last finite value over depth."


class NotRecorded(Exception):
    """A figure cannot be drawn from these runs; the message says what it needs and which command makes that."""


@dataclass(frozen=True)
class Chart:
    """A finished figure, its description in words, and its numbers where a page can draw it (`plots.py`)."""

    figure: Figure
    caption: str
    plot: Plot | None = None


def grid(rows: int, columns: int, row_height: float = 2.35, **kwargs) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(WIDTH, row_height * rows + 0.5), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def image_bytes(figure: Figure, kind: str = "png") -> bytes:
    """The figure as `png` or `svg`; the same figure gives the same bytes."""
    data = io.BytesIO()
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[kind]
    figure.savefig(data, format=kind, metadata=metadata)
    return data.getvalue()


def settings() -> AbstractContextManager[None]:
    """A context in which only the project's style counts, not the user's Matplotlib settings."""
    return mpl.rc_context(mpl.rcParamsDefault | STYLE | {"svg.hashsalt": "periln", "svg.fonttype": "path"})


def plain(label: str, **style) -> Line2D:
    """A legend entry without data."""
    return Line2D([], [], label=label, **({"color": DARK} | style))


def legend(
    figure: Figure,
    view: View,
    series: Sequence[str] | None = None,
    markers: bool = True,
    more: Sequence[Line2D] = (),
    average: str = "",
    rates: dict[str, str] | None = None,
) -> None:
    """One legend above the figure: the placements, then what lines and marks mean.

    `rates` are the learning rates of series with only one: they are shown next to its name.
    """
    runs = view.runs[view.runs.series.isin(series)] if series is not None else view.runs
    handles = []
    for name in runs.series.unique():
        look = view.looks[name]
        mark = look.marker if markers else ""
        label = view.label(name) + (f" at {rates[name]}" if rates else "")
        handles.append(Line2D([], [], **look.line, marker=mark, linewidth=2.2, label=label))
    if average and runs.groupby(["series", "learning_rate", "size"]).seed.nunique().max() > 1:
        handles.append(plain(average, linewidth=2.2))
        handles.append(plain("one seed", linewidth=0.9, alpha=0.6))
    if (runs.status == "diverged").any():
        handles.append(plain("diverged", linewidth=1, linestyle=":", marker="x"))
    handles += more
    # An entry is its handle (about 8 letters wide) and its label; a line holds about 108 letters.
    widths = [len(str(handle.get_label())) + 8 for handle in handles]
    columns = len(handles) if sum(widths) < 108 else max(1, min(len(handles), 108 // max(widths)))
    by_row = [handle for i in range(columns) for handle in handles[i::columns]]  # a legend fills its columns first
    figure.legend(handles=by_row, loc="outside upper center", ncols=columns, frameon=False)


def curves(ax: Axes, data: pd.DataFrame, view: View, runs: pd.DataFrame, markers: bool, average: str = "mean") -> None:
    """`data` (run, x, y): a thin line a run, a thick one for the seeds that did not diverge, `x` where one did."""
    for series, same in runs.groupby("series", sort=False):
        look = view.looks[series]
        style = {"color": look.colour}
        alive = same[same.status != "diverged"].run
        for run, status in zip(same.run, same.status, strict=True):
            line = data[(data.run == run) & np.isfinite(data.y)]
            if status == "diverged" and len(line):
                ax.plot(line.x, line.y, linewidth=1.1, linestyle=":", **style)
                ax.plot(line.x.iloc[-1:], line.y.iloc[-1:], "x", markersize=8, markeredgewidth=2, **style)
            elif status != "diverged" and len(alive) > 1:
                ax.plot(line.x, line.y, linewidth=0.9, alpha=0.6, **style)
        of = data[data.run.isin(alive) & np.isfinite(data.y)].groupby("x").y
        whole = of.agg(average)[of.count() == len(alive)]
        every = max(1, len(whole) // 20)
        mark: dict[str, Any] = {"marker": look.marker, "markevery": every} if markers else {}
        ax.plot(whole.index, whole.to_numpy(), linewidth=2.0, linestyle=look.style, **mark, **style)


def wrapped(title: str, columns: int) -> str:
    """A panel's title, broken so that it stays above its own panel."""
    width = {1: 90, 2: 38, 3: 26}[columns]
    return "\n".join(line for part in title.split("\n") for line in textwrap.wrap(part, width) or [""])


def hide_empty(axes: np.ndarray, used: int) -> None:
    """Hide the cells of a grid beyond its panels, and label the axes above."""
    for i, ax in enumerate(axes.flat):
        if i >= used:
            ax.set_visible(False)
        elif i + axes.shape[1] >= used:
            ax.tick_params(labelbottom=True)


def log_axis(ax: Axes) -> None:
    """A log axis of at least a decade, labelled at powers of ten only."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high < 10 * low:
        middle = (low * high) ** 0.5
        ax.set_ylim(middle / 10**0.5, middle * 10**0.5)
    ax.yaxis.set_major_locator(LogLocator(numticks=8))
    ax.yaxis.set_minor_locator(NullLocator())


def rate_axis(ax: Axes, rates: Sequence[float]) -> None:
    """A log axis of learning rates, labelled at the rates that were run as far as there is room."""
    ax.set_xscale("log")
    ticks = sorted(set(rates))
    low, high = ticks[0], ticks[-1]
    ax.set_xlim(low / 1.5, high * 1.5)
    roomy: list[float] = []
    least = (high / low) ** (1 / 6) if high > low else 1.0
    for tick in ticks:
        if not roomy or tick / roomy[-1] >= least * 0.999:
            roomy.append(tick)
    ax.set_xticks(roomy, labels=[f"{tick:g}" for tick in roomy])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_minor_locator(NullLocator())


def whole_numbers(ax: Axes, label: str = "", bins: int = 7) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(nbins=bins, integer=True))
    if label:
        ax.set_xlabel(label)


def at_least(ax: Axes, span: float) -> None:
    """Widen a y axis around its middle to a span, so that equal values do not look far apart."""
    low, high = ax.get_ylim()
    if high - low < span:
        middle = (low + high) / 2
        ax.set_ylim(middle - span / 2, middle + span / 2)


def step_colours(steps: Sequence[float]) -> tuple[mpl.colors.Colormap, mpl.colors.Normalize]:
    """A colour scale for ordered things (steps, layers): light is early; the palest yellow is left out."""
    low, high = min(steps), max(steps)
    span = (high - low) or 1
    return mpl.colormaps["viridis_r"], mpl.colors.Normalize(low - 0.25 * span, high if high > low else low + span)
