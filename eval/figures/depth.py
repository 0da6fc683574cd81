"""Hidden states and gradients over depth (the paper's Figures 1, 5, 6, 10, 11), and gamma over training (7b)."""

import numpy as np
import pandas as pd
from matplotlib import cm
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator

from periln.eval.figures.layer_rows import layer_rows, source_words
from periln.eval.figures.pieces import (
    DEPTH,
    DEPTH_CROSS,
    Chart,
    NotRecorded,
    at_least,
    curves,
    grid,
    hide_empty,
    legend,
    log_axis,
    step_colours,
    whole_numbers,
    wrapped,
)
from periln.eval.figures.plots import Plot, depth_lines, step_lines
from periln.eval.figures.selection import (
    MODELS,
    View,
    at_best_rate,
    rate_name,
    rate_names,
    rates_words,
    seeds_words,
    sizes,
)
from periln.eval.records.derived import at_edge, by_depth
from periln.eval.records.words import first_and_last, first_steps, recorded_steps

MOST_ROWS = 4  # of learning rates, below the initialization; more: every series at its best rate
MOST_LINES = 9  # steps in one panel
STREAM = ("embedding", "attn", "mlp")


def panels(view: View, most: int = MOST_ROWS) -> tuple[list[tuple[str, View]], str]:
    """The rows of a figure: sizes and learning rates; and what was done about many, in words."""
    several = len(sizes(view)) > 1
    rows = []
    for size in sizes(view):
        of = view.where(size=size)
        rates = sorted(of.runs.learning_rate.unique())
        rows += [(rate_name(rate) + (f", {size}" if several else ""), of.where(learning_rate=rate)) for rate in rates]
    if len(rows) <= most:
        return rows, ""
    best = at_best_rate(view)
    rows = [(f"best rates, {size}" if several else "best rates", best.where(size=size)) for size in sizes(view)]
    return rows, f" {rates_words(best)}"


def _first_and_last(view: View, rows: pd.DataFrame, stats: tuple[str, str], names: tuple[str, str], depth: str):
    data = [by_depth(rows, stat) for stat in stats]
    below, words = panels(view.where(run=set(rows.run)))
    # At initialization the learning rate has not acted yet: a seed's runs are the same run.
    first = first_steps(rows)
    start = view.runs[view.runs.run.isin(first.index)].drop_duplicates(["series", "size", "seed"])
    when = "at initialization" if (first <= 1).all() else "at the first recorded step"
    top = [(when, view.of(start.assign(status="completed")))] if len(start) else []
    if start["size"].nunique() > 1:
        top = [(f"{when}, {size}", top[0][1].where(size=size)) for size in sizes(top[0][1])]
    alike = view.runs["size"][view.runs.run.isin(rows.run)].nunique() == 1
    figure, axes = grid(len(top) + len(below), 2, sharex=alike, sharey="col")
    for i, (row, (title, of)) in enumerate(zip(axes, [*top, *below], strict=True)):
        for ax, all_steps, name in zip(row, data, names, strict=True):
            shown = at_edge(all_steps, last=i >= len(top))
            curves(ax, shown, view, of.runs, markers=True)
            if not np.isfinite(shown.y[shown.run.isin(of.runs.run)]).any():
                ax.text(0.5, 0.5, "nothing finite was recorded", transform=ax.transAxes, ha="center")
            end = title if title.startswith(MODELS) else f"at the end, {title}"
            ax.set(title=title if i < len(top) else end, ylabel=name)
            whole_numbers(ax)
            log_axis(ax)
    for ax in axes[-1]:
        ax.set_xlabel(depth)
    used = view.where(run=set(rows.run))
    legend(figure, used, average="mean of the seeds")
    lost = sorted(set(data[0].run[~np.isfinite(data[0].y)]))
    panels_ = [{"title": "", "y": name, "log": True} for name in names]
    lines = [line for i, all_steps in enumerate(data) for line in depth_lines(used, all_steps, i)]
    plot = {"kind": "lines", "x": depth, "panels": panels_, "lines": lines}
    return figure, data[0], words, lost, plot


def hidden_state(view: View) -> Chart:
    """Figures 5, 10, 11: mean |x| and variance of the stream by layer, at initialization and at the end."""
    rows = layer_rows(view, "stream", "mean |x| and variance of the hidden state", ("mean_abs", "variance"), edges=True)
    rows = rows[rows.sublayer.isin(STREAM)]
    figure, data, words, _, plot = _first_and_last(
        view, rows, ("mean_abs", "variance"), ("mean |x|", "variance"), DEPTH
    )
    return Chart(
        figure,
        "The residual stream after every sublayer (for Post-LN: after its norm), 0 is what enters layer 1; log axes. "
        f"{source_words(view, rows)} {first_and_last(data)}{words} {_cross(view, data)}{seeds_words(view, data.run)}"
        f"{view.names}",
        plot,
    )


def gradient_by_layer(view: View) -> Chart:
    """Figure 6: norm and variance of the gradient by layer, at initialization and at the end."""
    rows = layer_rows(view, "gradient", "norm and variance of the gradient", ("norm", "variance"), edges=True)
    whole = rows[rows.sublayer == "layer"]
    rows = whole if len(whole) else rows[rows.sublayer.isin(("attn", "mlp"))]
    if rows.empty:
        raise NotRecorded("Needs the gradient of each layer's parameters (tensor `gradient`, sublayer `layer`).")
    names = ("gradient norm", "gradient variance")
    figure, data, words, lost, plot = _first_and_last(view, rows, ("norm", "variance"), names, "layer")
    left_out = "Where a gradient was not finite at that step, nothing is drawn. " if lost else ""
    return Chart(
        figure,
        f"Norm and variance of the gradient of each {'layer' if len(whole) else 'sublayer'}'s parameters, without the "
        f"loss scale, before clipping; log axes. {source_words(view, rows)} {first_and_last(data)}{words} "
        f"{_cross(view, data)}{left_out}{seeds_words(view, data.run)}{view.names}",
        plot,
    )


def _cross(view: View, data: pd.DataFrame) -> str:
    lost = view.runs[view.runs.run.isin(data.run.unique()) & (view.runs.status == "diverged")]
    return f"{DEPTH_CROSS} " if len(lost) else ""


def growth(view: View) -> Chart:
    """Figure 1: variance of the stream by layer, a line a step, a panel a placement."""
    rows = layer_rows(view, "stream", "the variance of the hidden state at several steps", ("variance",))
    rows = rows[rows.sublayer.isin(STREAM)]
    used = at_best_rate(view.where(run=set(rows.run)))
    data = by_depth(rows, "variance")
    data = data[data.run.isin(used.runs.run)]
    several = len(sizes(used)) > 1
    cells = list(used.runs.groupby(["size", "series"], sort=False))
    columns = min(3, len(cells))
    figure, axes = grid(-(-len(cells) // columns), columns, row_height=2.7, sharey=True, sharex=not several)
    colours, norm = step_colours(data.step)
    ended = False
    for ax, ((size, series), same) in zip(axes.flat, cells, strict=False):
        alive = same[same.status != "diverged"]
        runs = alive if len(alive) else same
        of = data[data.run.isin(runs.run)]
        _lines_by_step(ax, of, colours, norm)
        of = data[data.run.isin(same.run)]
        infinite = not np.isfinite(of.y).all()
        ended |= infinite
        title = view.label(series) + (f", {size}" if several else "") + ("" if len(alive) else " (diverged)")
        ax.set_title(wrapped(title + (" (not finite at a step)" if infinite and len(alive) else ""), columns))
        whole_numbers(ax)
        log_axis(ax)
    hide_empty(axes, len(cells))
    for ax in axes[:, 0]:
        ax.set_ylabel("variance of the stream")
    figure.supxlabel(DEPTH, fontsize=9.5)
    bar = figure.colorbar(cm.ScalarMappable(norm, colours), ax=axes, label="step", aspect=30)
    bar.ax.set_ylim(data.step.min(), data.step.max() or 1)
    gone = " Where the variance was not finite the line ends." if ended else ""
    most = f" At most {MOST_LINES} of them are drawn." if data.step.nunique() > MOST_LINES else ""
    return Chart(
        figure,
        f"Entry-wise variance of the stream over depth, a line a recorded step ({recorded_steps(data)}),{most} "
        f"mean of the seeds that did not diverge; log axis.{gone} {rates_words(used)} {source_words(used, rows)} "
        f"{seeds_words(used, data.run)}{used.names}",
        {
            "kind": "lines",
            "x": DEPTH,
            "panels": [{"title": "", "y": "variance of the stream", "log": True}],
            "lines": depth_lines(used, data, 0),
        },
    )


def _lines_by_step(ax: Axes, data: pd.DataFrame, colours, norm) -> None:
    steps = sorted(data.step.unique())
    if len(steps) > MOST_LINES:
        steps = [steps[round(i * (len(steps) - 1) / (MOST_LINES - 1))] for i in range(MOST_LINES)]
    for step in steps:
        of = data[(data.step == step) & np.isfinite(data.y)].groupby("x").y.mean()
        ax.plot(of.index, of.to_numpy(), color=colours(norm(step)), linewidth=1.6)


def output_gamma(view: View) -> Chart:
    """Figure 7(b): the mean gamma of every output norm over training."""
    rows = layer_rows(view, "output_norm_gamma", "the gamma of output norms", ("mean",))
    if not (rows.groupby("run").step.nunique() > 1).any():
        raise NotRecorded(
            f"Needs the gamma of output norms at two steps or more; there is {recorded_steps(rows)} alone: "
            "periln pretrain with layer_stats_every records more."
        )
    used = view.where(run=set(rows.run))
    if len(used.runs.groupby(["size", "learning_rate", "series"])) > 8:
        used = at_best_rate(used)
        rows = rows[rows.run.isin(used.runs.run)]
    several = len(sizes(used)) > 1
    cells = list(used.runs.groupby(["size", "learning_rate", "series"], sort=False))
    figure, axes = grid(len(cells), 2, sharey="row")
    deepest = int(rows.layer.max())
    colours, norm = step_colours([1, deepest])
    for row, ((size, rate, series), same) in zip(axes, cells, strict=True):
        alive = same[same.status != "diverged"]
        runs = (alive if len(alive) else same).run
        for ax, sublayer in zip(row, ("attn", "mlp"), strict=True):
            data = rows[rows.run.isin(runs) & (rows.sublayer == sublayer)]
            for layer, of in data.groupby("layer"):
                mean = of.groupby("step").value.mean()
                mark = "." if len(mean) < 40 else ""
                ax.plot(mean.index, mean.to_numpy(float), color=colours(norm(layer)), marker=mark)
            where = ", ".join([view.label(series), *rate_names(rate), *([size] if several else [])])
            name = {"attn": "attention", "mlp": "MLP"}[sublayer]
            ax.set_title(wrapped(where, 2) + f"\n{name}" + ("" if len(alive) else " (diverged)"))
            ax.margins(y=0.1)
            at_least(ax, 0.1)  # equal values are a line, not the noise of their last digit
            ax.ticklabel_format(axis="y", useOffset=False)
            whole_numbers(ax)
        row[0].set_ylabel("mean gamma")
    for ax in axes[-1]:
        ax.set_xlabel("step")
    bar = figure.colorbar(cm.ScalarMappable(norm, colours), ax=axes, label="layer", aspect=18 * len(cells))
    if deepest > 1:
        bar.ax.set_ylim(1, deepest)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return Chart(
        figure,
        f"The mean over channels of every output norm's gamma at the recorded steps ({recorded_steps(rows)}), a line a "
        "layer, averaged over the seeds that did not diverge. Only placements with output norms have a gamma. "
        f"{seeds_words(used, rows.run)}{used.names}",
        _gamma_plot(used, rows, colours, norm),
    )


def _gamma_plot(view: View, rows: pd.DataFrame, colours, norm) -> Plot:
    """The same for a page: a line a run and layer."""
    lines = []
    for i, sublayer in enumerate(("attn", "mlp")):
        for layer, of in rows[rows.sublayer == sublayer].groupby("layer"):
            data = pd.DataFrame({"run": of.run, "x": of.step.astype(float), "y": of.value.astype(float)})
            found = step_lines(view, data, i, more={"layer": int(layer)})
            lines += [line | {"c": to_hex(colours(norm(layer)))} for line in found]
    names = ("gamma after attention", "gamma after the MLP")
    panels_ = [{"title": "", "y": name, "log": False} for name in names]
    return {"kind": "lines", "x": "step", "steps": True, "panels": panels_, "lines": lines}
