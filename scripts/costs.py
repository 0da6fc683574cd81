"""What a model costs, by formula: parameters and FLOPs.

Letters: L layers, H heads, D hidden size, F FFN width, Q = H x head size, K the same of keys, T sequence length.
"""

from dataclasses import dataclass

from modeling_periln import PeriLlamaConfig
from modeling_periln.norms import PeriLlamaNorm
from modeling_periln.placements import LayerPlan
from modeling_periln.residual import FACTORS
from modeling_periln.slots import Learned, Norm


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
    """(in linear layers, in norms and learned factors) of one layer."""
    d, f, q, k = widths(config)
    linear = 2 * d * q + 2 * d * k + 3 * d * f
    linear += (q + 2 * k + d) * config.attention_bias + (2 * f + d) * config.mlp_bias
    others = 0
    for sublayer, inner in ((plan.attn, q), (plan.mlp, f)):
        others += _norm_parameters(config, sublayer.input_norm, d) + _norm_parameters(config, sublayer.residual_norm, d)
        others += _norm_parameters(config, sublayer.output_norm, d, config.output_norm_learnable)
        others += _norm_parameters(config, sublayer.inner_norm, inner)
        others += sum(FACTORS[x.learned](d) for x in (sublayer.alpha, sublayer.s) if isinstance(x, Learned))
    for slot, norm in plan.projections.items():
        full = q if slot == "q_norm" else k
        others += _norm_parameters(config, norm, full if norm.over == "full" else config.head_dim)
    return linear, others


def _norm_parameters(config: PeriLlamaConfig, norm: Norm | None, size: int, learnable: bool = True) -> int:
    """The learnable parameters of one norm: its gain, its bias, and what else DyT and Derf learn."""
    if norm is None:
        return 0
    kind, gain = norm.kind or config.norm_type, norm.gain or config.norm_gain
    gains = {"channel": size, "centered": size, "scalar": 1, "head": config.num_attention_heads, "none": 0}[gain]
    biases = size if kind in PeriLlamaNorm.BIASED and gain in ("channel", "centered") else 0
    return (gains + biases) * learnable + {"dyt": 1, "derf": 2}.get(kind, 0)


def vectors_of_a_norm(config: PeriLlamaConfig) -> int:
    """How many statistics of a token a norm keeps: its rms, or mean and deviation."""
    return 2 if config.norm_type == "layernorm" else 1


def widths(config: PeriLlamaConfig) -> tuple[int, int, int, int]:
    """D, F, Q, K."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    return config.hidden_size, config.intermediate_size, heads * config.head_dim, groups * config.head_dim


def count_parameters(config: PeriLlamaConfig) -> Parameters:
    """The model's learnable parameters, without building it."""
    plan, table = config.stream_plan(), config.vocab_size * config.hidden_size
    layers = [_layer_parameters(config, layer) for layer in plan.layers]
    ends = sum(_norm_parameters(config, norm, config.hidden_size) for norm in (plan.embedding_norm, plan.final_norm))
    return Parameters(
        embedding=table,
        head=0 if config.tie_word_embeddings else table,
        non_embedding=sum(map(sum, layers)) + ends,
        matrices=sum(linear for linear, _ in layers) + table,
        layer=max(map(sum, layers)),
    )


def hidden_entries(config: PeriLlamaConfig) -> int:
    """The entries of all matrices inside the layers, without their biases."""
    d, f, q, k = widths(config)
    return config.num_hidden_layers * (2 * d * q + 2 * d * k + 3 * d * f)


def flops_per_token(config: PeriLlamaConfig, sequence_length: int) -> float:
    """FLOPs of forward and backward a token: 6N + 12 L H Q T, as in PaLM (arXiv 2204.02311), appendix B.

    N counts the matrices that a token is multiplied with: all linear layers and the LM head, not the embedding
    table, which is only looked up. Attention is counted over the whole sequence, not its causal half, and what
    activation checkpointing computes twice is counted once: model FLOPs, as MFU wants them.
    """
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * sequence_length
    return 6.0 * count_parameters(config).matrices + 12.0 * attention
