"""Section `arithmetic`: the device against the CPU, compiled against eager, dtypes, graphs, host waits."""

import json
import warnings
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from periln.scripts.gpu_check.notes import Notes
from periln.scripts.gpu_check.place import Place, step
from periln.scripts.training.trainer import Trainer

MICRO_BATCHES = 12
CLASSES = 4  # that are compiled: a layer, the norms at the two ends, the loss


def gradients(trainer: Trainer) -> tuple[float, torch.Tensor]:
    """The loss of the first batch and the gradient, unscaled, in one vector on the CPU."""
    loss = trainer._gradients(trainer._micro_batches(0))
    scale = trainer.engine.loss_scale
    return loss, torch.cat([p.grad.flatten().float().cpu() for p in trainer.model.parameters()]) / scale


def check_against_cpu(place: Place, notes: Notes) -> None:
    recipe = place.tiny(name="against_cpu")
    loss, ours = gradients(place.trainer(recipe))
    expected, theirs = gradients(Place(place.out, torch.device("cpu")).trainer(replace(recipe, device="cpu")))
    error = ((ours - theirs).norm() / theirs.norm()).item()
    notes.check("loss as on the CPU in FP16", abs(loss - expected) < 5e-3, [loss, expected], "within 5e-3 nats")
    notes.check("gradient as on the CPU in FP16", error < 3e-2, error, "relative error below 3e-2")


def check_compiled(place: Place, notes: Notes) -> None:
    fields = {"batch_size": MICRO_BATCHES, "micro_batch_size": 1}
    trainers = {
        c: place.trainer(place.tiny(name="compiled" if c else "eager", compile=c, **fields)) for c in (False, True)
    }
    torch._dynamo.reset()
    counters.clear()
    losses = {c: [step(t, witness=t.step == 0)["loss"] for _ in range(3)] for c, t in trainers.items()}
    difference = max(abs(a - b) for a, b in zip(losses[False], losses[True], strict=True))
    notes.check("three compiled steps as three eager ones", difference < 5e-3, losses, "within 5e-3 nats")
    graphs, most = counters["stats"]["unique_graphs"], 2 * CLASSES
    notes.check(f"graphs for {MICRO_BATCHES} micro batches", 0 < graphs <= most, graphs, f"1 to {most}")
    breaks = sum(counters["graph_break"].values())
    notes.check("graph breaks", breaks == 0, breaks, "0")
    seen = json.loads((trainers[True].run.path / "environment.json").read_text())
    dtypes = sorted({add["output"] for add in seen["residual_adds"].values()})
    notes.check("dtypes of the residual sums", dtypes == ["float16"], dtypes, "float16 alone")
    notes.measure("attention", seen["attention"])


class ReadNumbers(TorchDispatchMode):
    """On a CPU, where nothing waits: counts the operators that would wait for a GPU.

    Tensors say that they are not on a CPU, so that what is asked there alone is left out.
    """

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.WAITING
        return func(*args, **(kwargs or {}))


def host_waits(place: Place, trainer: Trainer) -> int:
    """How often the host waits for the device in a step that is not the first."""
    step(trainer)
    if place.toy:
        with ReadNumbers() as seen, patch.object(torch.Tensor, "is_cpu", False):
            step(trainer)
        return seen.count
    torch.cuda.set_sync_debug_mode("warn")  # this process's alone
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step(trainer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in seen)


def check_host_waits(place: Place, notes: Notes) -> None:
    waits = {}
    for micro_batches in (1, MICRO_BATCHES):
        recipe = place.tiny(name="waits", batch_size=MICRO_BATCHES, micro_batch_size=MICRO_BATCHES // micro_batches)
        waits[micro_batches] = host_waits(place, place.trainer(recipe))
    few, many = waits.values()
    wanted = "at most 1 a step, whatever the number of micro batches"
    notes.check("host waits with 1 and 12 micro batches", many == few <= 1, waits, wanted)


def check_arithmetic(place: Place, notes: Notes) -> None:
    check_host_waits(place, notes)
    if notes.has_time("compiled", 10):
        check_compiled(place, notes)
    check_against_cpu(place, notes)  # last: Accelerate remembers that a process was a CPU's
