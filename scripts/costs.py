"""What a model costs, by formula: parameters and FLOPs.

Letters: L layers, H heads, D hidden size, F FFN width, Q = H x head size, K the same of keys, T sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that `scripts.plan --help` need not import torch
    from modeling_periln import PeriLlamaConfig
    from modeling_periln.placements import LayerPlan

# Dense FP16/BF16 matrix FLOP/s with FP32 accumulation, and memory in GiB: the makers' data sheets.
GPUS: dict[str, tuple[float, float]] = {
    "v100": (125e12, 32),
    "a100": (312e12, 80),
    "h100": (989e12, 80),
    "h200": (989e12, 141),
    "b200": (2250e12, 180),
    "l40s": (362e12, 48),
    "rtx4090": (165e12, 24),
    "mi300x": (1307e12, 192),
}


@dataclass(frozen=True)
class Parameters:
    """Counts of parameters. `matrices` are the linear layers', the head's among them; `layer` is the largest layer."""

    embedding: int
    head: int  # 0 where it is tied
    non_embedding: int
    matrices: int
    layer: int

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.non_embedding


def _layer_parameters(config: PeriLlamaConfig, plan: LayerPlan) -> tuple[int, int]:
    """(in linear layers, in norms) of one layer."""
    d, f, q, k = widths(config)
    linear = 2 * d * q + 2 * d * k + 3 * d * f
    linear += (q + 2 * k + d) * config.attention_bias + (2 * f + d) * config.mlp_bias
    learnable_outputs = plan.output_norm and config.output_norm_learnable
    norms = 2 * d * (plan.input_norm + learnable_outputs + plan.residual_norm)
    norms += {"full": q + k, "head": 2 * config.head_dim}.get(config.qk_norm, 0)
    return linear, norms * vectors_of_a_norm(config)


def vectors_of_a_norm(config: PeriLlamaConfig) -> int:
    """Gamma, and for LayerNorm beta. As many statistics has a token: rms, or mean and deviation."""
    return 2 if config.norm_type == "layernorm" else 1


def widths(config: PeriLlamaConfig) -> tuple[int, int, int, int]:
    """D, F, Q, K."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    return config.hidden_size, config.intermediate_size, heads * config.head_dim, groups * config.head_dim


def count_parameters(config: PeriLlamaConfig) -> Parameters:
    """The model's learnable parameters, without building it."""
    plan, table = config.stream_plan(), config.vocab_size * config.hidden_size
    layers = [_layer_parameters(config, layer) for layer in plan.layers]
    ends = (plan.embedding_norm + plan.final_norm) * config.hidden_size * vectors_of_a_norm(config)
    return Parameters(
        embedding=table,
        head=0 if config.tie_word_embeddings else table,
        non_embedding=sum(map(sum, layers)) + ends,
        matrices=sum(linear for linear, _ in layers) + table,
        layer=max(map(sum, layers)),
    )


def flops_per_token(config: PeriLlamaConfig, sequence_length: int) -> float:
    """FLOPs of forward and backward a token: 6N + 12 L H Q T, as in PaLM (arXiv 2204.02311), appendix B.

    N counts the matrices that a token is multiplied with: all linear layers and the LM head, not the embedding
    table, which is only looked up. Attention is counted over the whole sequence, not its causal half, and what
    activation checkpointing computes twice is counted once: model FLOPs, as MFU wants them.
    """
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * sequence_length
    return 6.0 * count_parameters(config).matrices + 12.0 * attention
