"""The certificate: no input exceeds it, some attain it, and what has no bound says why."""

import json

import pytest
import torch
from stability_families import FAMILIES, PLACEMENTS, build, perturb
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from periln.eval.bounds.certificate import certify
from periln.eval.bounds.reach import Reach, linear_rows, norm_reach
from periln.eval.fp16.layout import find_layout
from periln.eval.structure.anatomy import find_anatomy
from periln.eval.structure.norms import NormFacts
from periln.runkit.errors import UserError
from periln.runkit.fp16 import HalfMatmul
from periln.runkit.number_format import FP16

SIZES = {
    "vocab_size": 61,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
}


def periln(placement, **changes):
    torch.manual_seed(0)
    config = PeriLlamaConfig(**SIZES | {"norm_placement": placement, "initializer_range": 0.2} | changes)
    return perturb(PeriLlamaForCausalLM(config))


def peaks(model, ids, anatomy):
    """The largest |value| of every tensor of the certificate in one pass, by its key."""
    seen, handles = {}, []

    def keep(*key):
        def see(x):
            seen[key] = max(seen.get(key, 0.0), x.abs().max().item())

        return see

    def hook(module, see, side="output"):
        if side == "output":
            handles.append(module.register_forward_hook(lambda m, a, out: see(out)))
        else:
            handles.append(module.register_forward_pre_hook(lambda m, args: see(args[0])))

    handles.append(anatomy.embedding_stream.watch(keep(0, "embedding", "stream")))
    for s in anatomy.sublayers:
        for name in ("branch", "residual_add", "stream"):
            if getattr(s, name) is not None:
                handles.append(getattr(s, name).watch(keep(s.layer, s.kind, name)))
        if s.output_norm is not None:
            handles.append(s.branch_output.watch(keep(s.layer, s.kind, "branch_output")))
        if s.input_norm is not None:
            hook(s.input_norm.module, keep(s.layer, s.kind, "normed_input"))
        parts = dict(s.module.named_children())
        for name, tensor in (("v_proj", "values"), ("gate_proj", "gate")):
            if name in parts:
                hook(parts[name], keep(s.layer, s.kind, tensor))
        for name in ("down_proj", "dense_4h_to_h"):
            if name in parts:
                hook(parts[name], keep(s.layer, s.kind, "hidden"), "input")
    hook(anatomy.lm_head, keep(anatomy.num_layers, "final", "logits"))
    if anatomy.final_norm is not None:
        hook(anatomy.final_norm.module, keep(anatomy.num_layers, "final", "stream"))
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def bounds(certificate, fp16=False):
    return {
        (r["layer"], r["sublayer"], r["tensor"]): r["bound"] * (r["fp16_factor"] if fp16 else 1 + 1e-5)
        for r in certificate["rows"]
    }


def below(seen, allowed):
    over = {k: (v, allowed[k]) for k, v in seen.items() if not v <= allowed[k]}
    assert not over
    assert set(seen) <= set(allowed) and len(seen) > 10


def every_token_and_random_ones(model, seed=0):
    vocabulary = model.config.vocab_size
    random = torch.randint(0, vocabulary, (64, 12), generator=torch.Generator().manual_seed(seed))
    return [torch.arange(vocabulary)[:, None], random]


@torch.no_grad()
@pytest.mark.parametrize("placement", [*PLACEMENTS, "sandwich", "keel"])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_no_random_input_exceeds_the_certificate(placement, norm):
    biases = {"attention_bias": True, "mlp_bias": True} if norm == "layernorm" else {}
    model = periln(placement, norm_type=norm, residual_scale=0.7, **biases)
    anatomy, certificate = find_anatomy(model), certify(model)
    assert not certificate["unbounded"]
    for ids in every_token_and_random_ones(model):
        below(peaks(model, ids, anatomy), bounds(certificate))


PRE = {"input_norm": True, "final_norm": True}


@torch.no_grad()
@pytest.mark.parametrize("gain", ["scalar", "none", "centered"])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_no_random_input_exceeds_it_with_other_gains(norm, gain):
    model = periln("peri", norm_type=norm, norm_gain=gain)
    anatomy, certificate = find_anatomy(model), certify(model)
    assert not certificate["unbounded"]
    for ids in every_token_and_random_ones(model):
        below(peaks(model, ids, anatomy), bounds(certificate))


@pytest.mark.parametrize(
    ("row", "slot"),
    [
        ("sub_ln", "inner_norm"),
        ("normformer", "inner_norm"),
        ("hybrid", "v_norm"),
        (PRE | {"v_norm": {"gain": "none"}}, "v_norm"),  # without parameters, so that only its name tells of it
        (PRE | {"attn_inner_norm": {"gain": "none"}}, "inner_norm"),
        (PRE | {"mlp_inner_norm": {"gain": "none"}}, "inner_norm"),
    ],
)
def test_what_a_norm_inside_a_sublayer_bounds_is_not_known_and_its_rewrite_is_refused(row, slot):
    model = periln(row)
    reasons = [entry["why"] for entry in certify(model)["unbounded"]]
    assert any(f"holds {slot} (" in why for why in reasons), reasons
    with pytest.raises(UserError, match=rf"no rewrite is known, it has a norm inside \({slot}\)"):
        find_layout(find_anatomy(model))


@torch.no_grad()
@pytest.mark.parametrize("name", [f for f in FAMILIES if f != "gpt2"])
def test_no_random_input_of_another_family_exceeds_it(name):
    model = build(name)
    anatomy, certificate = find_anatomy(model), certify(model)
    assert not certificate["unbounded"]
    for ids in every_token_and_random_ones(model):
        below(peaks(model, ids, anatomy), bounds(certificate))


@pytest.mark.parametrize("placement", ["post", "pre", "peri", "output"])
def test_no_optimized_input_exceeds_it(placement):
    """Gradient ascent on the embedding's rows, for the largest entry of a module's output; certified anew after it."""
    model = periln(placement)
    anatomy, ids = find_anatomy(model), torch.tensor([[1, 2, 3]])
    target = anatomy.sublayers[-1].branch
    table = model.model.embed_tokens.weight
    optimizer = torch.optim.Adam([table], lr=0.3)
    kept, first = [], None
    handle = target.watch(kept.append)
    for _ in range(40):
        kept.clear()
        model(input_ids=ids, use_cache=False)
        value = kept[0].abs().max()
        first = value.item() if first is None else first
        optimizer.zero_grad()
        (-value).backward()
        optimizer.step()
    handle.remove()
    assert value.item() > 1.2 * first, "the attack found nothing larger, so it would prove nothing"
    with torch.no_grad():
        below(peaks(model, ids, anatomy), bounds(certify(model)))


@torch.no_grad()
def test_no_searched_input_exceeds_it():
    """Gradient-free: tokens exchanged one at a time, kept where the last sum grows."""
    model = periln("peri")
    anatomy, generator = find_anatomy(model), torch.Generator().manual_seed(3)
    key, allowed = (2, "mlp", "residual_add"), bounds(certify(model))
    ids = torch.randint(0, 61, (1, 6), generator=generator)
    start = best = peaks(model, ids, anatomy)[key]
    for _ in range(60):
        trial = ids.clone()
        trial[0, torch.randint(0, 6, (1,), generator=generator)] = torch.randint(0, 61, (1,), generator=generator)
        seen = peaks(model, trial, anatomy)
        below(seen, allowed)
        if seen[key] > best:
            ids, best = trial, seen[key]
    assert start < best <= allowed[key]


@torch.no_grad()
@pytest.mark.parametrize("placement", ["pre", "peri", "post", "output"])
def test_a_pass_in_fp16_stays_below_bound_times_factor(placement):
    model = periln(placement)
    for weight in model.parameters():
        weight.copy_(weight.half())  # the weights that the pass uses
    anatomy, certificate = find_anatomy(model), certify(model)
    model.half()
    with HalfMatmul():
        for ids in every_token_and_random_ones(model):
            below(peaks(model, ids, anatomy), bounds(certificate, fp16=True))


def test_what_cancels_in_exact_arithmetic_has_room_for_its_rounding():
    """LayerNorm's beta lies in a row's null space: what FP16 leaves of it is far above the row's exact bound."""
    generator = torch.Generator().manual_seed(0)
    centre = 100 * torch.rand(64, generator=generator, dtype=torch.float64)
    row = torch.randn(64, generator=generator, dtype=torch.float64).half().double()
    centre -= row * (row @ centre) / (row @ row)
    given = Reach(centre.abs() + 1e-6, centre.norm().item() + 1e-6, centre, torch.full_like(centre, 1e-6), 1.0, 2)
    left = (row @ centre.half().double()).abs()
    exact = 1e-6 * row.norm() + (row @ centre).abs()
    assert left > 100 * exact
    assert left <= linear_rows(given, row[None], None)[0] * (1 + FP16.unit_roundoff) ** given.roundings_of(64)


def test_a_norm_s_closer_bound_knows_that_its_input_is_rounded():
    """Where the epsilon decides, a norm's output grows with its input."""
    size, facts = 4, NormFacts("rms", 1.0, None, None, 0.0)
    exact, rounded = (norm_reach(facts, size, Reach.of_box(torch.full((size,), 0.1).double(), 0.1, n)) for n in (0, 50))
    assert rounded.box[0] == pytest.approx(exact.box[0].item() * (1 + FP16.unit_roundoff) ** 50, rel=1e-3)


@torch.no_grad()
def test_the_embedding_and_an_output_norm_attain_their_bounds():
    model = periln("peri", norm_eps=1e-12)
    attention = model.model.layers[0].self_attn
    row = attention.o_proj.weight[4].clone()
    attention.o_proj.weight.zero_()
    attention.o_proj.weight[4] = row  # the module's output lies along channel 4 alone
    model.model.layers[0].attn_output_norm.weight[4] = 50.0
    certificate, anatomy = certify(model), find_anatomy(model)
    allowed = bounds(certificate)
    seen = peaks(model, torch.arange(61)[:, None], anatomy)
    for key in ((0, "embedding", "stream"), (1, "attn", "branch_output")):
        assert seen[key] == pytest.approx(allowed[key], rel=1e-4)
    assert seen[1, "attn", "branch_output"] == pytest.approx(20**0.5 * 50.0, rel=1e-4)


@torch.no_grad()
def test_attention_and_mlp_rows_attain_their_bounds():
    """With one head, a token along (W_o W_v)_j * gamma; and for the MLP's product one between the two rows."""
    model = periln("pre", num_attention_heads=1, num_key_value_heads=1, head_dim=6, norm_eps=1e-12)
    layer = model.model.layers[0]
    value = layer.self_attn.o_proj.weight @ layer.self_attn.v_proj.weight * layer.attn_input_norm.weight
    model.model.embed_tokens.weight[7] = value[value.norm(dim=1).argmax()]
    seen, allowed = peaks(model, torch.tensor([[7]]), find_anatomy(model)), bounds(certify(model))
    assert seen[1, "attn", "branch"] == pytest.approx(allowed[1, "attn", "branch"], rel=1e-4)

    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.gate_proj.weight.mul_(1e3)  # there SiLU is the identity
    gate, up = (w.weight * layer.mlp_input_norm.weight for w in (layer.mlp.gate_proj, layer.mlp.up_proj))
    product = gate.norm(dim=1) * up.norm(dim=1) + (gate * up).sum(1).abs()
    i = product.argmax()
    sign = torch.sign((gate[i] * up[i]).sum())
    model.model.embed_tokens.weight[7] = gate[i] / gate[i].norm() + sign * up[i] / up[i].norm()
    seen, allowed = peaks(model, torch.tensor([[7]]), find_anatomy(model)), bounds(certify(model))
    assert seen[1, "mlp", "hidden"] == pytest.approx(allowed[1, "mlp", "hidden"], rel=1e-4)


def test_peri_is_certified_however_large_its_modules_and_pre_is_not():
    peri, pre = periln("peri"), periln("pre")
    for model in (peri, pre):
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.data.mul_(1e6)
    tensors = {r["tensor"] for r in certify(peri)["above_limit"]}
    assert tensors == {"branch"}  # the module's output before its norm may overflow, the stream may not
    above = certify(pre)["above_limit"]
    assert {r["tensor"] for r in above} >= {"branch", "residual_add", "stream"}
    assert not certify(pre)["certified"] and certify(periln("pre"))["certified"]


def test_measured_values_stand_beside_the_bounds_and_the_record_is_json():
    certificate = certify(periln("peri"), measured={(1, "attn", "branch"): 3.5})
    row = next(r for r in certificate["rows"] if (r["layer"], r["sublayer"], r["tensor"]) == (1, "attn", "branch"))
    assert row["measured"] == 3.5 and row["bound"] > 0
    assert {"limit", "rows", "largest_bound", "unbounded"} <= set(certificate) and certificate["limit"] == FP16.largest
    assert json.loads(json.dumps(certificate, allow_nan=False)) == certificate


def test_what_has_no_bound_says_why():
    sizes = {"vocab_size": 61, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16}
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    reasons = {(r["sublayer"], r["tensor"]): r["why"] for r in certify(gpt2)["unbounded"]}
    assert "positions" in reasons["embedding", "stream"] and "Conv1D" in reasons["attn", "branch"]
    squared = periln("peri", hidden_act="relu2")
    certificate = certify(squared)
    assert {r["sublayer"] for r in certificate["unbounded"]} == {"mlp"}
    assert all("activation" in r["why"] for r in certificate["unbounded"])
    rows = bounds({"rows": [r for r in certificate["rows"] if r["bound"] is not None]})
    assert rows[2, "mlp", "residual_add"] > 0  # its output norm bounds the stream all the same


def test_a_longer_embedding_row_raises_the_certificate_of_pre():
    model = periln("pre")
    before = bounds(certify(model))
    model.model.embed_tokens.weight.data[5, 3] = 1e4
    after = bounds(certify(model))
    assert after[2, "mlp", "residual_add"] > 1e4 > before[2, "mlp", "residual_add"]
