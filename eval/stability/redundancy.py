"""How much layers do: angles between the streams after them, the branch's share, and the loss without a layer."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from periln.eval.structure.anatomy import Anatomy, first_tensor, input_tensor
from periln.eval.structure.stages import Stages
from periln.eval.texts.windows import token_loss

_CHUNK = 256  # tokens whose cosines are in memory at once


class Angles:
    """Mean angular distance arccos(cos(x_l, x_m)) / pi over tokens, between the streams after layers l < m.

    Layer 0 is the embedding. A batch needs its streams (O(layers)); what is kept is one sum a pair.
    """

    def __init__(self, layers: int, apart: int | None = None):
        self.apart = apart
        self.sums = torch.zeros(layers + 1, layers + 1, dtype=torch.float64)
        self.tokens = 0

    @torch.no_grad()
    def add(self, streams: list[torch.Tensor]) -> None:
        """Streams (B, S, D) after layers 0 to L of one batch."""
        flat = [x.reshape(-1, x.shape[-1]) for x in streams]
        for start in range(0, len(flat[0]), _CHUNK):
            x = torch.stack([s[start : start + _CHUNK] for s in flat], dim=1).double()  # T L+1 D
            x = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-300)
            cosine = (x @ x.transpose(1, 2)).clamp(-1.0, 1.0)
            self.sums += (cosine.arccos() / math.pi).sum(0).cpu()
            self.tokens += len(x)

    def rows(self, step: int) -> list[tuple]:
        """(step, layer, other, value) for the pairs asked for."""
        total = len(self.sums)
        pairs = [(a, b) for a in range(total) for b in range(a + 1, total) if self.apart in (None, b - a)]
        return [(step, a, b, self.sums[a, b].item() / self.tokens) for a, b in pairs]


@contextmanager
def skipped(layer: nn.Module) -> Iterator[None]:
    """While open, the layer returns its input."""
    given: list[torch.Tensor] = []

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given[:] = [input_tensor(args, kwargs)]

    def after(module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return given[0]
        hidden = first_tensor(output)
        return type(output)(given[0] if item is hidden else item for item in output)

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def skip_losses(
    anatomy: Anatomy, loss_of: Callable[[], float], step: int, tell: Callable[[], None] = lambda: None
) -> list[tuple]:
    """Rows `skip_loss`: by how much `loss_of()` (nats a token) rises when one layer is skipped."""
    whole, rows = loss_of(), []
    for number, (_, layer) in enumerate(anatomy.layers, start=1):
        with skipped(layer):
            rows.append((step, number, "layer", "stream", "skip_loss", loss_of() - whole))
        tell()
    return rows


@torch.no_grad()
def staged_skip_losses(
    stages: Stages, batches: Iterable[torch.Tensor], step: int, tell: Callable[[int], None] = lambda layer: None
) -> list[tuple]:
    """The same rows from one pass a batch (ids (B, S)): without layer l only the layers after it run again, from the
    stream that entered it. `tell` is given the number of each layer that is done.
    """
    count, numbers = 0, range(1, stages.anatomy.num_layers + 1)
    whole, without = 0.0, dict.fromkeys(numbers, 0.0)
    for ids in batches:
        streams, _ = stages.streams(ids)
        count += ids[:, 1:].numel()
        whole += token_loss(stages.end(ids, streams[-1]), ids).double().item()
        for number in numbers:
            without[number] += token_loss(stages.rest(ids, streams[number - 1], number), ids).double().item()
            tell(number)
    return [
        (step, number, "layer", "stream", "skip_loss", total / count - whole / count)
        for number, total in without.items()
    ]
