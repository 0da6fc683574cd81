"""What a model has and how it begins: modules and state dict, initial values, and what a damaged checkpoint gets."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import NORMS_OF, SIZES, random_ids, shaken_model, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from modeling_periln import PeriLlamaForCausalLM

PLACES = {"A": "input", "B": "output", "C": "residual"}
# Large enough that a standard deviation is known to a few percent.
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
}


def norm_names(placement: str, layers: int = 3) -> set[str]:
    """The norms that a model of this placement has, by position."""
    rows = ["post", *["pre"] * (layers - 1)] if placement == "mix" else [placement] * layers
    names = {
        f"model.layers.{i}.{part}_{PLACES[letter]}_norm"
        for i, row in enumerate(rows)
        for part in ("attn", "mlp")
        for letter in NORMS_OF[row]
    }
    if placement == "peri":
        names.add("model.embed_norm")
    if placement not in ("post", "pre_post", "deepnorm"):
        names.add("model.final_norm")
    return names


# Names


@pytest.mark.parametrize("placement", [*NORMS_OF, "mix"])
@pytest.mark.parametrize(("norm_type", "parts"), [("rmsnorm", ["weight"]), ("layernorm", ["weight", "bias"])])
def test_norms_are_named_by_position_and_an_empty_slot_has_no_weights(placement, norm_type, parts):
    state = tiny_model(norm_placement=placement, norm_type=norm_type).state_dict()
    expected = {f"{name}.{part}" for name in norm_names(placement) for part in parts}
    assert {key for key in state if "norm" in key} == expected


@pytest.mark.parametrize("placement", ["post", "pre", "peri"])
def test_an_empty_slot_is_an_identity(placement):
    present = norm_names(placement)
    slots = [f"{part}_{place}_norm" for part in ("attn", "mlp") for place in PLACES.values()]
    model = tiny_model(norm_placement=placement)
    for i in range(3):
        for slot in slots:
            name = f"model.layers.{i}.{slot}"
            assert isinstance(model.get_submodule(name), nn.Identity) is (name not in present)


@pytest.mark.parametrize(("qk_norm", "sizes"), [("full", (24, 12)), ("head", (6, 6)), (None, None)])
def test_qk_norm_has_the_size_of_all_heads_or_of_one(qk_norm, sizes):
    state = tiny_model(qk_norm=qk_norm).state_dict()
    names = [f"model.layers.{i}.self_attn.{x}_norm.weight" for i in range(3) for x in "qk"]
    found = {key: tuple(state[key].shape) for key in state if "self_attn" in key and "norm" in key}
    assert found == ({name: (sizes[i % 2],) for i, name in enumerate(names)} if sizes else {})


# Initial values


@pytest.mark.parametrize("seed", [0, 3])
def test_placements_begin_from_bitwise_the_same_weights(seed):
    """A comparison of placements starts from one point: norms draw no random numbers."""
    states = {name: tiny_model(seed, norm_placement=name).state_dict() for name in [*NORMS_OF, "mix"]}
    del states["deepnorm"]  # its gain is the next test
    shared = {key for key in states["pre"] if "norm" not in key}
    assert len(shared) == 2 + 7 * 3
    for state in states.values():
        assert {key for key in state if "norm" not in key} == shared
        assert all(torch.equal(state[key], states["peri"][key]) for key in shared)
    assert not torch.equal(states["pre"]["lm_head.weight"], tiny_model(seed + 1).lm_head.weight)


@pytest.mark.parametrize("norm_type", ["rmsnorm", "layernorm"])
def test_norms_begin_as_plain_normalizations(norm_type):
    state = tiny_model(norm_type=norm_type, qk_norm="head").state_dict()
    values = {key: tensor for key, tensor in state.items() if "norm" in key}
    assert values
    for key, tensor in values.items():
        assert torch.equal(tensor, torch.ones_like(tensor) if key.endswith("weight") else torch.zeros_like(tensor))


def test_deepnorm_begins_as_post_times_its_gain():
    """(8L)^(-1/4) on v, o and the three matrices of the MLP: exactly 1/2 for L = 2. Not on q and k."""
    deepnorm, post = (tiny_model(norm_placement=x, num_hidden_layers=2).state_dict() for x in ("deepnorm", "post"))
    for key, weight in post.items():
        scaled = any(f"{name}_proj" in key for name in ("v", "o", "gate", "up", "down"))
        if "norm" not in key:
            assert torch.equal(deepnorm[key], weight * (0.5 if scaled else 1.0)), key


STD = {
    # placement, depth_scaled_init: q, k; v, gate, up; o, down (initializer_range 0.02, L = 2)
    ("peri", False): (0.02, 0.02, 0.02),
    ("peri", True): (0.02, 0.02, 0.01),
    ("deepnorm", False): (0.02, 0.01, 0.01),
    ("deepnorm", True): (0.02, 0.01, 0.005),
}
GROUPS = [("q_proj", "k_proj"), ("v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")]


@pytest.mark.parametrize(("placement", "depth_scaled"), STD)
def test_spread_of_initial_weights_as_measured(placement, depth_scaled):
    torch.manual_seed(0)
    config = tiny_config(norm_placement=placement, depth_scaled_init=depth_scaled, **WIDE)
    model = AutoModelForCausalLM.from_config(config)
    weights = dict(model.named_parameters())
    for names, std in zip(GROUPS, STD[placement, depth_scaled], strict=True):
        for key in (k for k in weights if any(f".{name}." in k for name in names)):
            assert weights[key].std().item() == pytest.approx(std, rel=0.05), key
            assert abs(weights[key].mean().item()) < 0.1 * std, key
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        assert weights[key].std().item() == pytest.approx(0.02, rel=0.05)


def test_padding_token_has_an_embedding_like_any_other():
    """With pad = eos a padding_idx would keep the row of the document separator at zero."""
    model = tiny_model(pad_token_id=3, eos_token_id=3)
    assert model.model.embed_tokens.weight[3].abs().max() > 0
    ids = torch.full((1, 4), 3)
    model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad[3].abs().max() > 0


def test_biases_begin_at_zero():
    state = tiny_model(attention_bias=True, mlp_bias=True).state_dict()
    biases = [tensor for key, tensor in state.items() if key.endswith("bias")]
    assert len(biases) == 7 * 3
    assert not any(tensor.any() for tensor in biases)


# A checkpoint with weights missing


def reloaded_without(model: PeriLlamaForCausalLM, folder: Path, *missing: str) -> dict[str, torch.Tensor]:
    """The state dict after some weights were deleted from the saved file."""
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for key in missing:
        del weights[key]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(5)
    return PeriLlamaForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize(("placement", "depth_scaled"), STD)
def test_a_missing_weight_is_initialized_with_its_own_spread_and_the_others_are_kept(placement, depth_scaled, tmp_path):
    model = tiny_model(norm_placement=placement, depth_scaled_init=depth_scaled, **WIDE)
    missing = [f"model.layers.1.{name}.weight" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]
    before, after = model.state_dict(), reloaded_without(model, tmp_path, *missing)
    for key, std in zip(missing, STD[placement, depth_scaled], strict=True):
        assert after[key].std().item() == pytest.approx(std, rel=0.05), key
        assert not torch.equal(after[key], before[key])
    assert all(torch.equal(after[key], before[key]) for key in before if key not in missing)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({}, "model.embed_norm.weight"),
        ({}, "model.final_norm.weight"),
        ({}, "model.layers.2.mlp_output_norm.weight"),
        ({"norm_placement": "post"}, "model.layers.0.attn_residual_norm.weight"),
        ({"norm_placement": "pre"}, "model.layers.1.mlp_input_norm.weight"),
        ({"qk_norm": "full"}, "model.layers.1.self_attn.k_norm.weight"),
        ({"norm_type": "layernorm"}, "model.layers.1.attn_input_norm.weight"),
        ({"norm_type": "layernorm"}, "model.layers.1.attn_input_norm.bias"),
        ({"output_norm_learnable": False}, "model.layers.1.attn_output_norm.weight"),
        ({"output_norm_learnable": False, "norm_type": "layernorm"}, "model.layers.1.attn_output_norm.bias"),
    ],
)
def test_a_missing_norm_is_a_plain_normalization_after_reload(changes, key, tmp_path):
    model = shaken_model(**changes)
    after = reloaded_without(model, tmp_path, key)
    expected = 1.0 if key.endswith("weight") else 0.0
    assert torch.equal(after[key], torch.full_like(after[key], expected))
    assert all(torch.equal(after[k], v) for k, v in model.state_dict().items() if k != key)


@pytest.mark.parametrize("placement", [*NORMS_OF, "mix"])
def test_a_saved_model_is_the_same_model(placement, tmp_path):
    model = shaken_model(norm_placement=placement)
    model.save_pretrained(tmp_path)
    loaded = PeriLlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    assert loaded.state_dict().keys() == model.state_dict().keys()
    ids = random_ids()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_frequencies_survive_a_reload_in_fp32(dtype, tmp_path):
    """They are in no file: a loader that forgets them leaves whatever was in memory."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = PeriLlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.lm_head.weight.dtype == dtype
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(loaded.model.rotary_emb.inv_freq, 500_000.0 ** -(torch.arange(0, 6, 2) / 6))


# Frozen gamma (section 4.4.1 of the paper)


@pytest.mark.parametrize("norm_type", ["rmsnorm", "layernorm"])
def test_frozen_gamma_is_not_a_parameter(norm_type):
    frozen = tiny_model(output_norm_learnable=False, norm_type=norm_type)
    free = tiny_model(norm_type=norm_type)
    gone = free.state_dict().keys() - dict(frozen.named_parameters()).keys()
    parts = ["weight"] if norm_type == "rmsnorm" else ["weight", "bias"]
    outputs = {f"model.layers.{i}.{x}_output_norm.{p}" for i in range(3) for x in ("attn", "mlp") for p in parts}
    assert gone == outputs
    assert frozen.state_dict().keys() == free.state_dict().keys()
    assert torch.equal(frozen(random_ids()).logits, free(random_ids()).logits)


def test_frozen_gamma_stays_at_one_while_the_others_move():
    model = tiny_model(output_norm_learnable=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(random_ids(), labels=random_ids()).loss.backward()
    optimizer.step()
    layer = model.model.layers[0]
    assert torch.equal(layer.attn_output_norm.weight, torch.ones(SIZES["hidden_size"]))
    assert not torch.equal(layer.attn_input_norm.weight, torch.ones(SIZES["hidden_size"]))


# Tied embeddings and a vocabulary that changes


def test_tied_embeddings_are_one_tensor_before_and_after_a_file(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = PeriLlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(random_ids()).logits, model(random_ids()).logits)


def test_untied_embeddings_are_two_tensors():
    model = tiny_model()
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [80, 40])
def test_a_resized_vocabulary_keeps_the_old_tokens(tied, size):
    model = shaken_model(tie_word_embeddings=tied)
    ids = random_ids(vocab=40)
    before = model(ids).logits
    model.resize_token_embeddings(size)
    kept = min(size, SIZES["vocab_size"])
    logits = model(ids).logits
    assert model.config.vocab_size == logits.shape[-1] == size
    assert torch.allclose(logits[..., :kept], before[..., :kept], atol=1e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert model(ids, labels=ids).loss.isfinite()
