"""The backward pass at a checkpoint: gradients of every sublayer, and whether the loss knows its weights' scale."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from periln.eval.stability.layer_gradients import layer_by_layer
from periln.eval.structure.anatomy import Anatomy, Sublayer
from periln.eval.structure.stages import Stages
from periln.eval.texts.windows import token_loss

PIECE = 2**22  # entries in float64 at once


def accumulate_gradients(model: nn.Module, batches: Iterable[torch.Tensor], tokens: int) -> float:
    """The gradient of the mean next-token loss over `tokens` predictions, into `.grad`; returns the loss.

    Every parameter gets one, whatever its `requires_grad` was; the model keeps its mode.
    """
    model.zero_grad(set_to_none=True)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    total = 0.0
    for ids in batches:
        loss = token_loss(model(input_ids=ids, use_cache=False).logits, ids) / tokens
        loss.backward()
        total += loss.item()
    return total


def _groups(anatomy: Anatomy) -> Iterable[tuple[int, str, list[nn.Module]]]:
    norm = anatomy.embedding_norm
    yield 0, "embedding", [anatomy.embedding, *([norm.module] if norm else [])]
    for s in anatomy.sublayers:
        norms = [n.module for n in (s.input_norm, s.output_norm, s.residual_norm) if n is not None]
        yield s.layer, s.kind, [s.module, *norms]
    for number, (_, layer) in enumerate(anatomy.layers, start=1):
        yield number, "layer", [layer]
    ends = [anatomy.final_norm.module] if anatomy.final_norm else []
    yield anatomy.num_layers, "final", ends if anatomy.tied else [*ends, anatomy.lm_head]


@torch.no_grad()
def _sums(x: torch.Tensor, y: torch.Tensor | None = None) -> tuple[float, float, float]:
    """In float64, a piece at a time: sum x, sum x^2, and <x, y>."""
    total = square = product = 0.0
    for i, piece in enumerate(pieces := x.reshape(-1).split(PIECE)):
        wide = piece.double()
        total, square = total + wide.sum().item(), square + torch.dot(wide, wide).item()
        if y is not None:
            product += torch.dot(wide, y.detach().reshape(-1)[i * PIECE : i * PIECE + len(pieces[i])].double()).item()
    return total, square, product


def _gradient_row(modules: list[nn.Module], step: int, layer: int, sublayer: str) -> list[tuple]:
    """`gradient` norm and variance (over entries) of a group of parameters, where it has a gradient."""
    parameters = {id(p): p for m in modules for p in m.parameters() if p.grad is not None}
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    if not parameters:
        return []
    count = sum(p.numel() for p in parameters.values())
    sums = [_sums(gradient) for gradient in gradients]
    mean, square = sum(s[0] for s in sums) / count, sum(s[1] for s in sums)
    values = {"norm": square**0.5, "variance": max(square / count - mean**2, 0.0)}
    return [(step, layer, sublayer, "gradient", stat, value) for stat, value in values.items()]


def scale_freedom(sublayer: Sublayer) -> float | None:
    """<dL/dW, W> / (|dL/dW| |W|) of the map that gives the module's output, its bias included; None without one.

    It is 0 (to rounding and epsilon) where an output norm follows: the loss does not depend on the scale of W.
    """
    projection = sublayer.output_projection
    if projection is None:
        return None
    with_gradient = [p for p in projection.module.parameters() if p.grad is not None]
    if not with_gradient:
        return None
    grads = [_sums(p.grad, p) for p in with_gradient if p.grad is not None]
    size = (sum(g[1] for g in grads) * sum(_sums(p.detach())[1] for p in with_gradient)) ** 0.5
    return sum(g[2] for g in grads) / size if size > 0 else None


@torch.no_grad()
def _weight_rows(anatomy: Anatomy, s: Sublayer, step: int) -> list[tuple]:
    """`scale_freedom` of the branch weights, and the learned gain of the output norm."""
    found, freedom = [], scale_freedom(s)
    if freedom is not None:
        found.append((step, s.layer, s.kind, "branch_weights", "scale_freedom", freedom))
    gain = None if s.output_norm is None else anatomy.gain(s.output_norm)
    if gain is not None:
        for stat in ("mean", "min", "max"):
            found.append((step, s.layer, s.kind, "output_norm_gamma", stat, getattr(gain, stat)().item()))
    return found


def _rows(anatomy: Anatomy, step: int, chosen: Callable[[int, str], bool]) -> list[tuple]:
    """All rows of the groups, by layer and sublayer."""
    found: list[tuple] = []
    for layer, sublayer, modules in _groups(anatomy):
        if chosen(layer, sublayer):
            found += _gradient_row(modules, step, layer, sublayer)
    for s in anatomy.sublayers:
        if chosen(s.layer, s.kind):
            found += _weight_rows(anatomy, s, step)
    return found


def backward_rows(
    anatomy: Anatomy,
    batches: list[torch.Tensor],
    step: int,
    stages: Stages | None = None,
    tell: Callable[[], None] = lambda: None,
) -> list[tuple]:
    """All rows, from one gradient of the mean loss over `batches` (ids (B, S)); no gradient is left behind.

    With stages the gradients come a layer at a time, and are freed once measured; `tell` is called after each layer
    of each batch. Otherwise all of them exist at once.
    """
    tokens = sum(ids[:, 1:].numel() for ids in batches)
    found: list[tuple] = []
    try:
        if stages is None or shared_between_layers(anatomy):
            accumulate_gradients(anatomy.model, batches, tokens)
            found = _rows(anatomy, step, lambda layer, sublayer: True)
        else:

            def visit(number: int | None) -> None:
                ends = {None: "final", 0: "embedding"}
                if number in ends:
                    found.extend(_rows(anatomy, step, lambda layer, sublayer: sublayer == ends[number]))
                else:
                    inside = ("attn", "mlp", "layer")
                    found.extend(_rows(anatomy, step, lambda layer, sublayer: layer == number and sublayer in inside))

            layer_by_layer(stages, batches, tokens, visit, tell)
        return sorted(found, key=_order)
    finally:
        anatomy.model.zero_grad(set_to_none=True)


def _order(row: tuple) -> tuple:
    return row[1], ("embedding", "attn", "mlp", "layer", "final").index(row[2])


def shared_between_layers(anatomy: Anatomy) -> bool:
    """Whether a parameter belongs to two layers, or to a layer and the embedding."""
    seen = [id(p) for _, layer in anatomy.layers for p in layer.parameters()]
    return len(seen) > len(set(seen)) or any(id(p) in set(seen) for p in anatomy.embedding.parameters())
