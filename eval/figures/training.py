"""Loss and gradient norm over the steps (the paper's Figures 3b, 3c, 4, 9, 15 to 18, 20 to 22); spikes and skips."""

import math
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from periln.eval.figures.depth import panels
from periln.eval.figures.pieces import (
    DARK,
    DPI,
    WIDTH,
    Chart,
    NotRecorded,
    curves,
    grid,
    legend,
    log_axis,
    plain,
    whole_numbers,
)
from periln.eval.figures.plots import Plot, every_of, step_lines
from periln.eval.figures.selection import View, at_best_rate, common_protocol, rates_words, seeds_words, sizes
from periln.eval.records.derived import spikes
from periln.eval.records.words import recorded_steps
from periln.runkit.placements import BY_NORMS

SKIP_MARKERS = {"probe": "|", "backward": "x", "forward": "D"}
NAMES = {"loss": "training loss (nats a token)", "grad_norm": "gradient norm"}
PRETRAIN = "periln pretrain --config"
PRE, PERI, OUTPUT = BY_NORMS["A"], BY_NORMS["AB"], BY_NORMS["B"]
MOST_MARKS = 200  # of spikes and skipped steps of a run, on a page
LAST_SHARE = 1 / 6  # the paper's Figures 20 to 22 show the last 5B of 30B tokens


def metrics_of(view: View) -> pd.DataFrame:
    """The records of the view's runs.

    Raises:
        NotRecorded: no run has any.
    """
    found = view.frames.metrics[view.frames.metrics.run.isin(view.runs.run)]
    if found.empty:
        raise NotRecorded(f"Needs loss and gradient norm by step (metrics.jsonl): {PRETRAIN} RECIPE writes them.")
    return found


def _draw(
    view: View,
    rows: list[tuple[str, View]],
    keys: Sequence[str],
    share: float = 1.0,
    rates: dict[str, str] | None = None,
) -> Chart:
    metrics = metrics_of(view)
    if metrics.groupby("run")[list(keys)].count().max().max() < 2:
        raise NotRecorded(f"Needs runs with two finite steps or more: {PRETRAIN} RECIPE, with more steps.")
    if share < 1:
        last = metrics.groupby("run").step.transform("max")
        metrics = metrics[metrics.step >= (1 - share) * last]
    figure, axes = grid(len(rows), len(keys), row_height=2.6, sharey="col" if len(rows) < 2 else False)
    cut = False
    for row, (title, of) in zip(axes, rows, strict=True):
        for ax, key in zip(row, keys, strict=True):
            data = metrics.rename(columns={"step": "x", key: "y"})[["run", "x", "y"]]
            data = data[data.run.isin(of.runs.run)]
            curves(ax, data, view, of.runs, markers=False)
            ax.set(title=title, ylabel=NAMES[key])
            whole_numbers(ax)
            if key == "grad_norm":
                log_axis(ax)
            else:
                cut |= _cut_explosions(ax, data, of.runs)
    for ax in axes[-1]:
        ax.set_xlabel("step")
    shown = {run for _, of in rows for run in of.runs.run}
    used = view.where(run=set(metrics.run))
    legend(figure, used, markers=False, average="mean of the seeds", rates=rates)
    said = [f"Every step is drawn, unsmoothed ({recorded_steps(metrics)})."]
    if share < 1:
        said.append(f"Only the last {share:.0%} of each run's steps is shown.")
    if "grad_norm" in keys:
        said.append("The gradient norm is that before clipping, on a log axis.")
    if (used.runs.status == "diverged").any():
        said.append("Values that were not finite are left out; a cross is the last finite one of a run that diverged.")
    if cut:
        said.append("Losses above 1.5 times the largest of the runs that did not diverge are cut off.")
    plot = _plot(view.where(run=shown), metrics, keys)
    return Chart(figure, " ".join([*said, seeds_words(used, metrics.run)]) + used.names, plot)


def _plot(view: View, metrics: pd.DataFrame, keys: Sequence[str]) -> Plot:
    """The same for a page: a panel a quantity."""
    metrics = metrics[metrics.run.isin(view.runs.run)]
    every, panels_, lines = every_of(metrics.step), [], []
    for i, key in enumerate(keys):
        many = f", {'largest' if key == 'grad_norm' else 'mean'} of {every} steps" if every > 1 else ""
        panels_.append({"title": "", "y": NAMES[key] + many, "log": key == "grad_norm"})
        data = metrics.rename(columns={"step": "x", key: "y"})[["run", "x", "y"]]
        lines += step_lines(view, data, i, largest=key == "grad_norm")
    return {"kind": "lines", "x": "step", "steps": True, "panels": panels_, "lines": lines}


def _cut_explosions(ax: Axes, data: pd.DataFrame, runs: pd.DataFrame) -> bool:
    """Keep a run whose loss exploded from flattening all others."""
    calm = data.y[data.run.isin(runs.run[runs.status != "diverged"])].max()
    if not math.isfinite(calm) or not data.y.max() > 1.5 * calm:
        return False
    low = data.y.min()
    ax.set_ylim(low - 0.05 * (1.5 * calm - low), 1.5 * calm)
    return True


def every_rate(view: View) -> Chart:
    """Loss and gradient norm at every learning rate."""
    metrics_of(view)
    rows, words = panels(view, most=8)
    drawn = _draw(view, rows, ("loss", "grad_norm"))
    return Chart(drawn.figure, drawn.caption + words, drawn.plot)


def best(keys: Sequence[str]):
    """Figures 3(b), 3(c) and 9: every placement at its best rate, a row a size."""

    def draw(view: View) -> Chart:
        metrics_of(view)
        usual, words = common_protocol(view)
        return _compared(at_best_rate(usual), keys, words)

    return draw


def _compared(used: View, keys: Sequence[str], words: str = "", share: float = 1.0) -> Chart:
    several = len(sizes(used)) > 1
    own = _own_rates(used)
    note = "learning rates differ: each at its own best" if own else ""
    rows = [("\n".join(filter(None, [size if several else "", note])), used.where(size=size)) for size in sizes(used)]
    drawn = _draw(used, rows, keys, share, own)
    return Chart(drawn.figure, f"{drawn.caption} {rates_words(used)}{words}", drawn.plot)


def _own_rates(used: View) -> dict[str, str] | None:
    """The learning rates of each series; None where all have the same one."""
    by = used.runs.groupby("series").learning_rate.unique()
    if used.runs.learning_rate.nunique() < 2:
        return None
    return {series: " and ".join(f"{rate:g}" for rate in sorted(rates)) for series, rates in by.items()}


# --- one change at a time ------------------------------------------------------------------------------------


def _sides(view: View, needed: Sequence[pd.DataFrame], sentence: str) -> View:
    """The runs of several sides at the sizes that every required side has."""
    common = set.intersection(*(set(side["size"]) for side in needed))
    if not common:
        raise NotRecorded(sentence)
    runs = pd.concat(needed)
    return view.of(view.runs[view.runs.run.isin(runs.run) & view.runs["size"].isin(common)])


def _usual(view: View) -> tuple[View, str]:
    metrics_of(view)
    return common_protocol(view)


def frozen_gamma(view: View) -> Chart:
    """Figure 4: the output norms' gamma kept at 1, with learned gamma and Pre-LN."""
    usual, words = _usual(view)
    runs = usual.runs
    frozen = runs[runs.frozen]
    sentence = (
        "Needs two runs that differ in model.output_norm_learnable: "
        f"{PRETRAIN} scripts/recipes/400m-peri-frozen-gamma.yaml and 400m-peri-no-embedding-norm.yaml."
    )
    if frozen.empty:
        raise NotRecorded(sentence)
    # The paper leaves the embedding norm out on both sides; so that only one thing differs, take what the frozen runs
    # have.
    same = runs.embedding_norm.isin(frozen.embedding_norm.unique()) & runs.placement.isin(frozen.placement)
    learned = runs[same & ~runs.frozen & (runs.norm_type == "rmsnorm")]
    used = _sides(usual, (frozen, learned), sentence)
    pre = runs[(runs.series == PRE) & runs["size"].isin(used.runs["size"])]
    used = usual.of(runs[runs.run.isin([*used.runs.run, *pre.run])])
    has = "with" if frozen.embedding_norm.all() else "without"
    return _compared(at_best_rate(used), ("loss", "grad_norm"), f" The runs are {has} a norm on the embedding.{words}")


def switched(column: str, values: Sequence, sentence: str):
    """Figures 15 to 18: runs of one placement that differ in one setting, which takes all of `values`."""

    def draw(view: View) -> Chart:
        usual, words = _usual(view)
        runs, others = usual.runs, [c for c in ("norm_type", "embedding_norm", "frozen", "qk_norm") if c != column]
        kept = [
            same
            for _, same in runs.groupby(["placement", "size", *others], sort=False)
            if set(values) <= set(same[column])
        ]
        if not kept:
            raise NotRecorded(sentence)
        peri = [same for same in kept if same.placement.iloc[0] == PERI]
        used = usual.of(runs[runs.run.isin(pd.concat(peri or kept).run)])
        return _compared(at_best_rate(used), ("loss", "grad_norm"), words)

    return draw


def olmo2(view: View) -> Chart:
    """Figures 20 to 22: output norms with QK-norm (OLMo 2) and Peri-LN, over the last steps."""
    usual, words = _usual(view)
    runs = usual.runs
    output = runs[(runs.placement == OUTPUT) & (runs.qk_norm != "none")]
    peri = runs[runs.series == PERI]
    sentence = (
        "Needs a run of the placement output with QK-norm (OLMo 2 style) and one of peri: "
        f"{PRETRAIN} scripts/recipes/400m-olmo2.yaml and 400m-peri.yaml."
    )
    if output.empty or peri.empty:
        raise NotRecorded(sentence)
    used = _sides(usual, (output, peri), sentence)
    return _compared(at_best_rate(used), ("loss", "grad_norm"), words, share=LAST_SHARE)


# --- what the paper has no figure of -------------------------------------------------------------------------


def spikes_and_loss_scale(view: View) -> Chart:
    """Gradient spikes, skipped steps and the loss scale of every run."""
    metrics = metrics_of(view)
    used = view.where(run=set(metrics.run))
    rows, words = panels(used, most=6)
    columns = min(2, len(rows))
    lines = -(-len(rows) // columns)
    events = 0.7 + 0.21 * len(used.runs)
    figure = Figure(figsize=(WIDTH, 1.0 + events + 2.2 * lines), dpi=DPI, layout="constrained")
    parts = figure.add_gridspec(1 + lines, columns, height_ratios=[events, *[2.2] * lines])
    kinds = _events(figure.add_subplot(parts[0, :]), used, metrics)
    order = list(used.runs.series.unique())
    for i, (title, of) in enumerate(rows):
        ax = figure.add_subplot(parts[1 + i // columns, i % columns])
        for _, run in of.runs.iterrows():
            width = 5.0 - 3.8 * order.index(run.series) / max(1, len(order) - 1)
            scale = metrics[metrics.run == run.run]
            colour = view.looks[run.series].colour
            ax.plot(scale.step, scale.loss_scale, color=colour, linewidth=width, drawstyle="steps-post")
        if metrics.loss_scale[metrics.run.isin(of.runs.run)].notna().any():
            ax.set_yscale("log", base=2)
            ax.yaxis.set_major_locator(LogLocator(base=2, numticks=7))
        else:
            ax.text(0.5, 0.5, "no loss scale (not FP16)", transform=ax.transAxes, ha="center")
        whole_numbers(ax)
        ax.set(title=title, xlabel="step", ylabel="loss scale" if i % columns == 0 else "")
    spike = plain("gradient spike", linestyle="", marker="v")
    legend(figure, used, markers=False, more=[spike, *map(_skip_mark, kinds)])
    return Chart(
        figure,
        "Above, a row a run: its length in steps, the gradient spikes (above the mean of the 128 steps before by 6 of "
        "their standard deviations), the skipped steps by kind, and a cross where it diverged. Below, the loss scale; "
        f"lines of several widths, so that equal scales can be told apart ({recorded_steps(metrics)}).{words} "
        f"{seeds_words(used, metrics.run)}{used.names}",
        _events_plot(used, metrics),
    )


def _events_plot(view: View, metrics: pd.DataFrame) -> Plot:
    """The same for a page: the gradient norm with marks at spikes and skipped steps, and the loss scale."""
    plot = _plot(view, metrics, ("grad_norm",))
    for line in plot["lines"]:
        of = metrics[metrics.run == line["run"]]
        skipped = of[of.skip_kind.notna()]
        marks = [[int(step), "spike of the gradient norm"] for step in spikes(of)]
        marks += [[int(step), f"skipped: {kind}"] for step, kind in zip(skipped.step, skipped.skip_kind, strict=True)]
        line["m"] = sorted(marks)[:MOST_MARKS]
    scale = metrics.rename(columns={"step": "x", "loss_scale": "y"})[["run", "x", "y"]]
    if scale.y.notna().any():
        plot["panels"].append({"title": "", "y": "loss scale", "log": True})
        plot["lines"] += step_lines(view, scale, 1)
    return plot


def _skip_mark(kind: str) -> Line2D:
    marker = SKIP_MARKERS.get(kind, "o")
    return plain(f"skipped: {kind}", color="black", linestyle="", marker=marker, markersize=6)


def _events(ax: Axes, view: View, metrics: pd.DataFrame) -> list[str]:
    """One row a run; returns the kinds of skips that occur."""
    several = len(sizes(view)) > 1
    for y, (_, run) in enumerate(view.runs.iterrows()):
        of, colour = metrics[metrics.run == run.run], view.looks[run.series].colour
        ax.plot([of.step.min(), of.step.max()], [y, y], color=colour, linewidth=2.2, alpha=0.55)
        spiked = spikes(of)
        ax.plot(spiked, [y - 0.22] * len(spiked), "v", color=colour, markersize=6)
        for kind, skipped in of.groupby("skip_kind"):
            marker = SKIP_MARKERS.get(kind, "o")
            ax.plot(skipped.step, [y] * len(skipped), marker, color="black", markersize=6 if marker == "|" else 4)
        if run.status == "diverged":
            ax.plot([of.step.max()], [y], "x", color=colour, markersize=9, markeredgewidth=2.4)
    labels = [
        f"{view.label(r.series)}, {r.learning_rate:g}, seed {r.seed}" + (f", {r['size']}" if several else "")
        for _, r in view.runs.iterrows()
    ]
    ax.set_yticks(range(len(labels)), labels=labels)
    ax.set(ylim=(len(labels) - 0.4, -0.6), xlabel="step")
    whole_numbers(ax)
    ax.grid(axis="y", visible=False)
    size = 8.5 if max(map(len, labels)) < 34 else 7.0
    ax.tick_params(axis="y", labelsize=size, labelcolor=DARK)
    found = set(metrics.skip_kind.dropna())
    return [k for k in SKIP_MARKERS if k in found] + sorted(found - set(SKIP_MARKERS))
