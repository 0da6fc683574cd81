"""Tiny models of many families with random weights, some of them trained a little out of their symmetric start."""

import copy

import torch
from transformers import (
    Exaone4Config,
    Exaone4ForCausalLM,
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
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
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
_TYPES = ["sliding_attention", "full_attention"]
# Placements with every field of attention, as `peri_llama:fields` and `peri_llama:fields_tied`.
_FIELDS = {
    "norm_placement": "sandwich",
    "norm_gain": "centered",
    "qk_norm": "head",
    "sliding_window": 4,
    "layer_types": _TYPES * 2,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "partial_rotary_factor": 0.5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    },
    "no_rope_layers": [1, 1, 1, 0],
    "query_pre_attn_scalar": 9,
    "embedding_multiplier": 3.0,
}
_OURS = {"fields": _FIELDS, "fields_tied": _FIELDS | {"tie_word_embeddings": True, "norm_gain": "channel"}}
_OURS |= {kind: {"norm_placement": "peri", "norm_type": kind} for kind in ("dyt", "derf")}
_OURS["scalar"] = {"norm_placement": "peri", "norm_gain": "scalar"}
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
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_COMMON, **_HEAD, sliding_window=4)),
    "olmo3": lambda: Olmo3ForCausalLM(Olmo3Config(**_COMMON, sliding_window=4, layer_types=_TYPES)),
    "exaone4": lambda: Exaone4ForCausalLM(Exaone4Config(**_COMMON, sliding_window=4, layer_types=_TYPES)),
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
        name = family.split(":")[1]
        fields = copy.deepcopy(_OURS.get(name, {"norm_placement": name}))
        config = PeriLlamaConfig(**_COMMON | {"num_hidden_layers": 4} | fields)
        model = PeriLlamaForCausalLM(config)
    else:
        model = FAMILIES[family]()
    return perturb(model, seed) if moved else model.eval()
