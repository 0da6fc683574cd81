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
from functools import partial
from typing import Any

import torch
from torch import nn

from periln.eval.structure.anatomy import Anatomy, Point, first_tensor, input_tensor
from periln.eval.texts.windows import token_loss
from periln.runkit.fp16 import half_products
from periln.runkit.number_format import FP16

LEAST, MOST = -8, 16  # range of the powers of two that are tried as loss scales


@dataclass(frozen=True)
class NonFinite:
    """The first tensor that is not finite: its module, and what it is in words.

    `what`: "stream" (a residual add), "branch" (a module's output before its output norm), "weight", or "module".
    """

    module: str
    what: str
    where: str
    layer: int | None


def _largest(x: torch.Tensor | None) -> float:
    """The largest |x|; NaN or infinite where x is not finite (many times faster than `isfinite().all()`)."""
    if x is None or not x.numel():
        return 0.0
    low, high = (bound.item() for bound in x.detach().aminmax())
    return math.nan if math.isnan(low) else max(-low, high)


def _finite(x: torch.Tensor | None) -> bool:
    return math.isfinite(_largest(x))


class _Watch:
    """What both passes share: the names of points, and the first finding."""

    def __init__(self, anatomy: Anatomy):
        self.anatomy = anatomy
        self.first: NonFinite | None = None
        self._handles: list[Any] = []
        self.words: dict[tuple[str, str], tuple[str, str, int | None]] = {}
        model = anatomy.model
        for name, module in model.named_modules():
            layer = next(
                (i for i, (n, _) in enumerate(anatomy.layers, start=1) if name == n or name.startswith(f"{n}.")), None
            )
            owner = next((s for s in anatomy.sublayers if name.startswith(f"{s.name}.")), None)
            inside = "" if owner is None else f", inside the {owner.kind} of layer {owner.layer}"
            self.words[name, "output"] = ("module", f"the output of {name}{inside}", layer)
            self.words[name, "input"] = ("module", f"what {name} reads{inside}", layer)
            if type(module).__name__.endswith("Residual"):
                self.words[name, "output"] = ("stream", f"the stream at the residual add {name}", layer)
        for s in anatomy.sublayers:
            before = "" if s.output_norm is None else ", before its output norm"
            for name in filter(None, (s.output_projection and s.output_projection.name, s.name)):
                said = f"the output of the {s.kind} of layer {s.layer} ({name}){before}"
                self.words[name, "output"] = ("branch", said, s.layer)
            if s.residual_add is not None:
                said = f"the stream at the residual add after the {s.kind} of layer {s.layer}"
                self.words[s.residual_add.name, s.residual_add.side] = ("stream", said, s.layer)
            if s.output_norm is not None:
                said = f"the output norm {s.output_norm.name} of the {s.kind} of layer {s.layer}"
                self.words[s.output_norm.name, "output"] = ("module", said, s.layer)
        start = anatomy.embedding_stream
        self.words[start.name, start.side] = ("stream", "the embedding as the first layer reads it", 0)

    def found(self, name: str, side: str) -> None:
        if self.first is None:
            what, where, layer = self.words[name, side]
            self.first = NonFinite(name, what, where, layer)
        raise _Overflow

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()


class _Overflow(Exception):
    """Ends a forward pass once its answer is known."""


class FirstForward(_Watch):
    """A context manager around forward passes; `first` is the first tensor that is not finite, or None.

    The pass ends there, with `_Overflow`.

    An add between modules has no module: it is seen as the next module's input, and named after the add.
    """

    def __enter__(self) -> "FirstForward":
        for name, module in self.anatomy.model.named_modules():
            if name:

                def before(m: nn.Module, args: tuple, kwargs: dict, name=name) -> None:
                    if not _finite(input_tensor(args, kwargs)):
                        self.found(name, "input")

                def after(m: nn.Module, args: tuple, output: Any, name=name) -> None:
                    if not _finite(first_tensor(output)):
                        self.found(name, "output")

                self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(after))
        return self


class FirstBackward(_Watch):
    """A context manager around forward and backward passes; `first` as above, of gradients.

    A module is named when the gradient of its output was finite and that of its input, or of a weight, is not; a point
    of the stream when the sum of the gradients that reach it is not. With `exact=False`, for models that change module
    outputs in place, a module is named by the gradient of its output alone.
    """

    def __init__(self, anatomy: Anatomy, exact: bool = True):
        super().__init__(anatomy)
        self.exact = exact
        self.largest = 0.0  # of all gradients seen, while they were finite

    def _overflows(self, *grads: torch.Tensor | None) -> bool:
        """Whether one of these gradients is the first that is not finite."""
        if self.first is not None:
            return False
        for grad in grads:
            if not math.isfinite(largest := _largest(grad)):
                return True
            self.largest = max(self.largest, largest)
        return False

    def __enter__(self) -> "FirstBackward":
        model = self.anatomy.model
        for name, module in model.named_modules():
            if not name or any(True for _ in module.children()) or isinstance(module, nn.Embedding):
                continue  # ids have no gradient; what reaches the table is seen at the stream and at its weight

            def before(m: nn.Module, grads: tuple, name=name) -> None:
                if self._overflows(*grads):
                    _, said, layer = self.words[name, "output"]
                    self.first = NonFinite(name, "gradient", f"the gradient of {said}", layer)

            def after(m: nn.Module, grad_input: tuple, grad_output: tuple, name=name) -> None:
                if self._overflows(*grad_input):
                    said = f"the gradient that {name} hands to its input"
                    self.first = NonFinite(name, "gradient", said, self.words[name, "output"][2])

            if self.exact:
                self._handles.append(module.register_full_backward_pre_hook(before))
                self._handles.append(module.register_full_backward_hook(after))
            else:
                _, said, layer = self.words[name, "output"]
                see = partial(self._stream, NonFinite(name, "gradient", f"the gradient of {said}", layer))
                self._handles.append(Point(name, module, "output").watch(see))
        for name, parameter in model.named_parameters():
            self._handles.append(parameter.register_hook(lambda grad, name=name: self._weight(name, grad)))
        start = self.anatomy.embedding_stream
        points: list[tuple[Point | None, str, int]] = [(start, "the embedding", 0)]
        points += [
            (s.stream, f"the stream after the {s.kind} of layer {s.layer}", s.layer) for s in self.anatomy.sublayers
        ]
        for point, said, layer in points:
            if point is not None:
                see = partial(self._stream, NonFinite(point.name, "stream", f"the gradient of {said}", layer))
                self._handles.append(point.watch(see))
        return self

    def _weight(self, name: str, grad: torch.Tensor) -> None:
        if self._overflows(grad):
            module = name.rpartition(".")[0]
            self.first = NonFinite(
                module, "weight", f"the gradient of the weight {name}", self.words[module, "output"][2]
            )

    def _stream(self, found: NonFinite, x: torch.Tensor) -> None:
        def see(grad: torch.Tensor) -> None:
            if self._overflows(grad):
                self.first = found

        if x is not None and x.requires_grad:
            x.register_hook(see)


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
    return [name for name, p in model.named_parameters() if not _finite(p)]


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
                except _Overflow:
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
