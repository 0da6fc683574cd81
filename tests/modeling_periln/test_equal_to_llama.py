"""Three rows of the table are architectures that Transformers already has: with the same weights they agree.

`pre` is Llama bit for bit (and, with QK-norm over a head, Qwen 3), `output` with full QK-norm is OLMo 2,
`peri` is HyperCLOVA X with `use_post_norm`.
"""

import importlib

import pytest
import torch
from stock_classes import needs
from tiny_models import SIZES, random_ids, shaken_model
from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

ROPE = {"rope_type": "default", "rope_theta": 500_000.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# The names of our norms (`final_norm`, `attn_input_norm`, ...) in the other architectures.
LLAMA_NAMES = {
    "final_norm": "norm",
    "attn_input_norm": "input_layernorm",
    "mlp_input_norm": "post_attention_layernorm",
}
OLMO2_NAMES = {
    "final_norm": "norm",
    "attn_output_norm": "post_attention_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
HYPERCLOVAX_NAMES = {**LLAMA_NAMES, "attn_output_norm": "post_norm1", "mlp_output_norm": "post_norm2"}


def renamed(weights: dict, names: dict) -> dict:
    """The same tensors under the other architecture's names."""
    return {".".join(names.get(part, part) for part in key.split(".")): value for key, value in weights.items()}


def twin(model, architecture, config_class, names, weights=None, **more):
    """A model of another architecture with our model's sizes and weights, every one of them used."""
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shared += ("num_key_value_heads", "head_dim", "max_position_embeddings", "attention_bias", "mlp_bias")
    shared += ("rope_parameters", "rms_norm_eps")
    fields = {name: getattr(model.config, name) for name in shared} | {"pad_token_id": None} | more
    other = architecture(config_class(**fields, attn_implementation=model.config._attn_implementation))
    other.load_state_dict(renamed(weights or model.state_dict(), names), strict=True)
    return other.eval()


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def left_padded(ids: torch.Tensor, padding: int) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return mask


SHAPES = {
    "multi-head": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 5 * 2, "hidden_size": 40},
    "grouped-query, head size not hidden/heads": {},
    "multi-query": {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 4, "hidden_size": 24},
    "one layer": {"num_hidden_layers": 1},
    "odd MLP and vocabulary sizes": {"intermediate_size": 33, "vocab_size": 127},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama 3 rotary scaling": {"rope_parameters": LLAMA3_ROPE},
    "another epsilon": {"norm_eps": 1e-2},
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [1, 7, 33])
@pytest.mark.parametrize("shape", SHAPES)
def test_pre_is_llama_bit_for_bit(shape, length, attention):
    model = shaken_model(norm_placement="pre", attn_implementation=attention, **SHAPES[shape])
    llama = twin(model, LlamaForCausalLM, LlamaConfig, LLAMA_NAMES)
    ids = random_ids(2, length)
    logits = model(ids).logits
    assert logits.std() > 0.1
    assert largest_difference(logits, llama(ids).logits) == 0.0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pre_is_llama_bit_for_bit_with_left_padding(attention):
    model = shaken_model(norm_placement="pre", attn_implementation=attention)
    llama = twin(model, LlamaForCausalLM, LlamaConfig, LLAMA_NAMES)
    ids = random_ids(3, 11)
    mask = left_padded(ids, 4)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    ours, theirs = (m(ids, attention_mask=mask, position_ids=position_ids).logits for m in (model, llama))
    assert ours.isfinite().all()
    assert largest_difference(ours, theirs) == 0.0
    assert largest_difference(ours, model(ids).logits) > 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_pre_are_llamas(shape):
    model = shaken_model(norm_placement="pre", **SHAPES[shape])
    llama = twin(model, LlamaForCausalLM, LlamaConfig, LLAMA_NAMES)
    ids = random_ids(2, 13)
    losses = [m(ids, labels=ids).loss for m in (model, llama)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == losses[1].item()
    ours = renamed({name: p.grad for name, p in model.named_parameters()}, LLAMA_NAMES)
    theirs = {name: p.grad for name, p in llama.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 0, name
        assert largest_difference(ours[name], gradient) <= 1e-6 * gradient.abs().max(), name


def test_generation_of_pre_is_llamas():
    model = shaken_model(norm_placement="pre")
    llama = twin(model, LlamaForCausalLM, LlamaConfig, LLAMA_NAMES)
    ids, more = random_ids(2, 5), {"max_new_tokens": 12, "do_sample": False}
    tokens = model.generate(ids, **more)
    assert tokens.shape == (2, 17)
    assert torch.equal(tokens, llama.generate(ids, **more))


@pytest.mark.parametrize("other", ["post", "peri", "output", "lns"])
def test_no_other_row_is_llama(other):
    """The equality above can fail: another row has other weights, or with the same weights other logits."""
    model = shaken_model(norm_placement=other)
    llama = twin(shaken_model(norm_placement="pre"), LlamaForCausalLM, LlamaConfig, LLAMA_NAMES)
    missing, unexpected = llama.load_state_dict(renamed(model.state_dict(), LLAMA_NAMES), strict=False)
    ids = random_ids(2, 9)
    assert missing or unexpected or largest_difference(model(ids).logits, llama(ids).logits) > 0.01


def test_pre_with_qk_norm_over_a_head_is_qwen_3():
    model = shaken_model(norm_placement="pre", qk_norm="head")
    qwen = twin(model, Qwen3ForCausalLM, Qwen3Config, LLAMA_NAMES)
    ids = random_ids(2, 13)
    assert largest_difference(model(ids).logits, qwen(ids).logits) <= 1e-5


@pytest.mark.parametrize("length", [1, 13])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_output_with_full_qk_norm_is_olmo_2(length, eps):
    needs("olmo2")
    model = shaken_model(norm_placement="output", qk_norm="full", norm_eps=eps)
    olmo = twin(model, Olmo2ForCausalLM, Olmo2Config, OLMO2_NAMES)
    ids = random_ids(2, length)
    logits = model(ids).logits
    assert logits.std() > 0.1
    assert largest_difference(logits, olmo(ids).logits) <= 1e-5


def hyperclovax(model, weights=None):
    needs("hyperclovax")
    module = importlib.import_module("transformers.models.hyperclovax")
    architecture, config_class = module.HyperCLOVAXForCausalLM, module.HyperCLOVAXConfig
    other = twin(model, architecture, config_class, HYPERCLOVAX_NAMES, weights, use_post_norm=True)
    scales = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    assert {name: getattr(other.config, name) for name in scales} == dict.fromkeys(scales, 1.0)
    assert other.config.attention_multiplier == SIZES["head_dim"] ** -0.5
    return other


@pytest.mark.parametrize("length", [1, 13])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_peri_without_embedding_norm_is_hyperclova_x(length, eps):
    model = shaken_model(norm_placement="peri", embedding_norm=False, norm_eps=eps)
    ids = random_ids(2, length)
    logits = model(ids).logits
    assert logits.std() > 0.1
    assert largest_difference(logits, hyperclovax(model)(ids).logits) <= 1e-5


def test_gradients_of_peri_are_hyperclova_xs():
    model = shaken_model(norm_placement="peri", embedding_norm=False)
    other = hyperclovax(model)
    ids = random_ids(2, 13)
    for m in (model, other):
        m(ids, labels=ids).loss.backward()
    ours = renamed({name: p.grad for name, p in model.named_parameters()}, HYPERCLOVAX_NAMES)
    for name, p in other.named_parameters():
        assert largest_difference(ours[name], p.grad) <= 1e-5 * p.grad.abs().max(), name


@torch.no_grad()
def test_embedding_norm_folds_into_the_table():
    """An embedding norm is a function of the token alone: applied to the table once, it is gone."""
    model = shaken_model(norm_placement="peri")
    weights = dict(model.state_dict())
    weights["model.embed_tokens.weight"] = model.model.embed_norm(weights["model.embed_tokens.weight"])
    del weights["model.embed_norm.weight"]
    other = hyperclovax(model, weights)
    ids = random_ids(2, 13)
    logits = model(ids).logits
    assert largest_difference(logits, other(ids).logits) <= 1e-5
    other.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight)
    assert largest_difference(logits, other(ids).logits) > 0.01  # the norm was not idle
