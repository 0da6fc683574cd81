"""What a row of the table of optimizers says."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Group = dict[str, Any]
"""A parameter group of torch: `params`, `weight_decay`, `eps`, and `hidden`, whether it holds the hidden matrices."""


@dataclass(frozen=True)
class Shared:
    """What every optimizer is given from the recipe."""

    learning_rate: float
    betas: tuple[float, float]
    eps: float


def _nothing(options: Any) -> None:
    """Options whose types say all."""


def _as_adam(options: Any) -> float:
    """Every entry moves by the rate: the sum over a row's entries, which agree, grows with the width."""
    return -1.0


@dataclass(frozen=True)
class Row:
    """An optimizer.

    Attributes:
        options: a dataclass, the fields of `optimizer.options`.
        build: the optimizer of parameter groups.
        hidden_state, other_state: FP32 numbers that it keeps for an entry of a hidden matrix, and of all else.
        update_bytes: what the update needs beside them for an entry of the matrix that it is at.
        refused: engine (`zero2`, `zero3`, `fsdp2`, `ddp`) to the reason why it cannot run there.
        hidden_width_power: of the width, in the rate of hidden matrices (`scripts/parametrization.py`).
        check: raises UsageError for options of the right type that cannot be.
    """

    options: type
    build: Callable[[list[Group], Shared, Any], torch.optim.Optimizer]
    hidden_state: int
    other_state: int
    update_bytes: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    hidden_width_power: Callable[[Any], float] = _as_adam
    check: Callable[[Any], None] = _nothing
