"""The largest |value| and |gradient| of every watched tensor, in FP32."""

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from periln.eval.structure.points import Point
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


@dataclass
class Measured:
    """Peaks of all watched tensors; where logits were left out, how many samples' and what they cannot exceed."""

    peaks: list[Peak]
    left_out: dict[str, Any] | None


def measure_peaks(
    layout: "Layout",
    model: nn.Module,
    batches: Iterable[torch.Tensor],
    backward: int,
    limit: float,
    tick: Callable[[], None],
) -> Measured:
    """Peaks over `batches` (ids (B, S)), in the precision that the model has; gradients over the first `backward`.

    Behind these, the head is left out of passes whose logits cannot reach `limit`: it is most of a small model's work.

    Raises:
        UserError: a tensor of the forward pass is not finite in that precision either.
    """
    peaks, weights = [Peak(w.group, w.words) for w in layout.watches], _weights(layout, model)
    at = [0]  # the batch that is read
    handles = [w.point.watch(_keep(peak, at)) for w, peak in zip(layout.watches, peaks, strict=True)]
    was = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(backward > 0)
    headless = _Headless(layout, model, limit)
    try:
        for number, ids in enumerate(batches):
            at[0] = number
            if number < backward:
                with torch.enable_grad():
                    logits = model(input_ids=ids, use_cache=False).logits
                    # Gradients pass through the embedding's output even if its table needs none.
                    (token_loss(logits, ids) / ids[:, 1:].numel()).backward()
                for peak, weight, rows in weights:
                    peak.gradient = _largest(peak.gradient, weight.grad if rows is None else weight.grad[rows])
                model.zero_grad(set_to_none=True)
            else:
                headless.run(ids)
            tick()
            for peak in peaks:
                if not peak.forward < float("inf"):
                    raise UserError(f"{peak.words} is not finite in {model.dtype} either: this is not an FP16 overflow")
    finally:
        for handle in handles:
            handle.remove()
        for parameter, needed in was.items():
            parameter.requires_grad_(needed)
    if headless.left_out:
        of_head = next(i for i, w in enumerate(layout.watches) if w.point.name == layout.head)
        peaks[of_head].words += ", where computed"
    return Measured(peaks + [peak for peak, *_ in weights], headless.left_out)


class _Headless:
    """Passes without the head, for all positions but the last, where that is known to hide nothing.

    A logit is at most the length of what the head reads times that of the head's longest row (Cauchy and Schwarz).
    """

    def __init__(self, layout: "Layout", model: nn.Module, limit: float):
        self.model, self.limit = model, limit
        self.head: Any = model.get_submodule(layout.head)
        self.norm = next((n.module for n in layout.norms if n.gives == layout.final), None)
        takes = inspect.signature(model.forward).parameters
        self.can = self.norm is not None and isinstance(self.head, nn.Linear) and "logits_to_keep" in takes
        self.longest: float | None = None
        self.left_out: dict[str, Any] | None = None

    @torch.no_grad()
    def run(self, ids: torch.Tensor) -> None:
        """A forward pass of ids (B, S), with the head if its logits might reach the limit."""
        bound = self._bound(ids) if self.can else math.inf
        if bound < self.limit:
            known = self.left_out or {"samples": 0, "bound": 0.0}
            self.left_out = {"samples": known["samples"] + len(ids), "bound": max(known["bound"], bound)}
        else:  # further samples are unlikely to be far below
            self.can = False
            self.model(input_ids=ids, use_cache=False)

    def _bound(self, ids: torch.Tensor) -> float:
        """What the logits of a pass without the head cannot exceed; infinite where that is not known."""
        seen: dict[str, torch.Tensor] = {}
        assert self.norm is not None
        points = Point("", self.norm, "output"), Point("", self.head, "input")
        handles = [p.watch(partial(seen.__setitem__, p.side)) for p in points]
        try:
            self.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
        if not torch.equal(seen["input"], seen["output"][:, -1:]):  # something is between the norm and the head
            return math.inf
        if self.longest is None:
            rows = self.head.weight.split(8192)
            self.longest = max(part.float().norm(dim=-1).max().item() for part in rows)
        bias = 0.0 if self.head.bias is None else self.head.bias.abs().max().item()
        bound = 1.01 * self.longest * seen["output"].float().norm(dim=-1).max().item() + bias
        return bound if math.isfinite(bound) else math.inf


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
        for row, part in enumerate(x.detach()):
            largest = _largest(peak.forward, part)
            if largest > peak.forward:
                peak.forward, peak.batch, peak.row = largest, at[0], row
        if x.requires_grad:
            x.register_hook(see_gradient)

    def see_gradient(gradient: torch.Tensor) -> None:
        peak.gradient = _largest(peak.gradient, gradient)

    return see
