"""Where tensors can be seen: at modules' inputs and outputs, in every form in which Transformers passes them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


def first_tensor(value: Any) -> torch.Tensor | None:
    """A module's output tensor: itself, or the first floating one in a tuple, list or model output."""
    if isinstance(value, torch.Tensor):
        return value if value.is_floating_point() else None
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return next((found for item in items if (found := first_tensor(item)) is not None), None)


def input_tensor(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """A module's input: the first floating positional tensor, or `hidden_states`, or the first by name."""
    found = first_tensor(args)
    return found if found is not None else first_tensor([kwargs.get("hidden_states"), *kwargs.values()])


@dataclass(frozen=True)
class Point:
    """Where a tensor (batch, position, channel) can be seen: at a module's `input` or `output`."""

    name: str
    module: nn.Module
    side: str

    def watch(self, see: Callable[[Any], None]) -> Any:
        """Call `see` with the tensor (or None) on every forward pass; returns the hook's handle."""
        if self.side == "input":

            def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
                see(input_tensor(args, kwargs))

            return self.module.register_forward_pre_hook(before, with_kwargs=True)

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            see(first_tensor(output))

        return self.module.register_forward_hook(after)


@dataclass
class Call:
    """One call of a module: its name, and what went in and came out."""

    name: str
    module: nn.Module
    given: torch.Tensor | None
    result: torch.Tensor | None = None


@dataclass
class TensorCall(Call):
    """A call that turned one tensor into another."""

    given: torch.Tensor
    result: torch.Tensor


@dataclass
class Trace:
    calls: dict[str, list[Call]] = field(default_factory=dict)  # by the name of the layer, "" outside of layers

    def of(self, name: str) -> Call | None:
        return next((c for calls in self.calls.values() for c in calls if c.name == name), None)


@contextmanager
def watched(modules: dict[str, list[tuple[str, nn.Module]]], trace: Trace) -> Iterator[None]:
    handles: list[Any] = []

    def watch(owner: str, name: str, module: nn.Module) -> None:
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given = input_tensor(args, kwargs)
            call = Call(name, module, None if given is None else given.detach().clone())
            trace.calls.setdefault(owner, []).append(call)

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            result = first_tensor(output)
            call = next(c for c in reversed(trace.calls[owner]) if c.name == name)
            call.result = None if result is None else result.detach().clone()

        handles.extend(
            [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
        )

    try:
        for owner, members in modules.items():
            for name, module in members:
                watch(owner, name, module)
        yield
    finally:
        for handle in handles:
            handle.remove()
