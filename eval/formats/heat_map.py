"""A picture of what formats lose where: the lowest signal-to-noise ratio of every slot, over layers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from periln.eval.figures.pieces import DPI, image_bytes, settings
from periln.eval.formats.recipes import RECIPES, TARGETS, Recipe
from periln.eval.formats.words import PLACES

LOW, HIGH = 0.0, 60.0  # dB: noise as large as the signal, and ten bits
NOT_FINITE = "#D55E00"


def worst_by_slot(records: Sequence[tuple[Recipe, dict[str, Any]]], target: str):
    """Names of the slots, names of the rows, and the lowest SNR in dB over layers: NaN not finite, inf exact."""
    of = [(recipe, record) for recipe, record in records if recipe.group == target]
    slots = list(dict.fromkeys(s["slot"] for _, record in of for s in record["slots"] if s["target"] == target))
    grid = np.full((len(slots), len(of)), np.inf)
    for column, (_, record) in enumerate(of):
        for s in record["slots"]:
            ratio = np.inf if s["exact"] else s["snr_db"] if s["snr_db"] is not None else np.nan
            i = slots.index(s["slot"])
            grid[i, column] = np.fmin(grid[i, column], ratio) if not np.isnan(ratio) else np.nan
    return slots, [recipe.name for recipe, _ in of], grid


def draw(title: str, records: Sequence[tuple[Recipe, dict[str, Any]]]) -> bytes | None:
    """A panel a target, slot x format, as PNG; None where no target was measured by itself."""
    panels = [(target, *worst_by_slot(records, target)) for target in TARGETS if target != RECIPES]
    panels = [panel for panel in panels if panel[1] and panel[2]]
    if not panels:
        return None
    with settings():  # type: ignore[attr-defined]
        heights = [len(slots) + 4 for _, slots, _, _ in panels]
        width = 2.6 + 0.52 * max(len(names) for _, _, names, _ in panels)
        figure = Figure(figsize=(max(7.5, width), 0.28 * sum(heights) + 0.8), dpi=DPI, layout="constrained")
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for ax, panel in zip(axes, panels, strict=True):
            image = _panel(ax, *panel)
        figure.colorbar(image, ax=list(axes), label="lowest signal to noise over layers, dB", shrink=0.6)
        figure.suptitle(title)
        return image_bytes(figure)


def _panel(ax: Any, target: str, slots: list[str], names: list[str], grid: np.ndarray) -> Any:
    import matplotlib as mpl

    colours = mpl.colormaps["viridis"].with_extremes(bad=NOT_FINITE)
    image = ax.imshow(np.clip(grid, LOW, HIGH), cmap=colours, vmin=LOW, vmax=HIGH, aspect="auto")
    ax.grid(False)
    ax.set_title(PLACES[target], loc="left")
    short = ["+".join(part.rpartition(".")[2] for part in slot.split("+")) for slot in slots]
    ax.set_yticks(range(len(slots)), labels=short)
    ax.set_xticks(range(len(names)), labels=names, rotation=30, ha="right", fontsize=8)
    for (i, j), value in np.ndenumerate(grid):
        text = "x" if np.isnan(value) else "exact" if np.isinf(value) else f"{value:.0f}"
        light = np.isnan(value) or value < 0.55 * HIGH
        ax.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if light else "black")
    return image
