"""What is left below FP16's largest number: over depth, and as a map of layers and steps."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import cm
from matplotlib import colors as mcolors
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator

from periln.eval.figures.depth import STREAM, panels
from periln.eval.figures.layer_rows import layer_rows, source_words
from periln.eval.figures.pieces import (
    DEPTH,
    Chart,
    NotRecorded,
    curves,
    grid,
    hide_empty,
    legend,
    plain,
    whole_numbers,
    wrapped,
)
from periln.eval.figures.plots import MOST_STEPS, depth_lines, keys_of, numbers, spread, style_of
from periln.eval.figures.selection import View, at_best_rate, rate_names, rates_words, seeds_words, sizes
from periln.eval.records.derived import by_depth
from periln.eval.records.words import recorded_steps
from periln.runkit.number_format import FP16

TENSORS = {"stream": "stream", "residual_add": "residual sum", "branch": "module output"}
OVERFLOW, NOT_MEASURED = "#D55E00", "#EEEEEE"
MOST_BITS = 16


def _peaks(view: View) -> pd.DataFrame:
    """max |x| rows of the three tensors; what is not finite becomes infinity."""
    parts, missing = [], None
    for tensor in TENSORS:
        try:
            parts.append(layer_rows(view, tensor, "the largest |x|", ("max_abs",), both=True))
        except NotRecorded as error:
            missing = error
    if not parts and missing is not None:
        raise missing
    rows = pd.concat(parts, ignore_index=True)
    rows = rows[rows.sublayer.isin(STREAM)]  # not what follows the final norm
    return rows.assign(value=rows.value.where(np.isfinite(rows.value), np.inf))


def peaks_by_layer(view: View) -> Chart:
    """The largest |x| of every layer against FP16's largest number."""
    rows = _peaks(view)
    used = view.where(run=set(rows.run))
    below, words = panels(used)
    figure, axes = grid(len(below), 3, row_height=2.7, sharey=True, sharex=len(sizes(used)) == 1)
    for row, (title, of) in zip(axes, below, strict=True):
        for ax, (tensor, name) in zip(row, TENSORS.items(), strict=True):
            data = by_depth(rows[rows.tensor == tensor], "max_abs")
            data.y = data.y.where(np.isfinite(data.y), 2 * FP16.largest)
            data = data.groupby(["run", "x"], as_index=False).y.max()
            curves(ax, data[data.run.isin(of.runs.run)], view, of.runs, markers=True, average="max")
            ax.axhline(FP16.largest, color="black", linewidth=1.4, linestyle="--")
            ax.set_yscale("log", base=2)
            ax.set_title(name)
            whole_numbers(ax)
        row[0].set_ylabel(f"{title}\nlargest |x|")
        _bits_axis(row[2])
    axes[-1, 1].set_xlabel(DEPTH)
    panels_ = [{"title": "", "y": f"largest |x|, {name}", "log": True} for name in TENSORS.values()]
    largest = (
        rows.groupby(["run", "tensor", "layer", "sublayer"], as_index=False).value.max().assign(stat="max_abs", step=0)
    )
    lines = []
    for i, tensor in enumerate(TENSORS):
        data = by_depth(largest, "max_abs", tensor)
        lines += depth_lines(used, data.assign(y=data.y.where(np.isfinite(data.y), 2 * FP16.largest)), i)
    axes[0, 0].set_ylim(top=4 * FP16.largest)
    line = plain(FP16.limit, color="black", linewidth=1.4, linestyle="--")
    legend(figure, used, more=[line], average="largest of the seeds")
    beyond = " A value that was not finite is drawn above the line, at 131008." if np.isinf(rows.value).any() else ""
    return Chart(
        figure,
        f"The largest |x| of each layer over all recorded steps ({recorded_steps(rows)}) and, thick, over the seeds "
        "that did not diverge; the dashed line is FP16's largest number, the right axis the bits that are left. The "
        "residual sum is taken before a Post-LN norm, the module output before an output norm."
        f"{beyond} {source_words(view, rows)}{words} {seeds_words(used, rows.run)}{used.names}",
        {
            "kind": "lines",
            "x": DEPTH,
            "combine": "max",
            "limit": {"y": FP16.largest, "name": FP16.limit},
            "panels": panels_,
            "lines": [{key: value for key, value in line.items() if key != "t"} for line in lines],
        },
    )


def _bits_axis(ax: Axes) -> None:
    bits = ax.secondary_yaxis("right", functions=(lambda y: y, lambda y: y))
    bits.set_yscale("log", base=2)
    left = np.arange(0, 40, 4)
    bits.yaxis.set_major_locator(FixedLocator(list(FP16.largest / 2.0**left)))
    bits.yaxis.set_minor_locator(FixedLocator([]))
    bits.yaxis.set_major_formatter(lambda y, _: f"{np.log2(FP16.largest / y):.0f}" if y > 0 else "")
    bits.set_ylabel("bits left")


# --- the map -------------------------------------------------------------------------------------------------


def _edges(values: list[float]) -> np.ndarray:
    """Cell borders half-way between the values; the outer cells end at theirs."""
    v = np.asarray(values, float)
    if len(v) == 1:
        return np.array([v[0] - 0.5, v[0] + 0.5])
    return np.concatenate([v[:1], (v[1:] + v[:-1]) / 2, v[-1:]])


def _step_edges(steps: list[float], every: np.ndarray) -> np.ndarray:
    """The same for steps; a single one beside panels with more is as wide as the narrowest cell between theirs."""
    if len(steps) > 1 or len(every) == 1:
        return _edges(steps)
    half = np.diff(every).min() / 2
    return np.clip([steps[0] - half, steps[0] + half], every[0], every[-1])


def headroom_map(view: View) -> Chart:
    """Layer x step: the least bits between max |x| and 65504 over stream, residual sum and module output."""
    rows = _peaks(view)
    used = view.where(run=set(rows.run))
    cells = list(used.runs.groupby(["size", "learning_rate", "series"], sort=False))
    words = ""
    if len(cells) > 12:
        used = at_best_rate(used)
        cells = list(used.runs.groupby(["size", "learning_rate", "series"], sort=False))
        words = f" {rates_words(used)}"
    rows = rows[rows.run.isin(used.runs.run)]
    several = len(sizes(used)) > 1
    columns = min(3, len(cells))
    figure, axes = grid(-(-len(cells) // columns), columns, row_height=2.7)
    palette = cm.cividis.copy()
    norm = mcolors.Normalize(0, MOST_BITS)
    overflow = gap = False
    every = np.unique(rows.step.astype(float))
    for ax, ((size, rate, series), same) in zip(axes.flat, cells, strict=False):
        lost = (same.status == "diverged").sum()
        bits = _map(ax, rows[rows.run.isin(same.run)], every, palette, norm)
        overflow, gap = overflow or bool((bits < 0).any()), gap or bool(np.isnan(bits).any())
        least = "overflow" if (bits < 0).any() else f"least {np.nanmin(bits):.1f} bits"
        name = ", ".join([used.label(series), *rate_names(rate), *([size] if several else [])])
        ended = "" if not lost else " (diverged)" if lost == len(same) else f" ({lost} of {len(same)} diverged)"
        ax.set_title(wrapped(f"{name}{ended}\n{least}", columns), fontsize=8.5)
    gap |= _same_steps(list(axes.flat)[: len(cells)])
    hide_empty(axes, len(cells))
    for ax in axes[:, 0]:
        ax.set_ylabel("layer")
    figure.supxlabel("step", fontsize=9.5)
    bar = figure.colorbar(cm.ScalarMappable(norm, palette), ax=axes, extend="max", aspect=30)
    bar.set_label(f"bits left below {FP16.limit}")
    patches = [Patch(color=OVERFLOW, label=f"overflow: not finite, or above {FP16.limit}")] * overflow
    patches += [Patch(color=NOT_MEASURED, label="not recorded")] * gap
    if patches:
        figure.legend(handles=patches, loc="outside upper center", ncols=2, frameon=False)
    return Chart(
        figure,
        f"FP16 headroom, log2({FP16.limit} / max |x|): the least over stream, residual sum and module output, and "
        f"over seeds, at the recorded steps ({recorded_steps(rows)}); attention is at the half, the MLP at the "
        f"whole number, 0 is what enters layer 1. The darker, the less is left. All panels have the same "
        f"steps; what is grey was not recorded, as after a run's end. {source_words(used, rows)}{words} "
        f"{seeds_words(used, rows.run)}{used.names}",
        {"kind": "map", "name": "bits left", "most": MOST_BITS, "maps": _maps(used, rows)},
    )


def _bits(rows: pd.DataFrame) -> tuple[list[float], list[float], np.ndarray]:
    """Steps, depths and the least bits (depth, step); NaN where nothing was recorded, -inf for what is infinite."""
    depth = rows.layer.astype(float) - 0.5 * (rows.sublayer == "attn")
    field = rows.assign(depth=depth).pivot_table(index="depth", columns="step", values="value", aggfunc="max")
    with np.errstate(divide="ignore"):  # infinity: minus infinitely many bits
        bits = np.log2(FP16.largest / field.clip(lower=1e-30).to_numpy(float))
    return list(field.columns), list(field.index), bits


def _maps(view: View, rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The same for a page: a map a run; an overflow is -1."""
    maps = []
    for _, run in view.runs.iterrows():
        of = rows[rows.run == run.run]
        worst = of.step[of.value == of.value.max()]  # stays, whichever steps are left out
        steps, depths, bits = _bits(of[of.step.isin({*spread(sorted(of.step.unique()), 2 * MOST_STEPS), *worst[:1]})])
        values = [numbers(np.where(line < 0, -1.0, line), 3) for line in bits]
        maps.append({"x": numbers(steps, 9), "y": numbers(depths), "v": values, "k": keys_of(view, run)})
        maps[-1] |= style_of(view, run)
    return maps


def _same_steps(axes: list[Axes]) -> bool:
    """One range of steps for all panels, so that a run that ended early is seen to; whether any is narrower."""
    limits = [ax.get_xlim() for ax in axes]
    low, high = min(low for low, _ in limits), max(high for _, high in limits)
    for ax in axes:
        ax.set_xlim(low, high)
    return any((start, end) != (low, high) for start, end in limits)


def _map(
    ax: Axes, rows: pd.DataFrame, every: np.ndarray, palette: mcolors.Colormap, norm: mcolors.Normalize
) -> np.ndarray:
    """Draw one map; returns its bits (depth, step), NaN where nothing was recorded. `every`: all panels' steps."""
    steps, depths, bits = _bits(rows)
    over = bits < 0
    x, y = _step_edges(steps, every), _edges(depths)
    ax.set_facecolor(NOT_MEASURED)
    ax.pcolormesh(x, y, np.ma.masked_invalid(np.where(over, np.nan, bits)), cmap=palette, norm=norm)
    ax.pcolormesh(x, y, np.ma.masked_where(~over, over), cmap=mcolors.ListedColormap([OVERFLOW]))
    ax.grid(visible=False)
    whole_numbers(ax, bins=4)
    if len(every) == 1:  # a locator wants two ticks, and would write fractions of a step
        ax.xaxis.set_major_locator(FixedLocator(list(every)))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    return bits
