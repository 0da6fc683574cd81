"""What tables, figures and the report derive from the frames: one function for each derived quantity."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from runkit.recipes import flatten

from .frames import Frames


def differing(frames: Frames) -> list[str]:
    """Recipe fields in which the pretraining runs differ although only placement, rate and seed should."""
    meant = ("name", "seed", "optimizer.learning_rate")
    flat = [flatten(frames.recipes[run]) for run in frames.pretrained.run]
    keys = sorted({key for recipe in flat for key in recipe})
    other = [k for k in keys if k not in meant and not k.startswith(("model.norm_placement", "model.layer_placements"))]
    return [key for key in other if len({repr(recipe.get(key)) for recipe in flat}) > 1]


def spikes(metrics: pd.DataFrame, window: int = 128, least: int = 16, deviations: float = 6.0) -> list[int]:
    """Steps of one run at which the gradient norm spiked.

    A spike exceeds the mean of the `window` steps before it by `deviations` (population) standard deviations
    of theirs. Steps without a finite norm are no spikes and enter no window; a window needs `least` norms.
    """
    norms, steps = metrics.grad_norm.to_numpy(float), metrics.step.to_numpy(float)
    found = []
    for i in range(least, len(norms)):
        before = norms[max(0, i - window) : i]
        before = before[np.isfinite(before)]
        if len(before) >= least and norms[i] > before.mean() + deviations * before.std():
            found.append(int(steps[i]))
    return found


def final_loss(metrics: pd.DataFrame) -> float:
    """Mean of the finite losses in the last tenth of a run's steps; NaN where there is none."""
    losses = metrics.loss.to_numpy(float)[-max(1, math.ceil(len(metrics) / 10)) :]
    losses = losses[np.isfinite(losses)]
    return float(losses.mean()) if len(losses) else math.nan


def largest(layers: pd.DataFrame, tensors: Sequence[str]) -> pd.Series | None:
    """The row with the largest max |x| among `tensors`; a value that is not finite is the largest of all."""
    rows = layers[(layers.stat == "max_abs") & layers.tensor.isin(tensors)]
    if rows.empty:
        return None
    return rows.loc[rows.value.astype(float).fillna(math.inf).idxmax()]


def by_depth(layers: pd.DataFrame, tensor: str, stat: str) -> pd.DataFrame:
    """(run, step, x, y): attention stands at half numbers, the MLP of layer l at l, the embedding at 0."""
    rows = layers[(layers.tensor == tensor) & (layers.stat == stat)]
    x = rows.layer.astype(float) - 0.5 * (rows.sublayer == "attn")
    tidy = pd.DataFrame({"run": rows.run, "step": rows.step, "x": x, "y": rows.value.astype(float)})
    return tidy.sort_values("x", kind="stable")


def at_edge(data: pd.DataFrame, last: bool) -> pd.DataFrame:
    """The rows of every run's first, or last, recorded step."""
    steps = data.groupby("run").step
    return data[data.step == (steps.transform("max") if last else steps.transform("min"))]
