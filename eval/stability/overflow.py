"""What stops being finite first when a model runs in FP16, forward and backward.

The model's weights, stream and products are FP16, as under `model.half()` on a GPU: products are accumulated in FP32
and rounded to FP16 (`runkit.fp16.half_products` on a CPU). Norms and softmax keep the precision that their code gives
them.
"""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn

from periln.eval.stability.non_finite import FirstBackward, FirstForward, NonFinite, Overflow, is_finite
from periln.eval.structure.anatomy import Anatomy
from periln.eval.texts.windows import token_loss
from periln.runkit.fp16 import half_products
from periln.runkit.number_format import FP16

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


class HalfPasses:
    """Forward and backward passes of a model in FP16 over batches (ids (B, S)); one forward pass serves all scales.

    `weights`: those that FP16 cannot hold; `logits` (B, S, V) in FP32: of the first batch, once `forward` is done.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        batches: list[torch.Tensor],
        in_place: bool = False,
        tell: Callable[[], None] = lambda: None,
    ):
        if in_place:
            self.half, self.weights = anatomy.model, to_half(anatomy.model)
        else:
            self.half, self.weights = half_copy(anatomy.model)
            anatomy = _moved(anatomy, self.half, dict(self.half.named_modules()))
        self.half.requires_grad_(True)
        self.anatomy, self.batches, self.tell = anatomy, batches, tell
        self.exact = True
        self.largest: dict[float, float] = {}
        self.logits: torch.Tensor | None = None

    def _numerics(self) -> Any:
        return half_products() if next(self.half.parameters()).device.type == "cpu" else nullcontext()

    def forward(self) -> NonFinite | None:
        """The first that is not finite in the forward passes."""
        with self._numerics(), torch.no_grad(), FirstForward(self.anatomy) as watch:
            for ids in self.batches:
                try:
                    logits = self.half(input_ids=ids, use_cache=False).logits
                except Overflow:
                    break
                if self.logits is None:
                    self.logits = logits.float().cpu()
                self.tell()
        return watch.first

    def backward(self, *scales: float) -> list[NonFinite | None]:
        """The first gradient that is not finite at each of the scales; one forward pass a batch serves them all.

        The largest gradient seen goes into `largest`, for scales at which all are finite.
        """
        with self._numerics():
            try:
                return self._backward(scales)
            except RuntimeError as error:
                if "modified inplace" not in str(error):
                    raise
                self.exact = False
                return self._backward(scales)

    def _backward(self, scales: tuple[float, ...]) -> list[NonFinite | None]:
        largest = dict.fromkeys(scales, 0.0)
        found: dict[float, NonFinite] = {}
        for ids in self.batches:
            left = [scale for scale in scales if scale not in found]
            if not left:
                break
            with FirstBackward(self.anatomy, self.exact) as watch:
                loss = token_loss(self.half(input_ids=ids, use_cache=False).logits, ids) / ids[:, 1:].numel()
                for scale in left:
                    watch.first, watch.largest = None, 0.0
                    (loss * scale).backward(retain_graph=scale != left[-1])
                    self.half.zero_grad(set_to_none=True)
                    largest[scale] = max(largest[scale], watch.largest)
                    if watch.first is not None:
                        found[scale] = watch.first
                    self.tell()
        self.largest |= {scale: value for scale, value in largest.items() if scale not in found}
        return [found.get(scale) for scale in scales]

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
    passes = HalfPasses(anatomy, batches, in_place, tell)
    forward, backward, beyond, scale = passes.forward(), None, None, None
    if forward is None:
        backward = passes.backward(loss_scale)[0]
        if scales:
            scale, beyond = passes.largest_scale()
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


def _moved(anatomy: Anatomy, model: nn.Module, modules: dict[str, nn.Module]) -> Anatomy:
    """The anatomy of a copy of the model."""

    def move(value: Any) -> Any:
        if is_dataclass(value):
            changed = {f.name: move(getattr(value, f.name)) for f in fields(value)}
            if "name" in changed and "module" in changed:
                changed["module"] = modules[value.name]
            return replace(value, **changed)
        if isinstance(value, tuple):
            return tuple(move(v) for v in value)
        return value

    layers = tuple((name, modules[name]) for name, _ in anatomy.layers)
    moved = move(replace(anatomy, model=None, embedding=None, lm_head=None, layers=()))
    return replace(
        moved, model=model, embedding=modules[anatomy.embedding_name], lm_head=modules[anatomy.head_name], layers=layers
    )
