"""The tables of scores in the report: one for each suite, with the scores of chance below."""

import numpy as np
import pandas as pd

from periln.eval.records.derived import differing
from periln.eval.records.frames import Frames
from periln.eval.tables.footnotes import limit_words, notes
from periln.eval.tables.paper_tables import means_table, summarize
from periln.eval.tables.scores import from_runs
from periln.eval.text_table import Table
from periln.runkit.tasks import CHANCE, SUITES

MISSING = "n/a"


def plural(count: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def suites(frames: Frames) -> list[str]:
    """The task suites that were evaluated; else the one that the demo's recipe names."""
    tasks = set(frames.scores.task)
    asked = (frames.recipe.get("evaluation") or {}).get("suite")
    return [s for s in SUITES if tasks & set(SUITES[s])] or [asked if asked in SUITES else "mini"]


def cell_numbers(frames: Frames, suite: str) -> pd.DataFrame:
    """size, learning_rate, placement, column, mean, std (sample, n-1), n; accuracies in percent."""
    return summarize(from_runs(frames, suite))


def build(frames: Frames, suite: str) -> Table:
    """The scores of one suite for the report: a block a learning rate (and size), a row a placement.

    `numbers` is that of `cell_numbers`.
    """
    scores = from_runs(frames, suite)
    title = f"Scores, suite {suite}{limit_words(scores)}"
    sizes = scores.rows["size"].nunique()
    losses = ("loss", "bits_per_byte")
    found = means_table(scores, title, ["size", "learning_rate"], 1, MISSING, losses, show_size=sizes > 1)
    chance = {task: f"{x:.1f}" for task, x in zip(SUITES[suite], CHANCE, strict=True)}
    rows_at_chance = {"block": "for comparison", "placement": "chance", "Avg.": f"{np.mean(CHANCE):.1f}", **chance}
    text = pd.concat([found.text, pd.DataFrame([rows_at_chance])], ignore_index=True).fillna("")
    return Table(title, text, found.numbers, notes(scores, recipe_notes(frames)))


def recipe_notes(frames: Frames) -> list[str]:
    other = differing(frames)
    return [f"These runs differ in more than placement, learning rate and seed: {', '.join(other)}."] if other else []
