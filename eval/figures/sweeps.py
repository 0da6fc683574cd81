"""Final loss against the learning rate (the paper's Figures 3a, 8, 12, 13, 14), diverged runs marked."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from periln.eval.figures.pieces import Chart, NotRecorded, at_least, grid, hide_empty, legend, plain, rate_axis, wrapped
from periln.eval.figures.plots import Plot, numbers, style_of
from periln.eval.figures.selection import View, common_protocol, seeds_words, sizes
from periln.eval.figures.training import metrics_of
from periln.runkit.placements import BY_NORMS
from periln.runkit.sizes import count_text

LEAST_RATES = 3  # of a curve over learning rates
LEAST_SPAN = 0.1  # nats a token on the axis of losses: a smaller span would magnify the seeds' differences
FINAL = (
    "Final loss: the mean of the finite training losses in the last tenth of a run's recorded steps. Dots are runs, "
    "lines means over the seeds that did not diverge; a cross on the upper edge is a run that diverged."
)


def _enough(rows: Sequence[tuple[str, View]]) -> tuple[list[tuple[str, View]], str]:
    """The panels with enough rates for a curve; and, in words, which are left out.

    Raises:
        NotRecorded: no panel has them.
    """
    kept = [(title, of) for title, of in rows if of.runs.learning_rate.nunique() >= LEAST_RATES]
    if kept:
        left = [title for title, of in rows if of.runs.learning_rate.nunique() < LEAST_RATES]
        return kept, f" Left out, with fewer than {LEAST_RATES} learning rates: {', '.join(left)}." if left else ""
    rates = sorted({rate for _, of in rows for rate in of.runs.learning_rate})
    raise NotRecorded(
        f"Needs {LEAST_RATES} learning rates or more in one panel, for a curve, and the runs have {len(rates)} "
        f"({', '.join(f'{rate:g}' for rate in rates)}): periln sweep run "
        "scripts/recipes/sweeps/paper-400m.yaml. The figures overview and rates show these."
    )


def _draw(view: View, rows: Sequence[tuple[str, View]], same: bool = False) -> Chart:
    """A panel a row; `same`: they are comparable, and share their axis of losses."""
    metrics = metrics_of(view)
    used = view.where(run=set(metrics.run))
    rows = [(title, of) for title, of in rows if used.runs.run.isin(of.runs.run).any()]
    rows, left = _enough([(title, of.where(run=set(used.runs.run))) for title, of in rows])
    used = used.where(run={run for _, of in rows for run in of.runs.run})
    columns = min(3, len(rows))
    figure, axes = grid(-(-len(rows) // columns), columns, row_height=2.9, sharey=same)
    for ax, (title, of) in zip(axes.flat, rows, strict=False):
        _panel(ax, view, of.runs)
        ax.set(title=wrapped(title, columns), xlabel="learning rate")
    hide_empty(axes, len(rows))
    for ax in axes[:, 0]:
        ax.set_ylabel("final training loss\n(nats a token)")
    cross = [plain("diverged", linestyle="", marker="x", markersize=7, markeredgewidth=2)]
    lost = (used.runs.status == "diverged").any()
    calm = used.runs.assign(status="completed")
    legend(figure, used.of(calm), more=cross if lost else [])
    unfinished = used.runs[~used.runs.status.isin(["completed", "diverged"])]
    open_ = (
        f" {len(unfinished)} of the runs are not finished; their losses are those so far." if len(unfinished) else ""
    )
    return Chart(figure, f"{FINAL}{open_}{left} {seeds_words(used, used.runs.run)}{used.names}", _plot(rows))


def _plot(rows: Sequence[tuple[str, View]]) -> Plot:
    """The same for a page: a line a series and seed, marks where a run diverged."""
    lines = []
    for i, (_, of) in enumerate(rows):
        for (_, seed), same in of.runs.groupby(["series", "seed"], sort=False, dropna=False):
            alive = same[(same.status != "diverged") & same.final_loss.notna()].sort_values("learning_rate")
            lost = [[float(rate), "diverged"] for rate in same.learning_rate[same.status == "diverged"]]
            keys = {"series": of.label(same.series.iloc[0]), "seed": str(seed)}
            line = {"p": i, "x": numbers(alive.learning_rate), "y": numbers(alive.final_loss), "k": keys, "m": lost}
            lines.append(line | style_of(of, same.iloc[0].replace("diverged", "")))
    panels = [{"title": title, "y": "final training loss", "log": False} for title, _ in rows]
    rates = sorted({float(rate) for _, of in rows for rate in of.runs.learning_rate})
    plot = {"kind": "lines", "x": "learning rate", "x_log": True, "marks": True, "ticks": rates}
    return plot | {"panels": panels, "lines": lines}


def _panel(ax: Axes, view: View, runs: pd.DataFrame) -> None:
    for i, (series, same) in enumerate(runs.groupby("series", sort=False)):
        look = view.looks[series]
        alive, lost = same[same.status != "diverged"], same[same.status == "diverged"]
        means = alive.groupby("learning_rate").final_loss.mean()
        ax.plot(means.index, means.to_numpy(), marker=look.marker, linewidth=1.8, markersize=6, **look.line)
        ax.plot(alive.learning_rate, alive.final_loss, ".", color=look.colour, alpha=0.5)
        mark = {"color": look.colour, "markersize": 9, "markeredgewidth": 2, "clip_on": False, "in_layout": False}
        height = np.full(len(lost), 1.0 - 0.06 * i)
        ax.plot(lost.learning_rate, height, "x", transform=ax.get_xaxis_transform(), **mark)
    rate_axis(ax, list(runs.learning_rate))
    ax.margins(y=0.18)
    at_least(ax, LEAST_SPAN)
    if not runs.final_loss[runs.status != "diverged"].notna().any():
        ax.set_yticks([])
        ax.text(0.5, 0.5, "no run has a final loss", transform=ax.transAxes, ha="center")


def by_size(view: View, post_only: bool = False) -> Chart:
    """Figures 3(a) and 8: a panel a size."""
    metrics_of(view)
    usual, words = common_protocol(view)
    if post_only:
        usual = usual.where(placement=BY_NORMS["C"])
        if usual.runs.empty:
            raise NotRecorded(
                "Needs Post-LN runs at several learning rates: periln sweep run scripts/recipes/sweeps/paper-400m.yaml."
            )
    rows = [(size, usual.where(size=size)) for size in sizes(usual)]
    drawn = _draw(usual, rows)
    return Chart(drawn.figure, drawn.caption + words, drawn.plot)


def post_by_size(view: View) -> Chart:
    return by_size(view, post_only=True)


def by_setting(
    column: str, name: Callable[[float], str], paper: Callable[[float], bool], sentence: str
) -> Callable[[View], Chart]:
    """Figures 12 to 14: a panel for each value of a setting; `paper` tells whether a value is one of the paper's."""

    def draw(view: View) -> Chart:
        metrics_of(view)
        runs = view.runs[view.runs[column].notna()]
        values = sorted(runs[column].unique())
        if len(values) < 2 and not any(map(paper, values)):
            raise NotRecorded(sentence)
        several = len(sizes(view)) > 1
        rows = []
        for size in sizes(view.of(runs)):
            of = runs[runs["size"] == size]
            for value in sorted(of[column].unique()):
                title = name(value) + (f", {size}" if several else "")
                rows.append((title, view.of(of[of[column] == value])))
        return _draw(view.of(runs), rows, same=not several)

    return draw


def _near(value: float, *wanted: float) -> bool:
    return any(math.isclose(value, w, rel_tol=0.05) for w in wanted)


tokens = by_setting(
    "tokens",
    lambda n: f"{count_text(n)} tokens",
    lambda n: _near(n, 8e9, 16e9),
    "Needs runs with several numbers of tokens: periln sweep run scripts/recipes/sweeps/paper-400m-tokens.yaml.",
)
sequence_length = by_setting(
    "sequence_length",
    lambda n: f"sequence length {n:,.0f}",
    lambda n: n == 2048,
    "Needs runs with a second sequence length: periln pretrain --config "
    "scripts/recipes/400m-peri-seq2048.yaml and 400m-pre-seq2048.yaml.",
)
warmup = by_setting(
    "warmup",
    lambda x: f"warm-up {x:.0%}",
    lambda x: _near(x, 0.3),
    "Needs runs with a second warm-up: periln sweep run scripts/recipes/sweeps/paper-400m-warmup.yaml.",
)
