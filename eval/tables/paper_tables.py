"""The paper's Table 2 (means over seeds) and Tables 6 to 11 (a row a seed), from the scores of any models."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from periln.eval.tables.scores import LOSSES, Scores, block_columns
from periln.eval.text_table import Table

DIVERGED, NOT_TUNED = "Diverged", "N/A"
AVERAGE, TUNED_AVERAGE = "Avg.", "SFT Avg."
HEADS = {
    "c4_loss": "C4 loss",
    "c4_bits_per_byte": "C4 bits per byte",
    "loss": "held-out loss",
    "bits_per_byte": "bits per byte",
    "gold_bits_per_byte": "gold bits per byte",
}
STAGE_WORDS = {"pretrain": "Pretraining", "sft": "Fine-tuning"}
PAPER_TABLES = {
    **{("pretrain", "peri"): 6, ("pretrain", "pre"): 7, ("pretrain", "post"): 8},
    **{("sft", "peri"): 9, ("sft", "pre"): 10, ("sft", "post"): 11},
}
GROUP = ["size", "learning_rate", "placement"]


# --- statistics ----------------------------------------------------------------------------------------------


def _statistics(values: pd.Series) -> dict[str, float]:
    values = values.dropna()
    return {"mean": values.mean(), "std": values.std(ddof=1), "n": len(values)}


def _means(rows: pd.DataFrame, tasks: Sequence[str]) -> list[dict]:
    """Mean, sample standard deviation and n of every task in percent; last the plain mean of the task means.

    Avg. has no deviation, is given only where every task has a mean, and its n is the smallest of the tasks'.
    """
    found: list[dict[str, Any]] = [{"column": task} | _statistics(rows[task] * 100) for task in tasks]
    average = sum(row["mean"] for row in found) / len(found)
    return [*found, {"column": AVERAGE, "mean": average, "std": math.nan, "n": min(row["n"] for row in found)}]


def groups(scores: Scores) -> list[tuple[tuple, pd.DataFrame]]:
    """The pretraining rows of every (size, learning rate, placement), in order."""
    return list(scores.pretrained.groupby(GROUP, sort=False, dropna=False))


def same_group(rows: pd.DataFrame, key: tuple) -> pd.DataFrame:
    """The rows of one (size, learning rate, placement)."""
    size, rate, placement = key
    rates = rows.learning_rate.isna() if pd.isna(rate) else rows.learning_rate == rate
    return rows[(rows["size"] == size) & rates & (rows.placement == placement)]


def summarize(scores: Scores) -> pd.DataFrame:
    """Size, learning_rate, placement, column, mean, std (sample, n-1) and n over the seeds that completed.

    Columns are the tasks and `Avg.` in percent, the losses as they are, and `SFT Avg.`.
    """
    out, tuned = [], scores.fine_tuned
    for key, rows in groups(scores):
        done = rows[rows.status == "completed"]
        after = same_group(tuned, key)
        after = after[(after.status == "completed") & after.counts]
        found = _means(done, scores.tasks)
        found += [{"column": name} | _statistics(done[name]) for name in LOSSES]
        found.append(_means(after, scores.tasks)[-1] | {"column": TUNED_AVERAGE})
        out += [dict(zip(GROUP, key, strict=True)) | row for row in found]
    return pd.DataFrame(out)


# --- Table 2 -------------------------------------------------------------------------------------------------


def shown(row: pd.Series, digits: int, missing: str) -> str:
    """`57.51 ± 0.81`, `57.51 (n=1)`, or the word for what is missing."""
    if row.n == 0 or math.isnan(row["mean"]):
        return missing
    if row.n == 1:
        return f"{row['mean']:.{digits}f} (n=1)"
    return f"{row['mean']:.{digits}f}" + ("" if math.isnan(row["std"]) else f" ± {row['std']:.{digits}f}")


def survival(statuses: pd.Series) -> str:
    """`2/2`: completed of all; what neither completed nor diverged is named."""
    open_ = statuses[~statuses.isin(["completed", "diverged"])].value_counts()
    rest = ", ".join(f"{n} {status}" for status, n in sorted(open_.items()))
    return f"{(statuses == 'completed').sum()}/{len(statuses)}" + (f" ({rest})" if rest else "")


def heading(key: tuple, columns: Sequence[str], rows: pd.DataFrame, show_size: bool = True) -> str:
    """A block's heading, with the learning rate if the whole block has one."""
    rates = rows.learning_rate.dropna().unique()
    parts = [str(key[0])] if show_size else []
    if "learning_rate" in columns or len(rates) == 1:
        parts += [f"learning rate {rates[0]:g}"] if len(rates) else []
    return ", ".join(parts) or str(key[0])


def blocks(scores: Scores, columns: Sequence[str]) -> list[tuple[tuple, pd.DataFrame]]:
    """The pretraining rows of every block, in order; the key's first value is the size."""
    return list(scores.pretrained.groupby(list(columns), sort=False, dropna=False))


def row_heads(rows: pd.DataFrame, key: tuple, columns: Sequence[str]) -> dict[str, str]:
    """A row's name within its block: the placement, and the rate where the rows of the block differ in it."""
    rate = {} if "learning_rate" in columns or rows.learning_rate.nunique() <= 1 else {"learning rate": f"{key[1]:g}"}
    return {"placement": key[2]} | rate


def _shown_row(of: pd.DataFrame, runs: pd.DataFrame, tuned: pd.DataFrame, digits: int, missing: str) -> dict[str, str]:
    by = of.set_index("column")
    gone = (runs.status == "diverged").all()
    tuned_gone = gone or (len(tuned) > 0 and ((tuned.status == "diverged") | ~tuned.counts).all())
    cells = {}
    for column in by.index.drop(TUNED_AVERAGE):
        places = 3 if column in LOSSES else digits
        cells[HEADS.get(column, column)] = DIVERGED if gone else shown(by.loc[column], places, missing)
    cells[TUNED_AVERAGE] = NOT_TUNED if tuned_gone else shown(by.loc[TUNED_AVERAGE], digits, missing)
    return cells | {"seeds survived": survival(runs.status)}


def means_table(
    scores: Scores,
    title: str,
    columns: Sequence[str] | None = None,
    digits: int = 2,
    missing: str = "-",
    always: Sequence[str] = ("c4_loss",),
    show_size: bool = True,
) -> Table:
    """Table 2: a block a size (and learning rate), a row a placement. `numbers` is `summarize`'s.

    Losses that no run has are left out, but for those named in `always`.
    """
    columns = columns or block_columns(scores.pretrained)
    numbers, tuned, lines = summarize(scores), scores.fine_tuned, []
    for key, rows in blocks(scores, columns):
        for group, runs in rows.groupby(GROUP, sort=False, dropna=False):
            cells = _shown_row(same_group(numbers, group), runs, same_group(tuned, group), digits, missing)
            head = {"block": heading(key, columns, rows, show_size)}
            lines.append(head | row_heads(rows, group, columns) | cells)
    text = pd.DataFrame(lines).fillna("")
    unused = [name for name in LOSSES if name not in always and scores.pretrained[name].isna().all()]
    text = text.drop(columns=[HEADS[name] for name in unused])
    names = [name for name in ("placement", "learning rate") if name in text]
    text = text[["block", *names, *text.columns.drop(["block", *names])]]
    return Table(title, text, numbers, keys=len(names), csv=means_csv(scores, numbers))


def means_csv(scores: Scores, numbers: pd.DataFrame) -> pd.DataFrame:
    """A row a group: size, placement, every task with its deviation, avg, c4_loss, sft_avg; for runs, then the rest.

    Without learning rates these are the columns of the paper's Table 2 and no more.
    """
    rated, out = scores.pretrained.learning_rate.notna().any(), []
    for key, runs in groups(scores):
        of = same_group(numbers, key).set_index("column")
        row = {"size": key[0], "placement": key[2]}
        for task in scores.tasks:
            row |= {task: of.loc[task, "mean"], f"{task}_std": of.loc[task, "std"]}
        row |= {"avg": of.loc[AVERAGE, "mean"], "c4_loss": of.loc["c4_loss", "mean"]}
        row |= {"sft_avg": of.loc[TUNED_AVERAGE, "mean"]}
        if rated:
            row |= {"learning_rate": f"{key[1]:g}", "seeds": len(runs), "survived": (runs.status == "completed").sum()}
            row |= {"heldout_loss": of.loc["loss", "mean"], "bits_per_byte": of.loc["bits_per_byte", "mean"]}
            row |= {"c4_bits_per_byte": of.loc["c4_bits_per_byte", "mean"]}
        out.append(row)
    return pd.DataFrame(out)


# --- Tables 6 to 11 ------------------------------------------------------------------------------------------


def _seed_cells(row: pd.Series, tasks: Sequence[str], word: str, missing: str) -> dict[str, str]:
    if row.status == "diverged" or not row.get("counts", True):
        return dict.fromkeys(tasks, word)
    if row.status != "completed":
        return dict.fromkeys(tasks, row.status)
    return {task: missing if math.isnan(row[task]) else f"{row[task]:.4f}" for task in tasks}


def _with_missing(scores: Scores) -> pd.DataFrame:
    """Fine-tuning rows, with one of status `diverged` for every diverged pretraining that has none."""
    tuned, keys = scores.fine_tuned, [*GROUP, "seed"]
    if tuned.empty:
        return tuned
    gone = scores.pretrained[scores.pretrained.status == "diverged"]
    there = set(tuned[keys].fillna(-1).itertuples(index=False, name=None))
    new = gone.loc[[key not in there for key in gone[keys].fillna(-1).itertuples(index=False, name=None)]]
    if new.empty:
        return tuned
    return pd.concat([tuned, new.assign(stage="sft", counts=False)], ignore_index=True).sort_values(
        "seed", kind="stable"
    )


def seed_tables(scores: Scores, missing: str = "-") -> list[Table]:
    """Tables 6 to 11: one for each stage and placement, a block a size (and learning rate), a row a seed."""
    columns, tables = block_columns(scores.pretrained), []
    stages = {"pretrain": (scores.pretrained, DIVERGED), "sft": (_with_missing(scores), NOT_TUNED)}
    losses = [name for name in ("c4_loss",) if scores.pretrained[name].notna().any()]
    for stage, (rows, word) in stages.items():
        for placement in dict.fromkeys(scores.pretrained.placement):
            lines = []
            for key, block in blocks(scores, columns):
                rates = rows.learning_rate.isin(block.learning_rate)  # `NaN in` is true where NaN is held
                of = rows[(rows.placement == placement) & (rows["size"] == key[0]) & rates]
                for _, row in of.iterrows():
                    cells = _seed_cells(row, [*scores.tasks, *losses], word, missing)
                    head = heading(key, columns, block[block.placement == placement])
                    lines.append({"block": head, "seed": f"{row.seed:g}"} | cells)
            if lines:
                number = PAPER_TABLES.get((stage, placement))
                like = f", as the paper's Table {number}" if number else ""
                title = f"{STAGE_WORDS[stage]}, {placement}: a row a seed{like}"
                text = pd.DataFrame(lines).rename(columns=HEADS)
                tables.append(Table(title, text, rows[rows.placement == placement]))
    return tables


def seeds_csv(scores: Scores) -> pd.DataFrame:
    """All rows of `seed_tables` as one frame, which `--scores` reads again: scores in full, or the word."""
    rows = pd.concat([scores.pretrained, _with_missing(scores)], ignore_index=True)
    losses = [name for name in LOSSES if rows[name].notna().any()]
    out = []
    for _, row in rows.iterrows():
        word = DIVERGED if row.stage == "pretrain" else NOT_TUNED
        gone = row.status == "diverged" or row.get("counts", True) is False
        line = {name: row[name] for name in ("stage", "placement", "size")}
        line |= {"seed": "" if math.isnan(row.seed) else int(row.seed), "status": "diverged" if gone else row.status}
        for name in [*scores.tasks, *losses]:
            word_here = word if name in scores.tasks else ""
            done = row.status == "completed" and not math.isnan(row[name])
            line[name] = word_here if gone else repr(float(row[name])) if done else ""
        if scores.pretrained.learning_rate.notna().any():
            line["learning_rate"] = f"{row.learning_rate:g}"
        out.append(line)
    return pd.DataFrame(out)
