"""The arithmetic of a run: learning rate, parameter groups, and the bookkeeping of skips and divergence."""

import math
from collections import deque
from typing import Any

import torch
from torch import nn

from periln.runkit.spikes import SpikeCounter, Spikes
from periln.scripts.recipe import Divergence, Optimizer


def learning_rate(step: int, steps: int, recipe: Optimizer) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then cosine to `final_learning_rate`.

    A function of the step alone, so that a skipped step delays nothing and every placement gets the same.
    """
    peak, warmup = recipe.learning_rate, round(recipe.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    low = recipe.final_learning_rate * peak
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizer(model: nn.Module, recipe: Optimizer) -> torch.optim.AdamW:
    """AdamW with decoupled decay; vectors (norms, biases) are exempt unless the recipe says otherwise."""
    learnable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in learnable if p.ndim >= 2]
    vectors = [p for p in learnable if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": recipe.weight_decay if recipe.decay_norms_and_biases else 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.eps,
        fused=True,
    )


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
