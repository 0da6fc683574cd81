"""Models and configurations small enough that a test costs milliseconds."""

import torch
from torch import nn

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM

# Grouped-query attention, and a head size that is not hidden_size / heads.
SIZES = {
    "vocab_size": 61,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
}
# Where each placement has its norms A (sublayer's input), B (its output), C (the stream after the add).
NORMS_OF = {
    "post": "C",
    "pre": "A",
    "peri": "AB",
    "output": "B",
    "pre_post": "AC",
    "deepnorm": "C",
    "lns": "A",
}

# Attention and MLP apart, several kinds and gains, learned factors; and norms inside, which need the whole width.
OWN = {
    "attn": {"input_norm": {"kind": "dyt"}, "output_norm": {"gain": "scalar"}, "alpha": {"learned": "channel"}},
    "mlp": {"residual_norm": {"kind": "layernorm", "eps": 0.1}, "s": {"learned": "scalar", "init": 0.5}},
    "q_norm": {"over": "head", "kind": "l2"},
    "k_norm": {"over": "head", "gain": "centered"},
    "v_norm": {"over": "head", "kind": "derf"},
}
INSIDE = {"attn_inner_norm": {"gain": "head"}, "mlp_inner_norm": {"kind": "dyt", "gain": "centered"}}
SLIDING = {
    "norm_placement": "sandwich",
    "norm_gain": "centered",
    "qk_norm": "head",
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e4},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    },
    "no_rope_layers": [1, 1, 0],
    "embedding_multiplier": 2.5,
    "tie_word_embeddings": True,
}


def tiny_config(**changes) -> PeriLlamaConfig:
    return PeriLlamaConfig(**{**SIZES, **changes})


def tiny_model(seed: int = 0, **changes) -> PeriLlamaForCausalLM:
    """A model in evaluation mode, as it is initialized."""
    torch.manual_seed(seed)
    return PeriLlamaForCausalLM(tiny_config(**changes)).eval()


@torch.no_grad()
def shaken(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model with every parameter far from its initial value, norms and biases included.

    With gammas of 1 and branches of size 0.02 a forgotten or exchanged norm would hide below a tolerance.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        if weight.ndim == 2:
            noise *= 1.0 if "embed_tokens" in name else weight.shape[1] ** -0.5
        elif name.endswith("norm.weight"):
            noise = 1 + 0.3 * noise
        else:
            noise *= 0.2
        weight.copy_(noise)
    return model


def shaken_model(seed: int = 0, **changes) -> PeriLlamaForCausalLM:
    return shaken(tiny_model(seed, **changes), seed + 1)


def random_ids(batch: int = 2, length: int = 7, vocab: int = SIZES["vocab_size"], seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
