"""The arithmetic of a run: learning rate, parameter groups, and the bookkeeping of skips and divergence."""

import math
from collections import deque
from typing import Any

import torch
from torch import nn

from periln.runkit.spikes import SpikeCounter, Spikes
from periln.scripts.optimizers import find_row, read_options
from periln.scripts.optimizers.rows import Shared
from periln.scripts.parametrization import Factors, factors_by_kind, kind_of
from periln.scripts.recipe import Divergence, Optimizer, Recipe
from periln.scripts.training.schedules import rate


def learning_rate(step: int, steps: int, recipe: Optimizer) -> float:
    """Learning rate of step `step` (from 0) by the recipe's schedule (`schedules`)."""
    peak, final = recipe.learning_rate, recipe.final_learning_rate * recipe.learning_rate
    return rate(step, steps, peak, final, recipe.schedule, recipe.warmup, recipe.decay, recipe.decay_shape)


# A norm's place by the end of its module's name; a field of `NormDecay` each.
NORM_SLOTS = {
    "input_norm": "input",
    "output_norm": "output",
    "residual_norm": "residual",
    "q_norm": "qk",
    "k_norm": "qk",
    "v_norm": "v",
    "inner_norm": "inner",
    "embed_norm": "embedding",
    "final_norm": "final",
}


def weight_decay(name: str, parameter: nn.Parameter, recipe: Optimizer) -> float:
    """The decay of a parameter, by its name in the model: matrices have the recipe's, norms that of their slot, and
    other vectors have none unless the recipe says otherwise.
    """
    if parameter.ndim >= 2:
        return recipe.weight_decay
    module = name.rpartition(".")[0]
    slot = next((slot for ending, slot in NORM_SLOTS.items() if module.endswith(ending)), None)
    asked = getattr(recipe.norm_decay, slot) if slot else None
    if asked is not None:
        return asked
    return recipe.weight_decay if recipe.decay_norms_and_biases else 0.0


# The matrices that are tables of tokens, by their modules' names; the others are hidden ones.
TABLES = ("embed_tokens", "lm_head")


def is_hidden(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix between two layers of the stream's or a module's width."""
    return parameter.ndim >= 2 and name.rpartition(".")[0].rpartition(".")[2] not in TABLES


def make_optimizer(
    model: nn.Module, recipe: Optimizer, kinds: dict[str, Factors] | None = None
) -> torch.optim.Optimizer:
    """The recipe's optimizer; decay is decoupled. A group for each decay (and, with `kinds`, for each rate and epsilon)
    of the tables of tokens, of the hidden matrices and of the vectors.
    """
    groups: dict[tuple[bool, bool, float, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = kinds[kind_of(name, parameter)] if kinds else Factors()
            decay = own.decay * weight_decay(name, parameter, recipe)
            key = parameter.ndim < 2, is_hidden(name, parameter), decay, own.rate, own.eps
            groups.setdefault(key, []).append(parameter)
    listed = [
        {"params": groups[key], "hidden": key[1], "weight_decay": key[2]}
        | ({"rate_factor": key[3], "eps": recipe.eps * key[4]} if kinds else {})
        for key in sorted(groups)
    ]
    shared = Shared(recipe.learning_rate, (recipe.beta1, recipe.beta2), recipe.eps)
    return find_row(recipe.name).build(listed, shared, read_options(recipe.name, recipe.options))


def scales_of(recipe: Recipe, config: Any) -> dict[str, Factors] | None:
    """What the recipe's parametrization multiplies, by kind of parameter; None where it changes nothing."""
    rules, optimizer = recipe.parametrization, recipe.optimizer
    if rules.rule == "standard":
        return None
    options = read_options(optimizer.name, optimizer.options)
    return factors_by_kind(rules, config, find_row(optimizer.name).hidden_width_power(options))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the step's rate, times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)


class StepBook:
    """Counts skips, names their kind, and says when a run has diverged.

    A skip is `forward` where the loss itself is not finite; else `probe` where the loss scale has not yet been
    proven by a finite step since it was set or last doubled; else `backward`. It remembers nothing that is not
    in metrics.jsonl: after a resume, `replay` brings it back.
    """

    def __init__(self, divergence: Divergence, spikes: Spikes | None = None, scaled: bool = True):
        self.rules = divergence
        self._spikes = SpikeCounter(spikes or Spikes())
        self.total = self.consecutive = self.nonfinite = 0
        self.window: deque[float] = deque(maxlen=divergence.window)
        self.lowest = math.inf
        self._scale = self._proven_scale = 0.0 if scaled else math.inf  # without a loss scale there is none to probe

    def record(self, loss: float, found_inf: bool, scale: float) -> str | None:
        """Enter one step, computed at loss scale `scale`; returns the kind of its skip, or None."""
        finite = math.isfinite(loss)
        if scale > self._scale:  # doubled: unproven, whatever was proven before it came down
            self._proven_scale = min(self._proven_scale, self._scale)
        self._scale = scale
        self.nonfinite = 0 if finite else self.nonfinite + 1
        kind = None
        if found_inf:
            self.total, self.consecutive = self.total + 1, self.consecutive + 1
            kind = "forward" if not finite else "backward" if scale <= self._proven_scale else "probe"
        else:
            self.consecutive, self._proven_scale = 0, max(scale, self._proven_scale)
        if finite:
            self.window.append(loss)
            if len(self.window) == self.window.maxlen:
                self.lowest = min(self.lowest, self.mean)
        return kind

    def spike(self, grad_norm: float) -> bool:
        """Enter the step's gradient norm, before clipping; is it a spike?"""
        return self._spikes.record(grad_norm if math.isfinite(grad_norm) else None)

    def replay(self, records: list[dict[str, Any]]) -> None:
        """Enter the records of the steps before a resume."""
        for r in records:
            loss = math.nan if r["loss"] is None else r["loss"]
            norm = math.nan if r["grad_norm"] is None else r["grad_norm"]
            self.record(loss, r["found_inf"], r["loss_scale"])
            self.spike(norm)

    @property
    def mean(self) -> float:
        """Mean of the finite losses in the window."""
        return sum(self.window) / len(self.window)

    def divergence(self) -> str | None:
        """Why the run has diverged, or None."""
        rules = self.rules
        if self.nonfinite >= rules.nonfinite_losses:
            return f"the loss was not finite for {self.nonfinite} steps in a row"
        if self.consecutive >= rules.consecutive_skips:
            return f"{self.consecutive} steps in a row were skipped"
        if len(self.window) == rules.window and self.mean > self.lowest + rules.loss_rise:
            return (
                f"the mean loss of {rules.window} steps, {self.mean:.3f}, lies more than {rules.loss_rise} nats above "
                f"its lowest, {self.lowest:.3f}"
            )
        return None
