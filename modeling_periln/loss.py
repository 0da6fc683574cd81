"""Cross entropy that never holds the logits of the whole batch, and is safe under loss scaling.

The logits of one chunk of tokens are computed, turned into a loss and thrown away; backward computes them
again (activation checkpointing). Kernels that form d(logits) already in the forward pass do so before the
loss scale is applied, and in FP16 most of the gradient then underflows; recomputation has no such problem.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100


def shift_labels(labels: torch.Tensor, ignore_index: int = IGNORE_INDEX) -> torch.Tensor:
    """Labels (B, S) moved one place to the left, so that position t holds the token that t predicts."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()


def chunked_losses(
    hidden_states: torch.Tensor,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    chunk_tokens: int = 1024,
    ignore_index: int = IGNORE_INDEX,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cross entropy of `lm_head(hidden_states)` against `targets`, `chunk_tokens` tokens at a time.

    Args:
        hidden_states: (B, S, D) or (N, D), the base model's output.
        lm_head: maps (n, D) to logits (n, V).
        targets: (B, S) or (N,), already shifted; `ignore_index` is left out.
        num_items_in_batch: divisor of the summed loss; by default the number of targets that count.
        chunk_tokens: tokens a chunk; peak memory is about `chunk_tokens` x V logits in FP32.
        z_loss: coefficient of the mean of log(sum(exp(logits)))^2 over the same tokens (PaLM, 2204.02311, section 5).

    Returns:
        The loss in FP32 (or FP64 for FP64 logits), a scalar in nats, and the z term, coefficient included, to be
        added to it (None where the coefficient is 0).
    """
    hidden_states, targets = hidden_states.flatten(0, -2), targets.flatten().to(hidden_states.device)

    def chunk_sums(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = lm_head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")
        if not z_loss:
            return loss[None]
        squares = logits.logsumexp(-1).square()
        return torch.stack([loss, torch.where(target != ignore_index, squares, 0.0).sum()])

    total = None
    for hidden, target in zip(hidden_states.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        if torch.is_grad_enabled():
            sums = checkpoint(chunk_sums, hidden, target, use_reentrant=False, preserve_rng_state=False)
        else:
            sums = chunk_sums(hidden, target)
        total = sums if total is None else total + sums
    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum()
    elif torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device)
    total = total / num_items_in_batch
    return total[0].clone(), z_loss * total[1] if z_loss else None  # no view: FSDP2 warns of outputs that are views
