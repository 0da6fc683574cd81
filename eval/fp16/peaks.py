"""The largest |value| and |gradient| of every watched tensor, in FP32."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from eval.stability.probe import token_loss
from runkit.errors import UserError

if TYPE_CHECKING:
    from .layout import Layout


@dataclass
class Peak:
    """The largest |value|, and the largest |gradient| of the mean token loss of a batch, of one tensor of a group.

    Either is infinite where it is not finite; a gradient may be, in any precision.
    """

    group: str
    words: str
    forward: float = 0.0
    gradient: float = 0.0


def measure_peaks(
    layout: "Layout", model: nn.Module, batches: Iterable[torch.Tensor], backward: bool, tick: Callable[[], None]
) -> list[Peak]:
    """Peaks over `batches` (ids (B, S)), in the precision that the model has. Gradients are zero where not asked for.

    Raises:
        UserError: a tensor of the forward pass is not finite in that precision either.
    """
    peaks = [Peak(w.group, w.words) for w in layout.watches]
    handles = [w.point.watch(_keep(peak)) for w, peak in zip(layout.watches, peaks, strict=True)]
    was = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(backward)
    try:
        for ids in batches:
            with torch.set_grad_enabled(backward):
                logits = model(input_ids=ids, use_cache=False).logits
                if backward:
                    # Of a leaf that needs none, gradients pass through the embedding's output all the same.
                    (token_loss(logits, ids) / ids[:, 1:].numel()).backward()
                    model.zero_grad(set_to_none=True)
            tick()
            for peak in peaks:
                if not peak.forward < float("inf"):
                    raise UserError(f"{peak.words} is not finite in {model.dtype} either: this is no FP16 overflow")
    finally:
        for handle in handles:
            handle.remove()
        for parameter, needed in was.items():
            parameter.requires_grad_(needed)
    return peaks + _stored(layout, model)


def _stored(layout: "Layout", model: nn.Module) -> list[Peak]:
    """What FP16 must hold of the weights that carry a group's factor by themselves: gains and tables."""
    modules = dict(model.named_modules())
    found = [
        Peak(part.gives, f"the weight of {part.name}", weight.detach().abs().max().item())
        for part in (*layout.norms, *layout.tables)
        if (weight := getattr(modules[part.name], "weight", None)) is not None
    ]
    return found


def _largest(before: float, x: torch.Tensor) -> float:
    value = x.detach().abs().max().item()
    return max(before, value) if value == value else float("inf")


def _keep(peak: Peak) -> Callable[[torch.Tensor], None]:
    def see(x: torch.Tensor) -> None:
        peak.forward = _largest(peak.forward, x)
        if x.requires_grad:
            x.register_hook(see_gradient)

    def see_gradient(gradient: torch.Tensor) -> None:
        peak.gradient = _largest(peak.gradient, gradient)

    return see
