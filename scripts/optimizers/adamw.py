"""AdamW (1711.05101), decoupled as Megatron's `adam` is; torch's fused one, which works in place."""

from dataclasses import dataclass
from typing import Any

import torch

from periln.scripts.optimizers.rows import Group, Row, Shared


@dataclass
class Options:
    """None: its betas and eps are the recipe's."""


def build(groups: list[Group], shared: Shared, options: Any = None) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=shared.learning_rate, betas=shared.betas, eps=shared.eps, fused=True)


ROW = Row(options=Options, build=build, hidden_state=2, other_state=2)
