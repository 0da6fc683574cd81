"""The paper's numbers (eval/paper/) next to the user's own.

Source: Peri-LN, arXiv 2502.02732, Table 2 and Tables 6 to 11.
"""

import math
from pathlib import Path

import pandas as pd

from periln.eval.tables.paper_tables import AVERAGE, GROUP, TUNED_AVERAGE, means_csv, same_group, summarize
from periln.eval.tables.score_csv import read_scores
from periln.eval.tables.scores import Scores
from periln.eval.text_table import Table, signed
from periln.runkit.sizes import PAPER_SIZES, paper_size, size_value
from periln.runkit.tasks import SUITES

FOLDER = Path(__file__).parents[1] / "paper"
NAMES = {AVERAGE: "avg", TUNED_AVERAGE: "sft_avg", "c4_loss": "c4_loss"}
HEADS = {"c4_loss": "C4 loss"}
SOURCE = (
    "Paper: Table 2 of Peri-LN (arXiv 2502.02732); five seeds, 30B tokens of DCLM, cl100k_base. It names neither the "
    "metric (its scores look like acc) nor how its C4 documents were packed, and losses compare only where the "
    "tokenizers are the same. Sizes are without embeddings, within 5 %."
)


def table_2() -> pd.DataFrame:
    """The paper's Table 2: size, placement, tasks with `_std`, avg, c4_loss, sft_avg; accuracies in percent."""
    return pd.read_csv(FOLDER / "table_02.csv", comment="#")


def by_seed() -> Scores:
    """The paper's Tables 6 to 11."""
    return read_scores(FOLDER / "tables_06_to_11.csv")


def survivors() -> pd.Series:
    """Completed of all seeds by (size, placement), from Tables 6 to 8."""
    groups = by_seed().pretrained.groupby(["size", "placement"])
    return groups.status.apply(lambda s: f"{(s == 'completed').sum()}/{len(s)}")


def _cell(mean: float, std: float, digits: int, missing: str) -> str:
    if math.isnan(mean):
        return missing
    return f"{mean:.{digits}f}" + ("" if math.isnan(std) else f" ± {std:.{digits}f}")


def _lines(ours: pd.DataFrame, paper: pd.Series | None, columns: list[str], missing: str) -> list[dict]:
    """Rows `ours`, `paper`, `difference` of one group; without a row of the paper's, ours alone."""
    by, lines = ours.set_index("column"), [{"whose": "ours"}]
    values = {c: by.loc[c, "mean"] for c in columns}
    for c in columns:
        lines[0][HEADS.get(c, c)] = _cell(values[c], by.loc[c, "std"], 3 if c == "c4_loss" else 2, missing)
    if paper is None:
        return lines
    theirs = {c: float(paper[NAMES.get(c, c)]) for c in columns}
    stds = {c: float(paper.get(f"{c}_std", math.nan)) for c in columns}
    lines.append({"whose": "paper"} | {HEADS.get(c, c): _cell(theirs[c], stds[c], 2, missing) for c in columns})
    gaps = {c: values[c] - theirs[c] for c in columns}
    shown = {HEADS.get(c, c): missing if math.isnan(x) else signed(x, 2) for c, x in gaps.items()}
    return [*lines, {"whose": "difference"} | shown]


def _sentences(scores: Scores, matched: dict[str, str | None], absent: list[str]) -> list[str]:
    said = [SOURCE]
    none = [size for size, name in matched.items() if name is None]
    if none:
        said.append(f"No size of the paper's ({', '.join(PAPER_SIZES)}) corresponds to {', '.join(none)}.")
    if absent:
        said.append(f"The paper has no row for {', '.join(absent)}.")
    if scores.metric != "acc":
        said.append(f"Ours are {scores.metric} where a task has it.")
    return said


def compare(scores: Scores, missing: str = "-") -> Table:
    """Ours, the paper's, and the difference, by size and placement.

    Where no size of ours is one of the paper's, its whole Table 2 is shown below ours. The mini sets are not the
    paper's benchmarks: they are not compared, and a note says so.
    """
    title, printed, alive = "Beside the paper's Table 2", table_2().set_index(["size", "placement"]), survivors()
    columns = [*SUITES["hub"], AVERAGE, "c4_loss", TUNED_AVERAGE]
    if tuple(scores.tasks) != SUITES["hub"]:
        note = "The mini_ sets are not the five benchmarks: the paper has nothing to compare their scores with."
        text = pd.DataFrame([{"block": "not comparable", "placement": "-"}])
        return Table(title, text, pd.DataFrame(), (note,))
    numbers, rows, lines, absent = summarize(scores), scores.pretrained, [], []
    matched = {size: paper_size(size_value(size)) for size in dict.fromkeys(rows["size"])}
    rated = rows.learning_rate.notna().any()
    for key, runs in rows.groupby(GROUP, sort=False, dropna=False):
        size, rate, placement = key
        theirs = printed.loc[(matched[size], placement)] if (matched[size], placement) in printed.index else None
        if matched[size] and theirs is None:
            absent.append(f"{placement} at {size}")
        survived = {"ours": f"{(runs.status == 'completed').sum()}/{len(runs)}"}
        survived |= {"paper": alive[(matched[size], placement)]} if theirs is not None else {}
        for line in _lines(same_group(numbers, key), theirs, columns, missing):
            named = {"placement": placement} | ({"learning rate": f"{rate:g}"} if rated else {})
            lines.append({"block": size} | named | line | {"seeds survived": survived.get(line["whose"], "")})
    if not any(matched.values()):
        for (size, placement), row in printed.iterrows():
            cells = {
                HEADS.get(c, c): _cell(row[NAMES.get(c, c)], row.get(f"{c}_std", math.nan), 2, "-") for c in columns
            }
            named = {"placement": placement} | ({"learning rate": ""} if rated else {}) | {"whose": "paper"}
            lines.append(
                {"block": f"the paper's {size}"} | named | cells | {"seeds survived": alive[(size, placement)]}
            )
    text = pd.DataFrame(lines)
    csv = _csv(scores, numbers, matched)
    return Table(title, text, numbers, tuple(_sentences(scores, matched, absent)), 3 if rated else 2, csv)


def _csv(scores: Scores, numbers: pd.DataFrame, matched: dict[str, str | None]) -> pd.DataFrame:
    """Rows as in `means_csv` and the paper's Table 2, with `whose`; sizes under our names where they match."""
    theirs, named = table_2(), {name: size for size, name in matched.items() if name}
    if named:
        theirs = theirs[theirs["size"].isin(list(named))].assign(size=theirs["size"].map(named))
    both = [means_csv(scores, numbers).assign(whose="ours"), theirs.assign(whose="paper")]
    found = pd.concat(both, ignore_index=True)
    return found[["whose", *found.columns.drop("whose")]]
