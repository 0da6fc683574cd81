"""Every family that is a row of the table, against Transformers' own class: both ways, past its window, cached or not.

The native models are random, their norms' gains too. Each is compared over three windows' length.
"""

import copy

import pytest
import torch
from stock_classes import needs
from tiny_models import SIZES, random_ids, shaken, shaken_model, tiny_config

from modeling_periln import PeriLlamaForCausalLM
from modeling_periln.arguments import CACHE
from modeling_periln.conversions import ARCHITECTURES
from modeling_periln.convert import ConversionRefused, admissible_exports, convert, from_native, to_native

WINDOW = 5
LENGTH = 3 * WINDOW + 1
FULL, SLIDING = "full_attention", "sliding_attention"
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
LOCAL = {"rope_type": "default", "rope_theta": 500.0}
LINEAR = ROPE | {"rope_type": "linear", "factor": 2.0}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
MIXED = {"sliding_window": WINDOW, "layer_types": [SLIDING, FULL, SLIDING]}
FILLED = {"hidden_size": 24}  # where the class has no field for head_dim
# family: (architecture, fields of its configuration, our fields besides the row)
FAMILIES = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}, {"norm_placement": "pre"}),
    "olmo 2": ("olmo2", FILLED, {"norm_placement": "output", "qk_norm": "full"}),
    "hyperclova x": (
        "hyperclovax",
        {"use_post_norm": True},
        {"norm_placement": "peri", "embedding_norm": False},
    ),
    "hyperclova x, pre": ("hyperclovax", {"use_post_norm": False}, {"norm_placement": "pre"}),
    "mistral": ("mistral", {"sliding_window": WINDOW}, {"sliding_window": WINDOW}),
    "mistral without window": ("mistral", {"sliding_window": None}, {"sliding_window": None}),
    "qwen 3": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}, {"qk_norm": "head"}),
    "qwen 3, sliding": ("qwen3", MIXED | {"use_sliding_window": True}, MIXED),
    "glm 4": (
        "glm4",
        {"head_dim": 8, "attention_bias": False, "rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
        {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
    ),
    "glm 4, yarn": (
        "glm4",
        {"head_dim": 16, "attention_bias": False, "rope_parameters": YARN | {"partial_rotary_factor": 0.25}},
        {},
    ),
    "olmo 3": ("olmo3", FILLED | MIXED | {"rope_parameters": {FULL: YARN, SLIDING: LOCAL}}, {"qk_norm": "full"}),
    "olmo 3, one rope": ("olmo3", FILLED | MIXED | {"rope_parameters": {FULL: ROPE, SLIDING: ROPE}}, MIXED),
    "olmo 3, full": ("olmo3", FILLED | {"layer_types": [FULL] * 3}, {"sliding_window": None}),
    "exaone 4": ("exaone4", FILLED | MIXED, {"no_rope_layers": [1, 0, 1]}),
    "exaone 4 without window": ("exaone4", FILLED | {"sliding_window": None, "layer_types": [FULL] * 3}, {}),
    "exaone 4, sliding": ("exaone4", FILLED | {"sliding_window": WINDOW, "layer_types": [SLIDING] * 3}, {}),
    "gemma 3": (
        "gemma3_text",
        MIXED | {"rope_parameters": {FULL: LINEAR, SLIDING: LOCAL}, "query_pre_attn_scalar": 9},
        {"norm_gain": "centered", "query_pre_attn_scalar": 9, "embedding_multiplier": SIZES["hidden_size"] ** 0.5},
    ),
    "gemma 3, untied": ("gemma3_text", MIXED | {"tie_word_embeddings": False, "attention_bias": True}, MIXED),
    "gemma 3, full": ("gemma3_text", {"layer_types": [FULL] * 3}, {"sliding_window": None}),
    "bitnet": ("bitnet", FILLED | {"hidden_act": "relu2"}, {"norm_placement": "sub_ln", "hidden_act": "relu2"}),
    "bitnet, biases": ("bitnet", FILLED | {"attention_bias": True}, {"attention_bias": True}),
}


def native_model(family: str, seed: int = 0, **more):
    """A model of Transformers' own class, every weight far from its initial value."""
    target, fields, _ = FAMILIES[family]
    needs(target)
    other = ARCHITECTURES[target]
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": 60}
    fields = SIZES | tokens | {"rope_parameters": ROPE} | copy.deepcopy(fields) | more
    if other.ropes_by_type and FULL not in fields["rope_parameters"]:
        fields["rope_parameters"] = {FULL: fields["rope_parameters"], SLIDING: dict(fields["rope_parameters"])}
    model = shaken(other.model_class(other.config_class(**fields)).eval(), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim == 1 and "norm" in name:
            p.data.normal_(0.0 if other.centered else 1.0, 0.3, generator=generator)
    return model


def logits(model, ids, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **inputs).logits


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.isfinite().all() and theirs.std() > 0.1
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def step_by_step(model, ids) -> torch.Tensor:
    """Logits of a prompt of 3 and then one token at a time, from the model's own cache."""
    cache, found = None, []
    for start, end in [(0, 3), *((i, i + 1) for i in range(3, ids.shape[1]))]:
        with torch.no_grad():
            out = model(ids[:, start:end], use_cache=True, **{CACHE: cache})
        cache = getattr(out, CACHE)
        found.append(out.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_comes_in_and_goes_out_as_the_same_function(family):
    target, _, expected = FAMILIES[family]
    model = native_model(family)
    ours = from_native(model)
    assert type(ours) is PeriLlamaForCausalLM
    for field, value in expected.items():
        assert getattr(ours.config, field) == value, field
    back = to_native(ours, target)
    assert type(back) is type(model)
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    for length in (1, WINDOW, LENGTH):
        ids = random_ids(2, length)
        assert_close(logits(ours, ids), logits(model, ids))
        assert torch.equal(logits(back, ids), logits(model, ids))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_the_same_cached_padded_and_packed(family, attention):
    model = native_model(family, seed=1)
    model.set_attn_implementation(attention)
    ours = from_native(model)
    assert ours.config._attn_implementation == attention
    ids = random_ids(2, LENGTH, seed=1)
    whole = logits(model, ids)
    assert_close(step_by_step(ours, ids), step_by_step(model, ids))
    assert_close(step_by_step(ours, ids), whole)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    padded = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    keep = mask.bool()
    assert_close(logits(ours, ids, **padded)[keep], logits(model, ids, **padded)[keep])
    packed = torch.cat((torch.arange(9), torch.arange(LENGTH - 9)))[None].expand(2, -1)
    both = [logits(m, ids, position_ids=packed, use_cache=False) for m in (ours, model)]
    assert_close(*both)
    assert_close(both[0][:, 9:], logits(ours, ids[:, 9:]))  # the second document does not see the first


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_generates_the_same_tokens_past_its_window(family):
    model = native_model(family, seed=2)
    ours, ids = from_native(model), random_ids(2, 4, seed=2)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    for inputs in ({}, {"attention_mask": mask}):
        how = {"max_new_tokens": LENGTH, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **inputs}
        expected = model.generate(ids, **how)
        assert torch.equal(ours.generate(ids, **how), expected)
        assert torch.equal(ours.generate(ids, **how, use_cache=False), expected)
        assert torch.equal(ours.generate(ids, **how, cache_implementation="static"), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_family_are_the_native_ones(family):
    model = native_model(family, seed=3)
    ours, ids = from_native(model), random_ids(2, LENGTH, seed=3)
    for m in (ours, model):
        m(ids, labels=ids).loss.backward()
    # The names are told by the weights: an import of the gradients is the gradient of the import, where nothing folds.
    with torch.no_grad():
        grads = copy.deepcopy(model)
        for mine, theirs in zip(grads.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs.grad)
    expected = dict(from_native(grads).named_parameters())
    for name, parameter in ours.named_parameters():
        if name.endswith("o_proj.bias") and FAMILIES[family][0] == "glm4":
            continue
        gradient = expected[name]
        assert (parameter.grad - gradient).abs().max() <= 2e-5 * gradient.abs().max().clamp(min=1e-3), name


@pytest.mark.parametrize("family", ["mistral", "olmo 3", "exaone 4", "gemma 3", "glm 4"])
def test_a_family_converts_on_disk_with_a_proof_past_its_window(family, tmp_path):
    model = native_model(family, seed=4)
    model.save_pretrained(tmp_path / "native")
    record = convert(tmp_path / "native", tmp_path / "ours", "peri_llama", text="none")
    window = getattr(model.config, "sliding_window", None)
    assert window is None or max(length for _, length in record["compared"]["shapes"]) >= 3 * window
    ours = PeriLlamaForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids = random_ids(2, LENGTH)
    assert_close(logits(ours, ids), logits(model, ids))
    convert(tmp_path / "ours", tmp_path / "back", FAMILIES[family][0], text="none")
    back = type(model).from_pretrained(tmp_path / "back").eval()
    assert torch.equal(logits(back, ids), logits(model, ids))


# A model of ours with more than the family has, folded on the way out

SANDWICH = {"norm_placement": "sandwich", "qk_norm": "head"}
FOLDED = {
    "plain gains become centered": ("gemma3_text", SANDWICH),
    "a table of its own scale": ("gemma3_text", SANDWICH | {"embedding_multiplier": 0.5}),
    "an embedding norm": ("gemma3_text", SANDWICH | {"embedding_norm": True, "embedding_multiplier": 3.0}),
    "scores of another scale": ("gemma3_text", SANDWICH | {"query_pre_attn_scalar": 2.5}),
    "scores scaled in q_norm": ("qwen3", {"norm_placement": "lns", "qk_norm": "head", "query_pre_attn_scalar": 2.5}),
    "scores scaled in q_proj": ("mistral", {"norm_placement": "pre", "query_pre_attn_scalar": 9}),
    "scores scaled in interleaved queries": ("glm4", {"query_pre_attn_scalar": 9}),
    "centered gains become plain": ("olmo2", {"norm_placement": "output", "qk_norm": "full", "norm_gain": "centered"}),
    "a branch's factor": ("exaone4", {"norm_placement": "output", "qk_norm": "head", "residual_scale": 0.3}),
    "a branch's factor in a centered gain": (
        "gemma3_text",
        SANDWICH | {"norm_gain": "centered", "residual_scale": 0.3},
    ),
    "an embedding norm with centered gain": ("glm4", {"norm_gain": "centered", "embedding_multiplier": 2.0}),
    "a tied table with its factor": (
        "hyperclovax",
        {"embedding_norm": False, "embedding_multiplier": 3.0, "tie_word_embeddings": True},
    ),
    "sliding layers": ("gemma3_text", SANDWICH | MIXED | {"rope_parameters": {FULL: LINEAR, SLIDING: LOCAL}}),
    "a window for all": ("olmo3", {"norm_placement": "output", "qk_norm": "full", "sliding_window": WINDOW}),
    "an inner norm": ("bitnet", {"norm_placement": "sub_ln", "hidden_size": 24, "embedding_multiplier": 2.0}),
}


@pytest.mark.parametrize("case", FOLDED)
def test_what_the_family_has_no_place_for_is_folded(case):
    target, fields = FOLDED[case]
    needs(target)
    model = shaken_model(**copy.deepcopy(fields))
    ids = random_ids(2, LENGTH)
    assert_close(logits(to_native(model, target), ids), logits(model, ids))


REFUSED = {
    "a window": ("llama", {"norm_placement": "pre", "sliding_window": 5}, "sliding_window=5: llama attends to all"),
    "some layers slide": ("mistral", {"norm_placement": "pre", **MIXED}, "layer_types has 'full_attention' and"),
    "two ropes": (
        "qwen3",
        {"norm_placement": "pre", "qk_norm": "head", **MIXED, "rope_parameters": {FULL: ROPE, SLIDING: LOCAL}},
        "rope_parameters has another rope for each of .*qwen3 has one for all layers",
    ),
    "a share of the head": (
        "mistral",
        {"norm_placement": "pre", "head_dim": 8, "rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5 in rope_parameters: mistral rotates all",
    ),
    "no rope": ("llama", {"norm_placement": "pre", "no_rope_layers": [1, 0, 1]}, r"no_rope_layers=\[1, 0, 1\]: llama"),
    "rope beside the window": (
        "exaone4",
        {"norm_placement": "output", "qk_norm": "head", **MIXED},
        "no_rope_layers=None: exaone4 rotates in sliding layers alone",
    ),
    "a tied scaled table": (
        "llama",
        {"norm_placement": "pre", "tie_word_embeddings": True, "embedding_multiplier": 2.0},
        "embedding_multiplier=2.0 with tie_word_embeddings=True: llama multiplies embeddings by 1",
    ),
    "biases": (
        "mistral",
        {"norm_placement": "pre", "attention_bias": True},
        "attention_bias=True: mistral has no bias",
    ),
    "heads that do not fill": ("bitnet", {"norm_placement": "sub_ln"}, "head_dim=6: bitnet needs heads that fill"),
    "no inner norm": ("bitnet", {"norm_placement": "pre", "hidden_size": 24}, "no norms before a sublayer's last"),
    "an inner norm": ("llama", {"norm_placement": "sub_ln"}, "has norms before a sublayer's last projection"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_family_cannot_hold_is_refused_by_name(case):
    target, fields, message = REFUSED[case]
    config = tiny_config(**copy.deepcopy(fields))
    with pytest.raises(ConversionRefused, match=message):
        to_native(PeriLlamaForCausalLM(config), target)
    assert admissible_exports(config)[target]


NOT_OURS = {
    "final_logit_softcapping=30.0": ("gemma 3", {"final_logit_softcapping": 30.0}),
    "attn_logit_softcapping=50.0": ("gemma 3", {"attn_logit_softcapping": 50.0}),
    "use_bidirectional_attention=True": ("gemma 3", {"use_bidirectional_attention": True}),
    "would rotate 3 of head_dim=6": ("glm 4", {"head_dim": 6}),
}


@pytest.mark.parametrize("message", NOT_OURS)
def test_what_no_row_has_is_refused_by_name(message):
    family, more = NOT_OURS[message]
    with pytest.raises(ConversionRefused, match=message):
        from_native(native_model(family, **more))


def test_quantized_bitnet_weights_are_refused():
    model = native_model("bitnet")
    model.config.quantization_config = {"quant_method": "bitnet"}
    with pytest.raises(ConversionRefused, match="quantization_config: quantized weights cannot be folded"):
        from_native(model)
