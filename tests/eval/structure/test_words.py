"""What the bench says of a model's norms, for the model types of Transformers and for placements of ours."""

import pytest
import torch
from stability_families import build, perturb
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from periln.eval.structure.anatomy import find_anatomy
from periln.eval.structure.words import describe
from periln.runkit.errors import UserError

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 8,
}
# Some configurations refuse what others need.
FEWER = {"head_dim"}, {"head_dim", "num_key_value_heads", "intermediate_size"}
PLAIN = ("llama", "mistral", "ministral", "qwen2", "glm", "granite", "phi3", "smollm3", "helium", "seed_oss", "arcee")
PLAIN += ("ernie4_5", "mixtral", "granitemoe", "glm4_moe", "ernie4_5_moe", "gpt_oss", "cwm", "solar_open")
GEMMA = "centered gains, {}no embedding norm, embedding times 5.657"  # sqrt(32)
TYPES = dict.fromkeys(PLAIN, "pre") | {
    "qwen3": "pre, QK-norm by head",
    "qwen3_moe": "pre, QK-norm by head",
    "apertus": "pre, QK-norm by head",
    "hunyuan_v1_dense": "pre, QK-norm by head",
    "lfm2": "pre, QK-norm by head",
    "olmoe": "pre, QK-norm over all heads",
    "olmo": "pre, norms of another kind",  # a LayerNorm that states no epsilon
    "olmo2": "output, QK-norm over all heads",
    "olmo3": "output, QK-norm over all heads",
    "flex_olmo": "output, QK-norm over all heads",
    "exaone4": "output, QK-norm by head",
    "gemma": "pre, centered gains, embedding times 5.657",
    "vaultgemma": "pre, centered gains, embedding times 5.657",
    "recurrent_gemma": "pre, centered gains, embedding times 5.656",  # its factor is a bfloat16
    "gemma2": "peri, " + GEMMA.format(""),
    "gemma3_text": "peri, " + GEMMA.format("QK-norm by head, "),
    "glm4": "peri, no embedding norm",
    "hyperclovax": "peri, no embedding norm",
    "afmoe": "peri, QK-norm by head, no embedding norm",
    "nanochat": "pre, no gains, QK-norm by head, embedding norm",
    "bitnet": "pre, a norm inside attention (attn_sub_norm), a norm inside the MLP (ffn_sub_norm)",
    "diffllama": "pre, a norm inside attention (groupnorm)",
    "nemotron": "pre, LayerNorm, centered gains",
    "persimmon": "pre, LayerNorm, QK-norm by head",
    "openai-gpt": "post, LayerNorm",
    **dict.fromkeys(("stablelm", "starcoder2", "gpt2", "gpt_bigcode", "jais2", "phimoe", "ctrl"), "pre, LayerNorm"),
    **dict.fromkeys(("cohere", "cohere2", "phi", "gpt_neox", "falcon"), "pre, parallel layers, LayerNorm"),
}
NO_STREAM = {
    "doge": "another factor for each channel",
    "mpt": "its output is not the stream after attention plus what its MLP gives",
    "bloom": "what its MLP reads is not its input plus what attention gives",
    "minimax": "what its MLP reads is not its input plus what attention gives",
    **dict.fromkeys(("opt", "xglm", "biogpt"), "does not have two modules that write to the stream"),
}


def model_of(kind: str) -> torch.nn.Module:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this Transformers has no model type {kind}")
    for left_out in (set(), *FEWER):
        try:
            torch.manual_seed(0)
            config = CONFIG_MAPPING[kind](**{key: value for key, value in SIZES.items() if key not in left_out})
            return perturb(AutoModelForCausalLM.from_config(config))
        except (AttributeError, TypeError, ValueError):
            if left_out == FEWER[-1]:
                raise
    raise AssertionError


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_a_model_type_is_described(kind):
    assert describe(find_anatomy(model_of(kind))) == TYPES[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", NO_STREAM)
def test_a_model_type_without_one_plain_stream_is_refused_with_the_reason(kind):
    with pytest.raises(UserError, match=NO_STREAM[kind]):
        find_anatomy(model_of(kind))


SANDWICH = {"norm_placement": "sandwich", "norm_gain": "centered", "qk_norm": "head"}
OURS = {
    "peri": ({}, "peri"),
    "post": ({"norm_placement": "post"}, "post"),
    "peri without embedding norm": ({"embedding_norm": False}, "peri, no embedding norm"),
    "deepnorm": ({"norm_placement": "deepnorm"}, "post, alpha 1.682"),
    "lns": ({"norm_placement": "lns"}, "pre, c 0.5 to 1"),
    "mix": ({"norm_placement": "mix"}, "post in 1 of 4 layers, pre in 3 of 4 layers"),
    "a window and two ropes": (
        SANDWICH
        | {
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
            "embedding_multiplier": 3.0,
        },
        "peri, centered gains, QK-norm by head, no embedding norm, embedding times 3",
    ),
    "partial and absent ropes": (
        {"no_rope_layers": [1, 0, 1, 0], "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "peri",
    ),
    "values and inner norms": (
        {"norm_placement": {"input_norm": True, "final_norm": True, "v_norm": "head", "mlp_inner_norm": True}},
        "pre, norm on values by head, a norm inside the MLP (inner_norm)",
    ),
    "attention and MLP apart": (
        {"norm_placement": "hybrid"},
        "attention post and MLP no norms, QK-norm by head, norm on values by head",
    ),
    "DyT": ({"norm_type": "dyt"}, "peri, DyT"),
    "Derf in one slot": (
        {"norm_placement": {"input_norm": {"kind": "derf"}, "final_norm": {"gain": "centered"}}},
        "pre, Derf, centered gains",
    ),
    "L2 with one gain": ({"norm_type": "l2", "norm_gain": "scalar"}, "peri, L2 norms, one gain for all channels"),
    "LayerNorm without gains": ({"norm_type": "layernorm", "norm_gain": "none"}, "peri, LayerNorm, no gains"),
    "LayerNorm with one gain": (
        {"norm_type": "layernorm", "norm_gain": "scalar"},
        "peri, LayerNorm, one gain for all channels",
    ),
    "keel": ({"norm_placement": "keel"}, "pre_post, alpha 8"),
    "no final norm": ({"norm_placement": "pre", "final_norm": False}, "pre, no final norm"),
}


@pytest.mark.parametrize("case", OURS)
def test_a_placement_of_ours_is_described(case):
    fields, expected = OURS[case]
    torch.manual_seed(0)
    model = perturb(PeriLlamaForCausalLM(PeriLlamaConfig(**{**SIZES, **fields})))
    assert describe(find_anatomy(model)) == expected


def test_a_learned_factor_for_each_channel_is_refused_by_what_it_is():
    model = build("peri_llama:learned_residual")
    with pytest.raises(UserError, match="another factor for each channel .a learned vector"):
        find_anatomy(model)


def test_several_streams_at_once_are_refused_by_what_they_are():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.mlp = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)

        def forward(self, hidden_states, **kwargs):
            return hidden_states

    model = build("llama")
    model.model.layers = torch.nn.ModuleList([Layer(), Layer()])
    layer = model.model.layers[0]
    layer.forward = lambda x, **kwargs: x[:, :, None].expand(-1, -1, 4, -1)
    model.model.layers[1].forward = lambda x, **kwargs: x
    model.model.norm = torch.nn.Identity()
    model.lm_head.forward = lambda x: x
    with pytest.raises(UserError, match="carries 4 residual streams at once, as hyper-connections do"):
        find_anatomy(model)
