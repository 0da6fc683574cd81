"""Muon for the hidden matrices, AdamW for the embedding, the head, norms and biases.

Muon steps along the orthogonalized momentum of a matrix: Jordan et al., https://kellerjordan.github.io/posts/muon/;
torch's own implementation. With `match_rms_adamw` (2502.16982) its steps have the size of AdamW's, so that one learning
rate and weight decay serve both; with `original` the matrices want their own rate: `rate_factor`.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from periln.runkit.errors import UsageError
from periln.scripts.optimizers import adamw
from periln.scripts.optimizers.rows import Group, Row, Shared


@dataclass
class Options:
    """Of the hidden matrices alone."""

    momentum: float = 0.95
    nesterov: bool = True
    newton_schulz_steps: int = 5
    adjust_rate: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    rate_factor: float = 1.0  # times the recipe's learning rate


def check(options: Options) -> None:
    if not 0 <= options.momentum < 1:
        raise UsageError(f"optimizer.options.momentum must be at least 0 and below 1, not {options.momentum}")
    if not 1 <= options.newton_schulz_steps < 100:
        steps = options.newton_schulz_steps
        raise UsageError(f"optimizer.options.newton_schulz_steps must be at least 1 and below 100, not {steps}")
    if not options.rate_factor > 0:
        raise UsageError(f"optimizer.options.rate_factor must be above 0, not {options.rate_factor}")


def width_power(options: Options) -> float:
    """`original` moves a matrix by sqrt(out/in) at any width, `match_rms_adamw` by the root of its larger side."""
    return 0.0 if options.adjust_rate == "original" else -0.5


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers that look like one: their groups and their state are its own."""

    def __init__(self, muon: torch.optim.Muon, others: torch.optim.Optimizer):
        self.parts = (muon, others)
        super().__init__([*muon.param_groups, *others.param_groups], {})
        self._link()

    def _link(self) -> None:
        """A group's rate that is set here, and a state that is put here, are the part's too."""
        muon, others = self.parts
        first = len(muon.param_groups)
        muon.param_groups, others.param_groups = self.param_groups[:first], self.param_groups[first:]
        muon.state = others.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # `load_state_dict`, which Accelerate calls at once, makes both anew
        self._link()

    def step(self, closure: Any = None) -> Any:
        loss = self.parts[0].step(closure)
        self.parts[1].step()
        return loss


def build(groups: list[Group], shared: Shared, options: Options) -> torch.optim.Optimizer:
    hidden = [dict(group) for group in groups if group["hidden"]]
    for group in hidden:
        group.pop("eps", None)  # AdamW's: Muon's own keeps a norm above zero
        group["rate_factor"] = group.get("rate_factor", 1.0) * options.rate_factor
    muon = torch.optim.Muon(
        hidden,
        lr=shared.learning_rate,
        momentum=options.momentum,
        nesterov=options.nesterov,
        ns_steps=options.newton_schulz_steps,
        adjust_lr_fn=options.adjust_rate,
    )
    return MuonAndAdamW(muon, adamw.build([group for group in groups if not group["hidden"]], shared))


_FLAT = "it keeps flat pieces of all weights, and Muon needs each matrix whole"
ROW = Row(
    options=Options,
    build=build,
    hidden_state=1,
    other_state=2,
    # The direction in FP32, then in BF16 with its product by the Gram matrix; the result in FP32.
    update_bytes=4 + 2 + 2 + 2,
    refused={"zero2": _FLAT, "zero3": _FLAT},
    hidden_width_power=width_power,
    check=check,
)
