"""The two sublayers, `f` of the equation: attention and MLP, each with the norms that are inside it.

Shapes: B batch, S sequence, D hidden size, H query heads, K key/value heads, E head size.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .arguments import one_cache, update_cache
from .attention_fields import SLIDING, layer_types_of
from .configuration_periln import PeriLlamaConfig
from .norms import build_norm
from .placements import LayerPlan
from .rotary import rotation_of


class PeriLlamaAttention(nn.Module):
    """Llama's attention, rotary and grouped-query; queries, keys, values and the heads' outputs may be normed."""

    def __init__(self, config: PeriLlamaConfig, layer_idx: int, plan: LayerPlan):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = cast(int, config.head_dim)
        kv_heads = cast(int, config.num_key_value_heads)
        self.num_key_value_groups = config.num_attention_heads // kv_heads
        self.scaling = float(config.query_pre_attn_scalar or self.head_dim) ** -0.5
        self.sliding_window = config.sliding_window if layer_types_of(config)[layer_idx] == SLIDING else None
        self.rotate = rotation_of(config, layer_idx)
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        q_size, kv_size = config.num_attention_heads * self.head_dim, kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.attention_bias)

        # A norm over all heads sees one group of channels, a norm over each head (or none) as many groups as heads.
        self.widths: dict[str, int] = {}
        for slot, size in (("q_norm", q_size), ("k_norm", kv_size), ("v_norm", kv_size)):
            norm = plan.projections.get(slot)
            self.widths[slot] = size if norm is not None and norm.over == "full" else self.head_dim
            self.add_module(slot, build_norm(config, slot, norm, layer_idx, self.widths[slot]))
        self.inner_norm = build_norm(config, "attn_inner_norm", plan.attn.inner_norm, layer_idx, q_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cache = one_cache(cache, past_key_values, kwargs)
        input_shape = hidden_states.shape[:-1]

        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        query, key = self._normed_heads("q_norm", query), self._normed_heads("k_norm", key)  # B S H|K E
        value = self._normed_heads("v_norm", value)
        query, key = self.rotate(query, *position_embeddings), self.rotate(key, *position_embeddings)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # B H|K S E

        if cache is not None:
            key, value = update_cache(cache, key, value, self.layer_idx, kwargs)

        attention_interface: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        attn_output = self.inner_norm(attn_output.reshape(*input_shape, -1).contiguous())
        return self.o_proj(attn_output), attn_weights

    def _normed_heads(self, slot: str, x: torch.Tensor) -> torch.Tensor:
        """Queries, keys or values (B, S, N E) through the slot's norm, as heads (B, S, N, E)."""
        normed: torch.Tensor = getattr(self, slot)(x.view(*x.shape[:-1], -1, self.widths[slot]))
        return normed.view(*x.shape[:-1], -1, self.head_dim)


class PeriLlamaMLP(nn.Module):
    """Llama's gated MLP (SwiGLU), with a norm before the last projection where the placement has one."""

    def __init__(self, config: PeriLlamaConfig, layer_idx: int, plan: LayerPlan):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        size = config.intermediate_size
        self.inner_norm = build_norm(config, "mlp_inner_norm", plan.mlp.inner_norm, layer_idx, size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gated = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        output: torch.Tensor = self.down_proj(self.inner_norm(gated))
        return output
