"""Per-layer statistics of a training step, read by hooks from its own forward and backward pass.

Rows: (step, layer, sublayer, tensor, stat, value). Layer 0 is the embedding, layers are 1 to L. Tensors:

    stream             what the next sublayer reads: after the add and, where there is one, the norm after it
    residual_add       the sum alpha * x + s * branch itself
    branch             a module's output before its output norm
    gradient           the gradient of a sublayer's parameters (unscaled): 2-norm, and variance of its entries
    output_norm_gamma  the learned gain of an output norm

Statistics of activations are over batch, position and channel, in FP32: mean |x|, variance, max |x|. A value that is
not finite in a tensor makes its statistics inf or NaN.

A hook adds to a row of one buffer on the device, in place: nothing is allocated for a step, nothing waits, and
torch.compile makes it part of the layer's kernels. Each row also counts what it has seen: statistics of a tensor that
was seen twice, or in part, are refused.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from torch import nn

from periln.runkit.folder import write_bytes
from periln.scripts.training.engine import Engine

COLUMNS = ["step", "layer", "sublayer", "tensor", "stat", "value"]


def write_rows(path: Path, rows: Iterable[tuple]) -> None:
    """Rows of `COLUMNS` as a Parquet file, whole or not at all."""
    write_bytes(path, pd.DataFrame(rows, columns=COLUMNS).to_parquet(index=False))


def step_of(name: str) -> int:
    """The step in a file's name, `step_00000050.parquet`."""
    return int(name.removeprefix("step_").removesuffix(".parquet"))


def drop_rows(folder: Path, step: int) -> None:
    """Remove the files of steps from `step` on, which will be done again."""
    for file in folder.glob("step_*.parquet"):
        if step_of(file.name) >= step:
            file.unlink()


def gradient_places(name: str) -> list[tuple[int, str]]:
    """Each (layer, sublayer) that a parameter belongs to, by its name; none for the final norm and the head."""
    words = name.split(".")
    if words[1] in ("embed_tokens", "embed_norm"):
        return [(0, "embedding")]
    if words[1] != "layers":
        return []
    return [(int(words[2]) + 1, sublayer) for sublayer in ("mlp" if words[3].startswith("mlp") else "attn", "layer")]


@dataclass
class Activations:
    """What the hooks saw in one step, on one rank.

    Attributes:
        entries: entries of one tensor, over all its forward passes.
        sums: (tensors, 5): sum of |x|, sum of x, sum of x^2, max |x|, share of `entries` seen; on the device.
    """

    entries: int
    sums: torch.Tensor


class Later:
    """Tensors that hooks of an eager CPU step saw, and whose statistics are taken a few at a time.

    Between a layer's kernels the code of a dozen small operators is cold, and takes two to four times as long as over
    several tensors in a row. Nothing is allocated: all tensors go through one, in FP32.
    """

    MOST = 8  # that wait: they are kept alive meanwhile

    def __init__(self) -> None:
        self._waiting: list[tuple[tuple[torch.Tensor, ...], torch.Tensor, float, int]] = []
        self._room = torch.empty(0)

    def add(self, row: tuple[torch.Tensor, ...], found: torch.Tensor, share: float) -> None:
        """`row`: the five numbers of the place's row, each a view; `share`: of the step's entries."""
        self._waiting.append((row, found, share, found._version))
        if len(self._waiting) >= self.MOST:
            self.flush()

    def drop(self) -> None:
        self._waiting.clear()

    def flush(self) -> None:
        """Add what waits to its rows.

        Raises:
            RuntimeError: a tensor was changed in place since.
        """
        with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]  # no products: nothing for `HalfMatmul`
            for row, found, share, version in self._waiting:
                if found._version != version:
                    raise RuntimeError("a module's output was changed in place before its statistics were taken")
                self._take(row, found.reshape(-1), share)
        self._waiting.clear()

    def _take(self, row: tuple[torch.Tensor, ...], x: torch.Tensor, share: float) -> None:
        absolute, total, square, peak, seen = row
        if self._room.numel() != x.numel():
            self._room = torch.empty(x.numel())
        room = self._room
        if x.dtype != torch.float32:
            x = room.copy_(x)
        total.add_(x.sum())
        square.add_(torch.dot(x, x))
        torch.abs(x, out=room)
        absolute.add_(room.sum())
        torch.maximum(peak, room.amax(), out=peak)
        seen.add_(share)


def _observe(module: Any, args: tuple, output: torch.Tensor | tuple) -> None:
    """The forward hook of every place. It finds its row through the module: as one function for all of them it is
    compiled once for a class of layers, where a closure would be compiled for each layer.
    """
    found = (output[0] if isinstance(output, tuple) else output).detach()
    share = found.numel() / module.stats_entries
    if type(found) is torch.Tensor and found.is_cpu and not torch.compiler.is_compiling():
        module.stats_later.add(module.stats_row, found, share)
        return
    x = found.float()
    total, norm = x.sum(), torch.linalg.vector_norm(x)
    size = x.abs() if found.dtype == torch.float32 else x.abs_()  # a copy of ours: no second one
    module.stats_sums.add_(torch.stack([size.sum(), total, norm.square()]))
    module.stats_peak.copy_(torch.maximum(module.stats_peak, size.amax()))
    module.stats_seen.add_(share)


class LayerStats:
    """Hooks at the embedding's norm, the residual adds, the norms after them and the modules' outputs.

    They collect while `attached`; `take` gives what was seen since `clear`. Hooks that stay attached from before the
    first forward pass are compiled with the layers; others see uncompiled layers only.

    Args:
        engine: the run's, prepared.
        entries: entries of one tensor in one step, on this rank: its sequences x their length x hidden size.
    """

    def __init__(self, engine: Engine, entries: int):
        self.engine, self.entries = engine, entries
        self.places: list[tuple[int, str, str]] = []
        self._modules: list[Any] = []  # that have a hook
        self._sources: list[int] = []  # of each place: which of them tells of it
        base = engine.model.model
        self._place(base.embed_norm, 0, "embedding", "stream")
        for l, layer in enumerate(base.layers, start=1):  # noqa: E741
            self._place(layer.self_attn, l, "attn", "branch")
            self._place(layer.attn_residual, l, "attn", "residual_add")
            self._place(layer.attn_residual_norm, l, "attn", "stream")
            self._place(layer.mlp, l, "mlp", "branch")
            self._place(layer.mlp_residual, l, "mlp", "residual_add")
            self._place(layer.mlp_residual_norm, l, "mlp", "stream")
        self._buffer = torch.zeros(len(self._modules), 5, device=engine.device)
        self._later = Later()
        for module, row in zip(self._modules, self._buffer, strict=True):
            module.stats_sums, module.stats_peak, module.stats_seen = row[:3], row[3], row[4]
            module.stats_row, module.stats_later, module.stats_entries = tuple(row), self._later, entries
        self._index = torch.tensor(self._sources, device=engine.device)
        self._handles: list = []
        engine.recomputing = self._unchanged

    def _place(self, module: nn.Module, layer: int, sublayer: str, tensor: str) -> None:
        self.places.append((layer, sublayer, tensor))
        # Without a norm after the add, the stream is the sum itself: it is not read twice.
        if layer == 0 or not isinstance(module, nn.Identity):
            self._modules.append(module)
        self._sources.append(len(self._modules) - 1)

    # --- collecting --------------------------------------------------------------------------------------
    @property
    def is_attached(self) -> bool:
        return bool(self._handles)

    def attach(self) -> None:
        self._handles += [module.register_forward_hook(_observe) for module in self._modules]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks for the time of the block."""
        self.attach()
        try:
            yield
        finally:
            self.detach()

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Around a layer that is computed once more in the backward pass: it was seen in the forward pass."""
        self._later.flush()
        before = self._buffer.clone()
        try:
            yield
        finally:
            self._later.drop()
            self._buffer.copy_(before)

    def clear(self) -> None:
        self._later.drop()
        self._buffer.zero_()

    def take(self) -> Activations:
        """The statistics of all forward passes since `clear`, which are those of one step."""
        self._later.flush()
        return Activations(self.entries, self._buffer.index_select(0, self._index))

    # --- rows --------------------------------------------------------------------------------------------
    def activation_rows(self, steps: list[int], seen: list[Activations]) -> Iterator[tuple]:
        """Rows of all ranks' activations in `steps`; a collective call, one for all steps.

        Raises:
            RuntimeError: a tensor was not seen exactly once in a step.
        """
        sums = torch.stack([s.sums for s in seen])
        gathered = [sums]
        if dist.is_initialized() and dist.get_world_size() > 1:
            gathered = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, sums)
        ranks = torch.stack(gathered).cpu().double()
        self._check(steps, ranks[..., 4])
        totals = torch.cat([ranks[..., :3].sum(0), ranks[..., 3:4].amax(0)], dim=-1).tolist()
        for step, part, places in zip(steps, seen, totals, strict=True):
            entries = part.entries * len(ranks)
            for place, (absolute, total, square, largest) in zip(self.places, places, strict=True):
                yield step, *place, "mean_abs", absolute / entries
                yield step, *place, "variance", square / entries - (total / entries) ** 2
                yield step, *place, "max_abs", largest

    def _check(self, steps: list[int], seen: torch.Tensor) -> None:
        """`seen`: (ranks, steps, places), the share of each place's entries."""
        wrong = ((seen - 1).abs() > 1e-3).nonzero().tolist()
        if wrong:
            rank, step, place = wrong[0]
            layer, sublayer, tensor = self.places[place]
            times = f"{seen[rank, step, place]:.3g} times"
            raise RuntimeError(
                f"the hooks saw the {tensor} of layer {layer} ({sublayer}) {times} in step {steps[step]}, not once: "
                "its statistics would be wrong. If compile and activation_checkpointing are both true, turn one off"
            )

    @torch.no_grad()
    def parameter_rows(self, step: int, loss_scale: float) -> Iterator[tuple]:
        """Rows of gradients and output norms; a collective call where they are sharded. After backward, before
        gradients are unscaled or cleared.
        """
        found: dict[tuple[int, str], list[torch.Tensor]] = {}
        for name, entries in self._gradient_sums():
            for place in gradient_places(name):
                found.setdefault(place, []).append(entries)
        for place, parts in found.items():
            n, total, square = torch.stack(parts).sum(0).tolist()
            variance = square / n - (total / n) ** 2
            yield step, *place, "gradient", "norm", square**0.5 / loss_scale
            yield step, *place, "gradient", "variance", variance / loss_scale**2
        for l, layer in enumerate(self.engine.model.model.layers, start=1):  # noqa: E741
            for sublayer, norm in (("attn", layer.attn_output_norm), ("mlp", layer.mlp_output_norm)):
                if hasattr(norm, "weight"):
                    gamma = self.engine.whole(norm.weight).float() + getattr(norm, "centered", False)  # 1 + w
                    values = torch.stack([gamma.mean(), *gamma.aminmax()]).tolist()
                    for stat, value in zip(("mean", "min", "max"), values, strict=True):
                        yield step, l, sublayer, "output_norm_gamma", stat, value

    def _gradient_sums(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(parameter, [entries, sum, sum of squares] of its gradient over all shards), in double precision."""
        parts, sharded = self.engine.gradient_parts()
        if not parts:
            return
        sums = torch.stack([torch.stack([g.sum(), torch.linalg.vector_norm(g)]) for _, _, g in parts]).double()
        sums[:, 1].square_()
        if sharded:
            dist.all_reduce(sums)
        for (name, entries, _), (total, square) in zip(parts, sums.cpu(), strict=True):
            yield name, torch.stack([torch.tensor(float(entries)).double(), total, square])
