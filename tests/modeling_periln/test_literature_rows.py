"""Rows of the literature, kinds of norms and learned factors against their sources' equations, in float64.

The reference shares no code with the model: each row is written out as an equation (`placements.py` says what each was
compared with) and reads the model's weights by name. H heads, D hidden size, L layers; all sublayers have 2L.
"""

import json
import subprocess
import sys

import pytest
import torch
from tiny_models import SIZES, random_ids, shaken_model, tiny_config

from modeling_periln import PeriLlamaForCausalLM

LAYERS, HEADS, KV_HEADS, HEAD_DIM, THETA = 3, 4, 2, 6, 500_000.0
EXACT = 1e-10


def rms(x, gain, eps=1e-6):
    return gain * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


class Reference:
    """Attention and MLP of one layer by the weights' names, with what a row puts inside them."""

    def __init__(self, weights, layer: int):
        self.weights, self.prefix = weights, f"model.layers.{layer}."

    def __getitem__(self, name):
        return self.weights[self.prefix + name + ".weight"]

    def attention(self, x, qkv=False, inner=lambda heads: heads, values=lambda v: v):
        batch, length, _ = x.shape
        q, k, v = (x @ self[f"self_attn.{p}_proj"].T for p in "qkv")
        v = values(v)
        q, k, v = (y.view(batch, length, -1, HEAD_DIM) for y in (q, k, v))
        if qkv:
            q, k, v = (rms(y, self[f"self_attn.{p}_norm"]) for p, y in zip("qkv", (q, k, v), strict=True))
        angles = torch.outer(torch.arange(length).float(), 1.0 / THETA ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
        turn = torch.complex(angles.cos().double(), angles.sin().double())[:, None]  # FP32 tables, as the model's
        q, k = (torch.view_as_complex(torch.stack(y.chunk(2, -1), -1).contiguous()) * turn for y in (q, k))
        q, k = (torch.cat((y.real, y.imag), -1) for y in (q, k))
        future = torch.ones(length, length).triu(1).bool()
        out = []
        for h in range(HEADS):
            kv = h // (HEADS // KV_HEADS)
            scores = q[:, :, h] @ k[:, :, kv].mT / HEAD_DIM**0.5
            out.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, :, kv])
        return inner(torch.stack(out, 2)).flatten(-2) @ self["self_attn.o_proj"].T

    def mlp(self, x, inner=lambda hidden: hidden):
        gate = torch.nn.functional.silu(x @ self["mlp.gate_proj"].T)
        return inner(gate * (x @ self["mlp.up_proj"].T)) @ self["mlp.down_proj"].T


def sandwich(x, w, layer):  # Gemma 2: x + Norm(f(Norm(x)))
    x = x + rms(w.attention(rms(x, w["attn_input_norm"])), w["attn_output_norm"])
    return x + rms(w.mlp(rms(x, w["mlp_input_norm"])), w["mlp_output_norm"])


def sub_ln(x, w, layer):  # Magneto: a second norm inside, before the projection back
    attn = w.attention(
        rms(x, w["attn_input_norm"]),
        inner=lambda h: rms(h.flatten(-2), w["self_attn.inner_norm"]).unflatten(-1, (HEADS, -1)),
    )
    x = x + attn
    return x + w.mlp(rms(x, w["mlp_input_norm"]), inner=lambda h: rms(h, w["mlp.inner_norm"]))


def normformer(x, w, layer):  # HeadScale, a norm after attention, a norm inside the MLP
    heads = w.attention(rms(x, w["attn_input_norm"]), inner=lambda h: h * w["self_attn.inner_norm"][:, None])
    x = x + rms(heads, w["attn_output_norm"])
    return x + w.mlp(rms(x, w["mlp_input_norm"]), inner=lambda h: rms(h, w["mlp.inner_norm"]))


def hybrid(x, w, layer):  # Y = MHA_QKV(X) + X;  X' = FFN(Norm(Y)) + Norm(Y)
    y = rms(w.attention(x, qkv=True) + x, w["attn_residual_norm"])
    return w.mlp(y) + y


def hybrid_star(x, w, layer):  # the first block: Pre-Norm in both sublayers
    if layer > 1:
        return hybrid(x, w, layer)
    x = w.attention(rms(x, w["attn_input_norm"]), qkv=True) + x
    return w.mlp(rms(x, w["mlp_input_norm"])) + x


def keel(x, w, layer):  # equation 8: Norm(alpha x + f(Norm(x))), alpha the number of sublayers
    x = rms(2 * LAYERS * x + w.attention(rms(x, w["attn_input_norm"])), w["attn_residual_norm"])
    return rms(2 * LAYERS * x + w.mlp(rms(x, w["mlp_input_norm"])), w["mlp_residual_norm"])


def keel_first(x, w, layer):  # section 3.1: no Post-LN in the first attention, no alpha in the first layer
    if layer > 1:
        return keel(x, w, layer)
    x = x + w.attention(rms(x, w["attn_input_norm"]))
    return rms(x + w.mlp(rms(x, w["mlp_input_norm"])), w["mlp_residual_norm"])


def learned_residual(x, w, layer):  # Norm(omega * x + f(x)), omega a vector (Admin, equation 9)
    omega = {part: w.weights[f"{w.prefix}{part}_residual.alpha"] for part in ("attn", "mlp")}
    x = rms(omega["attn"] * x + w.attention(x), w["attn_residual_norm"])
    return rms(omega["mlp"] * x + w.mlp(x), w["mlp_residual_norm"])


def no_norms(x, w, layer):
    x = x + w.attention(x)
    return x + w.mlp(x)


ROWS = {  # the layer, and whether there is a final norm
    "sandwich": (sandwich, True),
    "sub_ln": (sub_ln, True),
    "normformer": (normformer, True),
    "hybrid": (hybrid, True),
    "hybrid_star": (hybrid_star, True),
    "keel": (keel, False),
    "keel_first": (keel_first, False),
    "learned_residual": (learned_residual, False),
    "none": (no_norms, False),
}


def reference(weights, ids, layer, final_norm):
    x = weights["model.embed_tokens.weight"][ids]
    for i in range(LAYERS):
        x = layer(x, Reference(weights, i), i + 1)
    x = rms(x, weights["model.final_norm.weight"]) if final_norm else x
    return x @ weights["lm_head.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_its_papers_equation(name):
    model, ids = shaken_model(norm_placement=name, num_hidden_layers=LAYERS).double(), random_ids(2, 9)
    expected = reference(model.state_dict(), ids, *ROWS[name])
    assert expected.std() > 0.01
    assert (model(ids).logits - expected).abs().max() < EXACT * max(1.0, expected.abs().max().item())


# Kinds and gains


def dynamic(function):
    def normed(x, w, name):
        alpha, shift = w[f"{name}.alpha"], w.get(f"{name}.shift", 0.0)
        return function(alpha * x + shift)

    return normed


KINDS = {
    "rmsnorm": lambda x, w, name: rms(x, 1.0),
    "layernorm": lambda x, w, name: rms(x - x.mean(-1, keepdim=True), 1.0),
    "l2": lambda x, w, name: x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt(),
    "dyt": dynamic(torch.tanh),
    "derf": dynamic(torch.erf),
}
GAINS = {
    "channel": lambda x, weight: x * weight,
    "scalar": lambda x, weight: x * weight,
    "centered": lambda x, weight: x * (1 + weight),
    "none": lambda x, weight: x,
}


@torch.no_grad()
@pytest.mark.parametrize("gain", GAINS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_with_every_gain_is_its_formula(kind, gain):
    model = shaken_model(norm_placement="peri", norm_type=kind, norm_gain=gain, num_hidden_layers=1).double()
    weights, seen = model.state_dict(), []
    for name, module in model.named_modules():
        if name.endswith("_norm") and not isinstance(module, torch.nn.Identity):
            module.register_forward_hook(lambda m, args, out, name=name: seen.append((name, args[0], out)))
    model(random_ids(2, 5))
    assert len(seen) == 6
    assert max((out - x).abs().max() for _, x, out in seen) > 0.01
    for name, x, out in seen:
        expected = GAINS[gain](KINDS[kind](x, weights, name), weights.get(f"{name}.weight"))
        assert (f"{name}.weight" in weights) == (gain != "none")
        expected = expected + weights.get(f"{name}.bias", 0.0)
        assert (f"{name}.bias" in weights) == (kind in ("layernorm", "dyt", "derf") and gain in ("channel", "centered"))
        assert (out - expected).abs().max() < 1e-12


OWN = {
    "attn": {"input_norm": True, "output_norm": {"kind": "layernorm", "gain": "scalar"}, "alpha": 0.5},
    "mlp": {"residual_norm": {"kind": "dyt"}, "s": {"learned": "scalar", "init": 0.25}, "c": "1/sqrt(2L)"},
    "v_norm": {"over": "full", "kind": "l2"},
    "mlp_inner_norm": {"gain": "centered", "eps": 0.1},
    "final_norm": {"kind": "derf"},
}


@torch.no_grad()
def test_different_rows_for_attention_and_mlp_of_the_users_own():
    model, ids = shaken_model(norm_placement=OWN, num_hidden_layers=LAYERS).double(), random_ids(2, 9)
    weights = model.state_dict()

    def layer(x, w, n):
        def by_name(name):
            return weights[w.prefix + name]

        def values(v):
            return KINDS["l2"](v, weights, "") * w["self_attn.v_norm"]

        branch = w.attention(rms(x, w["attn_input_norm"]), values=values)
        centered = branch - branch.mean(-1, keepdim=True)
        x = 0.5 * x + rms(centered, w["attn_output_norm"])
        inner = lambda h: rms(h, 1 + w["mlp.inner_norm"], eps=0.1)  # noqa: E731
        x = x + by_name("mlp_residual.s") * w.mlp((2 * LAYERS) ** -0.5 * x, inner=inner)
        norm = "mlp_residual_norm"
        return torch.tanh(by_name(f"{norm}.alpha") * x) * w[norm] + by_name(f"{norm}.bias")

    x = weights["model.embed_tokens.weight"][ids]
    for i in range(LAYERS):
        x = layer(x, Reference(weights, i), i + 1)
    end = "model.final_norm"
    x = torch.erf(weights[f"{end}.alpha"] * x + weights[f"{end}.shift"]) * weights[f"{end}.weight"]
    expected = (x + weights[f"{end}.bias"]) @ weights["lm_head.weight"].T
    assert (model(ids).logits - expected).abs().max() < EXACT


SHAPES = [*ROWS, OWN]


@torch.no_grad()
@pytest.mark.parametrize("row", SHAPES, ids=[*ROWS, "own"])
def test_a_row_generates_with_its_cache_what_it_generates_without(row):
    model, ids = shaken_model(norm_placement=row, num_hidden_layers=LAYERS), random_ids(2, 5)
    how = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **how), model.generate(ids, **how, use_cache=False))


@pytest.mark.parametrize("row", SHAPES, ids=[*ROWS, "own"])
def test_a_row_trains_every_parameter_and_compiles(row):
    model, ids = shaken_model(norm_placement=row, num_hidden_layers=2), random_ids(2, 6)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    torch.compiler.reset()  # else the rows share one limit of compilations
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert (compiled(ids).logits - model(ids).logits).abs().max() < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("row", ["normformer", OWN], ids=["normformer", "own"])
def test_a_row_exports(row):
    model, ids = shaken_model(norm_placement=row, num_hidden_layers=2), random_ids(2, 6)
    exported = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    assert (exported.module()(ids, use_cache=False).logits - model(ids).logits).abs().max() < 1e-6


@pytest.mark.parametrize("row", SHAPES, ids=[*ROWS, "own"])
def test_a_row_survives_a_saved_checkpoint_and_half_precision(row, tmp_path):
    model, ids = shaken_model(norm_placement=row, num_hidden_layers=LAYERS), random_ids(2, 6)
    model.save_pretrained(tmp_path)
    loaded = PeriLlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.stream_plan() == model.config.stream_plan()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        half = loaded.to(torch.bfloat16)
        seen = []
        for module in half.modules():
            if type(module).__name__ == "PeriLlamaResidual":
                module.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
        assert half(ids).logits.dtype == torch.bfloat16 and set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("row", SHAPES, ids=[*ROWS, "own"])
def test_what_was_not_in_a_checkpoint_begins_as_it_would_have(row, tmp_path):
    """Of a partial checkpoint the missing norms and factors get their initial values, not what was in memory."""
    torch.manual_seed(0)
    fresh = PeriLlamaForCausalLM(tiny_config(norm_placement=row, num_hidden_layers=2))
    fresh.save_pretrained(tmp_path, state_dict={"lm_head.weight": fresh.lm_head.weight})
    loaded = PeriLlamaForCausalLM.from_pretrained(tmp_path)
    for name, parameter in fresh.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(loaded.get_parameter(name), parameter), name


REMOTE = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "modeling_periln" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.tensor([[3, 1, 4, 1, 5]])
print(model.generate(ids, max_new_tokens=6, do_sample=False).tolist())
"""


@pytest.mark.slow
@pytest.mark.parametrize("row", ["hybrid_star", OWN], ids=["hybrid_star", "own"])
def test_a_row_is_carried_by_remote_code(row, tmp_path):
    model = shaken_model(norm_placement=row, num_hidden_layers=LAYERS)
    model.save_pretrained(tmp_path / "model")
    expected = model.generate(torch.tensor([[3, 1, 4, 1, 5]]), max_new_tokens=6, do_sample=False).tolist()
    command = [sys.executable, "-I", "-c", REMOTE, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


WRONG = {
    "hyper_connections": ("hyper_connections", "several residual streams"),
    "x0_lambdas": ({"x0_lambdas": 1}, "'x0_lambdas', which one stream cannot have"),
    "attn key": (
        {"attn": {"inputnorm": True}},
        r"norm_placement\['attn'\] has an unknown key 'inputnorm'.*'input_norm'",
    ),
    "attn value": ({"attn": True}, "norm_placement\\['attn'\\]=True must be a mapping"),
    "kind": ({"input_norm": {"kind": "rms"}}, "'kind'\\]='rms' is not known: did you mean 'rmsnorm'"),
    "gain": ({"input_norm": {"gain": "head"}}, "only attn_inner_norm sees the heads apart"),
    "eps": ({"input_norm": {"eps": -1}}, "'eps'\\]=-1 must be a number of at least 0"),
    "eps of dyt": ({"input_norm": {"kind": "dyt", "eps": 1e-5}}, "dyt has no epsilon"),
    "learned": ({"alpha": {"learned": "vector"}}, "'learned'\\]='vector' must be one of"),
    "learned c": ({"c": {"learned": "scalar"}}, "c is a constant"),
    "span": ({"q_norm": "heads"}, "q_norm'\\]='heads' must be one of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_row_cannot_be_is_refused_by_name(case):
    row, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        tiny_config(norm_placement=row)


def test_qk_norm_is_not_given_twice():
    with pytest.raises(ValueError, match="qk_norm='full': the placement has norms on queries or keys already"):
        tiny_config(norm_placement="hybrid", qk_norm="full")
    with pytest.raises(ValueError, match=r"layer_placements\[0\] has 'final_norm', which belongs to the whole stream"):
        tiny_config(layer_placements=[{"final_norm": True}] * SIZES["num_hidden_layers"])
