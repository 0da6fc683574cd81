"""A model whose weights, activations, stream or keys and values are rounded on the way, while a context is open.

The stream is rounded where it is carried from one sublayer to the next: at the embedding, after attention and after the
MLP. After attention it is seen as what the MLP's norm reads, but the layer adds the MLP's output to its own
tensor; so that sum is computed again from the rounded stream, alpha * x + s * branch, with the factors that `structure`
read off and checked.
"""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from periln.eval.formats.locate import Located, Product, replaced
from periln.eval.formats.quantize import quantize
from periln.eval.formats.recipes import ACTIVATIONS, KV, NONE, STREAM, TARGETS, WEIGHTS, Scaled
from periln.eval.structure.points import Point, first_tensor, input_tensor
from periln.eval.structure.sublayers import Sublayer
from periln.runkit.errors import UserError

NAME = "periln_formats"


@dataclass
class Slot:
    """Sums over everything rounded at one place: entries, energy of signal and error, and losses."""

    target: str
    layer: int
    slot: str
    elements: int = 0
    signal: float = 0.0
    noise: float = 0.0
    clipped: int = 0
    flushed: int = 0
    non_finite: int = 0


class Emulation:
    """A context manager around forward passes. `slots` holds a row a place, in the order of the first pass.

    Args:
        cells: the format of every target that is rounded.
    """

    def __init__(self, located: Located, cells: dict[str, Scaled]):
        for target in cells:
            if target in located.missing:
                raise UserError(f"{target}: {located.missing[target]}")
        self.located, self.cells = located, cells
        self.slots: dict[tuple[str, int, str], Slot] = {}
        self.readers: dict[tuple[int, str], list[str]] = {}  # the products that read the very same tensor
        self._handles: list[Any] = []
        self._kept: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._last: tuple[torch.Tensor, int, torch.Tensor, tuple[int, str]] | None = None
        self._middle: torch.Tensor | None = None
        self._branch: torch.Tensor | None = None
        self._attention: list[tuple[Any, Any, str]] = []

    def __enter__(self) -> "Emulation":
        try:
            if WEIGHTS in self.cells:
                self._round_weights()
            if ACTIVATIONS in self.cells:
                for product in self.located.products:
                    self._replace_input(product.module, partial(self._read, product))
            if STREAM in self.cells:
                self._follow_stream()
            if KV in self.cells:
                self._replace_attention()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        with torch.no_grad():
            for parameter, value in self._kept:
                parameter.data = value
        for config, before, _ in self._attention:
            config._attn_implementation_internal = before
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            for *_, name in self._attention:
                registry._global_mapping.pop(name, None)
        self._handles, self._kept, self._attention, self._last = [], [], [], None

    @torch.no_grad()
    def see(self, target: str, layer: int, slot: str, x: torch.Tensor, batched: bool = True) -> torch.Tensor:
        """x rounded to the target's format; its losses are counted."""
        new = quantize(x, self.cells[target], batched)
        row = self.slots.setdefault((target, layer, slot), Slot(target, layer, slot))
        row.elements += x.numel()
        row.signal += x.double().square().sum().item()
        row.noise += (new.values.double() - x).square().sum().item()
        row.clipped += new.clipped
        row.flushed += new.flushed
        row.non_finite += int((~new.values.isfinite()).sum())
        return new.values.to(x.dtype)

    # --- weights and what products read ----------------------------------------------------------------------

    @torch.no_grad()
    def _round_weights(self) -> None:
        done: set[int] = set()
        for product in self.located.products:
            weight = product.weight
            if id(weight) in done:
                continue
            done.add(id(weight))
            matrix = weight.data.T if product.transposed else weight.data
            new = self.see(WEIGHTS, product.layer, product.slot, matrix, batched=False)
            self._kept.append((weight, weight.data))
            weight.data = (new.T if product.transposed else new).contiguous()

    def _read(self, product: Product, x: torch.Tensor) -> torch.Tensor:
        """What a product reads, rounded once for all that read the same tensor."""
        if self._last is not None and self._last[0] is x and self._last[1] == x._version:
            key = self._last[3]
            if product.slot not in self.readers[key]:
                self.readers[key].append(product.slot)
            return self._last[2]
        new, key = self.see(ACTIVATIONS, product.layer, product.slot, x), (product.layer, product.slot)
        self.readers.setdefault(key, [product.slot])
        self._last = (x, x._version, new, key)
        return new

    # --- the stream ------------------------------------------------------------------------------------------

    def _follow_stream(self) -> None:
        anatomy = self.located.anatomy
        assert anatomy is not None  # otherwise the stream is missing, which is refused above
        self._replace(anatomy.embedding_stream, partial(self.see, STREAM, 0, "embedding"))
        before: Point | None = None  # where the layer's stream after attention is seen
        for sublayer in anatomy.sublayers:
            if sublayer.kind == "attn":
                before = None
            if sublayer.stream is None or sublayer.residual_add is None:
                continue  # the first module of a parallel layer adds nothing by itself
            if before is not None and before.side == "input":
                self._handles.append(sublayer.branch_output.watch(self._keep_branch))
                self._replace(sublayer.residual_add, partial(self._sum_again, sublayer))
            self._replace(sublayer.stream, partial(self._carry, sublayer))
            before = sublayer.stream

    def _keep_branch(self, x: torch.Tensor) -> None:
        self._branch = x

    def _carry(self, sublayer: Sublayer, x: torch.Tensor) -> torch.Tensor:
        self._middle = self.see(STREAM, sublayer.layer, f"after {sublayer.kind}", x)
        return self._middle

    def _sum_again(self, sublayer: Sublayer, x: torch.Tensor) -> torch.Tensor:
        assert self._middle is not None and self._branch is not None
        return sublayer.alpha * self._middle + sublayer.multiplier * self._branch

    # --- keys and values -------------------------------------------------------------------------------------

    def _replace_attention(self) -> None:
        """Models in Transformers' style look up an attention function by the name in their config."""
        owned: list[Any] = [m.config for m in self.located.model.modules() if hasattr(m, "config")]
        configs = {id(config): config for config in owned}
        for number, config in enumerate(configs.values()):
            before = getattr(config, "_attn_implementation_internal", None)
            name = f"{NAME}_{number}"
            eager = before in (None, "eager")  # each family's file has its own eager attention
            attend = None if eager else ALL_ATTENTION_FUNCTIONS[before]
            ALL_ATTENTION_FUNCTIONS.register(name, self._attend(attend))
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["eager" if eager else before])
            self._attention.append((config, before, name))
            config._attn_implementation_internal = name

    def _attend(self, given: Callable[..., Any] | None) -> Callable[..., Any]:
        def attention(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
            layer = self.located.layers.get(module, 0)
            key, value = self.see(KV, layer, "keys", key), self.see(KV, layer, "values", value)
            attend = given or sys.modules[type(module).__module__].eager_attention_forward
            return attend(module, query, key, value, mask, **kwargs)

        return attention

    # --- hooks -----------------------------------------------------------------------------------------------

    def _replace(self, point: Point, new: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if point.side == "input":
            self._replace_input(point.module, new)
        else:

            def after(module: nn.Module, args: tuple, output: Any) -> Any:
                x = first_tensor(output)
                return output if x is None else replaced(output, x, new(x))

            self._handles.append(point.module.register_forward_hook(after))

    def _replace_input(self, module: nn.Module, new: Callable[[torch.Tensor], torch.Tensor]) -> None:
        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any]:
            x = input_tensor(args, kwargs)
            if x is None:
                return args, kwargs
            y = new(x)
            return replaced(args, x, y), {k: y if v is x else v for k, v in kwargs.items()}

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))


@torch.no_grad()
def seen_in_a_pass(located: Located) -> Located:
    """The same, with targets also `missing` that do not show up in a pass on 16 random tokens."""
    cells = {t: Scaled("BF16", NONE) for t in TARGETS if t not in located.missing}
    model, missing = located.model, dict(located.missing)
    ids = torch.randint(0, located.vocabulary, (2, 8), generator=torch.Generator().manual_seed(0))
    with Emulation(located, cells) as emulation:
        model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    name = type(model).__name__
    if not any(target == KV for target, *_ in emulation.slots):
        missing[KV] = f"{name} does not call Transformers' attention interface: its keys and values cannot be located"
    reading = {(layer, slot) for (layer, _), slots in emulation.readers.items() for slot in slots}
    silent = [p.name for p in located.products if (p.layer, p.slot) not in reading]
    if ACTIVATIONS in cells and silent:
        missing[ACTIVATIONS] = f"{silent[0]} is not called as a module: what it reads cannot be located"
    return replace(located, missing=missing)


def slot_rows(slots: Iterable[Slot], readers: dict[tuple[int, str], list[str]]) -> list[dict[str, Any]]:
    """Slots as records: signal to noise in decibels (None for no error), and the shares that were lost."""
    rows = []
    for s in slots:
        finite = math.isfinite(s.noise) and not s.non_finite
        ratio = 10 * math.log10(s.signal / s.noise) if finite and s.noise > 0 and s.signal > 0 else None
        name = "+".join(readers.get((s.layer, s.slot), [s.slot])) if s.target == ACTIVATIONS else s.slot
        rows.append(
            {
                "target": s.target,
                "layer": s.layer,
                "slot": name,
                "elements": s.elements,
                "snr_db": ratio,
                "exact": finite and s.noise == 0,
                "clipped": s.clipped / max(s.elements, 1),
                "flushed": s.flushed / max(s.elements, 1),
                "non_finite": s.non_finite,
            }
        )
    return rows
