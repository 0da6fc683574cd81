"""The numbers behind a figure, for the charts of the report's page: what `runkit/pages/charts.js` draws.

A plot is a mapping that JSON can carry. `kind` is `lines`, `map`, `pairs` or `dots`; every line, map or run has `k`,
what the reader can switch on and off (series, rate, size, seed, layer), and arrays of numbers, which `packed` stores
once.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import to_hex

from periln.eval.figures.measured_models import NO_RATE
from periln.eval.figures.selection import View, sizes

MOST_POINTS = 400  # of a line; more are put together
MOST_STEPS = 24  # recorded steps of a run
_DASHES = {"-": "", "--": "6 3", "-.": "6 3 1 3"}

Plot = dict[str, Any]


def keys_of(view: View, run: pd.Series) -> dict[str, Any]:
    """What a reader can switch a run on and off by."""
    keys: dict[str, Any] = {"series": view.label(run.series), "seed": None if pd.isna(run.seed) else str(run.seed)}
    if run.learning_rate != NO_RATE:
        keys["rate"] = float(run.learning_rate)
    if len(sizes(view)) > 1:
        keys["size"] = run["size"]
    return {key: value for key, value in keys.items() if value is not None}


def style_of(view: View, run: pd.Series) -> dict[str, Any]:
    """A run's name, colour, dashes and whether it diverged."""
    look = view.looks[run.series]
    dash = _DASHES.get(look.style, "5 1 1 1 1 1") if isinstance(look.style, str) else "5 1 1 1 1 1"
    return {"run": run.run, "c": to_hex(look.colour), "d": dash} | ({"lost": True} if run.status == "diverged" else {})


def numbers(values: Iterable[float], digits: int = 5) -> list[float | None]:
    """Numbers as the page carries them, None for what is not finite."""
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values]


def thinned(x: np.ndarray, y: np.ndarray, every: int, largest: bool) -> tuple[np.ndarray, np.ndarray]:
    """Points `every` of which are one: at the last of their places their mean, or the largest; what is not finite is
    left out."""
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if every <= 1 or not len(x):
        return x, y
    groups = pd.Series(y).groupby(x // every)
    last = np.minimum((groups.mean().index.to_numpy() + 1) * every - 1, x.max())
    return last, (groups.max() if largest else groups.mean()).to_numpy()


def every_of(x: pd.Series) -> int:
    """How many steps are one point, for lines over these steps."""
    return max(1, math.ceil((x.max() - x.min() + 1) / MOST_POINTS)) if len(x) else 1


def step_lines(
    view: View, data: pd.DataFrame, panel: int, largest: bool = False, more: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """A line a run over steps; `data` has run, x, y."""
    every, lines = every_of(data.x), []
    for _, run in view.runs.iterrows():
        of = data[data.run == run.run]
        x, y = thinned(of.x.to_numpy(float), of.y.to_numpy(float), every, largest)
        if len(x):
            keys = {"k": keys_of(view, run) | dict(more or {})}
            lines.append({"p": panel, "x": numbers(x, 9), "y": numbers(y)} | keys | style_of(view, run))
    return lines


def depth_lines(view: View, data: pd.DataFrame, panel: int) -> list[dict[str, Any]]:
    """A line a run and recorded step over depth; `data` has run, step, x, y."""
    lines = []
    for _, run in view.runs.iterrows():
        of = data[data.run == run.run]
        for step in spread(sorted(of.step.unique()), MOST_STEPS):
            at = of[(of.step == step) & np.isfinite(of.y)]
            if len(at):
                point = {"p": panel, "t": int(step), "x": numbers(at.x), "y": numbers(at.y)}
                lines.append(point | {"k": keys_of(view, run)} | style_of(view, run))
    return lines


def spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the values, including the first and the last."""
    if len(values) <= most:
        return list(values)
    return [values[i] for i in sorted({round(k * (len(values) - 1) / (most - 1)) for k in range(most)})]


def packed(plots: Mapping[str, Plot]) -> str:
    """The plots as JSON that may stand inside a page: `pool` has every array once, `plots` say which by its number."""
    pool: dict[tuple[Any, ...], int] = {}

    def stored(part: dict[str, Any]) -> dict[str, Any]:
        return part | {name: pool.setdefault(tuple(part[name]), len(pool)) for name in ("x", "y")}

    out = {}
    for name, plot in plots.items():
        out[name] = plot | {key: [stored(part) for part in plot[key]] for key in ("lines", "maps") if key in plot}
    text = json.dumps({"pool": [list(values) for values in pool], "plots": out}, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
