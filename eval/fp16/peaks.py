"""The largest |value| and |gradient| of every watched tensor, in FP32."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from periln.eval.texts.windows import token_loss
from periln.runkit.errors import UserError

if TYPE_CHECKING:
    from periln.eval.fp16.layout import Layout, NormUse, Table


@dataclass
class Peak:
    """The largest |value|, and the largest |gradient| of the mean token loss of a batch, of one tensor of a group.

    Either is infinite where not finite; a gradient may be so in any precision. With `reads` it is a matrix
    between two groups, which the rewrite scales by 2^(group - reads). `batch` and `row` hold the largest |value|.
    """

    group: str
    words: str
    forward: float = 0.0
    gradient: float = 0.0
    reads: str | None = None
    batch: int = 0
    row: int = 0


def measure_peaks(
    layout: "Layout", model: nn.Module, batches: Iterable[torch.Tensor], backward: int, tick: Callable[[], None]
) -> list[Peak]:
    """Peaks over `batches` (ids (B, S)), in the precision that the model has; gradients over the first `backward`.

    Raises:
        UserError: a tensor of the forward pass is not finite in that precision either.
    """
    peaks, weights = [Peak(w.group, w.words) for w in layout.watches], _weights(layout, model)
    at = [0]  # the batch that is read
    handles = [w.point.watch(_keep(peak, at)) for w, peak in zip(layout.watches, peaks, strict=True)]
    was = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(backward > 0)
    try:
        for number, ids in enumerate(batches):
            at[0] = number
            with torch.set_grad_enabled(number < backward):
                logits = model(input_ids=ids, use_cache=False).logits
                if number < backward:
                    # Gradients pass through the embedding's output even if its table needs none.
                    (token_loss(logits, ids) / ids[:, 1:].numel()).backward()
                    for peak, weight, rows in weights:
                        peak.gradient = _largest(peak.gradient, weight.grad if rows is None else weight.grad[rows])
                    model.zero_grad(set_to_none=True)
            tick()
            for peak in peaks:
                if not peak.forward < float("inf"):
                    raise UserError(f"{peak.words} is not finite in {model.dtype} either: this is not an FP16 overflow")
    finally:
        for handle in handles:
            handle.remove()
        for parameter, needed in was.items():
            parameter.requires_grad_(needed)
    return peaks + [peak for peak, *_ in weights]


def _weights(layout: "Layout", model: nn.Module) -> list[tuple[Peak, nn.Parameter, torch.Tensor | None]]:
    """The weights that FP16 must hold: gains and tables, which carry a group's factor alone, with their
    gradients, and the gradients of matrices."""
    modules: dict[str, Any] = dict(model.named_modules())
    found: list[tuple[Peak, nn.Parameter, torch.Tensor | None]] = []
    ends: list[NormUse | Table] = [*layout.norms, *layout.tables]
    for end in ends:
        if (weight := getattr(modules[end.name], "weight", None)) is not None:
            peak = Peak(end.gives, f"the weight of {end.name}", weight.detach().abs().max().item())
            found.append((peak, weight, None))
    for part in layout.matrices:
        peak = Peak(part.gives, f"the weight of {part.name}", part.largest, reads=part.reads)
        found.append((peak, modules[part.name].weight, part.rows))
    return found


def _largest(before: float, x: torch.Tensor) -> float:
    low, high = (bound.item() for bound in x.detach().aminmax())
    return math.inf if math.isnan(low) else max(before, -low, high)


def _keep(peak: Peak, at: list[int]) -> Callable[[torch.Tensor], None]:
    def see(x: torch.Tensor) -> None:
        largest = _largest(peak.forward, x)
        if largest > peak.forward:
            peak.batch, peak.row = at[0], int(x.detach().abs().flatten(1).amax(1).argmax())
        peak.forward = largest
        if x.requires_grad:
            x.register_hook(see_gradient)

    def see_gradient(gradient: torch.Tensor) -> None:
        peak.gradient = _largest(peak.gradient, gradient)

    return see
