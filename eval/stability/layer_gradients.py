"""Gradients a layer at a time, in little memory."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from periln.eval.structure.anatomy import Anatomy
from periln.eval.structure.stages import LayerCall, Stages, streams_from
from periln.eval.texts.windows import loss_gradient

STREAMS = 2**27  # bytes: where the streams of all layers take more than 128 MiB, some are computed again


def kept_streams(layers: int, samples: int, size: int) -> tuple[int, int]:
    """Which streams of `size` bytes are kept: every how many layers', and how many there are at most, with gradients.

    The others are computed again, from one that was kept. Where those of all L layers take more than `STREAMS` bytes,
    some 2 sqrt(L) a sample are there at once.
    """

    def most(every: int) -> int:
        return samples * (-(-layers // every) + every)

    every = 1 if most(1) * size <= STREAMS else min(range(1, layers + 1), key=most)
    return every, most(every)


@dataclass
class _Pass:
    """A batch (ids (B, S)): what is kept of it, and the gradient of the stream (B, S, D) that was reached last."""

    ids: torch.Tensor
    calls: list[LayerCall]
    kept: list[torch.Tensor]
    inside: list[torch.Tensor]
    grad: torch.Tensor


def layer_by_layer(
    stages: Stages,
    batches: list[torch.Tensor],
    tokens: int,
    visit: Callable[[int | None], None],
    tell: Callable[[], None] = lambda: None,
) -> None:
    """The gradient of the mean loss over `tokens` predictions, one layer's at a time, the last first.

    `visit` is called when the gradients of the model's end (None), of a layer (its number) and of its start (0) are
    complete; those that no later piece adds to are then freed.
    """
    model, layers = stages.anatomy.model, stages.anatomy.layers
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    model.zero_grad(set_to_none=True)
    begins = {id(p) for p in stages.anatomy.embedding.parameters()}  # a tied table belongs to both ends
    of_one = stages.anatomy.hidden_size * batches[0].shape[1] * stages.anatomy.embedding.weight.element_size()
    every, _ = kept_streams(len(layers), sum(len(ids) for ids in batches), of_one)
    passes = []
    for ids in batches:
        passes.append(_from_the_end(stages, ids, tokens, every))
        tell()
    visit(None)
    _free(model, begins)
    for number in range(len(layers), 0, -1):
        for each in passes:
            if not each.inside:
                first = (number - 1) // every * every
                with torch.no_grad():
                    each.inside = streams_from(each.kept.pop(), each.calls[first : number - 1])
            leaf = each.inside.pop().requires_grad_()
            each.calls[number - 1](leaf.clone()).backward(each.grad)
            each.grad = _gradient(leaf)
            tell()
        visit(number)
        _free(layers[number - 1][1], begins)
    for each in passes:
        with _rows_where_added(stages.anatomy.embedding):
            stages.begin(each.ids)[0].backward(each.grad)
    visit(0)


def _from_the_end(stages: Stages, ids: torch.Tensor, tokens: int, every: int) -> _Pass:
    """Run a batch (ids (B, S)), and the backward pass from its loss to the stream after the last layer."""
    kept = []
    with torch.no_grad():
        x, calls = stages.begin(ids)
        x = x.clone()
        for number, call in enumerate(calls):
            if number % every == 0:
                kept.append(x)
            x = call(x.clone())  # a layer may change its input in place
    leaf = x.requires_grad_()
    with _head(stages.anatomy.lm_head) as head:
        logits = stages.end(ids, leaf.clone())
        gradient = logits.detach() if head.gave(logits) else logits.detach().clone()
        logits.backward(loss_gradient(gradient, ids, tokens))
    return _Pass(ids, calls, kept, [], _gradient(leaf))


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    if leaf.grad is None:
        raise RuntimeError("the loss does not depend on the stream")
    return leaf.grad


class _Product(torch.autograd.Function):
    """x (..., D) W^T, whose backward adds to the gradient that W (V, D) has, without making a second one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: nn.Parameter) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        weight.grad.addmm_(grads[0].flatten(0, -2).T, x.flatten(0, -2))
        return grads[0] @ weight, None


@dataclass
class _Head:
    """What a head that is `nn.Linear` and nothing else gave: no backward pass reads that product again."""

    products: list[tuple[torch.Tensor, int]]

    def gave(self, logits: torch.Tensor) -> bool:
        """Whether these are its product, called once and not changed since; it is then let go."""
        found = len(self.products) == 1 and self.products[0][0] is logits and self.products[0][1] == logits._version
        self.products.clear()
        return found


@contextmanager
def _head(head: nn.Module) -> Iterator[_Head]:
    """Adds in place to a gradient that the head has, and watches what it gives."""
    seen = _Head([])
    if type(head) is not nn.Linear:
        yield seen
        return
    with ExitStack() as hooks:
        hook = head.register_forward_hook(lambda m, args, out: seen.products.append((out, out._version)))
        hooks.callback(hook.remove)
        if _adds_in_place(head) and head.weight.grad is not None:
            hooks.callback(vars(head).pop, "forward", None)
            vars(head)["forward"] = lambda input: _Product.apply(input, head.weight)
        yield seen


def _adds_in_place(head: nn.Module) -> bool:
    return type(head) is nn.Linear and head.bias is None and "forward" not in vars(head)


@torch.no_grad()
def ends_in_place(anatomy: Anatomy, ids: torch.Tensor) -> tuple[bool, bool]:
    """Whether the gradient of the logits takes their place, and whether the head's weight has one alone."""
    adds = _adds_in_place(anatomy.lm_head)
    with _head(anatomy.lm_head) as head:
        logits = anatomy.model(input_ids=ids, use_cache=False).logits
        adds = adds and bool(head.products)
        return head.gave(logits), adds


@contextmanager
def _rows_where_added(embedding: nn.Module) -> Iterator[None]:
    """The gradient of a table that has one already comes as the rows that were read, not as a second table.

    The gradient of a tied head is there before that of the table, and each batch but the first adds to it. In FP32
    alone: in half precision a frequent token's rows would be lost one by one, where their sum is not.
    """
    table = embedding if isinstance(embedding, nn.Embedding) and embedding.weight.dtype == torch.float32 else None
    if table is None or table.sparse or table.scale_grad_by_freq or table.weight.grad is None:
        yield
        return
    try:
        table.sparse = True
        yield
    finally:
        table.sparse = False


def _free(module: nn.Module, kept: set[int]) -> None:
    for parameter in module.parameters():
        if id(parameter) not in kept:
            parameter.grad = None
