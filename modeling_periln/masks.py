"""The attention masks of a forward pass: one for each type of layer, made by Transformers' own functions."""

from collections.abc import Iterable
from typing import Any

import torch
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .attention_fields import FULL, SLIDING

MASKS = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}


def masks_by_type(layer_types: Iterable[str], attention_mask: Any, **how: Any) -> dict[str, Any]:
    """The mask of each type of layer, from a mask (B, S) or (B, 1, S, S) or none; `how` is for Transformers' functions.

    generate() with a compiled cache makes the masks itself, by type where the configuration has types; they pass.
    """
    if isinstance(attention_mask, dict):
        return attention_mask
    return {kind: MASKS[kind](attention_mask=attention_mask, **how) for kind in layer_types}


def positions_of_packed(cu_seq_lens: torch.Tensor, length: int) -> torch.Tensor:
    """Position ids (1, S) that restart at every document, from the documents' starts and the end (documents + 1,)."""
    starts = cu_seq_lens.long()
    index = torch.arange(length, device=starts.device)
    document = torch.searchsorted(starts, index, right=True) - 1
    return (index - starts[document]).unsqueeze(0)


def positions_of(
    inputs_embeds: torch.Tensor,
    position_ids: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
    attention_mask: Any,
    cache: Any,
    use_cache: bool | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Position ids (1, S) or (B, S), and those that masks are made from: None where nobody gave any.

    Flash attention alone reads `cu_seq_lens_*`; the masks of the others are made from positions that restart.

    Raises:
        ValueError: `cu_seq_lens` without `position_ids`, for more than one row or with a cache or a mask.
    """
    mask_positions = position_ids  # given: they may restart, which the mask must know
    if cu_seq_lens is not None:
        if not use_cache and cache is None and attention_mask is None and inputs_embeds.shape[0] == 1:
            mask_positions = positions_of_packed(cu_seq_lens.to(inputs_embeds.device), inputs_embeds.shape[1])
            position_ids = mask_positions if position_ids is None else position_ids
        elif position_ids is None:
            raise ValueError(
                "cu_seq_lens_q packs documents into one row: it needs a batch of 1, use_cache=False and no "
                "attention_mask, or position_ids of your own"
            )
    if position_ids is None:
        offset = cache.get_seq_length() if cache is not None else 0
        position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0) + offset
    return position_ids, mask_positions
