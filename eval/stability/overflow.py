"""What stops being finite first when a model runs in FP16, forward and backward.

The model's weights, stream and products are FP16, as under `model.half()` on a GPU: products are accumulated in FP32
and rounded to FP16 (`runkit.fp16.half_products` on a CPU). Norms and softmax keep the precision that their code gives
them.
"""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn

from periln.eval.stability.non_finite import FirstBackward, FirstForward, NonFinite, Overflow, is_finite
from periln.eval.structure.anatomy import Anatomy
from periln.eval.texts.windows import token_loss
from periln.runkit.fp16 import half_products
from periln.runkit.number_format import FP16
from periln.runkit.process import return_freed_memory

LEAST, MOST = -8, 16  # range of the powers of two that are tried as loss scales


@torch.no_grad()
def to_half(model: nn.Module) -> list[str]:
    """Convert a model to FP16 in place, as a file of its weights loads; returns the weights that FP16 cannot hold.

    Buffers that no file holds are not changed (rotary frequencies: `model.half()` would round them).
    """
    dtype = getattr(torch, FP16.dtype)
    for module in model.modules():
        own = dict(module.named_buffers(recurse=False))
        stored = [name for name in own if name not in module._non_persistent_buffers_set]
        for name in stored:
            if own[name].is_floating_point():
                module._buffers[name] = own[name].to(dtype)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return [name for name, p in model.named_parameters() if not is_finite(p)]


def half_copy(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """A copy of the model in FP16, and the names of the weights that FP16 cannot hold."""
    dtype = getattr(torch, FP16.dtype)
    half: dict[int, Any] = {}  # parameters are copied once, in FP16
    for parameter in model.parameters():
        wide = parameter.detach()
        narrow = wide.to(dtype, copy=True) if wide.is_floating_point() else wide.clone()
        half[id(parameter)] = nn.Parameter(narrow, requires_grad=parameter.requires_grad)
    copied = copy.deepcopy(model, half).eval()
    return copied, to_half(copied)


@dataclass
class _Graph:
    """A forward pass that backward passes start from: the watch over its gradients, its logits, and their loss."""

    watch: FirstBackward
    logits: torch.Tensor | None = None
    loss: torch.Tensor | None = None

    def loss_of(self, ids: torch.Tensor) -> torch.Tensor:
        """Nats a token of the batch `ids`; computed once, and the logits are then let go."""
        if self.loss is None:
            assert self.logits is not None
            self.loss = token_loss(self.logits, ids) / ids[:, 1:].numel()
            self.logits = None
        return self.loss


class HalfPasses:
    """Forward and backward passes of a model in FP16 over batches (ids (B, S)); what was run once is not run again.

    One forward pass of a batch serves the scales of a call of `backward`; where there is a single batch, the pass of
    `forward` serves them all, and its graph is held until `close`.

    `weights`: those that FP16 cannot hold; `logits` (B, S, V) in FP32: of the first batch, once `forward` is done, if
    they are to be kept.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        batches: list[torch.Tensor],
        in_place: bool = False,
        tell: Callable[[], None] = lambda: None,
        keep_logits: bool = True,
    ):
        if in_place:
            self.half, self.weights = anatomy.model, to_half(anatomy.model)
        else:
            self.half, self.weights = half_copy(anatomy.model)
            anatomy = moved(anatomy, self.half)
        self.half.requires_grad_(True)
        self.anatomy, self.batches, self.tell = anatomy, batches, tell
        self.exact = True
        self.largest: dict[float, float] = {}
        self.logits: torch.Tensor | None = None
        self._keep_logits = keep_logits
        self._ran = False
        self._first: NonFinite | None = None
        self._graph: _Graph | None = None
        self._tried: dict[float, NonFinite | None] = {}

    def _numerics(self) -> Any:
        return half_products() if next(self.half.parameters()).device.type == "cpu" else nullcontext()

    def _exactly(self, passes: Callable[[], Any]) -> Any:
        """The result of `passes`, watched less exactly where the model changes module outputs in place."""
        with self._numerics():
            try:
                return passes()
            except RuntimeError as error:
                if "modified inplace" not in str(error):
                    raise
                self.exact = False
                self.close()
                return passes()

    def forward(self) -> NonFinite | None:
        """The first that is not finite in the forward passes."""
        if not self._ran:
            self._first, self._ran = self._exactly(self._forward), True
        return self._first

    def _forward(self) -> NonFinite | None:
        with FirstForward(self.anatomy) as watch:
            for ids in self.batches:
                try:
                    logits = self._with_graph(ids) if len(self.batches) == 1 else self._without(ids)
                except Overflow:
                    self.close()
                    break
                if self._keep_logits and self.logits is None:
                    self.logits = logits.detach().float().cpu()
                self.tell()
        return watch.first

    @torch.no_grad()
    def _without(self, ids: torch.Tensor) -> torch.Tensor:
        return self.half(input_ids=ids, use_cache=False).logits

    def _with_graph(self, ids: torch.Tensor) -> torch.Tensor:
        self._graph = _Graph(FirstBackward(self.anatomy, self.exact).__enter__())
        logits: torch.Tensor = self.half(input_ids=ids, use_cache=False).logits
        self._graph.logits = logits
        return logits

    def close(self) -> None:
        """Let go of the graph of a forward pass, and of the watch over its gradients."""
        if self._graph is not None:
            self._graph.watch.__exit__()
            self._graph = None

    def backward(self, *scales: float) -> list[NonFinite | None]:
        """The first gradient that is not finite at each of the scales; one forward pass a batch serves them all.

        The largest gradient seen goes into `largest`, for scales at which all are finite.
        """
        new = tuple(dict.fromkeys(scale for scale in scales if scale not in self._tried))
        if new:
            self._tried |= self._exactly(lambda: self._backward(new))
        return [self._tried[scale] for scale in scales]

    def _backward(self, scales: tuple[float, ...]) -> dict[float, NonFinite | None]:
        largest = dict.fromkeys(scales, 0.0)
        found: dict[float, NonFinite | None] = {}
        for ids in self.batches:
            for scale in (left := [scale for scale in scales if scale not in found]):
                if self._graph is None:
                    self._with_graph(ids)
                assert self._graph is not None
                watch, loss = self._graph.watch, self._graph.loss_of(ids)
                watch.first, watch.largest = None, 0.0
                last = scale == left[-1] and len(self.batches) > 1
                return_freed_memory(collect=False)  # the allocator keeps what is as small as the gradients of a layer
                try:
                    (loss * scale).backward(retain_graph=not last)
                except Overflow:
                    found[scale] = watch.first
                self.half.zero_grad(set_to_none=True)
                largest[scale] = max(largest[scale], watch.largest)
                if last or scale in found:  # a pass that ended early leaves its graph as it was then
                    self.close()
                self.tell()
        self.largest |= {scale: value for scale, value in largest.items() if scale not in found}
        return {scale: found.get(scale) for scale in scales}

    def largest_scale(self) -> tuple[float | None, NonFinite | None]:
        """The largest 2^k, k from -8 to 16, with finite gradients, and what overflows at twice it (None beyond 2^16).

        Gradients are proportional to the scale, so the largest one at a tried scale predicts the answer; that scale and
        twice it are tried, and only if the prediction was wrong the interval is halved.
        """
        if not self.largest:
            self.backward(2.0**LEAST)
        if not self.largest:
            return None, None
        scale, value = max(self.largest.items())
        room = FP16.headroom(value) if value > 0 else 2.0 * MOST
        guess = min(max(math.floor(math.log2(scale) + room), LEAST), MOST)
        low, high, first = LEAST - 1, MOST + 1, None  # low is finite (or untried), high is not (or untried)
        beside = [k for k in (guess, guess + 1) if k <= MOST]
        for k, found in zip(beside, self.backward(*(2.0**k for k in beside)), strict=True):
            if found is None:
                low = max(low, k)
            elif k < high:
                high, first = k, found
        while high - low > 1:
            middle = (low + high) // 2
            found = self.backward(2.0**middle)[0]
            if found is None:
                low = middle
            else:
                high, first = middle, found
        return None if low < LEAST else 2.0**low, first


def first_non_finite(
    anatomy: Anatomy,
    batches: list[torch.Tensor],
    loss_scale: float = 1.0,
    in_place: bool = False,
    tell: Callable[[], None] = lambda: None,
    scales: bool = True,
) -> dict[str, Any]:
    """Run `batches` (ids (B, S)) through the model in FP16: a copy of it, or the model itself if it may stay in FP16.

    Args:
        tell: called after each pass of each batch.
        scales: whether to search for the largest loss scale, which takes at least one forward and two backward passes.

    Returns:
        forward, backward: the first non-finite tensor, or None; backward is None as well where the forward pass already
        overflows (`backward_run` is False then). `largest_finite_loss_scale`: the largest power of two, from 2^-8 to
        2^16, at which all gradients are finite, None if there is none; `backward_beyond`: what overflows at twice that
        (None if it is 2^16). `weights`: parameters that FP16 cannot hold.
    """
    passes = HalfPasses(anatomy, batches, in_place, tell, keep_logits=False)
    forward, backward, beyond, scale = passes.forward(), None, None, None
    if forward is None:
        backward = passes.backward(loss_scale)[0]
        if scales:
            scale, beyond = passes.largest_scale()
    passes.close()
    return found_words(forward, backward, loss_scale, passes.weights) | {
        "largest_finite_loss_scale": scale,
        "backward_beyond": None if beyond is None else asdict(beyond),
    }


def found_words(
    forward: NonFinite | None, backward: NonFinite | None, loss_scale: float, weights: list[str]
) -> dict[str, Any]:
    """What `first_non_finite` returns, before the search for the largest loss scale."""
    return {
        "forward": None if forward is None else asdict(forward),
        "backward": None if backward is None else asdict(backward),
        "backward_run": forward is None,
        "loss_scale": loss_scale,
        "largest_finite_loss_scale": None,
        "backward_beyond": None,
        "weights": weights,
    }


def moved(anatomy: Anatomy, model: nn.Module) -> Anatomy:
    """The anatomy of a copy of the model."""
    modules = dict(model.named_modules())
    layers = tuple((name, modules[name]) for name, _ in anatomy.layers)
    rest = _move(replace(anatomy, model=None, embedding=None, lm_head=None, layers=()), modules)
    return replace(
        rest, model=model, embedding=modules[anatomy.embedding_name], lm_head=modules[anatomy.head_name], layers=layers
    )


def _move(value: Any, modules: dict[str, nn.Module]) -> Any:
    """Not inside of `moved`: a function that calls itself by its closure would hold the copy until gc looks for it."""
    if is_dataclass(value):
        changed = {f.name: _move(getattr(value, f.name), modules) for f in fields(value)}
        if "name" in changed and "module" in changed:
            changed["module"] = modules[value.name]
        return replace(value, **changed)
    if isinstance(value, tuple):
        return tuple(_move(v, modules) for v in value)
    return value
