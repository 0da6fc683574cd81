"""What became of every run, in the numbers a reader asks for first: its loss, its headroom, whether it finished."""

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from periln.eval.figures.measured_models import STAGE
from periln.eval.figures.selection import View, common_protocol, plain_placements
from periln.eval.records.derived import largest
from periln.runkit.number_format import FP16

TITLES = {"post": "Post-LN", "pre": "Pre-LN", "peri": "Peri-LN"}
TENSORS = ("stream", "residual_add", "branch")
HELDOUT, TRAINING = "held-out loss", "final training loss"


@dataclass(frozen=True)
class Outcomes:
    """`rows`: run, series, name, learning_rate, seed, status, loss (nats a token), headroom (bits, minus infinity for
    an overflow, NaN where nothing was recorded). `loss` names the loss, `words` what was left out."""

    rows: pd.DataFrame
    loss: str
    words: str = ""

    @property
    def rates(self) -> list[float]:
        return sorted(self.rows.learning_rate.unique())

    def at(self, rate: float) -> pd.DataFrame:
        return self.rows[self.rows.learning_rate == rate]

    @property
    def finished(self) -> pd.DataFrame:
        return self.rows[self.rows.status == "completed"]

    @property
    def main_rate(self) -> float | None:
        """The rate at which most series finished with a loss; of several the one with the lowest; None without any."""
        of = self.finished[self.finished.loss.notna()]
        if of.empty:
            return None
        by = of.groupby("learning_rate").agg(series=("series", "nunique"), loss=("loss", "min"))
        return float(by.sort_values(["series", "loss"], ascending=[False, True]).index[0])

    @property
    def compared(self) -> pd.DataFrame:
        """The runs to compare: those at the main rate, or each series at its best rate if no two share one."""
        done, rate = self.finished[self.finished.loss.notna()], self.main_rate
        at = self.at(rate) if rate is not None else self.rows
        if done.series.nunique() < 2 or at[at.run.isin(done.run)].series.nunique() > 1:
            return at
        best = done.groupby(["series", "learning_rate"], as_index=False).loss.mean().sort_values("loss")
        keys = pd.MultiIndex.from_frame(best.drop_duplicates("series")[["series", "learning_rate"]])
        return self.rows[pd.MultiIndex.from_frame(self.rows[["series", "learning_rate"]]).isin(keys)]

    @property
    def same_rate(self) -> bool:
        return self.compared.learning_rate.nunique() < 2


def title_of(view: View, series: str) -> str:
    """A series as a sentence names it: `Peri-LN, gamma frozen` for `peri, gamma frozen`."""
    head, comma, rest = view.label(series).partition(",")
    return TITLES.get(head, head) + comma + rest


def outcomes_of(view: View) -> Outcomes:
    """The runs of the view that can be compared: of one size (that of most runs) and one protocol."""
    runs = view.of(view.runs[view.runs.stage != STAGE])
    if runs.runs.empty:
        return Outcomes(pd.DataFrame(columns=_COLUMNS), TRAINING)
    usual, words = common_protocol(runs)
    size = usual.runs["size"].value_counts().index[0]
    if usual.runs["size"].nunique() > 1:
        words += f" Of the sizes, the one with most runs: {size}."
    usual, changed = plain_placements(usual.where(size=size))
    rows = pd.DataFrame([_row(usual, run) for _, run in usual.runs.iterrows()], columns=_COLUMNS)
    # One kind of loss for all: a held-out loss cannot be compared with a training loss.
    done = rows[rows.status == "completed"]
    heldout = len(done) > 0 and done.heldout.notna().all()
    rows["loss"] = rows.heldout if heldout else rows.training
    return Outcomes(rows, HELDOUT if heldout else TRAINING, words + changed)


_COLUMNS = ["run", "series", "name", "learning_rate", "seed", "status", "heldout", "training", "headroom"]


def _row(view: View, run: pd.Series) -> dict[str, Any]:
    frames = view.frames
    scores = frames.scores[(frames.scores.run == run.run) & (frames.scores.task == "heldout")]
    heldout = scores.value[scores.metric == "loss"].dropna()
    peak = largest(frames.layers[frames.layers.run == run.run], TENSORS)
    return {
        "run": run.run,
        "series": run.series,
        "name": title_of(view, run.series),
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "status": run.status,
        "heldout": float(heldout.iloc[0]) if len(heldout) else math.nan,
        "training": run.final_loss,
        "headroom": math.nan if peak is None else FP16.headroom(float(peak.value)),
    }
