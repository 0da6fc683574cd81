"""Angular distance between the hidden states of layers (the paper's Figures 7a, 7c, 7d)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import cm
from matplotlib import colors as mcolors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from periln.eval.figures.layer_rows import BENCH, angle_rows, source_words
from periln.eval.figures.measured_models import STAGE
from periln.eval.figures.pieces import DPI, WIDTH, Chart, NotRecorded, curves, legend, whole_numbers, wrapped
from periln.eval.figures.plots import keys_of, numbers, style_of
from periln.eval.figures.selection import View, at_best_rate, rates_words, seeds_words, sizes
from periln.eval.records.words import listed
from periln.runkit.placements import BY_NORMS

CAPTION = (
    "Angular distance, in units of pi: 0 is the same direction, 0.5 a right angle. Above, between the streams before "
    "and after a layer (drawn at the layer); below, between the streams after any two layers (0: what enters layer 1), "
    "mean of the seeds; blank: not measured."
)


def _at(view: View, last: bool) -> tuple[View, pd.DataFrame]:
    rows = angle_rows(view)
    steps = rows.groupby("run").step
    rows = rows[rows.step == (steps.transform("max") if last else steps.transform("min"))]
    return at_best_rate(view.where(run=set(rows.run))), rows


def _draw(used: View, rows: pd.DataFrame, when: str) -> Chart:
    rows = rows[rows.run.isin(used.runs.run)]
    if not np.isfinite(rows.value.astype(float)).any():
        raise NotRecorded("None of the angular distances is finite, since the checkpoints' hidden states are not.")
    several = len(sizes(used)) > 1
    cells = list(used.runs.groupby(["size", "series"], sort=False))
    columns = min(3, len(cells))
    lines = -(-len(cells) // columns)
    tops = sizes(used)
    figure = Figure(figsize=(WIDTH, 2.4 * len(tops) + 2.6 * lines + 0.4), dpi=DPI, layout="constrained")
    parts = figure.add_gridspec(len(tops) + lines, columns, height_ratios=[2.2] * len(tops) + [2.6] * lines)
    for i, size in enumerate(tops):
        ax = figure.add_subplot(parts[i, :])
        _neighbours(ax, used.where(size=size), rows)
        ax.set_title(f"a layer's angular distance, {when}" + (f", {size}" if several else ""))
    norm = mcolors.Normalize(0, max(0.05, float(np.nanmax(rows.value.astype(float)))))
    maps = []
    for i, ((size, series), same) in enumerate(cells):
        ax = figure.add_subplot(parts[len(tops) + i // columns, i % columns])
        _pairs(ax, rows[rows.run.isin(same.run)], norm)
        ax.set_title(wrapped(used.label(series) + (f", {size}" if several else ""), columns))
        maps.append(ax)
    bar = figure.colorbar(cm.ScalarMappable(norm, "viridis"), ax=maps, aspect=24)
    bar.set_label("angular distance / pi")
    legend(figure, used, average="mean of the seeds")
    source = source_words(used, rows.assign(source="bench"))
    said = f"{CAPTION} {source} {rates_words(used)} {seeds_words(used, rows.run)}{used.names}"
    plot = {"kind": "pairs", "name": "angular distance / pi", "most": float(f"{norm.vmax:.3g}")}
    return Chart(figure, said, plot | {"maps": _maps(used, rows)})


def _maps(view: View, rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The same for a page: a map a run."""
    maps = []
    for _, run in view.runs.iterrows():
        field = _field(rows[rows.run == run.run])
        layers = numbers(range(len(field)))
        maps.append({"x": layers, "y": layers, "v": [numbers(line, 3) for line in field], "k": keys_of(view, run)})
        maps[-1] |= style_of(view, run)
    return maps


def _field(rows: pd.DataFrame) -> np.ndarray:
    """The distance between any two layers, the mean over the runs; NaN where none was measured."""
    count = int(max(rows.layer.max(), rows.other.max())) + 1
    field = np.full((count, count), np.nan)
    for (layer, other), value in rows.groupby(["layer", "other"]).value.mean().items():
        field[int(layer), int(other)] = field[int(other), int(layer)] = value
    return field


def _neighbours(ax: Axes, used: View, rows: pd.DataFrame) -> None:
    low, high = rows[["layer", "other"]].min(axis=1), rows[["layer", "other"]].max(axis=1)
    near = rows[high - low == 1]
    data = pd.DataFrame({"run": near.run, "x": high[near.index].astype(float), "y": near.value.astype(float)})
    curves(ax, data.sort_values("x", kind="stable"), used, used.runs, markers=True)
    ax.set_ylabel("distance / pi")
    ax.set_ylim(bottom=0)
    whole_numbers(ax, "layer")


def _pairs(ax: Axes, rows: pd.DataFrame, norm: mcolors.Normalize) -> None:
    ax.imshow(_field(rows), origin="lower", cmap="viridis", norm=norm, interpolation="nearest")
    ax.grid(visible=False)
    whole_numbers(ax, "layer")
    ax.yaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))


def _from_the_start(view: View) -> View:
    """The runs whose first measured checkpoint is their start, or that have a later one too.

    Raises:
        NotRecorded: there is none.
    """
    trained = view.where(stage="pretrain")  # measured models are not at their start
    if trained.runs.empty:
        raise NotRecorded("Needs runs: a model that was measured is not at initialization; Figure 7c shows it.")
    steps = angle_rows(trained).groupby("run").step.agg(["min", "max"])
    early = steps[(steps["min"] == 0) | (steps["min"] < steps["max"])]
    if early.empty:
        raise NotRecorded(
            "Needs angular distances at initialization; these runs have one measured checkpoint each, of step "
            f"{listed(steps['min'])}: keep more (keep_every in the recipe), then {BENCH}."
        )
    return trained.where(run=set(early.index))


def distances(last: bool) -> Callable[[View], Chart]:
    """Figures 7(a), at initialization, and 7(c), at the end."""

    def draw(view: View) -> Chart:
        view = view if last else _from_the_start(view)
        used, rows = _at(view, last)
        steps = rows.step[rows.run.isin(used.runs.run)]
        when = "at the end" if last else "at initialization"
        when = "as measured" if (used.runs.stage == STAGE).all() else when
        if not last and steps.max() > 0:
            when = f"at the first measured step, {listed(steps)} (not initialization)"
        drawn = _draw(used, rows, when)
        return Chart(drawn.figure, f"{drawn.caption} Measured at step {listed(steps)}.", drawn.plot)

    return draw


def frozen(view: View) -> Chart:
    """Figure 7(d): Peri-LN with gamma frozen at 1, with Peri-LN and Pre-LN, at the end."""
    used, rows = _at(view, last=True)
    if not used.runs.frozen.any():
        raise NotRecorded(
            "Needs a checkpoint with output norms whose gamma is frozen at 1 (model.output_norm_learnable: false): "
            "periln pretrain --config scripts/recipes/400m-peri-frozen-gamma.yaml, then "
            "periln bench on it."
        )
    placements = set(used.runs.placement[used.runs.frozen]) | {BY_NORMS["A"]}
    used = used.where(placement=placements)
    drawn = _draw(used, rows, "at the end")
    return Chart(drawn.figure, f"{drawn.caption} Measured at step {listed(rows.step)}.", drawn.plot)
