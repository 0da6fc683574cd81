"""Which score of a model counts where its eval folder holds several for one task and metric: one rule for all readers.

The score of the chosen checkpoint (best.json) counts, else that of the latest one; among those the one with the fewest
examples before an item, as the paper's are 0-shot; then the one on the most items; then the file whose name sorts last.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

RULE = (
    "Where a task was scored several times, the chosen checkpoint's score counts (else the latest checkpoint's), then "
    "that with the fewest examples before an item, then that on the most items."
)


def _number(value: Any, missing: float) -> float:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
    return float(value) if usable else missing


def precedence(score: Mapping[str, Any]) -> tuple[Any, ...]:
    """A sort key; the score with the largest counts. Keys: chosen, at_step, num_fewshot, limit, n, file."""
    return (
        score.get("chosen") is True,
        _number(score.get("at_step"), -1.0),
        -_number(score.get("num_fewshot"), 0.0),
        _number(score.get("n"), _number(score.get("limit"), math.inf)),
        str(score.get("file") or ""),
    )


def that_count(scores: Iterable[Mapping[str, Any]], by: tuple[str, ...] = ("task", "metric")) -> list[int]:
    """The positions of the scores that count, one for each combination of the keys in `by`, ascending."""
    best: dict[tuple[Any, ...], tuple[tuple[Any, ...], int]] = {}
    for at, score in enumerate(scores):
        key, value = tuple(score.get(name) for name in by), (precedence(score), at)
        if key not in best or value > best[key]:
            best[key] = value
    return sorted(at for _, at in best.values())


def protocol(scores: Iterable[Mapping[str, Any]]) -> str:
    """How some scores were made: `0-shot`, `5-shot, limit 20`; where they differ, `0- and 5-shot`."""
    scores = list(scores)
    shots = sorted({int(_number(s.get("num_fewshot"), 0)) for s in scores})
    limits = sorted({_number(s.get("limit"), math.inf) for s in scores})
    words = " and ".join(f"{n}-" for n in shots) + "shot" if shots else ""
    if limits and limits != [math.inf]:
        words += f", limit {' and '.join('none' if x == math.inf else f'{x:g}' for x in limits)}"
    return words
