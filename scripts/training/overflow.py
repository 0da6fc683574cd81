"""Which module's output stopped being finite first?"""

from typing import Any

import torch
from torch import nn


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, (tuple, list)):
        return [t for item in output for t in _tensors(item)]
    return []


class FirstNonFinite:
    """A context manager around forward passes; `name` is the first module, in the order of execution, whose output
    was not finite, or None. Modules inside a module come before it.
    """

    def __init__(self, model: nn.Module):
        self.model, self.name = model, None
        self._handles: list = []

    def __enter__(self) -> "FirstNonFinite":
        for name, module in self.model.named_modules():
            if name:
                self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str):
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            floating = (t for t in _tensors(output) if t.is_floating_point())
            if self.name is None and not all(bool(t.isfinite().all()) for t in floating):
                self.name = name

        return hook
