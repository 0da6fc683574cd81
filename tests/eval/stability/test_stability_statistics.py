"""What the probe measures is what a plain float64 computation over the same tensors gives."""

import math

import pytest
import torch
from stability_families import FAMILIES, LAYERS, PLACEMENTS, VOCABULARY, build

from periln.eval.stability.attention import AttentionProbe
from periln.eval.stability.backward import backward_rows
from periln.eval.stability.moments import Moments
from periln.eval.stability.probe import Probe
from periln.eval.stability.redundancy import Angles, skip_losses, skipped
from periln.eval.structure.anatomy import find_anatomy
from periln.eval.texts.samples import random_samples

ALL = [*FAMILIES, *(f"peri_llama:{p}" for p in PLACEMENTS)]
SAMPLES = random_samples(VOCABULARY, 7, 12, seed=3)


def plain_statistics(x: torch.Tensor) -> dict[str, float]:
    """By the textbook, on (N, S, D) in float64."""
    x = x.double()
    index = int(x.abs().argmax())
    length, width = x.shape[1:]
    deviation = x - x.mean()
    return {
        "mean_abs": x.abs().mean().item(),
        "variance": x.var(correction=0).item(),
        "variance_data": x.flatten(0, 1).var(dim=0, correction=0).mean().item(),
        "kurtosis": (deviation**4).mean().item() / deviation.square().mean().item() ** 2,
        "max_abs": x.abs().max().item(),
        "max_sample": index // (length * width),
        "max_token": index // width % length,
        "max_channel": index % width,
        "headroom_bits": math.log2(65504 / x.abs().max().item()),
    }


def run_probe(model, batch_size=3):
    """Probe and rows by (layer, sublayer, tensor, stat), over batches that do not divide the samples."""
    anatomy, first = find_anatomy(model), 0
    with torch.no_grad(), Probe(anatomy) as probe, AttentionProbe(anatomy) as attention:
        for ids in SAMPLES.batches(batch_size):
            probe.start(first)
            probe.finish(model(input_ids=ids, use_cache=False).logits, ids)
            first += len(ids)
    rows = {row[1:5]: row[5] for row in [*probe.rows(0), *attention.rows(0)]}
    return probe, rows


@pytest.mark.parametrize("family", ALL)
def test_streams_are_the_model_s_own_hidden_states(family):
    """Transformers' `hidden_states`: the embedding, the stream after each layer but the last, and the final output."""
    model = build(family)
    _, rows = run_probe(model)
    ends = []
    last = find_anatomy(model).end
    handle = last.watch(lambda x: ends.append(x.detach()))
    with torch.no_grad():
        states = model(input_ids=SAMPLES.ids, use_cache=False, output_hidden_states=True).hidden_states
    handle.remove()
    layers = len(states) - 1
    expected = {(i, "embedding" if i == 0 else "mlp"): states[i] for i in range(layers)}
    expected[layers, "mlp"] = ends[0]
    if find_anatomy(model).final_norm is not None:
        expected[layers, "final"] = states[-1]
        assert not torch.equal(ends[0], states[-1])
    for (layer, sublayer), x in expected.items():
        for stat, value in plain_statistics(x).items():
            assert rows[layer, sublayer, "stream", stat] == pytest.approx(value, rel=1e-5, abs=1e-12), (layer, stat)


@pytest.mark.parametrize(
    ("family", "attn", "output_norm"),
    [
        ("gemma3", "self_attn", "post_attention_layernorm"),
        ("olmo2", "self_attn", "post_attention_layernorm"),
        ("glm4", "self_attn", "post_self_attn_layernorm"),
        ("llama", "self_attn", None),
        ("neox_parallel", "attention", None),
    ],
)
def test_branches_are_measured_before_and_after_their_output_norm(family, attn, output_norm):
    model = build(family)
    _, rows = run_probe(model)
    seen, layer = {}, find_anatomy(model).layers[1][1]
    module = getattr(layer, attn)
    module.register_forward_hook(lambda m, a, o: seen.__setitem__("branch", o[0]))
    after = module if output_norm is None else getattr(layer, output_norm)
    after.register_forward_hook(lambda m, a, o: seen.__setitem__("branch_output", o[0] if isinstance(o, tuple) else o))
    layer.register_forward_pre_hook(lambda m, a: seen.__setitem__("x", a[0]))
    with torch.no_grad():
        model(input_ids=SAMPLES.ids, use_cache=False)
    for tensor in ("branch", "branch_output"):
        for stat, value in plain_statistics(seen[tensor]).items():
            assert rows[2, "attn", tensor, stat] == pytest.approx(value, rel=1e-5), (tensor, stat)
    share = (seen["branch_output"].double().norm(dim=-1) / seen["x"].double().norm(dim=-1)).mean().item()
    assert rows[2, "attn", "branch_output", "branch_share"] == pytest.approx(share, rel=1e-5)


def test_the_loss_is_the_model_s_own():
    model = build("qwen3")
    probe, _ = run_probe(model)
    with torch.no_grad():
        expected = model(input_ids=SAMPLES.ids, labels=SAMPLES.ids).loss.item()
    assert probe.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "olmo2", "glm4", "qwen3", "neox_parallel"])
def test_attention_s_entropy_is_that_of_its_weights(family):
    model = build(family)
    attention = [n for n, p in model.named_parameters() if "q_proj" in n or "k_proj" in n or "query_key" in n]
    with torch.no_grad():
        for name in attention:
            model.get_parameter(name).mul_(8)  # away from uniform attention
    _, rows = run_probe(model)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(input_ids=SAMPLES.ids, use_cache=False, output_attentions=True).attentions
    uniform = torch.arange(1, 13).log().mean().item()
    for layer, p in enumerate(weights, start=1):
        entropy = torch.special.entr(p.double()).sum(-1).mean().item()
        assert rows[layer, "attn", "attention_logits", "entropy"] == pytest.approx(entropy, rel=1e-5)
        assert entropy < 0.98 * uniform
    assert before in ("sdpa", "eager")


def test_attention_s_largest_logit_is_that_of_query_and_key():
    """GPT-2 has neither rotary embedding nor its own mask: logits by hand."""
    model = build("gpt2")
    _, rows = run_probe(model)
    seen = []
    model.transformer.h[1].attn.c_attn.register_forward_hook(lambda m, a, o: seen.append(o))
    with torch.no_grad():
        model(input_ids=SAMPLES.ids, use_cache=False)
    query, key, _ = seen[0].view(7, 12, 3, 4, 8).permute(2, 0, 3, 1, 4)
    logits = (query @ key.transpose(2, 3) / 8**0.5).masked_fill(~torch.ones(12, 12).tril().bool(), -torch.inf)
    assert rows[2, "attn", "attention_logits", "max"] == pytest.approx(logits.max().item(), rel=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "neox_sequential", "peri_llama:peri"])
def test_the_probe_changes_nothing(family):
    model = build(family)
    with torch.no_grad():
        before = model(input_ids=SAMPLES.ids, use_cache=False).logits
        run_probe(model)
        after = model(input_ids=SAMPLES.ids, use_cache=False).logits
        anatomy = find_anatomy(model)
        with Probe(anatomy), AttentionProbe(anatomy):
            inside = model(input_ids=SAMPLES.ids, use_cache=False).logits
    assert torch.equal(before, after)
    torch.testing.assert_close(inside, before, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_memory_does_not_grow_with_samples():
    def held(probe):
        sums = [(m.channel_sum.numel(), m.channel_square.numel()) for m in probe.moments.values()]
        return sums, len(probe.peaks), probe.angles.sums.numel(), len(probe._batch), len(probe.shares)

    model = build("llama")
    few, _ = run_probe(model, batch_size=7)
    many, _ = run_probe(model, batch_size=1)
    assert held(few) == held(many)
    assert held(many)[3] == 0


def test_angles_are_arccos_of_the_cosine_over_pi():
    model = build("llama")
    probe, _ = run_probe(model)
    with torch.no_grad():
        states = model(input_ids=SAMPLES.ids, use_cache=False, output_hidden_states=True).hidden_states
    a, b = states[0].double(), states[1].double()
    expected = (torch.cosine_similarity(a, b, dim=-1).arccos() / math.pi).mean().item()
    found = {(layer, other): value for _, layer, other, value in probe.angles.rows(0)}
    assert found[0, 1] == pytest.approx(expected, rel=1e-6)
    assert set(found) == {(0, 1), (0, 2), (1, 2)}


def test_equal_streams_have_no_angle_and_only_the_asked_pairs_are_given():
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    angles = Angles(3, apart=2)
    angles.add([x, x, 3 * x, -x])
    values = {(layer, other): value for _, layer, other, value in angles.rows(0)}
    assert set(values) == {(0, 2), (1, 3)}
    assert values[0, 2] == pytest.approx(0.0, abs=1e-7)  # rounding beyond 1 would give NaN
    assert values[1, 3] == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize("family", ["llama", "neox_parallel"])
def test_a_skipped_layer_is_as_one_taken_out(family):
    model = build(family)
    anatomy = find_anatomy(model)
    ids = SAMPLES.ids

    @torch.no_grad()
    def loss():
        return model(input_ids=ids, labels=ids, use_cache=False).loss.item()

    rows = skip_losses(anatomy, loss, step=0)
    whole = loss()
    layers = model.base_model.layers
    second = layers[1]
    del layers[1]
    model.config.num_hidden_layers = 1
    assert rows[1][5] == pytest.approx(loss() - whole, abs=1e-6)
    assert rows[1][5] != 0
    layers.append(second)
    model.config.num_hidden_layers = LAYERS
    with skipped(layers[0]), torch.no_grad():
        states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    assert states is not None


def test_gradients_are_those_of_the_mean_loss():
    model = build("llama")
    rows = {row[1:5]: row[5] for row in backward_rows(find_anatomy(model), list(SAMPLES.batches(2)), 0)}
    assert all(p.grad is None for p in model.parameters())
    model(input_ids=SAMPLES.ids, labels=SAMPLES.ids).loss.backward()
    for layer, block in enumerate(model.model.layers, start=1):
        for sublayer, modules in (
            ("attn", [block.self_attn, block.input_layernorm]),
            ("mlp", [block.mlp, block.post_attention_layernorm]),
            ("layer", [block]),
        ):
            grads = torch.cat([p.grad.flatten() for m in modules for p in m.parameters()]).double()
            assert rows[layer, sublayer, "gradient", "norm"] == pytest.approx(grads.norm().item(), rel=1e-4)
            variance = grads.var(correction=0).item()
            assert rows[layer, sublayer, "gradient", "variance"] == pytest.approx(variance, rel=1e-4)
    weight = model.model.layers[1].mlp.down_proj.weight
    inner = (weight.grad * weight).sum() / weight.grad.norm() / weight.norm()
    assert rows[2, "mlp", "branch_weights", "scale_freedom"] == pytest.approx(inner.item(), abs=1e-5)


@pytest.mark.parametrize(("family", "free"), [("gemma2", True), ("olmo2", True), ("glm4", True), ("llama", False)])
def test_an_output_norm_frees_the_scale_of_the_branch_weights(family, free):
    model = build(family)
    rows = backward_rows(find_anatomy(model), list(SAMPLES.batches(7)), 0)
    freedom = [abs(row[5]) for row in rows if row[3] == "branch_weights"]
    assert len(freedom) == 2 * LAYERS
    assert (max(freedom) < 0.01) == free  # not 0: these tiny branches feel the norm's epsilon


def test_peaks_of_inner_tensors_are_measured_too():
    model = build("llama")
    _, rows = run_probe(model)
    seen = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        model(input_ids=SAMPLES.ids, use_cache=False)
    expected = seen[0].abs().max().item()
    assert rows[1, "mlp", "input:mlp.down_proj", "max_abs"] == pytest.approx(expected, rel=1e-5)
    bits = math.log2(65504 / expected)
    assert rows[1, "mlp", "input:mlp.down_proj", "headroom_bits"] == pytest.approx(bits, rel=1e-5)


def test_what_is_not_finite_is_shown_and_not_averaged_away():
    moments = Moments()
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    x[1, 2, 3] = math.nan
    moments.add(torch.ones(1, 3, 4), 0)
    moments.add(x, 1)
    moments.add(100 * torch.ones(1, 3, 4), 3)
    stats = moments.stats()
    assert math.isnan(stats["max_abs"]) and stats["headroom_bits"] == -math.inf and moments.not_finite == 1
    assert (stats["max_sample"], stats["max_token"], stats["max_channel"]) == (2, 2, 3)
