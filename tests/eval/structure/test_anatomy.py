"""The stream is found by structure: where the norms stand, which factors are used, and what cannot be followed."""

import pytest
import torch
from stability_families import FAMILIES, LAYERS, PLACEMENTS, build, perturb
from torch import nn
from transformers import MptConfig, MptForCausalLM

from modeling_periln.norms import PeriLlamaLayerNorm, PeriLlamaRMSNorm
from periln.eval.structure.anatomy import find_anatomy
from periln.eval.structure.norms import norm_facts
from periln.runkit.errors import UserError

# A, B, C of every layer, the final norm, and the first gain's offset.
EXPECTED = {
    "llama": "A--F",
    "gemma2": "AB-F",
    "gemma3": "AB-F",
    "olmo2": "-B-F",
    "glm4": "AB-F",
    "hyperclovax_peri": "AB-F",
    "hyperclovax_pre": "A--F",
    "qwen3": "A--F",
    "mistral": "A--F",
    "olmo3": "-B-F",
    "exaone4": "-B-F",
    "neox_parallel": "A--F",
    "neox_sequential": "A--F",
    "gpt2": "A--F",
    "peri_llama:post": "--C-",
    "peri_llama:pre": "A--F",
    "peri_llama:peri": "AB-F",
    "peri_llama:output": "-B-F",
    "peri_llama:pre_post": "A-C-",
    "peri_llama:deepnorm": "--C-",
    "peri_llama:lns": "A--F",
}
ALL = [*FAMILIES, *(f"peri_llama:{p}" for p in PLACEMENTS if p != "mix")]


def norms_of(sublayer) -> str:
    slots = zip("ABC", (sublayer.input_norm, sublayer.output_norm, sublayer.residual_norm), strict=True)
    return "".join(letter if norm else "-" for letter, norm in slots)


@pytest.mark.parametrize("moved", [True, False], ids=["moved", "as_initialized"])
@pytest.mark.parametrize("family", ALL)
def test_norms_are_found_where_they_stand(family, moved):
    anatomy = find_anatomy(build(family, moved=moved))
    *slots, final = EXPECTED[family]
    assert {norms_of(s) for s in anatomy.sublayers} == {"".join(slots)}
    assert [(s.layer, s.kind) for s in anatomy.sublayers] == [
        (layer, kind) for layer in range(1, anatomy.num_layers + 1) for kind in ("attn", "mlp")
    ]
    assert (anatomy.final_norm is not None) == (final == "F")
    assert all(s.output_projection is not None for s in anatomy.sublayers)


@pytest.mark.parametrize("family", ALL)
def test_the_stream_put_together_from_what_was_found_is_the_model_s(family):
    """The points are enough to compute every stream: C(alpha x + s B), from a fresh batch."""
    model = build(family)
    anatomy = find_anatomy(model)
    seen = {}
    handles = []
    for s in anatomy.sublayers:
        for what in ("reads", "branch_output", "residual_add", "stream"):
            point = getattr(s, what)
            if point is not None:
                key = (s.layer, s.kind, what)
                handles.append(point.watch(lambda x, key=key: seen.__setitem__(key, x.detach().double())))
    with torch.no_grad():
        model(torch.randint(0, 90, (3, 12), generator=torch.Generator().manual_seed(5)))
    for handle in handles:
        handle.remove()
    waiting = 0.0
    for s in anatomy.sublayers:
        branch = s.multiplier * seen[s.layer, s.kind, "branch_output"]
        if s.residual_add is None:
            waiting = branch
            continue
        expected = s.alpha * seen[s.layer, s.kind, "reads"] + branch + waiting
        waiting = 0.0
        torch.testing.assert_close(seen[s.layer, s.kind, "residual_add"], expected, rtol=1e-5, atol=1e-5)
        if s.residual_norm is not None:
            with torch.no_grad():
                expected = s.residual_norm.module(expected.float()).double()
            torch.testing.assert_close(seen[s.layer, s.kind, "stream"], expected, rtol=1e-4, atol=1e-4)


def test_factors_are_found_exactly():
    peri = find_anatomy(build("hyperclovax_peri"))
    assert {s.multiplier for s in peri.sublayers} == {0.5}
    assert peri.embedding_scale == pytest.approx(3.0, rel=1e-6)
    deep = find_anatomy(build("peri_llama:deepnorm"))
    assert {s.alpha for s in deep.sublayers} == {8**0.25}
    lns = find_anatomy(build("peri_llama:lns"))
    assert [s.input_scale for s in lns.sublayers[::2]] == pytest.approx([1, 2**-0.5, 3**-0.5, 0.5])


@torch.no_grad()
def test_factors_are_found_where_a_branch_is_ten_thousand_times_the_stream():
    """A part's share of the sum's rounding is its own, entry by entry, however large the other part is."""
    model = build("hyperclovax_peri")
    model.model.layers[0].post_norm1.weight.mul_(3e4)
    first, second = find_anatomy(model).sublayers[:2]
    assert (first.alpha, first.multiplier) == (1.0, 0.5) == (second.alpha, second.multiplier)


def test_mix_differs_from_layer_to_layer():
    anatomy = find_anatomy(build("peri_llama:mix"))
    assert [norms_of(s) for s in anatomy.sublayers[::2]] == ["--C", "A--", "A--", "A--"]


def test_a_parallel_layer_has_one_add():
    anatomy = find_anatomy(build("neox_parallel"))
    assert [s.parallel for s in anatomy.sublayers] == [True] * 2 * LAYERS
    assert [s.residual_add is None for s in anatomy.sublayers] == [True, False] * LAYERS


def test_gemma_s_gain_is_one_plus_its_weight():
    anatomy = find_anatomy(build("gemma3"))
    norm = anatomy.sublayers[0].output_norm
    assert norm.facts.offset == 1.0
    torch.testing.assert_close(anatomy.gain(norm), 1 + norm.module.weight.detach().double())
    layer = find_anatomy(build("neox_parallel")).sublayers[0].input_norm
    assert (layer.facts.kind, layer.facts.offset) == ("layer", 0.0)


def test_a_layer_that_does_something_else_to_its_stream_is_refused():
    model = build("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output.clone())
    find_anatomy(model)  # what the hook gives is still what is added
    model.model.layers[1].register_forward_hook(lambda module, args, output: output * output.abs())
    with pytest.raises(UserError, match=r"model\.layers\.1 .*cannot be followed: its output is not the stream"):
        find_anatomy(model)


def test_a_module_that_adds_the_stream_by_itself_is_refused():
    """MPT's MLP gives stream + branch: the sum would be right with a factor of 0 for the stream."""
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 96, "max_seq_len": 64}
    with pytest.raises(UserError, match="cannot be followed"):
        find_anatomy(perturb(MptForCausalLM(MptConfig(**sizes))))


def test_what_is_not_a_causal_language_model_is_refused():
    with pytest.raises(UserError, match="no config"):
        find_anatomy(nn.Linear(2, 2))
    with pytest.raises(UserError, match="no language-model head"):
        find_anatomy(build("llama").model)


def test_a_pass_that_is_not_finite_is_refused_by_the_name_of_the_layer():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(1e30)
        model.model.layers[0].mlp.up_proj.weight.fill_(1e30)
    with pytest.raises(UserError, match=r"model\.layers\.0 is not finite in torch\.float32"):
        find_anatomy(model)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_the_facts_of_a_norm_whose_gain_is_frozen(kind):
    """Its gain is a buffer, so that no parameter tells its size."""
    facts = norm_facts((PeriLlamaRMSNorm if kind == "rmsnorm" else PeriLlamaLayerNorm)(24, learnable=False))
    assert facts.kind == ("rms" if kind == "rmsnorm" else "layer") and bool((facts.gain == 1).all())


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("mean", [True, False], ids=["rms", "l2"])
def test_a_norm_with_one_gain_that_does_not_state_its_size(shape, mean):
    """On one channel, x / |x| and x / sqrt(mean(x^2)) are the same."""

    class OneGainNorm(nn.Module):
        eps = 1e-6

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full(shape, 3.0))

        def forward(self, x):
            squares = x.square().mean(-1, keepdim=True) if mean else x.square().sum(-1, keepdim=True)
            return self.weight * x * torch.rsqrt(squares + self.eps)

    if mean:
        assert norm_facts(OneGainNorm()).gain.tolist() == [3.0]
        return
    with pytest.raises(UserError, match="neither an RMSNorm nor a LayerNorm"):
        norm_facts(OneGainNorm())
