"""The figures of the report, drawn from the frames of `records`.

Every placement has one colour and one marker everywhere (`runkit/looks.py`).
The same records give the same bytes: nothing is read from the user's Matplotlib settings, and the PNGs carry no
metadata.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from runkit.looks import STYLE, colour_of, marker_of

from .records import FP16_MAX, Frames, at_edge, by_depth, drawn_from, first_and_last, rate_text, recorded_steps, spikes

WIDTH, DPI = 7.5, 120  # 900 pixels
DEPTH_CROSS = "Dotted: a run that diverged, with a cross at its last finite value over depth."
SKIP_MARKERS = {"probe": "|", "backward": "x", "forward": "D"}


@dataclass(frozen=True)
class Drawing:
    """One figure: what is drawn, in words, and its PNG (None where nothing was recorded for it)."""

    name: str
    drawn: str
    png: bytes | None


# --- pieces --------------------------------------------------------------------------------------------------


def _grid(rows: int, columns: int, row_height: float = 2.35, **kwargs) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(WIDTH, row_height * rows + 0.5), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _legend(figure: Figure, frames: Frames, markers: bool, more: list[Line2D] = (), average: str = "") -> None:
    """One legend for the figure: the placements, then what lines and marks mean."""
    handles = [
        Line2D([], [], color=colour_of(p), marker=marker_of(p) if markers else "", linewidth=2.2, label=p)
        for p in frames.placements
    ]
    if average:
        handles.append(Line2D([], [], color="#444444", linewidth=2.2, label=average))
        handles.append(Line2D([], [], color="#444444", linewidth=0.9, alpha=0.6, label="one seed"))
    if (frames.pretrained.status == "diverged").any():
        handles.append(Line2D([], [], color="#444444", linewidth=1, linestyle=":", marker="x", label="diverged"))
    handles += more
    columns = len(handles) if len(handles) < 7 else 4
    by_row = [handle for i in range(columns) for handle in handles[i::columns]]  # a legend fills its columns first
    figure.legend(handles=by_row, loc="outside upper center", ncols=columns, frameon=False)


def _curves(ax: Axes, data: pd.DataFrame, runs: pd.DataFrame, markers: bool, average: str = "mean") -> None:
    """`data` (run, x, y): a thin line a run, a thick one for the seeds that did not diverge, `x` where one did."""
    for placement, same in runs.groupby("placement", sort=False):
        style = {"color": colour_of(placement)}
        mark = marker_of(placement) if markers else ""
        alive = same[same.status != "diverged"].run
        for run, status in zip(same.run, same.status, strict=True):
            line = data[(data.run == run) & np.isfinite(data.y)]
            if status != "diverged":
                ax.plot(line.x, line.y, linewidth=0.9, alpha=0.6, **style)
            elif len(line):
                ax.plot(line.x, line.y, linewidth=1.1, linestyle=":", **style)
                ax.plot(line.x.iloc[-1:], line.y.iloc[-1:], "x", markersize=8, markeredgewidth=2, **style)
        of = data[data.run.isin(alive) & np.isfinite(data.y)].groupby("x").y
        whole = of.agg(average)[of.count() == len(alive)]
        ax.plot(whole.index, whole.to_numpy(), linewidth=2.0, marker=mark, **style)


def _log_axis(ax: Axes) -> None:
    """A log axis of at least a decade, labelled at powers of ten only."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high < 10 * low:
        middle = (low * high) ** 0.5
        ax.set_ylim(middle / 10**0.5, middle * 10**0.5)
    ax.yaxis.set_minor_locator(NullLocator())


def _depth_axis(ax: Axes, label: bool) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if label:
        ax.set_xlabel("layer (attention at the half, MLP at the whole)")


# --- the figures ---------------------------------------------------------------------------------------------


def loss_and_gradient_norm(frames: Frames) -> tuple[str, bytes | None]:
    """Paper, Figure 3(b) and (c)."""
    metrics = frames.metrics
    if metrics.empty:
        return "", None
    rates = frames.learning_rates
    figure, axes = _grid(len(rates), 2, sharey="col")
    for row, rate in zip(axes, rates, strict=True):
        runs = frames.pretrained[frames.pretrained.learning_rate == rate]
        for ax, key, name in zip(
            row, ("loss", "grad_norm"), ("training loss (nats a token)", "gradient norm"), strict=True
        ):
            data = metrics.rename(columns={"step": "x", key: "y"})[["run", "x", "y"]]
            _curves(ax, data[data.run.isin(runs.run)], runs, markers=False)
            ax.set(title=rate_text(rate), ylabel=name)
        _log_axis(row[1])
    for ax in axes[-1]:
        ax.set_xlabel("step")
    _cut_explosions(axes[0, 0], metrics, runs=frames.pretrained)
    _legend(figure, frames, markers=False, average="mean of the seeds")
    return (
        f"Every step is drawn, unsmoothed ({recorded_steps(metrics)}); the gradient norm is that before clipping, on a "
        "log axis. Values that were not finite are left out; a cross is the last finite one of a run that diverged; "
        f"losses above 1.5 times the largest of the other runs are cut off. {drawn_from(frames, metrics)}"
    ), _png(figure)


def _cut_explosions(ax: Axes, metrics: pd.DataFrame, runs: pd.DataFrame) -> None:
    """Keep a run whose loss exploded from flattening all others."""
    calm = metrics.loss[metrics.run.isin(runs.run[runs.status != "diverged"])].max()
    if math.isfinite(calm) and metrics.loss.max() > 1.5 * calm:
        low = metrics.loss.min()
        ax.set_ylim(low - 0.05 * (1.5 * calm - low), 1.5 * calm)


def _first_and_last(frames: Frames, tensor: str, stats: tuple[str, str], names: tuple[str, str], sublayers: list[str]):
    layers = frames.layers[frames.layers.sublayer.isin(sublayers)]
    data = [by_depth(layers, tensor, stat) for stat in stats]
    rates = frames.learning_rates
    figure, axes = _grid(1 + len(rates), 2, sharex=True, sharey="col")
    for i, row in enumerate(axes):
        runs = frames.pretrained if i == 0 else frames.pretrained[frames.pretrained.learning_rate == rates[i - 1]]
        if i == 0:  # the learning rate has not acted yet: a seed's runs are the same run
            runs = runs.drop_duplicates(["placement", "seed"]).assign(status="completed")
        for ax, all_steps, name in zip(row, data, names, strict=True):
            shown = at_edge(all_steps, last=i > 0)
            _curves(ax, shown, runs, markers=True)
            if not np.isfinite(shown.y[shown.run.isin(runs.run)]).any():
                ax.text(0.5, 0.5, "nothing finite was recorded", transform=ax.transAxes, ha="center")
            title = "at initialization" if i == 0 else f"at the end, {rate_text(rates[i - 1])}"
            ax.set(title=title, ylabel=name)
            _depth_axis(ax, label=False)
            _log_axis(ax)
    _legend(figure, frames, markers=True, average="mean of the seeds")
    return figure, axes, data[0]


def hidden_state(frames: Frames) -> tuple[str, bytes | None]:
    """Paper, Figure 5."""
    if not (frames.layers.tensor == "stream").any():
        return "", None
    names = ("mean |x|", "variance")
    where = ["embedding", "attn", "mlp"]
    figure, axes, data = _first_and_last(frames, "stream", ("mean_abs", "variance"), names, where)
    for ax in axes[-1]:
        _depth_axis(ax, label=True)
    return (
        f"The residual stream after every sublayer (for Post-LN: after its norm), 0 is what enters layer 1; log axes. "
        f"{first_and_last(data)} {DEPTH_CROSS} {drawn_from(frames, data)}"
    ), _png(figure)


def gradient_by_layer(frames: Frames) -> tuple[str, bytes | None]:
    """Paper, Figure 6."""
    if not ((frames.layers.tensor == "gradient") & (frames.layers.sublayer == "layer")).any():
        return "", None
    names = ("gradient norm", "gradient variance")
    figure, axes, data = _first_and_last(frames, "gradient", ("norm", "variance"), names, ["layer"])
    for ax in axes[-1]:
        ax.set_xlabel("layer")
    lost = sorted(set(data.run[~np.isfinite(data.y)]))
    left_out = " Where a gradient overflowed FP16 at that step, nothing is drawn." if lost else ""
    return (
        "Norm and variance of the gradient of each layer's parameters, unscaled, before clipping; log axes. "
        f"{first_and_last(data)} {DEPTH_CROSS}{left_out} {drawn_from(frames, data)}"
    ), _png(figure)


def output_gamma(frames: Frames) -> tuple[str, bytes | None]:
    """Paper, Figure 7(b)."""
    rows = frames.layers[(frames.layers.tensor == "output_norm_gamma") & (frames.layers.stat == "mean")]
    if rows.empty:
        return "", None
    runs = frames.pretrained[frames.pretrained.run.isin(rows.run.unique())]
    cells = list(runs.groupby(["learning_rate", "placement"], sort=False))
    figure, axes = _grid(len(cells), 2, sharey="row")
    colours, deepest = mpl.colormaps["viridis_r"], int(rows.layer.max())
    norm = mpl.colors.Normalize(1 - 0.25 * deepest, deepest)  # starts beyond the palest yellow
    for row, ((rate, placement), same) in zip(axes, cells, strict=True):
        alive = same[same.status != "diverged"]
        used = (alive if len(alive) else same).run
        for ax, sublayer in zip(row, ("attn", "mlp"), strict=True):
            data = rows[rows.run.isin(used) & (rows.sublayer == sublayer)]
            for layer, of in data.groupby("layer"):
                mean = of.groupby("step").value.mean()
                ax.plot(
                    mean.index, mean.to_numpy(float), color=colours(norm(layer)), marker="." if len(mean) < 40 else ""
                )
            ax.set_title(f"{placement}, {rate_text(rate)}: {sublayer}" + ("" if len(alive) else " (diverged)"))
        row[0].set_ylabel("mean gamma")
    for ax in axes[-1]:
        ax.set_xlabel("step")
    bar = figure.colorbar(mpl.cm.ScalarMappable(norm, colours), ax=axes, label="layer", aspect=18 * len(cells))
    bar.ax.set_ylim(1, deepest)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return (
        "The mean over channels of every output norm's gamma at the recorded steps "
        f"({recorded_steps(rows)}), a line a layer, averaged over the seeds that did not diverge. Only placements with "
        f"output norms have one. {drawn_from(frames, rows)}"
    ), _png(figure)


def fp16_headroom(frames: Frames) -> tuple[str, bytes | None]:
    """The largest |x| of every layer against FP16's largest number."""
    peaks = frames.layers[frames.layers.stat == "max_abs"]
    if peaks.empty:
        return "", None
    tensors = {"stream": "stream", "residual_add": "residual sum", "branch": "module output"}
    rates = frames.learning_rates
    figure, axes = _grid(len(rates), 3, row_height=2.7, sharey=True, sharex=True)
    overflowed = False
    for row, rate in zip(axes, rates, strict=True):
        runs = frames.pretrained[frames.pretrained.learning_rate == rate]
        for ax, (tensor, name) in zip(row, tensors.items(), strict=True):
            data = by_depth(peaks, tensor, "max_abs")
            overflowed |= not np.isfinite(data.y).all()
            data.y = data.y.where(np.isfinite(data.y), 2 * FP16_MAX)
            data = data.groupby(["run", "x"], as_index=False).y.max()
            _curves(ax, data[data.run.isin(runs.run)], runs, markers=True, average="max")
            ax.axhline(FP16_MAX, color="black", linewidth=1.4, linestyle="--")
            ax.set_yscale("log", base=2)
            ax.set_title(name)
            _depth_axis(ax, label=False)
        row[0].set_ylabel(f"{rate_text(rate)}\nlargest |x|")
        _bits_axis(row[2])
    axes[-1, 1].set_xlabel("layer (attention at the half, MLP at the whole)")
    axes[0, 0].set_ylim(top=4 * FP16_MAX)
    line = Line2D([], [], color="black", linewidth=1.4, linestyle="--", label="65504")
    _legend(figure, frames, markers=True, more=[line], average="largest of the seeds")
    beyond = " A value that was not finite stands above the line, at 131008." if overflowed else ""
    return (
        f"The largest |x| of each layer over all recorded steps ({recorded_steps(peaks)}) and, thick, over the seeds "
        "that did not diverge; the dashed line is FP16's largest number, the right axis the bits that are left. The "
        "residual sum is taken before a Post-LN norm, the module output before an output norm."
        f"{beyond} {drawn_from(frames, peaks)}"
    ), _png(figure)


def _bits_axis(ax: Axes) -> None:
    bits = ax.secondary_yaxis("right", functions=(lambda y: y, lambda y: y))
    bits.set_yscale("log", base=2)
    left = np.arange(0, 40, 4)
    bits.yaxis.set_major_locator(FixedLocator(list(FP16_MAX / 2.0**left)))
    bits.yaxis.set_minor_locator(FixedLocator([]))
    bits.yaxis.set_major_formatter(lambda y, _: f"{np.log2(FP16_MAX / y):.0f}" if y > 0 else "")
    bits.set_ylabel("bits left")


def spikes_and_loss_scale(frames: Frames) -> tuple[str, bytes | None]:
    """Gradient spikes, skipped steps and the loss scale of every run."""
    metrics, runs, rates = frames.metrics, frames.pretrained, frames.learning_rates
    if metrics.empty:
        return "", None
    columns = min(2, len(rates))
    rows = -(-len(rates) // columns)
    events = 0.6 + 0.23 * len(runs)
    figure = Figure(figsize=(WIDTH, 1.0 + events + 2.2 * rows), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[events, *[2.2] * rows])
    top = figure.add_subplot(grid[0, :])
    kinds = _events(top, frames)
    for i, rate in enumerate(rates):
        ax = figure.add_subplot(grid[1 + i // columns, i % columns])
        same = runs[runs.learning_rate == rate]
        for placement, group in same.groupby("placement", sort=False):
            width = 5.0 - 3.8 * frames.placements.index(placement) / max(1, len(frames.placements) - 1)
            for run in group.run:
                of = metrics[metrics.run == run]
                ax.plot(of.step, of.loss_scale, color=colour_of(placement), linewidth=width, drawstyle="steps-post")
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_locator(LogLocator(base=2, numticks=7))
        ax.set(title=rate_text(rate), xlabel="step", ylabel="loss scale" if i % columns == 0 else "")
    spike = Line2D([], [], color="#444444", linestyle="", marker="v", label="gradient spike")
    marks = [_skip_mark(kind) for kind in kinds]
    _legend(figure, frames, markers=False, more=[spike, *marks])
    return (
        "Above, a row a run: its length in steps, the gradient spikes (definition under the stability table), the "
        "skipped steps by kind, and a cross where it diverged. Below, the loss scale; lines of several widths, so that "
        f"equal scales can be told apart ({recorded_steps(metrics)}). {drawn_from(frames, metrics)}"
    ), _png(figure)


def _skip_mark(kind: str) -> Line2D:
    marker = SKIP_MARKERS.get(kind, "o")
    return Line2D([], [], color="black", linestyle="", marker=marker, markersize=6, label=f"skipped: {kind}")


def _events(ax: Axes, frames: Frames) -> list[str]:
    """One row a run; returns the kinds of skips that occur."""
    runs = frames.pretrained
    for y, (_, run) in enumerate(runs.iterrows()):
        of, colour = frames.metrics[frames.metrics.run == run.run], colour_of(run.placement)
        if of.empty:
            continue
        ax.plot([of.step.min(), of.step.max()], [y, y], color=colour, linewidth=2.2, alpha=0.55)
        spiked = spikes(of)
        ax.plot(spiked, [y - 0.22] * len(spiked), "v", color=colour, markersize=6)
        for kind, skipped in of.groupby("skip_kind"):
            marker = SKIP_MARKERS.get(kind, "o")
            ax.plot(skipped.step, [y] * len(skipped), marker, color="black", markersize=6 if marker == "|" else 4)
        if run.status == "diverged":
            ax.plot([of.step.max()], [y], "x", color=colour, markersize=9, markeredgewidth=2.4)
    labels = [f"{r.placement}, {r.learning_rate:g}, seed {r.seed}" for _, r in runs.iterrows()]
    ax.set_yticks(range(len(runs)), labels=labels)
    ax.set(ylim=(len(runs) - 0.4, -0.6), xlabel="step", ylabel="placement, learning rate, seed")
    ax.grid(axis="y", visible=False)
    found = set(frames.metrics.skip_kind.dropna())
    return [k for k in SKIP_MARKERS if k in found] + sorted(found - set(SKIP_MARKERS))


# --- all of them ---------------------------------------------------------------------------------------------

FIGURES: dict[str, Callable[[Frames], tuple[str, bytes | None]]] = {
    "1_loss_and_gradient_norm": loss_and_gradient_norm,
    "2_hidden_state": hidden_state,
    "3_gradient_by_layer": gradient_by_layer,
    "4_output_gamma": output_gamma,
    "5_fp16_headroom": fp16_headroom,
    "6_spikes_and_loss_scale": spikes_and_loss_scale,
}


def draw_all(frames: Frames) -> list[Drawing]:
    """Every figure, in the report's order; one for which nothing was recorded has no PNG."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        return [Drawing(name, *draw(frames)) for name, draw in FIGURES.items()]
