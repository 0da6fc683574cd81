"""Tiny models of many families with random weights, some of them trained a little out of their symmetric start."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM

VOCABULARY, WIDTH, LAYERS = 96, 32, 2
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD = {"head_dim": 8}
_NEOX = {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}
_GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}

FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_COMMON)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_COMMON, **_HEAD, sliding_window=8)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_COMMON, **_HEAD, sliding_window=8)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**_COMMON)),
    "glm4": lambda: Glm4ForCausalLM(Glm4Config(**_COMMON, **_HEAD)),
    "hyperclovax_peri": lambda: HyperCLOVAXForCausalLM(
        HyperCLOVAXConfig(**_COMMON, **_HEAD, use_post_norm=True, residual_multiplier=0.5, embedding_multiplier=3.0)
    ),
    "hyperclovax_pre": lambda: HyperCLOVAXForCausalLM(HyperCLOVAXConfig(**_COMMON, **_HEAD, use_post_norm=False)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_COMMON, **_HEAD)),
    "neox_parallel": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_NEOX, use_parallel_residual=True)),
    "neox_sequential": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_NEOX, use_parallel_residual=False)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2)),
}
PLACEMENTS = ("post", "pre", "peri", "output", "pre_post", "deepnorm", "lns", "mix")


def perturb(model: torch.nn.Module, seed: int = 0, spread: float = 0.2) -> torch.nn.Module:
    """Move every parameter away from its start, gains too, so that no two norms are equal by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(spread * noise if parameter.ndim == 1 else 0.05 * noise)
    return model.eval()


def build(family: str, seed: int = 0, moved: bool = True) -> torch.nn.Module:
    """A model of a family, or of a placement as `peri_llama:PLACEMENT`, in evaluation mode."""
    torch.manual_seed(seed)
    if family.startswith("peri_llama:"):
        config = PeriLlamaConfig(**_COMMON | {"num_hidden_layers": 4}, norm_placement=family.split(":")[1])
        model = PeriLlamaForCausalLM(config)
    else:
        model = FAMILIES[family]()
    return perturb(model, seed) if moved else model.eval()
