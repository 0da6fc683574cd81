"""What the causal LM returns: which positions get logits, and the losses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from .loss import IGNORE_INDEX, chunked_losses, shift_labels


@dataclass
class PeriLlamaCausalLMOutput(CausalLMOutputWithPast):
    """As for every causal LM; with a z term, `loss` is the sum of `cross_entropy` and `z_loss`."""

    z_loss: torch.Tensor | None = None
    cross_entropy: torch.Tensor | None = None


def positions_with_logits(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions (B, S, D) that get logits: the last n, a 1-D index or a 2-D index or mask (flattened)."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return hidden_states.gather(1, logits_to_keep[..., None].expand(-1, -1, hidden_states.shape[-1]))


def losses_without_logits(
    hidden_states: torch.Tensor,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    labels: torch.Tensor | None,
    given: Mapping[str, Any],
    z_loss: float,
    loss_scale: torch.Tensor | float | None,
    softmax: Callable[..., Any],
) -> dict[str, Any]:
    """Fields of the output for `skip_logits=True`: the loss, made chunk by chunk, and its two parts with a z term.

    `given` are the forward pass's other arguments: `shift_labels`, `ignore_index` and `num_items_in_batch` are read.

    Raises:
        ValueError: there are no labels.
    """
    targets, ignored = given.get("shift_labels"), given.get("ignore_index", IGNORE_INDEX)
    if targets is None:
        if labels is None:
            raise ValueError("skip_logits=True needs labels: without them there is nothing to return")
        targets = shift_labels(labels, ignored)
    more: dict[str, Any] = {"z_loss": z_loss, "loss_scale": loss_scale, "softmax": softmax}
    items = given.get("num_items_in_batch")
    loss, z_term = chunked_losses(hidden_states, lm_head, targets, items, ignore_index=ignored, **more)
    if z_term is None:
        return {"loss": loss}
    return {"loss": loss + z_term, "z_loss": z_term, "cross_entropy": loss}


def refuse_chunked_options(z_loss: float, loss_scale: torch.Tensor | float | None) -> None:
    """The options that only the chunked loss has, in a pass that returns logits. Raises ValueError for either."""
    for name, value in (("z_loss", z_loss or None), ("loss_scale", loss_scale)):
        if value is not None:
            raise ValueError(f"{name}={value} is part of the chunked loss: give skip_logits=True as well")
