"""Rotary position embedding (RoFormer, arXiv 2104.09864), with the signs in the table of sines.

Transformers' Llama turns the halves of a head, x = [x1, x2], by x * cos + [-x2, x1] * sin. [-x2, x1] is x rolled by
half its size except for the sign of x2, which goes into the sines, once for all layers. The result is the same to the
last bit, forward and backward, in 0.6 of the time on a CPU: one copy instead of two slices, a negation and their
gradients.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .attention_fields import has_rope, is_rope_by_type, layer_types_of, rope_of, rotary_dims

Tables = tuple[torch.Tensor, torch.Tensor]


class PeriLlamaRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's, whose frequencies stay in FP32: `model.to(torch.bfloat16)` would turn late positions by radians."""

    @staticmethod
    def compute_default_rope_parameters(config: Any, device: Any = None, **kwargs: Any) -> tuple[torch.Tensor, float]:
        """Inverse frequencies (R / 2,) for the R dimensions that are rotated, and a factor of 1 for the tables."""
        dims = rotary_dims(config.head_dim, config.rope_parameters)
        base = config.rope_parameters["rope_theta"]
        return (1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float) / dims))).to(device), 1.0

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Tables:
        """The tables for `rotate` at positions (B, S), in the dtype of x: cos and the signed sin, each (B, S, 1, R)."""
        cos, sin = super().forward(x, position_ids)
        sin[..., : sin.shape[-1] // 2].neg_()  # a tensor of this call alone
        return cos.unsqueeze(2), sin.unsqueeze(2)

    def by_type(
        self, layer_types: Iterable[str], x: torch.Tensor, position_ids: torch.Tensor | None
    ) -> dict[str, Tables]:
        """The tables for each type of layer: the same."""
        return dict.fromkeys(layer_types, self(x, position_ids=position_ids))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self


class PeriLlamaRotaryEmbeddings(nn.ModuleDict):
    """A rotary embedding for each type of layer."""

    def __init__(self, config: Any):
        super().__init__()
        for kind in sorted(set(layer_types_of(config))):
            one = copy.copy(config)  # the configuration as a model with this rope alone would have it
            one.__dict__ = {key: value for key, value in vars(config).items() if key != "layer_types"}
            one.__dict__["rope_parameters"] = rope_of(config, kind)
            self[kind] = PeriLlamaRotaryEmbedding(config=one)

    def __getattr__(self, name: str) -> Any:
        """`LAYERTYPE_inv_freq`, as Transformers' own embeddings of several types call them, besides a module's own."""
        kind = name.removesuffix("_inv_freq")
        return self[kind].inv_freq if kind != name and kind in self else super().__getattr__(name)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor | None = None, layer_type: str = "") -> Tables:
        """The tables of one type of layer; see `PeriLlamaRotaryEmbedding`. Raises KeyError for another type."""
        tables: Tables = self[layer_type](x, position_ids=position_ids)
        return tables

    def by_type(
        self, layer_types: Iterable[str], x: torch.Tensor, position_ids: torch.Tensor | None
    ) -> dict[str, Tables]:
        """The tables for each type of layer: its own."""
        return {kind: self[kind](x, position_ids=position_ids) for kind in layer_types}


def build_rotary(config: Any) -> PeriLlamaRotaryEmbedding | PeriLlamaRotaryEmbeddings:
    """One rotary embedding for all layers, or one for each type of layer where `rope_parameters` has several."""
    several = is_rope_by_type(config.rope_parameters)
    return PeriLlamaRotaryEmbeddings(config) if several else PeriLlamaRotaryEmbedding(config=config)


# What a layer does to its queries and keys


def rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Heads (B, S, H, E), each turned by its position's angles."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * signed_sin


def rotate_first(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Heads (B, S, H, E) whose first R dimensions are turned, R the tables' size; the others pass."""
    dims = cos.shape[-1]
    return torch.cat((rotate(x[..., :dims], cos, signed_sin), x[..., dims:]), dim=-1)


def leave(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Heads (B, S, H, E) as they are, in a layer without rope."""
    return x


def rotation_of(config: Any, layer_idx: int) -> Callable[..., torch.Tensor]:
    """`rotate`, `rotate_first` or `leave`, as layer `layer_idx` needs it."""
    if not has_rope(config, layer_idx):
        return leave
    rope = rope_of(config, layer_types_of(config)[layer_idx])
    return rotate if rotary_dims(config.head_dim, rope) == config.head_dim else rotate_first
