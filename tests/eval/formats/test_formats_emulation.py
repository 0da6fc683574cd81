"""The emulation: against models that are rounded by hand, and against faults planted in their weights."""

from contextlib import contextmanager

import pytest
import torch
from planted import with_large_stream, with_massive_activation
from stability_families import FAMILIES, PLACEMENTS, build
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM
from transformers.cache_utils import DynamicLayer

from periln.eval.formats import emulate
from periln.eval.formats.cured import cure_in_place
from periln.eval.formats.emulate import Emulation, seen_in_a_pass
from periln.eval.formats.locate import locate
from periln.eval.formats.measure import measure_recipe, measure_reference, paired_rise
from periln.eval.formats.quantize import Quantized, quantize
from periln.eval.formats.recipes import (
    ACTIVATIONS,
    BLOCK,
    CHANNEL,
    KV,
    NONE,
    ROW,
    STREAM,
    TARGETS,
    TENSOR,
    WEIGHTS,
    Recipe,
    Scaled,
)
from periln.eval.formats.summary import row_of
from periln.eval.texts.samples import Samples, random_samples
from periln.runkit.errors import UserError

IDS = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(4))


def logits(model: nn.Module, ids: torch.Tensor = IDS, **more) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **({"use_cache": False} | more)).logits


def emulated(model: nn.Module, cells: dict[str, Scaled]) -> torch.Tensor:
    with Emulation(seen_in_a_pass(locate(model)), cells):
        return logits(model)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for the order of FP32 sums."""
    return bool((a - b).abs().max() <= 2e-5 * b.abs().max())


# --- against models rounded by hand ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, *(f"peri_llama:{name}" for name in PLACEMENTS)])
def test_a_rounding_that_changes_nothing_changes_nothing(family, monkeypatch):
    model = build(family)
    before, located = logits(model), seen_in_a_pass(locate(model))
    assert located.missing == {}
    monkeypatch.setattr(emulate, "quantize", lambda x, scaled, batched: Quantized(x.clone(), 0, 0))
    with Emulation(located, dict.fromkeys(TARGETS, Scaled("INT8", ROW))) as emulation:
        assert torch.equal(logits(model), before)
    layers, adds = len(locate(model).anatomy.layers), 1 if family == "neox_parallel" else 2
    seen = [target for target, *_ in emulation.slots]
    assert seen.count(STREAM) == 1 + adds * layers and seen.count(KV) == 2 * layers
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox_parallel"])
def test_weights_are_rounded_an_output_channel_at_a_time(family):
    model, by_hand = build(family), build(family)
    found = emulated(model, {WEIGHTS: Scaled("INT4", ROW)})
    with torch.no_grad():
        for module in by_hand.modules():
            if type(module).__name__ in ("Linear", "Conv1D") and module is not by_hand.get_output_embeddings():
                dim = 0 if type(module).__name__ == "Conv1D" else 1
                scale = module.weight.abs().amax(dim, keepdim=True) / 7
                module.weight.copy_(torch.round(module.weight / scale) * scale)
    assert close(found, logits(by_hand)) and not close(found, logits(model))


@pytest.mark.parametrize("scaled", [Scaled("INT8", ROW), Scaled("FP8 E4M3", CHANNEL), Scaled("NVFP4", BLOCK)])
def test_every_linear_map_reads_rounded_activations(scaled, monkeypatch):
    model = build("gemma3")
    found = emulated(model, {ACTIVATIONS: scaled})
    forward, head = nn.Linear.forward, model.get_output_embeddings()
    monkeypatch.setattr(
        nn.Linear, "forward", lambda self, x: forward(self, x if self is head else quantize(x, scaled, True).values)
    )
    assert close(found, logits(model))


def by_hand(model: nn.Module, q, family: str) -> torch.Tensor:
    """Llama's, Gemma 2's and OLMo 2's equations with the stream rounded after each add."""
    base = model.model
    x = base.embed_tokens(IDS)
    positions = torch.arange(IDS.shape[1])[None]
    mask = torch.full((20, 20), -torch.inf).triu(1)[None, None]
    x = q(x)
    for layer in base.layers:
        given = x if family == "olmo2" else layer.input_layernorm(x)
        rotary = base.rotary_emb(x, positions)
        attn = layer.self_attn(given, position_embeddings=rotary, attention_mask=mask)[0]
        x = q(x + (attn if family == "llama" else layer.post_attention_layernorm(attn)))
        norm = {"llama": "post_attention_layernorm", "gemma2": "pre_feedforward_layernorm", "olmo2": None}[family]
        mlp = layer.mlp(x if norm is None else getattr(layer, norm)(x))
        x = q(x + (mlp if family == "llama" else layer.post_feedforward_layernorm(mlp)))
    out = model.lm_head(base.norm(x))
    cap = getattr(model.config, "final_logit_softcapping", None)
    return out if cap is None else torch.tanh(out / cap) * cap


@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma2"])
def test_the_stream_is_rounded_after_each_add(family):
    model = build(family)
    if family == "gemma2":
        model.config.layer_types = ["full_attention"] * len(model.model.layers)
        for layer in model.model.layers:
            layer.attention_type = "full_attention"
            layer.self_attn.sliding_window = None
    with torch.no_grad():
        assert close(by_hand(model, lambda x: x, family), logits(model))
        scaled = Scaled("INT8", TENSOR)
        direct = by_hand(model, lambda x: quantize(x, scaled, True).values, family)
    found = emulated(model, {STREAM: scaled})
    assert close(found, direct) and not close(found, logits(model))


def test_post_ln_carries_what_its_norms_give():
    model = build("peri_llama:post")
    scaled = Scaled("INT8", TENSOR)
    found = emulated(model, {STREAM: scaled})

    def after(module, args, output):
        return quantize(output, scaled, True).values

    norms = [m for name, m in model.named_modules() if name.endswith("residual_norm")]
    first = model.model.layers[0].register_forward_pre_hook(
        lambda m, args: (quantize(args[0], scaled, True).values, *args[1:])
    )
    handles = [first, *(norm.register_forward_hook(after) for norm in norms)]
    direct = logits(model)
    for handle in handles:
        handle.remove()
    assert len(norms) == 8 and close(found, direct) and not close(found, logits(model))


@contextmanager
def a_rounded_cache(scaled: Scaled):
    update = DynamicLayer.update

    def rounded(self, keys, values, *args, **kwargs):
        return update(self, *(quantize(x, scaled, True).values for x in (keys, values)), *args, **kwargs)

    DynamicLayer.update = rounded
    try:
        yield
    finally:
        DynamicLayer.update = update


@pytest.mark.parametrize("family", ["llama", "peri_llama:peri", "neox_sequential"])
def test_keys_and_values_are_what_the_cache_holds(family):
    model, scaled = build(family), Scaled("INT4", ROW)
    found = emulated(model, {KV: scaled})
    with a_rounded_cache(scaled):
        direct = logits(model, use_cache=True)
    assert close(found, direct) and not close(found, logits(model))


# --- planted faults -------------------------------------------------------------------------------------------


def measured(model: nn.Module, samples: Samples, target: str, scaled: Scaled, batch: int = 2) -> dict:
    reference = measure_reference(model, samples, batch)
    recipe = Recipe(target, scaled.words(target), {target: scaled})
    record = measure_recipe(seen_in_a_pass(locate(model)), recipe, samples, reference, batch)
    sizes = [samples.ids.shape[1] - 1] * len(samples.ids)
    return row_of(("as it is", recipe, record), reference.nats.tolist(), sizes) | {"record": record}


def test_a_massive_activation_ruins_int8_per_tensor_and_not_per_channel():
    """One entry of the stream, at one token, far above all others: with one scale for a sequence nothing else is left,
    and the channel's own scale confines the damage to it."""
    model = with_massive_activation(token=5, channel=9)
    ids = torch.randint(6, 90, (4, 24), generator=torch.Generator().manual_seed(0))
    ids[:, 3] = 5
    samples = Samples(ids, {})
    rows = {s: measured(model, samples, STREAM, Scaled("INT8", s)) for s in (TENSOR, ROW, CHANNEL)}
    assert rows[TENSOR]["kl"] > 20 * rows[CHANNEL]["kl"] and rows[TENSOR]["kl"] > 20 * rows[ROW]["kl"]
    assert rows[TENSOR]["flushed"] > 0.2 and rows[CHANNEL]["flushed"] < 0.05
    assert rows[TENSOR]["worst_slot"] in ("after mlp, layer 2", "after attn, layer 2")


def test_the_first_that_overflows_is_named_and_the_cure_mends_it():
    model = with_large_stream("llama")
    samples = random_samples(96, 4, 16, 0)
    row = measured(model, samples, STREAM, Scaled("FP16", NONE))
    assert row["first"] == "not finite: stream after mlp, layer 2"
    assert row["survives"] is False and row["rise"] is None and row["record"]["finite"] is False
    assert cure_in_place(model, samples, 2)["refused"] is None
    row = measured(model, samples, STREAM, Scaled("FP16", NONE))
    assert row["first"] is None and row["survives"] is True and row["kl"] < 1e-3


def test_a_plain_cast_that_saturates_is_the_first_that_is_named():
    model = with_large_stream("llama")
    row = measured(model, random_samples(96, 2, 16, 0), STREAM, Scaled("FP8 E4M3", NONE))
    assert row["first"] == "saturates: stream embedding" and row["clipped"] > 0


def test_results_do_not_depend_on_the_batch():
    model, samples = build("gemma2"), random_samples(96, 4, 12, 1)
    for target, scaled in ((ACTIVATIONS, Scaled("INT8", TENSOR)), (KV, Scaled("NVFP4", BLOCK))):
        one, four = (measured(model, samples, target, scaled, batch) for batch in (1, 4))
        assert one["rise"] == pytest.approx(four["rise"], abs=1e-6) and one["kl"] == pytest.approx(four["kl"], rel=1e-3)
        assert one["flushed"] == pytest.approx(four["flushed"], rel=1e-6)


def test_kl_top_1_and_loss_are_those_of_the_logits():
    model, samples = build("llama"), random_samples(96, 3, 10, 2)
    row = measured(model, samples, WEIGHTS, Scaled("INT4", ROW))
    p = logits(model, samples.ids).double().log_softmax(-1)
    with Emulation(locate(model), {WEIGHTS: Scaled("INT4", ROW)}):
        q = logits(model, samples.ids).double().log_softmax(-1)
    assert row["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)
    assert row["top1"] == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    target = samples.ids[:, 1:, None]
    bits = (p[:, :-1].gather(2, target) - q[:, :-1].gather(2, target)).mean().item() / torch.tensor(2.0).log().item()
    assert row["rise"] == pytest.approx(bits, abs=1e-6)


def test_the_interval_is_student_s_over_pairs():
    from scipy.stats import ttest_rel

    before, after = [10.0, 12.0, 9.0, 14.0], [10.5, 12.1, 9.4, 14.9]
    rise, low, high = paired_rise(after, before, [4] * 4)
    interval = ttest_rel(after, before).confidence_interval(0.95)
    bits = 4 * torch.tensor(2.0, dtype=torch.float64).log().item()
    assert (rise, low, high) == pytest.approx((0.475 / bits, interval.low / bits, interval.high / bits))
    # Samples that lose the same share of their bytes have no spread, whatever their sizes.
    rise, low, high = paired_rise([11.0, 22.0], [10.0, 20.0], [5, 10])
    assert low == pytest.approx(rise) == pytest.approx(high)
    assert paired_rise([11.0], [10.0], [5])[1:] == (None, None)


def test_a_model_that_is_not_finite_in_fp32_is_refused():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 0] = torch.inf
    with pytest.raises(UserError, match="logits are not finite in FP32"):
        measure_reference(model, random_samples(96, 2, 8, 0), 2)


# --- what cannot be located -----------------------------------------------------------------------------------


def test_a_stream_that_cannot_be_followed_is_said_and_the_rest_measured():
    config = OPTConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
                       word_embed_proj_dim=32, max_position_embeddings=64)  # fmt: skip
    torch.manual_seed(0)
    model = OPTForCausalLM(config).eval()
    located = seen_in_a_pass(locate(model))
    assert set(located.missing) == {STREAM} and "OPT" in located.missing[STREAM]
    with pytest.raises(UserError, match="^stream: "):
        Emulation(located, {STREAM: Scaled("FP16", NONE)})
    assert not close(emulated(model, {ACTIVATIONS: Scaled("INT4", ROW)}), logits(model))
    assert not close(emulated(model, {KV: Scaled("INT4", ROW)}), logits(model))


def test_experts_are_no_linear_maps_and_their_stream_is_measured():
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    torch.manual_seed(0)
    located = seen_in_a_pass(locate(MixtralForCausalLM(config).eval()))
    assert {WEIGHTS, ACTIVATIONS} <= set(located.missing)
    assert "MixtralTopKRouter) and 3 more hold matrices that are not linear maps" in located.missing[WEIGHTS]
    assert {STREAM, KV}.isdisjoint(located.missing)
