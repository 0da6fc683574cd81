"""Bits a byte of the right answer: a measure for models too small for their accuracy to move.

For an item, -log2 p(right answer | question) divided by the answer's bytes (UTF-8, with the space before it, as the
harness asks for it); for a task, the mean over its items, with the standard error of that mean.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

METRIC = "gold_bits_per_byte"


def bits_per_byte(task: Any, samples: Sequence[Mapping[str, Any]]) -> list[float]:
    """The bits a byte of the right answer of each item of a multiple-choice task.

    Args:
        task: the harness's task.
        samples: what it logs of the items: `doc`, `arguments`, `filtered_resps`.

    Returns:
        A number an item, in the order of the samples; empty for a task of another kind, or of several right answers.
    """
    if getattr(task, "OUTPUT_TYPE", None) != "multiple_choice":
        return []
    found = []
    for sample in samples:
        gold = task.doc_to_text(sample["doc"]) if task.multiple_input else task.doc_to_target(sample["doc"])
        if isinstance(gold, str):
            choices = task.doc_to_choice(sample["doc"])
            gold = choices.index(gold) if gold in choices else None
        if not isinstance(gold, int) or not 0 <= gold < len(sample["arguments"]):
            return []
        size = len(sample["arguments"][gold][1].encode())
        found.append(-sample["filtered_resps"][gold][0] / (math.log(2) * size))
    return found


def row(name: str, values: Sequence[float]) -> dict[str, Any] | None:
    """The result of a task as the records have it; None where there is nothing to average."""
    if not values or not all(map(math.isfinite, values)):
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"task": name, "metric": METRIC, "value": statistics.fmean(values), "stderr": error, "n": len(values)}
