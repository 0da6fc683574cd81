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
