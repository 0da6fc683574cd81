"""The peak of live tensor bytes of one training step, counted tensor by tensor.

Not the resident set of the process, which also holds the interpreter, libraries and what the allocator keeps. A
storage counts from the operator that made it until Python and autograd have let it go.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from periln.runkit.fp16 import HalfKernels, HalfMatmul
from periln.runkit.process import peak_rss
from periln.scripts.recipe import Recipe
from periln.scripts.training.distill import Teacher
from periln.scripts.training.engine import Engine
from periln.scripts.training.steps import make_optimizer


class LiveTensors(TorchDispatchMode):
    """While active, counts the bytes of all storages that operators return and that are still alive.

    Attributes:
        live: bytes now.
        peak: the largest `live` so far; `peak_at` names the operator that reached it.
    """

    def __init__(self, tensors: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self.peak_at = ""
        self._sizes: dict[int, int] = {}
        for tensor in tensors:
            self._enter(tensor, "before")

    def _enter(self, tensor: torch.Tensor, by: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._sizes.get(key)
        if known is None:
            weakref.finalize(storage, self._leave, key)
        self._sizes[key] = size
        self.live += size - (known or 0)
        if self.live > self.peak:
            self.peak, self.peak_at = self.live, by

    def _leave(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._enter(tensor, str(func))
        return result


@dataclass(frozen=True)
class Measured:
    """Bytes of live tensors at the peak of a step, the operator at the peak, and the process's largest RSS."""

    peak_bytes: int
    peak_at: str
    rss_bytes: int


def measure_step(recipe: Recipe, config: PeriLlamaConfig, steps: int = 2) -> Measured:
    """Train `steps` steps on random tokens, as the trainer does, and count the last one's live tensors.

    On the CPU, in one process; `recipe.batch_size` sequences in micro batches of `recipe.micro_batch_size`.
    """
    AcceleratorState._reset_state(True)  # it belongs to the process, and may be another measurement's
    recipe.device = "cpu"
    torch.manual_seed(recipe.seed)
    engine = Engine(recipe)
    if isinstance(engine.half_products, HalfKernels):  # the same products, in sight of the counter
        engine.half_products = HalfMatmul()
    model = PeriLlamaForCausalLM(config)
    model.train()
    teacher = Teacher(recipe, config, engine) if recipe.distill_from is not None else None
    engine.prepare(model, make_optimizer(model, recipe.optimizer), recipe)
    micro = recipe.micro_batch_size or recipe.batch_size

    def step() -> None:
        shape = (recipe.batch_size, recipe.sequence_length)
        inputs, targets = (torch.randint(0, config.vocab_size, shape) for _ in range(2))
        positions = torch.arange(shape[1]).remainder(-(-shape[1] // 2)).expand(micro, -1)  # two documents
        masking = {"position_ids": positions} if recipe.document_masking else {}
        with engine.arithmetic():
            for i in range(0, recipe.batch_size, micro):
                arguments: dict[str, Any] = {
                    "input_ids": inputs[i : i + micro],
                    "shift_labels": targets[i : i + micro],
                    "num_items_in_batch": inputs.numel(),
                    "skip_logits": True,
                    "use_cache": False,
                    "z_loss": recipe.optimizer.z_loss,
                    **masking,
                }
                if teacher is None:
                    loss = engine.prepared(**arguments, loss_scale=engine.told_scale()).loss
                else:
                    loss, _ = teacher.losses(engine.prepared, arguments)
                engine.backward(loss)
        del inputs, targets, loss, arguments
        engine.gradient_norm(recipe.optimizer.gradient_clip)
        engine.step(skipped=False)

    for _ in range(steps - 1):
        step()
    state = [t for entry in engine.optimizer.state.values() for t in entry.values() if isinstance(t, torch.Tensor)]
    counter = LiveTensors(
        [*model.parameters(), *model.buffers(), *state, *(teacher.model.parameters() if teacher else ())]
    )
    with counter:
        step()
    return Measured(counter.peak, counter.peak_at, peak_rss())
