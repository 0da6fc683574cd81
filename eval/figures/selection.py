"""Which runs a figure shows, under what name, and how they look.

A series is what a figure distinguishes by colour and line: a placement, and what its runs change about it (gamma
frozen, LayerNorm, ...). Size, tokens, sequence length and warm-up are panels, never series.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import matplotlib as mpl
import pandas as pd

from periln.eval.figures.measured_models import NO_RATE, STAGE
from periln.eval.records.derived import final_loss
from periln.eval.records.frames import Frames
from periln.eval.records.words import rate_text
from periln.runkit.placements import OTHER_COLOUR, colour_of, default_embedding_norm, has_embedding_norm, marker_of
from periln.runkit.sizes import PAPER_SIZES, count_text, paper_size

LONGEST_LABEL = 44
MODELS = "measured models"  # instead of a learning rate
_OWN_COLOURS = (OTHER_COLOUR, "#222222", "#9C6B4E", "#5B4FA2")
_OWN_MARKERS = ("d", "p", "X", "<", ">", "H")
_SHADES = ((0, 0.0), (0, 0.5), (1, 0.45), (0, 0.75))  # how far towards black or white
_STYLES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))


@dataclass(frozen=True)
class Look:
    colour: Any
    marker: str
    style: Any

    @property
    def line(self) -> dict[str, Any]:
        return {"color": self.colour, "linestyle": self.style}


@dataclass(frozen=True)
class View:
    """Runs to draw: `runs` has a row a pretraining run, in the order used everywhere."""

    frames: Frames
    runs: pd.DataFrame
    looks: dict[str, Look]
    short: dict[str, str]  # series whose names are too long for a legend, with their names there

    def label(self, series: str) -> str:
        return self.short.get(series, series)

    def of(self, runs: pd.DataFrame) -> "View":
        return replace(self, runs=runs)

    def where(self, **values: Any) -> "View":
        """The runs whose columns have these values, or one of these values."""
        kept = self.runs
        for column, value in values.items():
            kept = kept[kept[column].isin(value if isinstance(value, (list, tuple, set)) else [value])]
        return self.of(kept)

    @property
    def names(self) -> str:
        """The meaning of the short labels, as a sentence; empty if there are none."""
        used = [f"{self.short[s]}: {s}" for s in self.runs.series.unique() if s in self.short]
        return f" {'; '.join(used)}." if used else ""


def _changes(model: dict[str, Any], placement: str) -> list[str]:
    """What a model section changes about its placement, in words."""
    said = []
    norm = model.get("embedding_norm")
    if (
        norm is not None
        and bool(norm) != default_embedding_norm(model, placement)
        and isinstance(model.get("norm_placement", ""), str)
    ):
        said.append("embedding norm" if norm else "no embedding norm")
    if model.get("output_norm_learnable") is False:
        said.append("gamma frozen")
    if model.get("norm_type", "rmsnorm") != "rmsnorm":
        said.append({"layernorm": "LayerNorm"}.get(model["norm_type"], str(model["norm_type"])))
    if model.get("norm_gain", "channel") != "channel":
        said.append(f"gain {model['norm_gain']}")
    if model.get("qk_norm"):
        said.append("QK-norm" if model["qk_norm"] == "full" else "QK-norm by head")
    if model.get("final_norm") is not None:
        said.append("final norm" if model["final_norm"] else "no final norm")
    if model.get("residual_scale") not in (None, 1, 1.0):
        said.append(f"residual scale {model['residual_scale']}")
    return said


def sizes_of(runs: pd.DataFrame) -> pd.Series:
    """The model size of each run: the paper's name where it fits, else parameters without embeddings, else the shape.

    Runs of one shape have one size, though an extra, missing or frozen norm changes their parameters a little.
    """
    counts = runs.parameters_non_embedding.fillna(runs.parameters)
    shapes = runs[["num_layers", "hidden_size", "intermediate_size"]].apply(
        lambda row: " x ".join(map(str, row)), axis=1
    )
    shapes = shapes.where(runs.num_layers.notna() & runs.hidden_size.notna(), counts.map(str))
    names = {}
    for shape, same in runs.groupby(shapes):
        count = counts[same.index].max()
        first = same.iloc[0]
        if pd.notna(count):
            embedded = " with embeddings" if first.isna().parameters_non_embedding else ""
            name = f"{count_text(count)} parameters{embedded}"
            names[shape] = name if embedded else paper_size(count) or name
        elif pd.notna(first.num_layers) and pd.notna(first.hidden_size):
            names[shape] = f"{first.num_layers:g} layers x {first.hidden_size:g}"
        else:
            names[shape] = "size not recorded"
    for shape, name in list(names.items()):  # two shapes with equally many parameters are two sizes
        if list(names.values()).count(name) > 1 and name not in PAPER_SIZES:
            first = runs[shapes == shape].iloc[0]
            names[shape] = f"{name} ({first.num_layers:g} x {first.hidden_size:g})"
    return shapes.map(names)


def _model_sizes(models: pd.DataFrame) -> pd.Series:
    """One size for all measured models, so that they share one panel."""
    counts = [count_text(n) for n in models.parameters.dropna().sort_values()]
    ends = " to ".join(dict.fromkeys([*counts[:1], *counts[-1:]]))
    return pd.Series(f"{ends} parameters" if ends else "size not recorded", index=models.index, dtype=object)


def _describe(frames: Frames, run: pd.Series) -> dict[str, Any]:
    if run.stage == STAGE:
        flags = dict.fromkeys(("embedding_norm", "frozen"), False) | dict.fromkeys(("norm_type", "qk_norm"), "none")
        numbers = dict.fromkeys(("tokens", "warmup", "final_loss"), math.nan)
        return {"variant": "", "series": PurePath(run.run).name} | flags | numbers
    recipe = frames.recipes[run.run]
    model, optimizer = recipe.get("model") or {}, recipe.get("optimizer") or {}
    changes = _changes(model, run.placement)
    steps, batch, length = (pd.to_numeric(run[c], errors="coerce") for c in ("steps", "batch_size", "sequence_length"))
    return {
        "variant": ", ".join(changes),
        "series": ", ".join([run.placement, *changes]),
        "tokens": float(steps) * float(batch) * float(length),
        "warmup": optimizer.get("warmup"),
        "norm_type": model.get("norm_type", "rmsnorm"),
        "embedding_norm": has_embedding_norm(model, run.placement),
        "frozen": model.get("output_norm_learnable") is False,
        "qk_norm": model.get("qk_norm") or "none",
        "final_loss": final_loss(frames.metrics[frames.metrics.run == run.run]),
    }


def looks_of(runs: pd.DataFrame) -> dict[str, Look]:
    """A colour and marker for each placement, a line style for each of its variants."""
    looks: dict[str, Look] = {}
    own: list[str] = []
    for placement, same in runs.groupby("placement", sort=False):
        colour, marker = colour_of(placement), marker_of(placement)
        if colour == OTHER_COLOUR:
            colour = _OWN_COLOURS[len(own) % len(_OWN_COLOURS)]
            marker = _OWN_MARKERS[len(own) % len(_OWN_MARKERS)]
            own.append(placement)
        for i, series in enumerate(sorted(same.series.unique(), key=lambda s: (s != placement, s))):
            # A variant is the placement's colour, darker or paler, and has other dashes.
            towards, share = _SHADES[i % len(_SHADES)]
            rgb = tuple(c + (towards - c) * share for c in mpl.colors.to_rgb(colour))
            looks[series] = Look(rgb, marker, _STYLES[i % len(_STYLES)])
    return looks


def view_of(frames: Frames, rates: Sequence[float] | None = None) -> View:
    """All pretraining runs of the frames, or those with these learning rates."""
    runs = frames.runs[frames.runs.stage.isin(["pretrain", STAGE])]
    more = pd.DataFrame([_describe(frames, run) for _, run in runs.iterrows()], index=runs.index)
    runs = pd.concat([runs, more], axis=1)
    numbers = ("parameters", "parameters_non_embedding", "num_layers", "hidden_size", "intermediate_size")
    for column in (*numbers, "warmup", "sequence_length", "steps"):
        runs[column] = pd.to_numeric(runs[column], errors="coerce")
    models = runs.stage == STAGE
    runs["size"] = pd.concat([sizes_of(same) for same in (runs[~models],) if len(same)] + [_model_sizes(runs[models])])
    long = [series for series in runs.series.unique() if len(series) > LONGEST_LABEL]
    looks = looks_of(runs)
    order = {series: i for i, series in enumerate(looks)}
    # By rate first, as everywhere; within a rate, the variants of a placement are adjacent.
    runs = runs.assign(order=runs.series.map(order)).sort_values(["learning_rate", "order"], kind="stable")
    if rates:  # measured models have none, and are left out
        runs = runs[runs.learning_rate.isin(rates)]
    return View(frames, runs, looks, {series: f"own placement {i}" for i, series in enumerate(long, start=1)})


# --- choosing ------------------------------------------------------------------------------------------------


def sizes(view: View) -> list[str]:
    """The sizes, smallest first."""
    runs = view.runs.assign(n=view.runs.parameters_non_embedding.fillna(view.runs.parameters).fillna(0))
    return list(runs.groupby("size").n.max().sort_values(kind="stable").index)


def of_size(view: View, paper_sizes: Sequence[str]) -> View:
    """The runs of the paper's sizes where there are any, else all."""
    found = view.where(size=list(paper_sizes))
    return found if len(found.runs) else view


def common_protocol(view: View) -> tuple[View, str]:
    """The runs with the most frequent sequence length and warm-up; and, in words, how many are left out."""
    runs = view.runs
    for column in ("sequence_length", "warmup"):
        if runs[column].nunique() > 1:
            most = runs[column].mode().min() if column == "warmup" else runs[column].mode().max()
            runs = runs[runs[column] == most]
    longest = runs.groupby(["series", "size", "learning_rate"]).tokens.transform("max")
    runs = runs[~(runs.tokens < 0.8 * longest)]
    left = len(view.runs) - len(runs)
    words = f" Left out: {left} of {len(view.runs)} runs, of another sequence length, warm-up or token budget."
    return view.of(runs), words if left else ""


def plain_placements(view: View) -> tuple[View, str]:
    """The runs that change nothing about their placement, where there are any; and, in words, which are left out."""
    found = view.of(view.runs[view.runs.variant == ""])
    if found.runs.empty or len(found.runs) == len(view.runs):
        return view, ""
    others = [view.label(series) for series in view.runs.series.unique() if series not in set(found.runs.series)]
    return found, f" Left out, as they change a placement: {'; '.join(others)}."


def best_rates(view: View) -> pd.DataFrame:
    """(series, size, learning_rate): the rate of lowest mean final loss over the seeds that did not diverge.

    Where all of a series' runs diverged, the lowest rate.
    """
    rows = []
    for (series, size), same in view.runs.groupby(["series", "size"], sort=False):
        means = same[same.status != "diverged"].groupby("learning_rate").final_loss.mean().dropna()
        rate = means.idxmin() if len(means) else same.learning_rate.min()
        rows.append({"series": series, "size": size, "learning_rate": rate})
    return pd.DataFrame(rows, columns=["series", "size", "learning_rate"])


def at_best_rate(view: View) -> View:
    """Every series at its best rate only."""
    best = best_rates(view)
    keys = pd.MultiIndex.from_frame(view.runs[["series", "size", "learning_rate"]])
    return view.of(view.runs[keys.isin(pd.MultiIndex.from_frame(best))])


def rate_name(rate: float) -> str:
    """A learning rate as panels show it, or what replaces it."""
    return MODELS if rate == NO_RATE else rate_text(rate)


def rate_names(rate: float) -> list[str]:
    """A learning rate as part of a panel's title; nothing if there is none."""
    return [] if rate == NO_RATE else [rate_text(rate).removeprefix("learning ")]


def rates_words(view: View) -> str:
    """At which rates the series of a view were trained."""
    best = best_rates(view)
    best = best[best.learning_rate != NO_RATE]
    if best.empty:
        return "Models that were measured, not trained here."
    if best.learning_rate.nunique() == 1:
        return f"All at {rate_text(best.learning_rate.iloc[0])}."
    several = best["size"].nunique() > 1
    named = [f"{view.label(r.series)}{f' ({r.size})' if several else ''} {r.learning_rate:g}" for r in _rows(best)]
    return f"Learning rates, each series' own with the lowest final loss: {_joined(named)}."


def _rows(frame: pd.DataFrame) -> list[Any]:
    # `size` is an attribute only because itertuples keeps the column's name.
    return list(frame.itertuples(index=False))


def _joined(parts: list[str]) -> str:
    return ("; " if any("," in part for part in parts) else ", ").join(parts)


def seeds_words(view: View, found: pd.Series) -> str:
    """How many runs of each series were drawn, and how many of them diverged."""
    runs = view.runs[view.runs.run.isin(found.unique())]
    parts = []
    for series, same in runs.groupby("series", sort=False):
        if (same.stage == STAGE).all():
            parts.append(view.label(series))
            continue
        lost = (same.status == "diverged").sum()
        parts.append(f"{view.label(series)} {len(same)}" + (f" ({lost} diverged)" if lost else ""))
    return f"Runs drawn: {_joined(parts)}."
