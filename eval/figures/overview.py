"""The first figure of a report: loss, headroom and survival of every placement, a dot a seed."""

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from periln.eval.figures.outcomes import Outcomes, outcomes_of
from periln.eval.figures.pieces import DPI, WIDTH, Chart, NotRecorded
from periln.eval.figures.plots import Plot, numbers
from periln.eval.figures.selection import View, rate_name

FINISHED, PARTLY, LOST, OPEN = "#D3E8DC", "#FBE9C6", "#F3CFC1", "#EEEEEE"
MOST_RATES = 6


def overview(view: View) -> Chart:
    """Loss and least headroom of every series at one learning rate, and how many of its runs finished at each rate."""
    found = outcomes_of(view)
    if found.rows.empty or not (found.rows.loss.notna().any() or found.rows.headroom.notna().any()):
        raise NotRecorded("Needs a run with a loss (metrics.jsonl): periln pretrain --config RECIPE writes it.")
    rows = found.compared
    series = list(dict.fromkeys(found.rows.series))
    names = {row.series: row.name for row in found.rows.itertuples(index=False)}
    rates = found.rates
    shown = (
        rates
        if len(rates) <= MOST_RATES
        else [rates[round(i * (len(rates) - 1) / (MOST_RATES - 1))] for i in range(MOST_RATES)]
    )
    figure = Figure(figsize=(WIDTH + 1, 1.25 + 0.34 * len(series)), dpi=DPI, layout="constrained")
    loss, bits, table = figure.subplots(1, 3, sharey=True, width_ratios=[1.1, 1.1, 0.5 + 0.28 * len(shown)])
    where = rate_name(rows.learning_rate.iloc[0]) if found.same_rate else "each at its own best rate"
    _dots(loss, view, rows[rows.status == "completed"], series, "loss")
    loss.set(title=f"{found.loss}\n{where}", xlabel="nats a token (less is better)")
    _dots(bits, view, rows, series, "headroom")
    bits.set(title=f"least FP16 headroom\n{where}", xlabel="bits (more is safer)")
    _survival(table, found, series, shown)
    loss.set_yticks(range(len(series)), labels=[names[s] for s in series])
    for label, name in zip(loss.get_yticklabels(), series, strict=True):
        label.set_color(view.looks[name].colour)
        label.set_fontweight("bold")
    loss.set_ylim(len(series) - 0.5, -0.5)
    seeds = rows.groupby("series").seed.nunique()
    many = f"{seeds.min()} to {seeds.max()}" if seeds.min() < seeds.max() else f"{seeds.max()}"
    some = f" Of {len(rates)} learning rates {len(shown)} are shown." if len(shown) < len(rates) else ""
    return Chart(
        figure,
        f"Left: {found.loss} of the runs that finished, a dot a seed, the bar their mean ({many} each). Middle: the "
        "least bits between the largest |x| of stream, residual sums and module outputs and FP16's largest number at "
        "the steps at which a run recorded it; a cross is a run that diverged or overflowed. Right: runs that finished "
        f"of those that were started, by learning rate.{some}{found.words}",
        _plot(view, found, series, names),
    )


def _plot(view: View, found: Outcomes, series: list[str], names: dict[str, str]) -> Plot:
    """The same for a page: a run is a dot, whose rate and seed can be chosen; an overflow is -1e30."""
    compared, runs = set(found.compared.run), []
    for row in found.rows.itertuples(index=False):
        values = {"loss": row.loss, "headroom": max(row.headroom, -1e30)}
        keys = {"series": view.label(row.series), "rate": float(row.learning_rate), "seed": str(row.seed)}
        run = {"run": row.run, "k": keys, "status": row.status, "compared": row.run in compared}
        runs.append(run | {"lost": row.status == "diverged"} | dict(zip(values, numbers(values.values()), strict=True)))
    panels = [
        {"key": "loss", "title": found.loss, "x": "nats a token (less is better)", "unit": "nats a token"},
        {"key": "headroom", "title": "least FP16 headroom", "x": "bits (more is safer)", "unit": "bits"},
    ]
    rows = [{"series": view.label(s), "name": names[s], "c": to_hex(view.looks[s].colour)} for s in series]
    rate = float(found.compared.learning_rate.iloc[0]) if found.same_rate else None
    rates = [float(rate) for rate in found.rates]
    plot = {"kind": "dots", "rate": rate, "rates": rates, "own": not found.same_rate}
    return plot | {"panels": panels, "rows": rows, "runs": runs}


def _dots(ax: Axes, view: View, rows: pd.DataFrame, series: list[str], column: str) -> None:
    finite = rows[np.isfinite(rows[column])]
    for y, name in enumerate(series):
        look, of = view.looks[name], rows[rows.series == name]
        calm = of[np.isfinite(of[column])]
        lost = calm.status == "diverged"
        ax.plot(calm[column][~lost], [y] * int((~lost).sum()), look.marker, color=look.colour, alpha=0.75, markersize=7)
        ax.plot(calm[column][lost], [y] * int(lost.sum()), "x", color=look.colour, markersize=8, markeredgewidth=2)
        if (~lost).sum() > 1:
            mean = calm[column][~lost].mean()
            ax.plot([mean, mean], [y - 0.3, y + 0.3], color=look.colour, linewidth=2.2)
        if (of[column] == -math.inf).any():
            ax.text(0.02, y, "overflow", transform=ax.get_yaxis_transform(), color=look.colour, va="center")
        elif calm.empty:
            ax.text(
                0.02, y, "not recorded" if len(of) else "none finished", transform=ax.get_yaxis_transform(), va="center"
            )
    ax.margins(x=0.15)
    if finite.empty:
        ax.set_xticks([])
    elif np.ptp(finite[column]) < 0.02 * abs(finite[column].mean()):  # equal values are not spread over the whole axis
        middle = finite[column].mean()
        ax.set_xlim(middle - 0.02 * abs(middle), middle + 0.02 * abs(middle))
    ax.grid(axis="y", visible=False)


def _survival(ax: Axes, found: Outcomes, series: list[str], rates: list[float]) -> None:
    for y, name in enumerate(series):
        for x, rate in enumerate(rates):
            of = found.rows[(found.rows.series == name) & (found.rows.learning_rate == rate)]
            if of.empty:
                continue
            done, lost = (int((of.status == status).sum()) for status in ("completed", "diverged"))
            colour = OPEN if done + lost < len(of) else FINISHED if not lost else PARTLY if done else LOST
            ax.fill_between([x - 0.47, x + 0.47], y - 0.42, y + 0.42, color=colour, linewidth=0)
            ax.text(x, y, f"{done}/{len(of)}", ha="center", va="center")
    ax.set_xticks(range(len(rates)), labels=[f"{rate:g}" for rate in rates])
    ax.set(xlim=(-0.5, len(rates) - 0.5), title="runs finished\nof those started", xlabel="learning rate")
    ax.grid(visible=False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
