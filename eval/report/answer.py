"""The report's answer: at most three sentences, each from numbers in the records, with the number of seeds."""

import math

import pandas as pd

from periln.eval.figures.outcomes import Outcomes, outcomes_of
from periln.eval.figures.selection import view_of
from periln.eval.records.frames import Frames
from periln.eval.tables.report_tables import plural

MOST_NAMED = 3  # other placements next to the one that a sentence is about


def answer(frames: Frames) -> list[str]:
    """Which placement had the lowest loss, which the least headroom, which runs finished: one to three sentences."""
    found = outcomes_of(view_of(frames))
    return [sentence for sentence in (_loss(found), _headroom(found), _finished(found)) if sentence]


def _where(found: Outcomes) -> str:
    return (
        f"At learning rate {found.compared.learning_rate.iloc[0]:g}" if found.same_rate else "Each at its own best rate"
    )


def _seeds(counts: pd.Series) -> str:
    low, high = int(counts.min()), int(counts.max())
    return plural(high, "seed") if low == high else f"{low} to {high} seeds"


def _others(parts: list[str]) -> str:
    more = len(parts) - MOST_NAMED
    return ", ".join(parts[:MOST_NAMED] + ([f"{more} more above"] if more > 0 else []))


def _loss(found: Outcomes) -> str:
    """The lowest loss, with the others'; and whether the seeds distinguish the two lowest."""
    rows = found.compared
    rows = rows[(rows.status == "completed") & rows.loss.notna()]
    if rows.empty:
        return ""
    by = rows.groupby("name", sort=False).loss.agg(["mean", "count", "min", "max"]).sort_values("mean", kind="stable")
    best, first = by.index[0], by.iloc[0]
    mean = "mean of " if by["count"].max() > 1 else ""
    if len(by) == 1:
        return (
            f"{_where(found)} {best}'s {found.loss} was {first['mean']:.3f} nats a token ({mean}{_seeds(by['count'])})."
        )
    others = _others([f"{name} {row['mean']:.3f}" for name, row in by.iloc[1:].iterrows()])
    said = f"{_where(found)} {best} had the lowest {found.loss}, {first['mean']:.3f} nats a token ({others}; {mean}"
    said += f"{_seeds(by['count'])}" + (" each" if by["count"].nunique() == 1 else "") + ")"
    gap, spread = by["mean"].iloc[1] - first["mean"], (by["max"] - by["min"]).iloc[:2].max()
    if by["count"].iloc[:2].min() < 2:
        return f"{said}; one seed does not tell a placement from chance."
    if gap <= spread:
        return f"{said}; its lead over {by.index[1]}, {gap:.3f}, is within the {spread:.3f} by which seeds differ."
    return f"{said}."


def _headroom(found: Outcomes) -> str:
    """The least and the most headroom of the runs that are compared."""
    rows = found.compared
    rows = rows[rows.headroom.notna()]
    if rows.empty:
        return ""
    by = rows.groupby("name", sort=False).headroom.agg(["min", "count"])
    least, most = by["min"].idxmin(), by["min"].idxmax()

    def bits(value: float) -> str:
        return f"{value:.1f} bits" if math.isfinite(value) else "none (overflow)"

    seeds = f"the least of {_seeds(by['count'])}"
    if len(by) == 1:
        return f"{least} had {bits(by['min'].iloc[0])} of FP16 headroom there ({seeds}, at the recorded steps)."
    if by["min"].nunique() == 1:
        return f"FP16 headroom was {bits(by['min'].iloc[0])} for every placement ({seeds}, at the recorded steps)."
    return (
        f"{least} had the least FP16 headroom, {bits(by['min'].min())}, and {most} the most, "
        f"{bits(by['min'].max())} ({seeds}, at the recorded steps)."
    )


def _finished(found: Outcomes) -> str:
    """What became of the runs: at the highest rate that tells placements apart, else in all."""
    rows = found.rows
    if rows.empty:
        return ""
    open_ = rows[~rows.status.isin(["completed", "diverged"])]
    states = ", ".join(f"{n} {status}" for status, n in sorted(open_.status.value_counts().items()))
    rest = f"; {len(open_)} of {plural(len(rows), 'run')} not finished ({states})" if len(open_) else ""
    lost = rows[rows.status == "diverged"]
    if lost.empty:
        done = len(rows) - len(open_)
        if not done:
            return f"No run has finished: {states}."
        return f"No run diverged: {done} of {plural(len(rows), 'run')} finished, {_rates(found.rates)}{rest}."
    told = [r for r in found.rates if {"completed", "diverged"} <= set(found.at(r).status)]
    rate = max(told) if told else max(lost.learning_rate)
    at = found.at(rate)
    whole, gone = at[at.status == "completed"], _counts(at[at.status == "diverged"], at)
    if whole.empty:
        return f"At {rate:g} no run finished: {gone} diverged{rest}."
    alone = "only " if whole.series.nunique() == 1 and at.series.nunique() > 1 else ""
    return f"At {rate:g} {alone}{_counts(whole, at)} finished; {gone} diverged{rest}."


def _counts(some: pd.DataFrame, of: pd.DataFrame) -> str:
    """`Pre-LN (1 of 2 seeds) and Post-LN (2 of 2)`: the number of runs of each placement."""
    whole = of["name"].value_counts()
    parts = [f"{name} ({n} of {whole[name]})" for name, n in some["name"].value_counts(sort=False).items()]
    parts[0] = parts[0].replace(")", " seed)" if whole[some["name"].iloc[0]] == 1 else " seeds)")
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _rates(rates: list[float]) -> str:
    return f"at learning rate {rates[0]:g}" if len(rates) == 1 else f"at learning rates {rates[0]:g} to {rates[-1]:g}"
