"""A causal LM in pieces, each run from a given stream: up to layer 1, one layer, from some layer to the logits.

The pieces are the model's own code. Its layers' `forward` is replaced while a piece runs, so that masks, positions, the
final norm and whatever the model does to its logits stay the model's own. Where the pieces do not give the whole
model's logits to the bit (a layer that reads more from another layer than the stream), there are no stages.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from periln.eval.structure.anatomy import Anatomy
from periln.eval.structure.points import first_tensor, input_tensor


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


@dataclass(frozen=True)
class LayerCall:
    """How the model calls one of its layers; called with a stream (B, S, D), it gives the stream after that layer."""

    layer: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    place: int | str  # the stream's place among them

    def __call__(self, x: torch.Tensor) -> Any:
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.place, int):
            args[self.place] = x
        else:
            kwargs[self.place] = x
        return first_tensor(self.layer(*args, **kwargs))


def _call(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> LayerCall:
    stream = input_tensor(args, kwargs)
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    place = next(key for key, value in named if value is stream)
    if isinstance(place, int):
        args = (*args[:place], None, *args[place + 1 :])
    else:
        kwargs = {**kwargs, place: None}
    return LayerCall(layer, args, kwargs, place)


class Stages:
    """The pieces of a model whose anatomy is known; made by `find_stages`."""

    def __init__(self, anatomy: Anatomy, results: list[Any]):
        self.anatomy = anatomy
        self._results = results  # what every layer returns, with None for the stream

    def begin(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[LayerCall]]:
        """The stream that layer 1 reads on ids (B, S), with its graph in grad mode, and the calls of all layers."""
        calls: list[LayerCall] = []
        start: list[Any] = []
        last = self.anatomy.num_layers

        def record(number: int, layer: nn.Module) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                stream = input_tensor(args, kwargs)
                start.append(stream)
                calls.append(_call(layer, args, kwargs))
                if number == last:
                    raise _Stop
                return self._wrap(number, stream)

            return forward

        layers = enumerate((layer for _, layer in self.anatomy.layers), start=1)
        try:
            with self._replaced({number: record(number, layer) for number, layer in layers}):
                self.anatomy.model(input_ids=ids, use_cache=False)
        except _Stop:
            pass
        return start[0], calls

    def rest(self, ids: torch.Tensor, x: torch.Tensor, after: int) -> torch.Tensor:
        """Logits (B, S, V) of ids (B, S) if the stream after layer number `after` were x (B, S, D)."""

        def give(number: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                return self._wrap(number, x if number == after else input_tensor(args, kwargs))

            return forward

        with self._replaced({number: give(number) for number in range(1, after + 1)}):
            return self.anatomy.model(input_ids=ids, use_cache=False).logits

    def end(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, S, V) from the stream (B, S, D) after the last layer."""
        return self.rest(ids, x, self.anatomy.num_layers)

    def streams(self, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[LayerCall]]:
        """The stream after layers 0 to L, without graphs, and the calls of the layers."""
        with torch.no_grad():
            x, calls = self.begin(ids)
            return streams_from(x.clone(), calls), calls

    def _wrap(self, number: int, x: torch.Tensor | None) -> Any:
        result = self._results[number - 1]
        return x if result is None else type(result)(x if item is _STREAM else item for item in result)

    @contextmanager
    def _replaced(self, forwards: dict[int, Callable[..., Any]]) -> Iterator[None]:
        layers = [self.anatomy.layers[number - 1][1] for number in forwards]
        before = [vars(layer).get("forward") for layer in layers]
        try:
            for layer, forward in zip(layers, forwards.values(), strict=True):
                layer.forward = forward
            yield
        finally:
            for layer, own in zip(layers, before, strict=True):
                del layer.forward
                if own is not None:
                    layer.forward = own


_STREAM = object()


def streams_from(x: torch.Tensor, calls: list[LayerCall]) -> list[torch.Tensor]:
    """The stream x (B, S, D) and those after each of the calls."""
    found = [x]
    for call in calls:
        found.append(call(found[-1].clone()))  # a layer may change its input in place
    return found


def _result(output: Any) -> Any:
    """What a layer gives, without the stream; None for the stream alone.

    Raises:
        ValueError: it gives more tensors than the stream.
    """
    if isinstance(output, torch.Tensor):
        return None
    stream = first_tensor(output)
    if any(isinstance(item, torch.Tensor) and item is not stream for item in output):
        raise ValueError("a layer gives more than the stream")
    return type(output)(_STREAM if item is stream else item for item in output)


@torch.no_grad()
def find_stages(anatomy: Anatomy) -> Stages | None:
    """The pieces of a model, or None where they do not give what the whole model gives; checked on four tokens."""
    results: list[Any] = []
    parameter = next(anatomy.model.parameters())
    ids = torch.arange(4, device=parameter.device)[None] % anatomy.embedding.weight.shape[0]
    hooks = [layer.register_forward_hook(lambda m, a, out: results.append(out)) for _, layer in anatomy.layers]
    try:
        whole = anatomy.model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    try:
        stages = Stages(anatomy, [_result(output) for output in results])
        streams, _ = stages.streams(ids)
        stages.streams(ids.flip(1))  # what a layer keeps for another one now belongs to other tokens
        middle = (anatomy.num_layers + 1) // 2
        pieces = [stages.rest(ids, streams[after], after) for after in (middle, anatomy.num_layers)]
        same = len(results) == anatomy.num_layers and all(torch.equal(piece, whole) for piece in pieces)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError):
        return None
    return stages if same else None
