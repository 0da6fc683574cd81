"""What flows through a model, measured on the fly: every tensor of the stream, and the peak of every other tensor.

Rows: (step, layer, sublayer, tensor, stat, value). Layer 0 is the embedding, layers are 1 to L; `final` is after the
final norm, and has the number L. Tensors:

    stream           what the next sublayer reads: after the add and, where there is one, the norm after it; at layer 0
                     the embedding as layer 1 reads it; at `mlp` of layer L the stream before the final norm
    residual_add     the sum alpha * x + s * branch itself
    branch           a module's output before its output norm
    branch_output    the same after it
    logits           the head's output
    output:NAME      output of a module inside a layer (NAME within the layer), input:NAME what a linear map reads
"""

import math
from typing import Any

import torch
from torch import nn

from periln.eval.stability.moments import Moments
from periln.eval.stability.redundancy import Angles
from periln.eval.structure.anatomy import Anatomy, Point, first_tensor, input_tensor
from periln.eval.texts.windows import token_loss
from periln.runkit.number_format import FP16


class Probe:
    """A context manager around forward passes; each pass is between `start` and `finish`."""

    def __init__(self, anatomy: Anatomy, apart: int | None = None):
        self.anatomy = anatomy
        self.angles = Angles(anatomy.num_layers, apart)
        self.labels: list[tuple[int, str, str, tuple]] = []
        self.moments: dict[tuple, Moments] = {}
        self.peaks: dict[tuple[int, str, str], float] = {}
        self.shares: dict[tuple[int, str], list[float]] = {}
        self.loss_sum, self.predicted, self.first = 0.0, 0, 0
        self._points: dict[tuple, Point] = {}
        self._batch: dict[tuple, torch.Tensor] = {}
        self._lengths: dict[tuple, torch.Tensor] = {}
        self._handles: list[Any] = []
        self._streams: list[tuple] = []
        self._label()

    def _point(self, point: Point) -> tuple:
        key = (point.name, point.side)
        self._points[key] = point
        self.moments.setdefault(key, Moments())
        return key

    def _label(self) -> None:
        """Which point is which tensor; a point that is two of them (no norm between) is measured once."""
        anatomy, last = self.anatomy, self.anatomy.num_layers
        self._streams.append(self._point(anatomy.embedding_stream))
        self.labels.append((0, "embedding", "stream", self._streams[0]))
        for s in anatomy.sublayers:
            for tensor in ("branch", "branch_output", "residual_add", "stream"):
                point = getattr(s, tensor)
                if point is not None:
                    self.labels.append((s.layer, s.kind, tensor, self._point(point)))
            if s.kind == "mlp":
                self._streams.append(self.labels[-1][3])
        if anatomy.final_norm is not None:
            point = Point(anatomy.final_norm.name, anatomy.final_norm.module, "output")
            self.labels.append((last, "final", "stream", self._point(point)))

    def __enter__(self) -> "Probe":
        reads = {(s.reads.name, s.reads.side): s.reads for s in self.anatomy.sublayers}
        for key, point in (reads | self._points).items():
            self._handles.append(point.watch(lambda x, key=key: self._see(key, x)))
        for layer, (name, module) in enumerate(self.anatomy.layers, start=1):
            self._watch_inside(layer, name, module)
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _see(self, key: tuple, x: torch.Tensor) -> None:
        x = x.detach()
        self._batch[key] = x
        if key in self.moments:
            self._lengths[key] = self.moments[key].add(x, self.first)

    def _watch_inside(self, layer: int, name: str, module: nn.Module) -> None:
        """The largest |x| of every leaf's output inside the layer, and of every matrix's input."""
        kinds = {s.name: s.kind for s in self.anatomy.sublayers if s.layer == layer}
        for inner, leaf in module.named_modules():
            if not inner or any(True for _ in leaf.children()) or isinstance(leaf, (nn.Identity, nn.Dropout)):
                continue
            full = f"{name}.{inner}"
            kind = next((k for n, k in kinds.items() if full.startswith(f"{n}.")), "layer")

            def see(side: str, x: torch.Tensor | None, kind=kind, inner=inner) -> None:
                if x is not None and x.numel():
                    self._peak((layer, kind, f"{side}:{inner}"), x)

            self._handles.append(leaf.register_forward_hook(lambda m, a, o, see=see: see("output", first_tensor(o))))
            if getattr(getattr(leaf, "weight", None), "ndim", 0) == 2:
                hook = leaf.register_forward_pre_hook(
                    lambda m, a, k, see=see: see("input", input_tensor(a, k)), with_kwargs=True
                )
                self._handles.append(hook)

    def _peak(self, key: tuple[int, str, str], x: torch.Tensor) -> None:
        """Keep the largest |x|; NaN counts as the largest of all."""
        low, high = (bound.item() for bound in x.detach().aminmax())
        known, largest = self.peaks.get(key, 0.0), max(-low, high)
        self.peaks[key] = math.nan if math.isnan(known) or math.isnan(low) else max(known, largest)

    def start(self, first_sample: int) -> None:
        """Before a pass over a batch whose first row is sample number `first_sample`."""
        self.first = first_sample
        self._batch.clear()
        self._lengths.clear()

    def _lengths_at(self, point: Point) -> torch.Tensor:
        """The length of every token's vector (B S,) in this pass."""
        key = (point.name, point.side)
        if key not in self._lengths:
            self._lengths[key] = torch.linalg.vector_norm(self._batch[key].double(), dim=-1).flatten()
        return self._lengths[key]

    @torch.no_grad()
    def finish(self, logits: torch.Tensor, ids: torch.Tensor) -> None:
        """After it: logits (B, S, V) and the ids (B, S) that were given."""
        self.angles.add([self._batch[key] for key in self._streams])
        for s in self.anatomy.sublayers:
            x, branch = self._lengths_at(s.reads), self._lengths_at(s.branch_output)
            sums = self.shares.setdefault((s.layer, s.kind), [0.0, 0])
            sums[0] += (branch / x.clamp(min=1e-300)).sum().item()
            sums[1] += x.numel()
        self._peak((self.anatomy.num_layers, "final", "logits"), logits)
        self.loss_sum += token_loss(logits, ids).double().item()
        self.predicted += ids[:, 1:].numel()
        self.start(0)

    @property
    def loss(self) -> float:
        """Mean next-token loss, nats."""
        return self.loss_sum / self.predicted

    def rows(self, step: int) -> list[tuple]:
        """All statistics so far."""
        found = []
        for layer, sublayer, tensor, key in self.labels:
            stats = self.moments[key].stats()
            found += [(step, layer, sublayer, tensor, stat, value) for stat, value in stats.items()]
        for (layer, sublayer), (total, count) in self.shares.items():
            found.append((step, layer, sublayer, "branch_output", "branch_share", total / count))
        for (layer, sublayer, tensor), largest in self.peaks.items():
            found.append((step, layer, sublayer, tensor, "max_abs", largest))
            found.append((step, layer, sublayer, tensor, "headroom_bits", FP16.headroom(largest)))
        return found
