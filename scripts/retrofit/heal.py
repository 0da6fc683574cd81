"""The recipes of two healing runs: the new gains first, then everything; each learns the source's predictions.

They are ordinary runs of `periln pretrain`: killed, they resume exactly. The first begins with the retrofitted model,
the second with what the first has left.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from periln.runkit.errors import UsageError
from periln.runkit.recipes import dump_yaml

FOLDER = "heal"
BATCH, LONGEST = 8, 512  # sequences a step, and their tokens at most
GAINS_SHARE = 0.1  # of the tokens, for the new gains alone
GAINS_RATE, RATE = 2e-3, 2e-4


@dataclass(frozen=True)
class Healing:
    """What a healing is asked for with: prepared data, tokens of both runs, and what the runs are called."""

    data: str
    tokens: int
    name: str


def recipes(healing: Healing, source: str, model: Path, new_gains: list[str], positions: int) -> dict[str, dict]:
    """The recipes by file name, in order: `1-gains.yaml` where there are new gains, and `2-all.yaml`.

    Raises:
        UsageError: the tokens are fewer than a step of each.
    """
    length = min(LONGEST, positions)
    step = BATCH * length
    steps = healing.tokens // step
    first = max(1, round(GAINS_SHARE * steps)) if new_gains else 0
    if steps - first < 1:
        raise UsageError(f"--heal-tokens {healing.tokens} are fewer than the {2 * step} of two steps")
    shared: dict[str, Any] = {
        "data": healing.data,
        "distill_from": source,
        "batch_size": BATCH,
        "sequence_length": length,
        "precision": {"mode": "fp32", "residual_dtype": None},
    }
    found: dict[str, dict] = {}
    begin = str(model)
    if first:
        name = f"{healing.name}-gains"
        rate = {"learning_rate": GAINS_RATE, "weight_decay": 0.0}
        found["1-gains.yaml"] = _recipe(name, begin, first, rate, shared | {"train_only": new_gains})
        begin = f"runs/{name}"
    found["2-all.yaml"] = _recipe(f"{healing.name}-healed", begin, steps - first, {"learning_rate": RATE}, shared)
    return found


def _recipe(name: str, begin: str, steps: int, optimizer: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "init_from": begin, "steps": steps, "optimizer": optimizer, **shared}


def write_recipes(folder: Path, found: dict[str, dict]) -> None:
    """The recipes as files."""
    (folder / FOLDER).mkdir()
    for name, recipe in found.items():
        (folder / FOLDER / name).write_text(dump_yaml(recipe))
