"""The backward pass at a checkpoint: gradients of every sublayer, and whether the loss knows its weights' scale."""

from collections.abc import Iterable

import torch
from torch import nn

from periln.eval.structure.anatomy import Anatomy, Sublayer
from periln.eval.texts.windows import token_loss


def accumulate_gradients(model: nn.Module, batches: Iterable[torch.Tensor], tokens: int) -> float:
    """The gradient of the mean next-token loss over `tokens` predictions, into `.grad`; returns the loss.

    Every parameter gets one, whatever its `requires_grad` said; the model keeps the mode it was in.
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
def gradient_rows(anatomy: Anatomy, step: int) -> Iterable[tuple]:
    """`gradient` norm and variance (over entries) of each group of parameters that has a gradient."""
    for layer, sublayer, modules in _groups(anatomy):
        parameters = {id(p): p for m in modules for p in m.parameters() if p.grad is not None}
        if not parameters:
            continue
        count = sum(p.numel() for p in parameters.values())
        grads = [p.grad.double() for p in parameters.values()]
        square = sum(g.square().sum().item() for g in grads)
        mean = sum(g.sum().item() for g in grads) / count
        yield step, layer, sublayer, "gradient", "norm", square**0.5
        yield step, layer, sublayer, "gradient", "variance", max(square / count - mean**2, 0.0)


@torch.no_grad()
def scale_freedom(sublayer: Sublayer) -> float | None:
    """<dL/dW, W> / (|dL/dW| |W|) of the map that gives the module's output, its bias included; None without one.

    It is 0 (to rounding and epsilon) where an output norm follows: the loss does not depend on the scale of W.
    """
    projection = sublayer.output_projection
    if projection is None:
        return None
    pairs = [
        (p.grad.double().flatten(), p.double().flatten()) for p in projection.module.parameters() if p.grad is not None
    ]
    if not pairs:
        return None
    grad, weight = torch.cat([g for g, _ in pairs]), torch.cat([w for _, w in pairs])
    size = grad.norm() * weight.norm()
    return (grad @ weight / size).item() if size > 0 else None


def weight_rows(anatomy: Anatomy, step: int) -> Iterable[tuple]:
    """`scale_freedom` of the branch weights, and the learned gain of the output norms."""
    for s in anatomy.sublayers:
        freedom = scale_freedom(s)
        if freedom is not None:
            yield step, s.layer, s.kind, "branch_weights", "scale_freedom", freedom
        gain = None if s.output_norm is None else anatomy.gain(s.output_norm)
        if gain is not None:
            for stat in ("mean", "min", "max"):
                yield step, s.layer, s.kind, "output_norm_gamma", stat, getattr(gain, stat)().item()


def backward_rows(anatomy: Anatomy, batches: list[torch.Tensor], step: int) -> list[tuple]:
    """All of it, from one gradient of the mean loss over `batches` (ids (B, S)); no gradient is left behind."""
    tokens = sum(ids[:, 1:].numel() for ids in batches)
    try:
        accumulate_gradients(anatomy.model, batches, tokens)
        return [*gradient_rows(anatomy, step), *weight_rows(anatomy, step)]
    finally:
        anatomy.model.zero_grad(set_to_none=True)
