"""Data loading and prompt helpers of the bundled mini tasks (see README.md)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets

DATA_DIR = Path(__file__).resolve().parent
SPLIT = "validation"

_BRACKETED = re.compile(r"\[[^\n]*?\]")


def read_rows(name: str) -> list[dict[str, Any]]:
    """Read the rows of ``<name>.jsonl`` from the folder of this module."""
    with (DATA_DIR / f"{name}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def load(rows: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The splits of a mini task; `rows` names its file. lm-eval passes `dataset_kwargs` and the task's metadata."""
    return {SPLIT: datasets.Dataset.from_list(read_rows(rows))}


def hellaswag_clean(text: str) -> str:
    """Trim ``text``, turn title marks into full stops and drop every other bracketed mark."""
    cleaned = _BRACKETED.sub("", text.strip().replace(" [title]", ". "))
    return cleaned.replace("  ", " ")


def hellaswag_docs(dataset: datasets.Dataset) -> datasets.Dataset:
    """Add the rendered ``query`` and ``choices`` and the integer ``gold`` to every row."""
    rows = []
    for row in dataset:
        opening = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        rendered = {
            "query": hellaswag_clean(opening),
            "choices": [hellaswag_clean(ending) for ending in row["endings"]],
            "gold": int(row["label"]),
        }
        rows.append({**row, **rendered})
    return datasets.Dataset.from_list(rows)


# Partial evaluation: each option fills the blank, and the words after the blank are scored.


def winogrande_gold(doc: dict[str, Any]) -> int:
    """Return the index of the right option (lm-eval reads an integer text as "the contexts differ")."""
    return int(doc["answer"]) - 1


def winogrande_contexts(doc: dict[str, Any]) -> list[str]:
    """Return the sentence up to the blank, once with each option in its place."""
    before, _, _ = doc["sentence"].partition("_")
    return [before + doc["option1"], before + doc["option2"]]


def winogrande_continuation(doc: dict[str, Any]) -> str:
    """Return the part of the sentence after the blank."""
    _, _, after = doc["sentence"].partition("_")
    return after.strip()
