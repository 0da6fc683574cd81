"""What tables, figures and the report derive from the frames: one function for each derived quantity."""

import math
from collections.abc import Sequence

import pandas as pd

from periln.eval.records.frames import Frames
from periln.runkit import steps
from periln.runkit.recipes import flatten
from periln.runkit.spikes import Spikes, spike_steps


def differing(frames: Frames) -> list[str]:
    """Recipe fields in which the pretraining runs differ although only placement, rate and seed should."""
    meant = ("name", "seed", "optimizer.learning_rate")
    flat = [flatten(frames.recipes[run]) for run in frames.pretrained.run]
    keys = sorted({key for recipe in flat for key in recipe})
    other = [k for k in keys if k not in meant and not k.startswith(("model.norm_placement", "model.layer_placements"))]
    return [key for key in other if len({repr(recipe.get(key)) for recipe in flat}) > 1]


def spikes(metrics: pd.DataFrame, rules: Spikes | None = None) -> list[int]:
    """Steps of one run at which the gradient norm spiked, by the rules of its recipe: see `runkit.spikes`."""
    return spike_steps(metrics.step, metrics.grad_norm, rules)


def final_loss(metrics: pd.DataFrame) -> float:
    """Mean of the finite losses in the last tenth of a run's steps; NaN where there is none."""
    return steps.final_loss(metrics.loss.to_numpy(float))


def largest(layers: pd.DataFrame, tensors: Sequence[str]) -> pd.Series | None:
    """The row with the largest max |x| among `tensors`; a value that is not finite is the largest of all."""
    rows = layers[(layers.stat == "max_abs") & layers.tensor.isin(tensors)]
    if rows.empty:
        return None
    return rows.loc[rows.value.astype(float).fillna(math.inf).idxmax()]


def by_depth(layers: pd.DataFrame, stat: str, tensor: str | None = None) -> pd.DataFrame:
    """One statistic over depth as (run, step, x, y), of one tensor if named.

    The attention of layer l is at l - 1/2, its MLP at l, the embedding at 0.
    """
    rows = layers[(layers.stat == stat) & ((layers.tensor == tensor) if tensor else True)]
    x = rows.layer.astype(float) - 0.5 * (rows.sublayer == "attn")
    tidy = pd.DataFrame({"run": rows.run, "step": rows.step, "x": x, "y": rows.value.astype(float)})
    return tidy.sort_values("x", kind="stable")


def at_edge(data: pd.DataFrame, last: bool) -> pd.DataFrame:
    """The rows of every run's first, or last, recorded step."""
    steps = data.groupby("run").step
    return data[data.step == (steps.transform("max") if last else steps.transform("min"))]
