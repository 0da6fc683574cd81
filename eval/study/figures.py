"""The study's figures, from the cells' results."""

import io
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from periln.eval.study.measures import Cell, stream_variance
from periln.eval.study.tests import Results
from periln.runkit.figure_style import STYLE
from periln.runkit.number_format import FP16
from periln.runkit.placements import COLOURS, MARKERS, OTHER_COLOUR, OTHER_MARKER

TITLES = {"post": "Post-LN", "pre": "Pre-LN", "peri": "Peri-LN"}
COMPARED = tuple(TITLES)


def png(figure: Figure) -> bytes:
    """The same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=160, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def _look(variant: str) -> dict[str, Any]:
    return {"color": COLOURS.get(variant, OTHER_COLOUR), "marker": MARKERS.get(variant, OTHER_MARKER)}


def _by_rate(cells: list[Cell], of: Callable[[Cell], float | None]) -> dict[float, list[float]]:
    found: dict[float, list[float]] = {}
    for cell in cells:
        if (value := of(cell)) is not None:
            found.setdefault(cell["rate"], []).append(value)
    return dict(sorted(found.items()))


def _over_rates(results: Results, of: Callable[[Cell], float | None], label: str, crosses: bool) -> Figure | None:
    cells = results.of({"group": "E2"})
    if not cells:
        return None
    figure, ax = plt.subplots(figsize=(6.2, 3.6), layout="constrained")
    for i, variant in enumerate(COMPARED):
        mine = [cell for cell in cells if cell["variant"] == variant]
        means = _by_rate(mine, of)
        look = _look(variant)
        ax.plot(list(means), [float(np.mean(v)) for v in means.values()], label=TITLES[variant], **look)
        for rate, values in means.items():
            ax.plot([rate] * len(values), values, ".", color=look["color"], alpha=0.45)
        lost = sorted({cell["rate"] for cell in mine if cell["status"] == "diverged"})
        for rate in lost if crosses else ():
            at = [cell for cell in mine if cell["rate"] == rate]
            number = sum(cell["status"] == "diverged" for cell in at)
            y, place = 1.0 - 0.06 * i, ax.get_xaxis_transform()
            mark = {"color": look["color"], "transform": place, "clip_on": False}
            ax.plot([rate], [y], "x", markersize=8, markeredgewidth=2, **mark)
            text = f" {number}/{len(at)}"
            ax.text(rate, y, text, fontsize=7.5, va="center", **mark)
    ax.set(xscale="log", xlabel="learning rate", ylabel=label)
    ax.margins(y=0.22 if crosses else 0.05)  # room for the crosses
    ax.legend(frameon=False, loc="lower left" if crosses else "best")
    return figure


def rates(results: Results) -> Figure | None:
    """Held-out loss against the learning rate; crosses: diverged runs, of all."""
    return _over_rates(results, lambda cell: cell["heldout_loss"], "held-out loss\n(nats a token)", True)


def spikes(results: Results) -> Figure | None:
    return _over_rates(results, lambda c: 1000 * c["spikes"] / c["steps"], "gradient spikes\nin 1,000 steps", False)


def headroom(results: Results) -> Figure | None:
    def bits(cell: Cell) -> float | None:
        values = [0.0 if v is None else v for v in cell["headroom"].values()]
        return min(values) if values else None

    return _over_rates(results, bits, f"least FP16 headroom\n(bits below {FP16.limit})", False)


def depth(results: Results) -> Figure | None:
    """Stream variance and gradient norm over depth, at the first and the last recorded step; E1."""
    cells = [cell for cell in results.of({"group": "E1", "status": "completed"}) if cell["variant"] in COMPARED]
    if not cells:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.4), layout="constrained")
    for variant in COMPARED:
        mine = [cell for cell in cells if cell["variant"] == variant]
        for last in (False, True) if mine else ():
            look = {"color": COLOURS[variant], "linestyle": "-" if last else ":"}
            name = f"{TITLES[variant]}, {'end' if last else 'start'}"
            variances = [v for cell in mine if (v := stream_variance(cell, last)) and None not in v]
            gradients = [list(cell["gradient"].values())[-1 if last else 0] for cell in mine if cell.get("gradient")]
            for ax, curves in zip(axes, (variances, [g for g in gradients if None not in g]), strict=True):
                if curves:
                    mean = np.exp(np.log(np.maximum(np.array(curves, float), 1e-30)).mean(0))
                    ax.plot(range(1, len(mean) + 1), mean, label=name, **look)
    axes[0].set(ylabel="variance of the stream", xlabel="layer", yscale="log")
    axes[1].set(ylabel="gradient norm of the layer", xlabel="layer", yscale="log")
    axes[0].legend(frameon=False, fontsize=7.5)
    return figure


def pairs(results: Results) -> Figure | None:
    """Held-out loss of each variant minus Peri-LN's in the same block, a dot a seed."""
    rows: list[tuple[str, list[float], str]] = []
    for group in ("E1", "E3", "E4", "E5"):
        cells = results.of({"group": group})
        base = {(c["block"], c["seed"], c["data"]): c for c in cells if c["variant"] == "peri"}
        names = list(dict.fromkeys((c["block"], c["variant"]) for c in cells if c["variant"] != "peri"))
        for block, variant in sorted(names):
            found = []
            for cell in cells:
                other = base.get((block, cell["seed"], cell["data"]))
                if (cell["block"], cell["variant"]) != (block, variant) or other is None:
                    continue
                if cell["heldout_loss"] is not None and other["heldout_loss"] is not None:
                    found.append(cell["heldout_loss"] - other["heldout_loss"])
            if found:
                rows.append((f"{group} {block}: {variant}", found, variant))
    if not rows:
        return None
    figure, ax = plt.subplots(figsize=(7.2, 0.9 + 0.3 * len(rows)), layout="constrained")
    for y, (_, values, variant) in enumerate(rows[::-1]):
        ax.plot(values, [y] * len(values), ".", color=COLOURS.get(variant, OTHER_COLOUR))
        ax.plot([float(np.mean(values))], [y], "|", color="black", markersize=11)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(rows)), [name for name, _, _ in rows[::-1]])
    ax.set_xlabel("held-out loss minus Peri-LN's\n(nats a token; right: Peri-LN is better)")
    return figure


def course(results: Results) -> Figure | None:
    """Training loss and gradient norm of each placement at its best rate, all seeds; E2."""
    cells = [cell for cell in results.of({"group": "E2"}) if cell["rate"] == results.best.get(cell["variant"])]
    cells.sort(key=lambda cell: (COMPARED.index(cell["variant"]), cell["seed"]))
    if not cells:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.2), layout="constrained")
    for ax, name, label in zip(
        axes, ("loss", "grad_norm"), ("training loss (nats a token)", "gradient norm"), strict=True
    ):
        named = set()
        for cell in cells:
            title = f"{TITLES[cell['variant']]}, {cell['rate']:g}"
            steps, values = zip(*cell[name], strict=True)
            shown = None if title in named else title
            ax.plot(steps, values, color=COLOURS[cell["variant"]], linewidth=1.2, label=shown)
            named.add(title)
        ax.set(xlabel="step", ylabel=label)
    axes[1].set_yscale("log")
    axes[0].legend(frameon=False)
    return figure


def _by_layer(results: Results, of: Callable[[Cell], list[float] | None], label: str) -> Figure | None:
    curves: dict[str, list[list[float]]] = {}
    for cell in results.of({"group": "E1", "status": "completed"}):
        if values := of(cell):
            curves.setdefault(cell["variant"], []).append(values)
    if not curves:
        return None
    figure, ax = plt.subplots(figsize=(6.2, 3.4), layout="constrained")
    for i, (variant, rows) in enumerate(curves.items()):
        mean = np.array(rows, dtype=float).mean(0)
        look = (
            _look(variant)
            if variant in COMPARED
            else {"color": OTHER_COLOUR, "linestyle": ("--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)))[i % 4]}
        )
        ax.plot(range(1, len(mean) + 1), mean, label=TITLES.get(variant, variant), **look)
    ax.set(xlabel="layer", ylabel=label)
    ax.legend(frameon=False, fontsize=7.5)
    return figure


def angles(results: Results) -> Figure | None:
    return _by_layer(results, lambda cell: (cell.get("inside") or {}).get("angular"), "angular distance (units of pi)")


def gamma(results: Results) -> Figure | None:
    def at_end(cell: Cell) -> list[float] | None:
        tables = cell.get("gamma") or {}
        values = tables[max(tables, key=int)] if tables else None
        return values if values and None not in values else None

    return _by_layer(results, at_end, "mean gamma of the output norms")


FIGURES: dict[str, tuple[Callable[[Results], Figure | None], str]] = {
    "rates": (
        rates,
        "Held-out loss against the learning rate (as the paper's Figures 3a and 8). Dots are seeds, lines their "
        "means; a cross is a rate at which runs diverged, with how many of all.",
    ),
    "course": (
        course,
        "Training loss and gradient norm at each placement's best rate (as Figures 3b and 3c), a line a seed, thinned.",
    ),
    "depth": (
        depth,
        "Variance of the stream (as Figures 1 and 5) and gradient norm (as Figure 6) by layer, geometric mean over "
        "seeds, at the first (dotted) and the last recorded step.",
    ),
    "spikes": (spikes, "Gradient spikes in 1,000 steps (6 standard deviations above the 128 steps before)."),
    "headroom": (
        headroom,
        f"Bits between the largest entry of stream, sum and module output and {FP16.limit}, at the recorded steps.",
    ),
    "angles": (angles, "Angular distance over each layer after training (as Figure 7c), mean over seeds; E1."),
    "gamma": (gamma, "Mean gamma of the output norms by layer after training (as the end of Figure 7b); E1."),
    "pairs": (pairs, "Paired differences of held-out loss: a dot a seed, a bar their mean."),
}


def draw(results: Results) -> dict[str, bytes]:
    """PNG of each figure that the results allow, by name."""
    with plt.rc_context(STYLE):
        drawn = {name: make(results) for name, (make, _) in FIGURES.items()}
        return {name: png(figure) for name, figure in drawn.items() if figure is not None}
