"""Rotary embeddings: every type is Llama's, below and above the original length, and survives a checkpoint."""

import json

import pytest
import torch
import transformers
from test_equal_to_llama import LLAMA3_ROPE, LLAMA_NAMES, largest_difference, twin
from tiny_models import random_ids, shaken_model, tiny_config, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from modeling_periln.rotary import PeriLlamaRotaryEmbedding, rotate

ORIGINAL_LENGTH = 16
EXTENDED = {"rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": ORIGINAL_LENGTH}
LONGROPE = EXTENDED | {"rope_type": "longrope", "short_factor": [1.0, 1.25, 1.5], "long_factor": [1.0, 2.0, 4.0]}
ROPES = {
    "default": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    # Dynamic scaling has no separate length: it starts where max_position_embeddings ends.
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
        "max_position_embeddings": ORIGINAL_LENGTH,
    },
    "yarn": {"rope_parameters": EXTENDED | {"rope_type": "yarn"}},
    "llama3": {"rope_parameters": LLAMA3_ROPE},
    "longrope": {"rope_parameters": LONGROPE},
}
CHANGES_WITH_LENGTH = {"dynamic", "longrope"}


def fields(rope: str) -> dict:
    """Fields of their own: a configuration fills the mapping that it is given."""
    return {key: dict(value) if isinstance(value, dict) else value for key, value in ROPES[rope].items()}


def rope_model(rope: str, **more):
    return shaken_model(norm_placement="pre", **fields(rope), **more)


def needs_return(rope: str) -> None:
    """Skip the test where Transformers' own Llama keeps the frequencies of the longest sequence so far."""
    if rope != "dynamic":
        return
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, **fields(rope))
    rotary, x = LlamaRotaryEmbedding(config), torch.zeros(1, 1, 32)
    before = rotary.inv_freq.clone()
    for length in (33, 7):
        rotary(x, torch.arange(length)[None])
    if not torch.equal(rotary.inv_freq, before):
        pytest.skip(f"transformers {transformers.__version__} keeps dynamic frequencies, of a Llama too")


@torch.no_grad()
@pytest.mark.parametrize("rope", ROPES)
def test_every_type_is_llamas_bit_for_bit_below_and_above_the_original_length(rope):
    model = rope_model(rope)
    assert model.model.rotary_emb.rope_type == rope
    llama = twin(model, LlamaForCausalLM, LlamaConfig, LLAMA_NAMES)
    for length in (7, 33, 45, 7, ORIGINAL_LENGTH):  # some types keep what the longest sequence so far needed
        ids = random_ids(2, length)
        logits = model(ids).logits
        assert logits.std() > 0.1
        assert largest_difference(logits, llama(ids).logits) == 0.0, length
    ids, more = random_ids(2, 10), {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **more), llama.generate(ids, **more))


@torch.no_grad()
@pytest.mark.parametrize("rope", [rope for rope in ROPES if rope != "default"])
def test_every_type_differs_from_the_default(rope):
    """The equality above can fail. (Dynamic scaling is the default's up to the original length.)"""
    plain = shaken_model(norm_placement="pre", rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    model, ids = rope_model(rope), random_ids(2, 33)
    assert largest_difference(model(ids).logits, plain(ids).logits) > 0.01
    needs_return(rope)
    if rope == "dynamic":
        assert largest_difference(model(ids[:, :7]).logits, plain(ids[:, :7]).logits) == 0.0


@torch.no_grad()
@pytest.mark.parametrize("rope", ROPES)
def test_frequencies_change_beyond_the_original_length_where_the_type_says_so_and_come_back(rope):
    needs_return(rope)
    model = rope_model(rope)
    rotary, ids = model.model.rotary_emb, random_ids(1, 33)
    before, short = rotary.inv_freq.clone(), model(ids[:, :7]).logits
    model(ids)
    assert torch.equal(rotary.inv_freq, before) == (rope not in CHANGES_WITH_LENGTH)
    assert torch.equal(model(ids[:, :7]).logits, short)
    assert torch.equal(rotary.inv_freq, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [2, 6, 64])
def test_a_rotation_and_its_gradient_are_llamas_to_the_bit(head_dim, dtype):
    """The slow twin, with its negation and its slices, is Transformers' own."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(2, 5, 3, head_dim, generator=generator).to(dtype) for _ in range(2))
    x.requires_grad_()
    config = tiny_config(head_dim=head_dim)
    positions = torch.tensor([[0, 1, 2, 50, 9]])
    ours = rotate(x, *PeriLlamaRotaryEmbedding(config)(x, positions))
    theirs, _ = apply_rotary_pos_emb(x, x, *LlamaRotaryEmbedding(config)(x, positions), unsqueeze_dim=2)
    assert ours.dtype == dtype and largest_difference(ours, x) > 0.1
    assert torch.equal(ours, theirs)
    gradients = [torch.autograd.grad(y, x, grad)[0] for y in (ours, theirs)]
    assert torch.equal(*gradients)


@torch.no_grad()
def test_linear_scaling_divides_positions():
    """Against the type's definition: four times the positions, divided by the factor 4, are the positions."""
    plain, scaled, ids = rope_model("default"), rope_model("linear"), random_ids(2, 9)
    positions = torch.arange(9)[None]
    stretched = scaled(ids, position_ids=4 * positions, attention_mask=torch.ones_like(ids)).logits
    assert torch.equal(stretched, plain(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits)


@torch.no_grad()
@pytest.mark.parametrize("used_long", [False, True])
@pytest.mark.parametrize("rope", ROPES)
def test_a_checkpoint_has_the_same_logits_and_frequencies_in_fp32(rope, used_long, tmp_path):
    if used_long:
        needs_return(rope)
    model = rope_model(rope)
    before = model.model.rotary_emb.inv_freq.clone()
    if used_long:
        model(random_ids(1, 33))
    model.save_pretrained(tmp_path)
    assert not any("inv_freq" in key for key in model.state_dict())
    loaded = PeriLlamaForCausalLM.from_pretrained(tmp_path)
    for length in (7, 33):
        ids = random_ids(2, length)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    half = PeriLlamaForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    assert half.lm_head.weight.dtype == torch.bfloat16
    for name in ("inv_freq", "original_inv_freq"):
        frequencies = getattr(half.model.rotary_emb, name)
        assert frequencies.dtype == torch.float32
        assert torch.equal(frequencies, before)


@pytest.mark.parametrize("type_key", ["rope_type", "type"])
@pytest.mark.parametrize("rope", ROPES)
def test_the_arguments_of_older_configurations_are_folded_in(rope, type_key, tmp_path):
    new = tiny_config(**fields(rope))
    old = fields(rope)
    scaling = old.pop("rope_parameters")
    old |= {"rope_theta": scaling.pop("rope_theta")}
    if rope != "default":
        old |= {"rope_scaling": {type_key if key == "rope_type" else key: value for key, value in scaling.items()}}
    written = {key: value for key, value in new.to_dict().items() if key != "rope_parameters"}
    (tmp_path / "config.json").write_text(json.dumps(written | old))
    for folded in (tiny_config(**json.loads(json.dumps(old))), PeriLlamaConfig.from_pretrained(tmp_path)):
        assert not hasattr(folded, "rope_theta")
        parameters = {key: value for key, value in folded.rope_parameters.items() if key != "type"}
        assert parameters == new.rope_parameters
        logits = tiny_model(**folded_fields(folded))(random_ids(1, 20)).logits
        assert torch.equal(logits, tiny_model(**fields(rope))(random_ids(1, 20)).logits)


def folded_fields(config) -> dict:
    names = ("rope_parameters", "max_position_embeddings")
    return {name: getattr(config, name) for name in names}


BAD = {
    "an unknown type": ({"rope_type": "yarrn", "factor": 2.0}, r"rope_parameters\['rope_type'\]='yarrn'.*yarn"),
    "linear without factor": ({"rope_type": "linear"}, "rope_parameters.*factor"),
    "dynamic without factor": ({"rope_type": "dynamic"}, "rope_parameters.*factor"),
    "yarn without factor": ({"rope_type": "yarn"}, "rope_parameters.*factor"),
    "llama 3 without a field": (
        {key: value for key, value in LLAMA3_ROPE.items() if key != "low_freq_factor"},
        "rope_parameters.*low_freq_factor",
    ),
    "longrope without a list": (
        {key: value for key, value in LONGROPE.items() if key != "long_factor"},
        "rope_parameters.*long_factor",
    ),
    "longrope with a list of one": (LONGROPE | {"long_factor": [2.0]}, r"rope_parameters\['long_factor'\]=\[2.0\]"),
    "longrope with a number": (LONGROPE | {"short_factor": 2.0}, r"rope_parameters\['short_factor'\]=2.0"),
    "a factor below 1": ({"rope_type": "linear", "factor": 0.5}, r"rope_parameters\['factor'\]=0.5"),
    "a factor of the wrong type": ({"rope_type": "linear", "factor": "2"}, r"rope_parameters\['factor'\]='2'"),
    "a negative theta": ({"rope_theta": -1.0}, r"rope_parameters\['rope_theta'\]=-1.0"),
    "a theta of the wrong type": ({"rope_theta": "1e4"}, r"rope_parameters\['rope_theta'\]='1e4'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_parameters_are_refused_by_name(case):
    """Transformers warns of most of them; the model is then built with them, or fails without naming the field."""
    parameters, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        tiny_config(rope_parameters=dict(parameters))


def test_frequencies_stay_in_fp32_whatever_the_model_is_cast_to():
    rotary = tiny_model().model.rotary_emb
    before = rotary.inv_freq.clone()
    model = tiny_model().to(torch.bfloat16)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    assert tiny_model().half().model.rotary_emb.inv_freq.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert tiny_model().to("meta").model.rotary_emb.inv_freq.is_meta


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("rope_thetta", 1e4, "'rope_thetta'.*rope_theta"), ("partial_rotary_factor", 0.5, "partial_rotary_factor'.=0.5")],
)
def test_a_rotary_key_that_nothing_reads_is_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(rope_parameters={"rope_type": "default", key: value})
