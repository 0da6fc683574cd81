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
