"""The notes under a table of scores: everything in which the compared models differ."""

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd

from periln.eval.tables.scores import PROVENANCE, Scores, seeds_text
from periln.runkit.scores import RULE
from periln.runkit.tasks import COUNT

METHOD = (
    "Tasks: accuracy ({metric}) in percent, mean ± sample standard deviation (n-1) over the seeds that completed; n=1: "
    "one such seed, no deviation. {protocol}Avg. is the plain mean of the {count} task means. Losses in nats a token."
)
WORDS = {
    "harness": "Mixed harness versions",
    "limit": "Different limits (items a task)",
    "num_fewshot": "Different numbers of examples before an item",
    "dtype": "Scored in different dtypes",
    "tokenizer": "Different tokenizers, so that losses in nats a token cannot be compared (bits per byte can)",
    "tokens": "Unequal token counts",
    "c4_measured_on": "C4 losses measured in different ways",
    "heldout_measured_on": "Held-out losses measured in different ways",
}


def _who(rows: pd.DataFrame, sized: bool) -> str:
    """`peri seeds 1 to 5; pre seed 1`, with the stage where it is fine-tuning and the size where there are several."""
    parts = []
    for (stage, size, placement), same in rows.groupby(["stage", "size", "placement"], sort=False):
        words = [placement, size if sized else "", seeds_text(same.seed), "(fine-tuned)" if stage == "sft" else ""]
        parts.append(" ".join(word for word in words if word))
    return "; ".join(parts)


def _value(name: str, value: Any) -> str:
    if name == "tokens":
        return f"{value:,.0f}"
    if name.endswith("_measured_on"):
        return ", ".join(f"{key} {str(x)[:12]}" for key, x in json.loads(str(value)).items()) if "{" in value else value
    return str(value)


def _mixed(rows: pd.DataFrame, name: str, sized: bool, where: str = "") -> list[str]:
    """A note on one column of `PROVENANCE`, where the rows have more than one value of it; unknown is not a value."""
    known = rows[rows[name].notna()]
    values = list(dict.fromkeys(known[name]))
    if len(values) < 2:
        return []
    parts = [f"{_value(name, value)} ({_who(known[known[name] == value], sized)})" for value in values]
    return [f"{WORDS[name]}{where}: {', '.join(parts)}."]


def _differences(scores: Scores, rows: pd.DataFrame, sized: bool) -> list[str]:
    said = []
    for name in PROVENANCE:
        if name == "tokens":  # a larger model may well see more
            pretrained = rows[rows.stage == "pretrain"]
            for size, same in pretrained.groupby("size", sort=False):
                said += _mixed(same, name, sized, f" at {size}" if sized else "")
        elif name in ("limit", "num_fewshot", "dtype"):  # before and after fine-tuning may differ
            for _, same in rows.groupby("stage", sort=False):
                said += _mixed(same, name, sized)
        else:
            said += _mixed(rows, name, sized)
    return said


def _seeds(scores: Scores, sized: bool) -> list[str]:
    """Seeds that one placement has and another lacks, and seeds that neither completed nor diverged."""
    said, tuned = [], scores.fine_tuned
    for (size, rate), rows in scores.pretrained.groupby(["size", "learning_rate"], sort=False, dropna=False):
        every, at = set(rows.seed.dropna()), f" at {size}" if sized else ""
        at += f", learning rate {rate:g}" if scores.pretrained.learning_rate.nunique() > 1 else ""
        for placement, same in rows.groupby("placement", sort=False):
            if lacking := every - set(same.seed):
                said.append(f"Missing: {placement}{at} has no {seeds_text(pd.Series(sorted(lacking)))}.")
            open_ = same[~same.status.isin(["completed", "diverged"])]
            for status, which in open_.groupby("status"):
                said.append(f"Not counted: {placement}{at} {seeds_text(which.seed)} ({status}).")
            said += _lacking_scores(scores, same[same.status == "completed"], f"{placement}{at}")
            if len(tuned):
                rates = tuned.learning_rate.isna() if pd.isna(rate) else tuned.learning_rate == rate
                of = tuned[(tuned["size"] == size) & rates & (tuned.placement == placement)]
                done = set(same.seed[same.status == "completed"])
                if lacking := done - set(of.seed[of.status == "completed"]):
                    which = seeds_text(pd.Series(sorted(lacking)))
                    said.append(f"SFT Avg. of {placement}{at} is without {which}: not fine-tuned to the end.")
                said += _lacking_scores(
                    scores, of[(of.status == "completed") & of.counts], f"fine-tuned {placement}{at}"
                )
    return said


def _lacking_scores(scores: Scores, done: pd.DataFrame, who: str) -> list[str]:
    """Completed seeds that some task lacks; nothing if no seed has a score, which the table shows."""
    some = done[done[list(scores.tasks)].notna().any(axis=1)]
    if some.empty:
        return []
    said = []
    for task in scores.tasks:
        if done[task].isna().any() and scores.rows[task].notna().any():
            said.append(f"No score of {task} for {who} {seeds_text(done.seed[done[task].isna()])}.")
    return list(dict.fromkeys(said))


def _fine_tuned(scores: Scores, sized: bool) -> list[str]:
    """Fine-tunings that do not count, or that belong to no pretraining of the table."""
    tuned, keys = scores.fine_tuned, ["size", "placement", "seed"]
    said = []
    left = tuned[~tuned.counts & (tuned.status == "completed")]
    if len(left):
        said.append(f"Left out of SFT Avg., since that pretraining diverged: {_who(left, sized)}.")
    there = set(scores.pretrained[keys].itertuples(index=False, name=None))
    alone = tuned.loc[[key not in there for key in tuned[keys].itertuples(index=False, name=None)]]
    if len(alone):
        said.append(f"Without a row of pretraining: {_who(alone, sized)}.")
    return said


def _stale(scores: Scores, sized: bool) -> list[str]:
    """Runs that were scored at a checkpoint before the last, or at another than the chosen one."""
    rows = scores.pretrained
    early = rows[(rows.status == "completed") & (rows.evaluated_step < rows.step)]
    said = [f"Scored before the end of the run: {_who(early, sized)}."] if len(early) else []
    other = scores.rows[scores.rows.not_chosen]
    return said + ([f"Scored at another checkpoint than best.json names: {_who(other, sized)}."] if len(other) else [])


def notes(scores: Scores, more: Sequence[str] = ()) -> tuple[str, ...]:
    """How the numbers were made, then everything that differs, was left out, or is missing."""
    sized = scores.rows["size"].nunique() > 1
    scored = scores.rows[(scores.rows.status == "completed")]
    said = _seeds(scores, sized) + _fine_tuned(scores, sized) + _stale(scores, sized)
    found = [*scores.remarks, *more, *_differences(scores, scored, sized), *said]
    return (METHOD.format(metric=scores.metric, count=COUNT, protocol=_protocol(scored)), *found)


def _protocol(rows: pd.DataFrame) -> str:
    """How the models were scored, if all were scored alike; otherwise `_differences` says so."""
    shots, limits = rows.num_fewshot.dropna().unique(), rows.limit.dropna().unique()
    if len(shots) != 1 or len(limits) != 1:
        return ""
    items = "all items" if limits[0] == "none" else f"limit {limits[0]} items a task"
    return f"Scored with {shots[0]} examples before an item, {items}. {RULE} "


def limit_words(scores: Scores) -> str:
    """`, limit 20 items a task` for a table's title; nothing where every model answered everything."""
    limits = sorted(set(scores.rows.limit.dropna()))
    if limits in ([], ["none"]):
        return ""
    return f", limit {limits[0]} items a task" if len(limits) == 1 else f", limits differ ({'; '.join(limits)})"
