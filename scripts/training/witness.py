"""What a run is observed to do, for environment.json: dtypes, and the kernel of its attention.

Seen in a separate forward pass, uncompiled, before the process's first training step. Were it that step, a resumed
compiled run would have a step computed differently from the run that was not stopped.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from periln.runkit.environment import DtypeWitness
from periln.scripts.training.engine import Engine


class AttentionKernels(TorchDispatchMode):
    """While active, collects the names of the operators that compute attention; plain products are none."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if "attention" in (name := func.overloadpacket.__name__):
            self.names.add(name.strip("_"))
        return func(*args, **(kwargs or {}))


class Witness:
    """One run's; `look` first, `report` when there are gradients."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.attention = engine.model.config._attn_implementation
        self._dtypes, self._kernels = DtypeWitness(engine.model), AttentionKernels()

    def look(self, arguments: dict[str, Any]) -> None:
        """A forward pass that leaves no trace: no gradients, and random numbers as they were."""
        engine, device = self.engine, self.engine.device
        # Only PyTorch's own attention chooses a kernel; others have their name for it, and some refuse to be watched.
        kernels = self._kernels if self.attention == "sdpa" else nullcontext()
        devices = [device] if device.type == "cuda" else []
        # With a graph, for whether there will be a backward pass is among what the kernel is chosen by.
        graph = torch.set_grad_enabled(engine.zero is None)
        with torch.random.fork_rng(devices), graph, engine.uncompiled(), engine.unsynchronized(), self._dtypes:  # noqa: SIM117
            with engine.arithmetic(), kernels:
                engine.prepared(**arguments)

    def report(self) -> dict[str, Any]:
        """What was seen; the gradients' dtypes as they are now."""
        attention = {"implementation": self.attention, "kernels": sorted(self._kernels.names)}
        settings = {"deterministic_algorithms": torch.are_deterministic_algorithms_enabled()}
        return {"attention": attention} | settings | self._dtypes.report()
