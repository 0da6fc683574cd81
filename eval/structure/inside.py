"""What is inside a sublayer: the matrices between its input and its output, found by name and checked by computing.

Attention gives W_o [sum_t p_t (W_v n_t + b_v)]_heads + b_o with p_t >= 0 and sum p_t = 1 in every head. On a single
token p is 1, so the input of W_o must be the values themselves: that is checked, and so is the MLP's formula. A
module for which it does not hold (experts, other activations, norms of values) has no bound here, with a reason.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, overload

import torch
from torch import nn

from periln.eval.structure.points import first_tensor, input_tensor
from periln.eval.structure.sublayers import Sublayer

# |act(x)| <= |x| for every x, so |act(g) u| <= |g u|.
_BELOW_IDENTITY = ("silu", "swish", "gelu", "relu", "pytorchgelutanh", "newgelu", "fastgelu", "quickgelu", "gelutanh")


@dataclass(frozen=True)
class Attention:
    """Values (K, E, D) with biases (K, E) or None, `of_head` (H,) the value head of every query head, and W_o, b_o."""

    values: torch.Tensor
    value_bias: torch.Tensor | None
    of_head: torch.Tensor
    output: torch.Tensor
    output_bias: torch.Tensor | None

    def gives_on_one_token(self, x: torch.Tensor) -> torch.Tensor:
        """What W_o reads (..., H E) if every head sees x (..., D) alone."""
        v = torch.einsum("ked,...d->...ke", self.values, x)
        v = v if self.value_bias is None else v + self.value_bias
        return v[..., self.of_head, :].flatten(-2)

    def gives_on_one_token_at_most(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the sizes of its terms (..., H E), for what cancels in it."""
        bias = None if self.value_bias is None else self.value_bias.abs()
        return replace(self, values=self.values.abs(), value_bias=bias).gives_on_one_token(x.abs())


@dataclass(frozen=True)
class Gated:
    """W_down (act(G x + g) * (U x + u)) + b; without `up` it is W_down act(G x + g) + b."""

    gate: torch.Tensor
    gate_bias: torch.Tensor | None
    up: torch.Tensor | None
    up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None
    act: nn.Module

    def gives(self, x: torch.Tensor) -> torch.Tensor:
        """What W_down reads (..., F)."""
        linear = nn.functional.linear
        hidden = self.act(linear(x, self.gate, self.gate_bias))
        return hidden if self.up is None else hidden * linear(x, self.up, self.up_bias)


class Unknown(Exception):
    """The inside of a module is not one of these; the message says why."""


def _does_something(name: str, child: nn.Module) -> bool:
    """It has parameters, or is a norm without any; an Identity is an empty slot."""
    norm = name.endswith("norm") and not isinstance(child, nn.Identity)
    return norm or any(True for _ in child.parameters())


def linear_maps(module: nn.Module) -> dict[str, nn.Linear]:
    """The module's linear maps by name; anything else with parameters, except norms of queries and keys, is unknown."""
    found = {}
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            found[name] = child
        elif name not in ("q_norm", "k_norm", "q_layernorm", "k_layernorm") and _does_something(name, child):
            raise Unknown(f"{type(module).__name__} holds {name} ({type(child).__name__}), of unknown effect")
    if any(True for _ in module.parameters(recurse=False)):
        raise Unknown(f"{type(module).__name__} has its own parameters, of unknown effect")
    return found


def _act(module: nn.Module) -> nn.Module:
    empty = (nn.Dropout, nn.Identity)  # an Identity is an empty slot of a norm
    acts = [c for c in module.children() if not any(True for _ in c.parameters()) and not isinstance(c, empty)]
    acts = acts or [a for n in ("act_fn", "act") if callable(a := getattr(module, n, None))]
    name = type(acts[0]).__name__.lower().removesuffix("activation") if len(acts) == 1 else ""
    if name not in _BELOW_IDENTITY:
        raise Unknown(f"the activation of {type(module).__name__} is not known to stay below the identity")
    return acts[0]


@overload
def _wide(x: torch.Tensor) -> torch.Tensor: ...
@overload
def _wide(x: None) -> None: ...
def _wide(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.detach().double().cpu()


def _attention(module: nn.Module, size: int) -> tuple[Attention, nn.Module]:
    linears = linear_maps(module)
    names = set(linears)
    head = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    if names == {"q_proj", "k_proj", "v_proj", "o_proj"} and head:
        v, out = linears["v_proj"], linears["o_proj"]
        values, bias = _wide(v.weight).view(-1, head, size), _wide(v.bias)
        bias = None if bias is None else bias.view(-1, head)
    elif names == {"query_key_value", "dense"} and head:  # each head's rows are its query, key and value
        fused, out = linears["query_key_value"], linears["dense"]
        values = _wide(fused.weight).view(-1, 3, head, size)[:, 2]
        bias = None if fused.bias is None else _wide(fused.bias).view(-1, 3, head)[:, 2]
    else:
        raise Unknown(f"the matrices of {type(module).__name__} are not known: {', '.join(sorted(names)) or 'none'}")
    groups = out.in_features // (len(values) * head)
    of_head = torch.arange(len(values) * groups) // groups
    return Attention(values, bias, of_head, _wide(out.weight), _wide(out.bias)), out


def _mlp(module: nn.Module) -> tuple[Gated, nn.Module]:
    linears = linear_maps(module)
    names, act = set(linears), _act(module)
    parts: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
    if names == {"gate_proj", "up_proj", "down_proj"}:
        gate, up, down = (linears[n] for n in ("gate_proj", "up_proj", "down_proj"))
        parts = (gate.weight, gate.bias, up.weight, up.bias)
    elif names == {"gate_up_proj", "down_proj"}:
        down, fused = linears["down_proj"], linears["gate_up_proj"]
        weights = fused.weight.chunk(2)
        biases = (None, None) if fused.bias is None else fused.bias.chunk(2)
        parts = (weights[0], biases[0], weights[1], biases[1])
    elif names == {"dense_h_to_4h", "dense_4h_to_h"} or names == {"fc1", "fc2"}:
        first, second = ("fc1", "fc2") if "fc1" in names else ("dense_h_to_4h", "dense_4h_to_h")
        down = linears[second]
        parts = (linears[first].weight, linears[first].bias, None, None)
    else:
        raise Unknown(f"the matrices of {type(module).__name__} are not known: {', '.join(sorted(names)) or 'none'}")
    w, w_bias, v, v_bias = parts
    return Gated(_wide(w), _wide(w_bias), _wide(v), _wide(v_bias), _wide(down.weight), _wide(down.bias), act), down


Inside = Callable[[], Attention | Gated]


@torch.no_grad()
def look_inside(model: nn.Module, sublayers: Iterable[Sublayer], size: int) -> dict[str, Inside | Unknown]:
    """The inside of every sublayer by its name, checked on one token; an `Unknown` where that fails.

    The model is run once on a single token, in its own dtype. Each value builds the matrices in float64 when called,
    so that only one sublayer's copy exists at a time.
    """
    read: dict[str, Callable[[], tuple[Attention | Gated, nn.Module]]] = {}
    found: dict[str, Inside | Unknown] = {}
    seen: dict[str, dict[str, Any]] = {}
    handles: list[Any] = []
    for sublayer in sublayers:
        kind: Callable[[], tuple[Attention | Gated, nn.Module]] = partial(_mlp, sublayer.module)
        if sublayer.kind == "attn":
            kind = partial(_attention, sublayer.module, size)
        try:
            handles += _watch(sublayer.module, kind()[1], seen.setdefault(sublayer.name, {}))
            read[sublayer.name] = kind
        except Unknown as why:
            found[sublayer.name] = why
    training, parameter = model.training, next(model.parameters())
    model.eval()
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=parameter.device), use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    for name, kind in read.items():
        inside, same = kind()[0], "on one token the module does not give what its matrices say"
        found[name] = partial(_first, kind) if _agrees(inside, seen[name], parameter.dtype) else Unknown(same)
    return found


def _first(kind: Callable[[], tuple[Attention | Gated, nn.Module]]) -> Attention | Gated:
    return kind()[0]


def _watch(module: nn.Module, last: nn.Module, seen: dict[str, Any]) -> list[Any]:
    """Hooks that keep the module's input and output, and the input of its last matrix."""

    def first(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen["given"] = _wide(input_tensor(args, kwargs))

    def before(module: nn.Module, args: tuple) -> None:
        seen["hidden"] = _wide(args[0])

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        seen["result"] = _wide(first_tensor(output))

    return [
        module.register_forward_pre_hook(first, with_kwargs=True),
        last.register_forward_pre_hook(before),
        module.register_forward_hook(after),
    ]


def _agrees(inside: Attention | Gated, seen: dict[str, torch.Tensor], dtype: torch.dtype) -> bool:
    if isinstance(inside, Attention):
        hidden, matrix, bias = inside.gives_on_one_token(seen["given"]), inside.output, inside.output_bias
    else:
        hidden, matrix, bias = inside.gives(seen["given"]), inside.down, inside.down_bias
    result = nn.functional.linear(seen["hidden"], matrix, bias)
    for computed, actual in ((hidden, seen["hidden"]), (result, seen["result"])):
        limit = 1e3 * torch.finfo(dtype).eps * max(computed.abs().max().item(), 1e-30)
        if computed.shape != actual.shape or not bool((computed - actual).abs().max() <= limit):
            return False
    return True
