"""Cross entropy that never holds the logits of the whole batch, and is safe under loss scaling.

The logits of one chunk of tokens are computed, turned into a loss and thrown away. There are two ways to the gradient:

- Without `loss_scale`, backward computes the logits again (activation checkpointing). This is the definition.
- With `loss_scale`, the gradient is made in the same pass, as in torchtitan's chunked loss: no logits are computed
  twice. Kernels that form d(logits) in the forward pass commonly do so before the loss scale is applied, and in FP16
  most of the gradient then underflows; here the scale is a factor of d(logits) before they are rounded.
"""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100


def shift_labels(labels: torch.Tensor, ignore_index: int = IGNORE_INDEX) -> torch.Tensor:
    """Labels (B, S) moved one place to the left, so that position t holds the token that t predicts."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()


def softmax_part(
    logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, ignore_index: int, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the loss and, with `z_loss`, of log(sum(exp(logits)))^2 over a chunk, (1,) or (2,), and d(logits).

    `logits` (n, V), `targets` (n,). d(logits) is that of the loss plus `z_loss` times the squares, times `weight` (a
    scalar tensor in FP32), in the logits' dtype; logits in FP32 or wider are overwritten with it. Plain operations:
    torch.compile makes few kernels of them.
    """
    counts = targets != ignore_index
    places = targets.where(counts, 0)[:, None]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = wide.amax(-1, keepdim=True)
    picked = wide.gather(1, places) - largest
    # In place: writing a second tensor of this size takes as long as the exponential. The compiler fuses them anyway.
    gradient = wide - largest if torch.compiler.is_compiling() else wide.sub_(largest)
    partition = gradient.exp_().sum(-1, keepdim=True)
    log_partition = partition.log()
    sums = [(log_partition - picked)[:, 0].where(counts, 0.0).sum()]
    share = factor = (counts * weight)[:, None]
    if z_loss:
        log_partition = log_partition + largest
        sums.append(log_partition[:, 0].square().where(counts, 0.0).sum())
        share = factor * (1 + 2 * z_loss * log_partition)
    gradient.mul_(share / partition)
    gradient.scatter_(1, places, gradient.gather(1, places) - factor)
    return torch.stack(sums), gradient.to(logits.dtype)


class _OnePass(torch.autograd.Function):
    """The loss and the z term; the gradient of both is the loss's."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        items: Any,
        scale: torch.Tensor,
        chunk_tokens: int,
        ignore_index: int,
        z_loss: float,
        softmax: Callable[..., Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        with torch.autocast(device, enabled=False):
            matrix = weight.to(dtype)  # once, for all chunks
            hidden_grad = torch.empty_like(hidden_states, dtype=dtype) if want_hidden else None
            # Summed in FP32 at least: in FP16 the sum over a long batch would be rounded, and could overflow.
            wide = torch.promote_types(weight.dtype, torch.float32)
            weight_grad: torch.Tensor | None = None
            factor = scale / items
            total: Any = None
            for start in range(0, len(hidden_states), chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                hidden = hidden_states[rows].to(dtype)
                sums, gradient = softmax(F.linear(hidden, matrix), targets[rows], factor, ignore_index, z_loss)
                total = sums if total is None else total + sums
                if hidden_grad is not None:
                    torch.mm(gradient, matrix, out=hidden_grad[rows])
                if not want_weight:
                    continue
                if weight_grad is None:  # no zeros to add to: a pass over the head's weight less
                    weight_grad = (gradient.T @ hidden).to(wide)
                elif dtype == wide:
                    weight_grad.addmm_(gradient.T, hidden)
                else:
                    weight_grad += gradient.T @ hidden
        ctx.gradients, ctx.scale = (hidden_grad, weight_grad), scale
        ctx.dtypes = hidden_states.dtype, weight.dtype
        total = total / items
        ctx.mark_non_differentiable(z_term := z_loss * total[1:].sum())
        return total[0].clone(), z_term

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of the loss was made in its forward pass, and has been used already")
        rest = upstream / ctx.scale  # 1 if the loss was multiplied by the announced scale
        # On a GPU asking would be a wait, and the compiler cannot ask.
        known = type(rest) is torch.Tensor and rest.is_cpu and not torch.compiler.is_compiling()
        if not (known and rest == 1):
            for grad in ctx.gradients:
                if grad is not None:
                    grad.mul_(rest)
        gradients = (
            None if grad is None else grad.to(dtype) for grad, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        ctx.gradients = None
        return *gradients, *[None] * 7


def _is_plain(lm_head: Callable[..., Any]) -> TypeGuard[nn.Linear]:
    """Whether the head is nothing but its weight: a layer around it, or a hook that gathers it, wants to be called."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return type(lm_head) is nn.Linear and lm_head.bias is None and not any(getattr(lm_head, name) for name in hooks)


def chunked_losses(
    hidden_states: torch.Tensor,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    chunk_tokens: int = 1024,
    ignore_index: int = IGNORE_INDEX,
    z_loss: float = 0.0,
    loss_scale: torch.Tensor | float | None = None,
    softmax: Callable[..., Any] = softmax_part,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cross entropy of `lm_head(hidden_states)` against `targets`, `chunk_tokens` tokens at a time.

    Args:
        hidden_states: (B, S, D) or (N, D), the base model's output.
        lm_head: maps (n, D) to logits (n, V).
        targets: (B, S) or (N,), already shifted; `ignore_index` is left out.
        num_items_in_batch: divisor of the summed loss; by default the number of targets that count.
        chunk_tokens: tokens a chunk; peak memory is about `chunk_tokens` x V logits in FP32.
        z_loss: coefficient of the mean of log(sum(exp(logits)))^2 over the same tokens (PaLM, 2204.02311, section 5).
        loss_scale: what the caller multiplies the loss by before backward (1 without a scaler). The gradient is then
            made in this pass. It can be used once, and that of the z term is part of the loss's: add the two, or ignore
            the z term. A head that is more than its weight is called as without `loss_scale`.
        softmax: `softmax_part`, or a compiled form of it.

    Returns:
        The loss in FP32 (or FP64 for FP64 logits), a scalar in nats, and the z term, coefficient included, to be
        added to it (None where the coefficient is 0).
    """
    hidden_states, targets = hidden_states.flatten(0, -2), targets.flatten().to(hidden_states.device)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum()
    elif torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(hidden_states.device)
    if loss_scale is not None and torch.is_grad_enabled() and _is_plain(lm_head):
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        scale = torch.as_tensor(loss_scale, dtype=wide, device=hidden_states.device)
        given = (targets, num_items_in_batch, scale, chunk_tokens, ignore_index, z_loss, softmax)
        loss, z_term = _OnePass.apply(hidden_states, lm_head.weight, *given)
        return loss, z_term if z_loss else None

    def chunk_sums(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = lm_head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")
        if not z_loss:
            return loss[None]
        squares = logits.logsumexp(-1).square()
        return torch.stack([loss, torch.where(target != ignore_index, squares, 0.0).sum()])

    total: Any = None
    for hidden, target in zip(hidden_states.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        if torch.is_grad_enabled():
            sums = checkpoint(chunk_sums, hidden, target, use_reentrant=False, preserve_rng_state=False)
        else:
            sums = chunk_sums(hidden, target)
        total = sums if total is None else total + sums
    total = total / num_items_in_batch
    return total[0].clone(), z_loss * total[1] if z_loss else None  # not views, of which FSDP2 warns
