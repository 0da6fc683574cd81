"""Paired differences between placements: the same seed under both, and a t interval over the pairs."""

import math
from itertools import combinations

import pandas as pd

from periln.eval.tables.paper_tables import AVERAGE, HEADS, TUNED_AVERAGE, blocks, heading
from periln.eval.tables.scores import LOSSES, Scores, block_columns, seeds_text
from periln.eval.text_table import Table, signed
from periln.runkit.placements import placement_order


def t_interval(values: pd.Series, confidence: float = 0.95) -> tuple[float, float]:
    """The two-sided Student t interval of the mean of some values; NaN for fewer than two."""
    n = len(values)
    if n < 2:
        return math.nan, math.nan
    from scipy.special import stdtrit

    half = float(stdtrit(n - 1, 0.5 + confidence / 2)) * values.std(ddof=1) / math.sqrt(n)
    return values.mean() - half, values.mean() + half


def _by_seed(rows: pd.DataFrame, placement: str, columns: dict[str, pd.Series]) -> pd.DataFrame:
    """A row a completed seed of one placement. A seed with several rates cannot be paired and must not occur."""
    of = rows[(rows.placement == placement) & (rows.status == "completed") & rows.seed.notna()]
    return pd.DataFrame({name: values[of.index] for name, values in columns.items()}).set_axis(of.seed.astype(int))


def _columns(rows: pd.DataFrame, tasks: tuple[str, ...]) -> dict[str, pd.Series]:
    """The compared values of each seed: tasks and their plain mean in percent, and the losses."""
    found = {task: rows[task] * 100 for task in tasks}
    found[AVERAGE] = rows[list(tasks)].mean(axis=1, skipna=False) * 100
    return found | {name: rows[name] for name in LOSSES}


def differences(scores: Scores, confidence: float = 0.95) -> pd.DataFrame:
    """block, placement, minus, column, mean, low, high, n (pairs), common (seeds): `placement` minus `minus`.

    Within a block of Table 2, over the seeds that completed under both; accuracies in percentage points.
    """
    out, columns = [], block_columns(scores.pretrained)
    tuned = scores.fine_tuned
    tuned = tuned[tuned.counts]
    for key, rows in blocks(scores, columns):
        after = tuned[(tuned["size"] == key[0]) & tuned.learning_rate.isin(rows.learning_rate)]
        before_columns, after_columns = _columns(rows, scores.tasks), _columns(after, scores.tasks)
        names = sorted(dict.fromkeys(rows.placement), key=placement_order)
        for low, high in combinations(names, 2):
            sides = [_by_seed(rows, p, before_columns) for p in (high, low)]
            sides_after = [_by_seed(after, p, {TUNED_AVERAGE: after_columns[AVERAGE]}) for p in (high, low)]
            both = (sides[0] - sides[1]).join((sides_after[0] - sides_after[1]), how="outer")
            common = sides[0].index.intersection(sides[1].index)
            for column in (*scores.tasks, AVERAGE, *LOSSES, TUNED_AVERAGE):
                values = both[column].dropna()
                least, most = t_interval(values, confidence)
                head = {"block": heading(key, columns, rows), "placement": high, "minus": low, "column": column}
                numbers = {"mean": values.mean(), "low": least, "high": most, "n": len(values)}
                out.append(head | numbers | {"common": len(common), "seeds": seeds_text(pd.Series(common))})
    names = ["block", "placement", "minus", "column", "mean", "low", "high", "n", "common", "seeds"]
    return pd.DataFrame(out, columns=names)


def _cell(row: pd.Series, common: int, digits: int, missing: str) -> str:
    if row.n == 0:
        return missing
    mean = signed(row["mean"], digits)
    if row.n == 1:
        return f"{mean} (n=1)" if common != 1 else mean
    text = f"{mean} [{signed(row.low, digits)}, {signed(row.high, digits)}]"
    return text if row.n == common else f"{text} (n={row.n})"


def paired_table(scores: Scores, confidence: float = 0.95, missing: str = "-") -> Table | None:
    """A block a size (and learning rate), a row a pair of placements; None if there is no pair."""
    found, lines, few = differences(scores, confidence), [], []
    if found.empty:
        return None
    used = [c for c in found.column.unique() if c not in LOSSES or found.n[found.column == c].any()]
    for head, block in found.groupby("block", sort=False):
        for (high, low), of in block.groupby(["placement", "minus"], sort=False):
            by = of.set_index("column")
            common = int(by.common.iloc[0])
            pair = f"{high} - {low}"
            cells = {HEADS.get(c, c): _cell(by.loc[c], common, 3 if c in LOSSES else 2, missing) for c in used}
            seeds = f"{common} ({by.seeds.iloc[0]})" if common else "none"
            lines.append({"block": head, "pair": pair, "common seeds": seeds} | cells)
            if common < 2:
                few.append(f"{pair} ({head})")
    notes = [
        f"First minus second, over the seeds that completed under both: mean, and in brackets the {confidence:.0%} t "
        "interval over those pairs (n-1 degrees of freedom); accuracies in percentage points, losses in nats a token. "
        "A seed at which either diverged is in no pair. It covers the seeds and not the choice of the tasks' items, "
        "which all models share. No correction for the number of comparisons."
    ]
    if ((found.n > 1) & (found.high - found.low < 1e-9)).any():
        notes.append("An interval without width: the pairs happen to differ equally, which is not a certainty.")
    if few:
        notes.append(f"Fewer than two common seeds, so no interval: {'; '.join(few)}.")
    return Table("Paired differences between placements", pd.DataFrame(lines), found, tuple(notes), keys=2)
