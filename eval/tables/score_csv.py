"""Scores from a CSV file: a row a seed, in the shape of the paper's Tables 6 to 11.

    stage,placement,size,seed,status,arc_easy,hellaswag,piqa,social_iqa,winogrande

`stage` is pretrain or sft, `status` one of a run's statuses; scores are fractions. A diverged seed has no scores (or
the words that the tables print). `learning_rate`, `c4_loss`, and the names in `OPTIONAL` may be added;
any other column is left out, with a message. Lines that begin with # are comments.
"""

import csv
import math
from pathlib import Path
from typing import Any

import pandas as pd

from periln.eval.tables.scores import KEYS, LOSSES, PROVENANCE, Scores, in_order
from periln.runkit.errors import UserError, did_you_mean
from periln.runkit.folder import STATUSES
from periln.runkit.tasks import COUNT, SUITES

REQUIRED = ("stage", "placement", "size", "seed", "status")
STAGES = ("pretrain", "sft")
OPTIONAL = ("run", *PROVENANCE)
NO_SCORE = ("n/a", "diverged")  # in lower case: the words that a diverged seed's cell may hold


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """Line numbers and cells, without comments and empty lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {str(error.strerror).lower()}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a CSV file in UTF-8") from error
    kept = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                kept.append((number, [cell.strip() for cell in next(csv.reader([line], strict=True))]))
            except csv.Error as error:
                raise UserError(f"{path} line {number} is not a line of a CSV file ({error})") from error
    return kept


def _number(text: str, name: str, where: str, least: float = 0.0, most: float = math.inf) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}, column {name}: {text!r} is not a number")
    if value > most:
        percent = ": scores are fractions, not percent" if value <= 100 else ""
        raise UserError(f"{where}, column {name}: {text} is above {most:g}{percent}")
    if value < least:
        raise UserError(f"{where}, column {name}: {text} is below {least:g}")
    return value


def _row(cells: dict[str, str], tasks: tuple[str, ...], where: str) -> dict:
    """One checked row."""
    for name in ("stage", "placement", "size", "status", "seed"):
        if not cells[name]:
            raise UserError(f"{where}, column {name}: empty")
    for name, known in (("stage", STAGES), ("status", STATUSES)):
        if cells[name] not in known:
            near = did_you_mean(cells[name], known)
            raise UserError(f"{where}, column {name}: {cells[name]!r} is none of {', '.join(known)}{near}")
    if not cells["seed"].isdecimal():
        raise UserError(f"{where}, column seed: {cells['seed']!r} is not a whole number")
    row: dict = {name: cells[name] for name in REQUIRED} | {"seed": int(cells["seed"])}
    row["learning_rate"] = math.nan
    if cells.get("learning_rate"):
        row["learning_rate"] = _number(cells["learning_rate"], "learning_rate", where)
    for task in tasks:
        text = cells.get(task, "")
        blank = not text or (cells["status"] == "diverged" and text.lower() in NO_SCORE)
        row[task] = math.nan if blank else _number(text, task, where, most=1.0)
    for name in LOSSES:
        row[name] = _number(cells[name], name, where) if cells.get(name) else math.nan
    for name in OPTIONAL:
        row[name] = cells.get(name) or None
    if row["limit"] is None and "limit" in cells and row["status"] == "completed":
        row["limit"] = "none"  # an empty cell next to others with a limit: all items
    if row["tokens"]:
        row["tokens"] = _number(row["tokens"], "tokens", where)
    return row


def _remarks(rows: pd.DataFrame, tasks: tuple[str, ...], extra: list[str], absent: list[str]) -> tuple[str, ...]:
    """What in the file did not enter the tables."""
    said = []
    if extra:
        said.append(f"Columns of the file that no table uses: {', '.join(extra)}.")
    if absent:
        said.append(f"The file has no column {', '.join(absent)}: no Avg. of the {COUNT} tasks can be given.")
    scored = rows[(rows.status != "completed") & rows[list(tasks)].notna().any(axis=1)]
    for _, row in scored.iterrows():
        said.append(
            f"Scores of {row.placement} {row['size']} seed {row.seed} ({row.stage}) are left out: it is {row.status}."
        )
    return tuple(said)


def read_scores(path: str | Path) -> Scores:
    """The rows of a scores file.

    Raises:
        UserError: unreadable, a needed column missing or doubled, a row too short or too long, a cell that is not a
            score, a seed that appears twice; names line and column.
    """
    path = Path(path)
    lines = _lines(path)
    if not lines:
        raise UserError(f"{path} is empty: its first line must name the columns ({', '.join(REQUIRED)}, the tasks)")
    at, head = lines[0]
    for name in head:
        if head.count(name) > 1:
            raise UserError(f"{path} line {at}: column {name!r} appears twice")
    for name in REQUIRED:
        if name not in head:
            commas = "; cells are separated by commas" if len(head) == 1 else ""
            raise UserError(f"{path} line {at}: no column {name!r}{did_you_mean(name, head)}{commas}")
    tasks = max(SUITES.values(), key=lambda suite: len(set(suite) & set(head)))
    if not set(tasks) & set(head):
        raise UserError(f"{path} line {at}: no column of a task ({', '.join(SUITES['hub'])})")
    if len(lines) == 1:
        raise UserError(f"{path} has no rows below its line {at}")
    rows: list[dict[str, Any]] = []
    seen: dict[Any, Any] = {}
    for number, cells in lines[1:]:
        where = f"{path} line {number}"
        if len(cells) != len(head):
            raise UserError(f"{where}: {len(cells)} cells, but line {at} names {len(head)} columns")
        row = _row(dict(zip(head, cells, strict=True)), tasks, where)
        key = tuple("" if row[k] != row[k] else row[k] for k in KEYS)  # NaN does not equal itself
        if key in seen:
            raise UserError(
                f"{where}, column seed: {row['stage']} {row['placement']} {row['size']} seed {row['seed']} is in "
                f"line {seen[key]} already"
            )
        seen[key] = number
        rows.append(row)
    frame = pd.DataFrame(rows)
    if not (frame.stage == "pretrain").any():
        raise UserError(f"{path} has no row whose column stage is 'pretrain': the tables start from pretrained models")
    known = {*REQUIRED, *tasks, *LOSSES, *OPTIONAL, "learning_rate"}
    extra, absent = [name for name in head if name not in known], [task for task in tasks if task not in head]
    remarks = _remarks(frame, tasks, extra, absent)
    frame.loc[frame.status != "completed", [*tasks, *LOSSES]] = math.nan
    return Scores(
        path.name,
        tasks,
        in_order(frame.assign(step=math.nan, evaluated_step=math.nan, not_chosen=False)),
        remarks=remarks,
    )
