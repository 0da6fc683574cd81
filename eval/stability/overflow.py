"""What stops being finite first when a model runs in FP16, forward and backward.

The model's weights, stream and products are FP16, as under `model.half()` on a GPU: products are accumulated in FP32
and rounded to FP16 (`runkit.fp16.HalfMatmul` on a CPU). Norms and softmax keep the precision that their code gives
them.
"""

import copy
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from periln.eval.structure.anatomy import Anatomy, Point, first_tensor, input_tensor
from periln.eval.texts.windows import token_loss
from periln.runkit.fp16 import HalfMatmul
from periln.runkit.number_format import FP16


@dataclass(frozen=True)
class NonFinite:
    """The first tensor that is not finite: at which module, and what it is in words.

    `what`: "stream" (a residual add), "branch" (a module's output before its output norm), "weight", or "module".
    """

    module: str
    what: str
    where: str
    layer: int | None


def _finite(x: torch.Tensor | None) -> bool:
    return x is None or bool(x.isfinite().all())


class _Watch:
    """What both passes share: the names of points, and the first thing that was seen."""

    def __init__(self, anatomy: Anatomy):
        self.anatomy, self.first, self._handles = anatomy, None, []
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

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()


class FirstForward(_Watch):
    """A context manager around forward passes; `first` is the first tensor that is not finite, or None.

    An add between modules has no module: it is seen as the next module's input, and named after the add.
    """

    def __enter__(self) -> "FirstForward":
        for name, module in self.anatomy.model.named_modules():
            if name:

                def before(m: nn.Module, args: tuple, kwargs: dict, name=name) -> None:
                    if self.first is None and not _finite(input_tensor(args, kwargs)):
                        self.found(name, "input")

                def after(m: nn.Module, args: tuple, output: Any, name=name) -> None:
                    if self.first is None and not _finite(first_tensor(output)):
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

    def __enter__(self) -> "FirstBackward":
        model = self.anatomy.model
        for name, module in model.named_modules():
            if not name or any(True for _ in module.children()) or isinstance(module, nn.Embedding):
                continue  # ids have no gradient; what reaches the table is seen at the stream and at its weight

            def before(m: nn.Module, grads: tuple, name=name) -> None:
                if self.first is None and not all(_finite(g) for g in grads):
                    _, said, layer = self.words[name, "output"]
                    self.first = NonFinite(name, "gradient", f"the gradient of {said}", layer)

            def after(m: nn.Module, grad_input: tuple, grad_output: tuple, name=name) -> None:
                if self.first is None and not all(_finite(g) for g in grad_input):
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
        points = [(start, "the embedding", 0)]
        points += [
            (s.stream, f"the stream after the {s.kind} of layer {s.layer}", s.layer) for s in self.anatomy.sublayers
        ]
        for point, said, layer in points:
            if point is not None:
                see = partial(self._stream, NonFinite(point.name, "stream", f"the gradient of {said}", layer))
                self._handles.append(point.watch(see))
        return self

    def _weight(self, name: str, grad: torch.Tensor) -> None:
        if self.first is None and not _finite(grad):
            module = name.rpartition(".")[0]
            self.first = NonFinite(
                module, "weight", f"the gradient of the weight {name}", self.words[module, "output"][2]
            )

    def _stream(self, found: NonFinite, x: torch.Tensor) -> None:
        def see(grad: torch.Tensor) -> None:
            if self.first is None and not _finite(grad):
                self.first = found

        if x is not None and x.requires_grad:
            x.register_hook(see)


def half_copy(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The model in FP16, and the names of the weights that FP16 cannot hold."""
    half = copy.deepcopy(model).to(getattr(torch, FP16.dtype)).eval()
    return half, [name for name, p in half.named_parameters() if not _finite(p)]


def _scaled_backward(half: nn.Module, anatomy: Anatomy, batches: list[torch.Tensor], scale: float) -> NonFinite | None:
    try:
        return _watched_backward(half, FirstBackward(anatomy), batches, scale)
    except RuntimeError as error:
        if "modified inplace" not in str(error):
            raise
        return _watched_backward(half, FirstBackward(anatomy, exact=False), batches, scale)


def _watched_backward(
    half: nn.Module, watch: FirstBackward, batches: list[torch.Tensor], scale: float
) -> NonFinite | None:
    with watch:
        for ids in batches:
            half.zero_grad(set_to_none=True)
            loss = token_loss(half(input_ids=ids, use_cache=False).logits, ids) / ids[:, 1:].numel()
            (loss * scale).backward()
            if watch.first is not None:
                break
    half.zero_grad(set_to_none=True)
    return watch.first


def first_non_finite(anatomy: Anatomy, batches: list[torch.Tensor], loss_scale: float = 1.0) -> dict[str, Any]:
    """Run `batches` (ids (B, S)) through an FP16 copy of the model.

    Returns:
        forward, backward: the first non-finite tensor, or None; backward is None as well where the forward pass already
        overflows (`backward_run` is False then). `largest_finite_loss_scale`: the largest power of two, from 2^-8 to
        2^16, at which all gradients are finite, None where none is; `backward_beyond`: what overflows at twice that
        (None if it is 2^16). `weights`: parameters that FP16 cannot hold.
    """
    half, weights = half_copy(anatomy.model)
    anatomy = _moved(anatomy, half, dict(half.named_modules()))
    for parameter in half.parameters():
        parameter.requires_grad_(True)
    numerics = HalfMatmul() if next(half.parameters()).device.type == "cpu" else nullcontext()
    with numerics:
        with torch.no_grad(), FirstForward(anatomy) as forward:
            for ids in batches:
                half(input_ids=ids, use_cache=False)
                if forward.first is not None:
                    break
        result = {
            "forward": None if forward.first is None else asdict(forward.first),
            "backward": None,
            "backward_run": forward.first is None,
            "loss_scale": loss_scale,
            "largest_finite_loss_scale": None,
            "backward_beyond": None,
            "weights": weights,
        }
        if forward.first is None:
            first = _scaled_backward(half, anatomy, batches, loss_scale)
            result["backward"] = None if first is None else asdict(first)
            scale, beyond = _largest_scale(half, anatomy, batches)
            result["largest_finite_loss_scale"] = scale
            result["backward_beyond"] = None if beyond is None else asdict(beyond)
    return result


def _largest_scale(
    half: nn.Module, anatomy: Anatomy, batches: list[torch.Tensor]
) -> tuple[float | None, NonFinite | None]:
    """The largest 2^k, k from -8 to 16, with finite gradients, by halving the interval; and what overflows at twice it.

    2^16 itself is tried first, and nothing beyond it.
    """
    first = _scaled_backward(half, anatomy, batches, 2.0**16)
    if first is None:
        return 2.0**16, None
    low, high = -9, 16  # low is finite (or untried), high is not
    while high - low > 1:
        middle = (low + high) // 2
        found = _scaled_backward(half, anatomy, batches, 2.0**middle)
        if found is None:
            low = middle
        else:
            high, first = middle, found
    return None if low == -9 else 2.0**low, first


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
