"""The first tensor of a forward or backward pass that is not finite, by its module and in words."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from periln.eval.structure.anatomy import Anatomy, Point, first_tensor, input_tensor


@dataclass(frozen=True)
class NonFinite:
    """The first tensor that is not finite: its module, and what it is in words.

    `what`: "stream" (a residual add), "branch" (a module's output before its output norm), "weight", or "module".
    """

    module: str
    what: str
    where: str
    layer: int | None


def largest_in(x: torch.Tensor | None) -> float:
    """The largest |x|; NaN or infinite where x is not finite (many times faster than `isfinite().all()`)."""
    if x is None or not x.numel():
        return 0.0
    low, high = (bound.item() for bound in x.detach().aminmax())
    return math.nan if math.isnan(low) else max(0.0, -low, high)


def is_finite(x: torch.Tensor | None) -> bool:
    return math.isfinite(largest_in(x))


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
        raise Overflow

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()


class Overflow(Exception):
    """Ends a pass once its answer is known."""


class FirstForward(_Watch):
    """A context manager around forward passes; `first` is the first tensor that is not finite, or None.

    The pass ends there, with `Overflow`.

    An add between modules has no module: it is seen as the next module's input, and named after the add.
    """

    def __enter__(self) -> "FirstForward":
        for name, module in self.anatomy.model.named_modules():
            if name:

                def before(m: nn.Module, args: tuple, kwargs: dict, name=name) -> None:
                    if not is_finite(input_tensor(args, kwargs)):
                        self.found(name, "input")

                def after(m: nn.Module, args: tuple, output: Any, name=name) -> None:
                    if not is_finite(first_tensor(output)):
                        self.found(name, "output")

                self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(after))
        return self


class FirstBackward(_Watch):
    """A context manager around forward and backward passes; `first` as above, of gradients.

    The backward pass ends there, with `Overflow`.

    A module is named when the gradient of its output was finite and that of its input, or of a weight, is not; a point
    of the stream when the sum of the gradients that reach it is not. With `exact=False`, for models that change module
    outputs in place, a module is named by the gradient of its output alone.
    """

    def __init__(self, anatomy: Anatomy, exact: bool = True):
        super().__init__(anatomy)
        self.exact = exact
        self.largest = 0.0  # of all gradients seen, while they were finite

    def _overflows(self, *grads: torch.Tensor | None) -> bool:
        """Whether one of these gradients is not finite."""
        for grad in grads:
            if not math.isfinite(largest := largest_in(grad)):
                return True
            self.largest = max(self.largest, largest)
        return False

    def end(self, found: NonFinite) -> None:
        self.first = found
        raise Overflow

    def __enter__(self) -> "FirstBackward":
        model = self.anatomy.model
        for name, module in model.named_modules():
            if not name or any(True for _ in module.children()) or isinstance(module, nn.Embedding):
                continue  # ids have no gradient; what reaches the table is seen at the stream and at its weight

            def before(m: nn.Module, grads: tuple, name=name) -> None:
                if self._overflows(*grads):
                    _, said, layer = self.words[name, "output"]
                    self.end(NonFinite(name, "gradient", f"the gradient of {said}", layer))

            def after(m: nn.Module, grad_input: tuple, grad_output: tuple, name=name) -> None:
                if self._overflows(*grad_input):
                    said = f"the gradient that {name} hands to its input"
                    self.end(NonFinite(name, "gradient", said, self.words[name, "output"][2]))

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
            said, layer = f"the gradient of the weight {name}", self.words[module, "output"][2]
            self.end(NonFinite(module, "weight", said, layer))

    def _stream(self, found: NonFinite, x: torch.Tensor) -> None:
        def see(grad: torch.Tensor) -> None:
            if self._overflows(grad):
                self.end(found)

        if x is not None and x.requires_grad:
            x.register_hook(see)
