"""Planted faults are found, and named by what they are."""

import pytest
import torch
from planted import with_large_branch, with_large_gradient, with_large_stream, with_massive_activation
from stability_families import VOCABULARY, build, perturb
from transformers import FalconConfig, FalconForCausalLM

from periln.eval.stability.measure import Options, measure
from periln.eval.stability.overflow import first_non_finite
from periln.eval.structure.anatomy import find_anatomy
from periln.eval.texts.samples import random_samples

SAMPLES = random_samples(VOCABULARY, 12, 16, seed=1)
FORWARD_ONLY = Options(backward_samples=0, skip_samples=0, fp16_samples=0)


def in_fp16(model, loss_scale=1.0):
    return first_non_finite(find_anatomy(model), [SAMPLES.ids[:4]], loss_scale)


@pytest.mark.parametrize(("family", "layer"), [("llama", 2), ("llama", 1), ("qwen3", 2)])
def test_a_massive_activation_is_found_by_layer_channel_and_token(family, layer):
    token, channel = 42, 11
    where = (SAMPLES.ids == token).nonzero()
    assert 0 < len(where) < 20
    measured = measure(with_massive_activation(token, channel, layer, family), SAMPLES, FORWARD_ONLY)
    [found] = measured.record["massive_activations"]
    assert (found["layer"], found["sublayer"], found["channel"]) == (layer, "mlp", channel)
    assert found["token_id"] == token
    assert [found["sample"], found["position"]] in where.tolist()
    rows = measured.rows
    place = rows[(rows.layer == layer) & (rows.sublayer == "mlp") & (rows.tensor == "stream")].set_index("stat").value
    assert (place["max_channel"], place["max_sample"]) == (channel, found["sample"])
    sentence = next(s for s in measured.record["verdict"] if "massive" in s)
    assert f"after the mlp of layer {layer}: channel {channel}, position {found['position']} of sample" in sentence


def test_without_a_massive_activation_none_is_claimed():
    record = measure(build("llama"), SAMPLES, FORWARD_ONLY).record
    assert record["massive_activations"] == []
    assert any("no massive activation" in sentence for sentence in record["verdict"])
    assert 1 < record["outlier"]["ratio"] < 100


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_an_overflow_of_the_stream_is_named_as_the_add(family):
    model = with_large_stream(family)
    found = in_fp16(model)
    assert found["forward"]["what"] == "stream"
    assert "the stream at the residual add after the mlp of layer 2" in found["forward"]["where"]
    assert (found["forward"]["layer"], found["backward_run"], found["backward"]) == (2, False, None)
    rows = measure(model, SAMPLES, FORWARD_ONLY).rows
    bits = rows[(rows.stat == "headroom_bits")].set_index(["layer", "sublayer", "tensor"]).value
    assert bits[2, "mlp", "residual_add"] < 0 < min(bits[2, "mlp", "branch_output"], bits[2, "attn", "residual_add"])


@pytest.mark.parametrize(
    ("family", "kind", "module"),
    [
        ("glm4", "mlp", "model.layers.1.mlp.down_proj"),
        ("gemma3", "attn", "model.layers.1.self_attn.o_proj"),
        ("olmo2", "mlp", "model.layers.1.mlp.down_proj"),
        ("peri_llama:peri", "mlp", "model.layers.1.mlp.down_proj"),
    ],
)
def test_an_overflow_before_an_output_norm_is_named_as_the_module_s_output(family, kind, module):
    found = in_fp16(with_large_branch(family, kind=kind))["forward"]
    assert (found["what"], found["module"], found["layer"]) == ("branch", module, 2)
    assert found["where"] == f"the output of the {kind} of layer 2 ({module}), before its output norm"


def test_an_overflow_inside_a_module_is_named_by_the_product_that_made_it():
    """The product of gate and up is not a module's output: it is what the down projection reads."""
    model = build("llama")
    with torch.no_grad():
        for matrix in (model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj):
            matrix.weight.mul_(3e3)
    found = in_fp16(model)["forward"]
    assert found["where"] == "what model.layers.1.mlp.down_proj reads, inside the mlp of layer 2"


def test_a_stream_of_peri_llama_that_overflows_is_named_by_its_residual_module():
    model = build("peri_llama:pre")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 60000.0
        block = model.model.layers[1]
        block.self_attn.o_proj.weight.zero_()
        block.mlp.gate_proj.weight.zero_()
        block.mlp.up_proj.weight.zero_()
        block.mlp.gate_proj.weight[:, 0] = block.mlp.up_proj.weight[:, 0] = 1.0
        block.mlp.down_proj.weight[0] = 20.0
    found = in_fp16(model)["forward"]
    assert (found["what"], found["module"]) == ("stream", "model.layers.1.mlp_residual")


@pytest.fixture(scope="module")
def large_gradient():
    """The planted model and what its FP16 pass finds."""
    model = with_large_gradient()
    return model, in_fp16(model)


def test_an_overflow_in_the_backward_pass_alone_is_named_by_the_norm_that_made_it(large_gradient):
    _, found = large_gradient
    assert found["forward"] is None
    assert found["backward"] is not None
    assert found["backward"]["module"] == "model.layers.1.mlp_output_norm"
    assert "hands to its input" in found["backward"]["where"]


def test_the_backward_overflow_is_in_the_record_and_its_words(large_gradient):
    model, _ = large_gradient
    record = measure(model, SAMPLES, Options(backward_samples=0, skip_samples=0, fp16_samples=2)).record
    assert record["first_non_finite"]["backward"]["module"] == "model.layers.1.mlp_output_norm"
    assert any("the backward pass stops being finite" in sentence for sentence in record["verdict"])
    assert record["verdict"][0] == "This model runs in FP16, but overflows it in the backward pass."


def test_the_largest_loss_scale_is_the_largest_that_is_finite(large_gradient):
    model, found = large_gradient
    scale = found["largest_finite_loss_scale"]
    assert scale is not None
    assert in_fp16(model, scale)["backward"] is None
    assert in_fp16(model, 2 * scale)["backward"] == found["backward_beyond"] is not None


def test_a_sound_model_is_finite_in_fp16_at_the_usual_loss_scale():
    found = in_fp16(build("peri_llama:peri"), 2.0**16)
    assert found["forward"] is None and found["backward"] is None and found["weights"] == []
    assert found["largest_finite_loss_scale"] == 2.0**16


def test_a_weight_that_fp16_cannot_hold_is_named():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = 1e6
    assert in_fp16(model)["weights"] == ["model.layers.0.mlp.up_proj.weight"]


def test_a_model_that_changes_outputs_in_place_runs_backward_as_well():
    """Falcon adds its attention's output to its MLP's in place, which autograd's module hooks do not allow."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    model = perturb(FalconForCausalLM(FalconConfig(**sizes)))
    assert in_fp16(model)["largest_finite_loss_scale"] == 2.0**16
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    assert in_fp16(model, 2.0**16)["backward"]["layer"] in (None, 2)


def test_the_fp16_pass_leaves_the_model_as_it_was():
    model = build("gemma3")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    in_fp16(model)
    assert all(p.dtype == torch.float32 and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_first_sentence_says_whether_fp16_holds_the_model():
    def first(model):
        options = Options(backward_samples=0, skip_samples=0, fp16_samples=2)
        return measure(model, SAMPLES, options).record["verdict"][0]

    assert first(with_large_branch("glm4")) == "This model overflows FP16 in the forward pass."
    assert "bits to spare" in first(build("llama"))
