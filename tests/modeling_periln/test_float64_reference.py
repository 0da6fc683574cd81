"""The model against a second decoder, written from the equation alone and computed in float64.

    x  <-  C( alpha * x  +  s * B( f( c * A(x) ) ) )

The reference shares no code with the model: its own table of placements, its own norms, attention and rotary
embedding (cos and sin in FP32, as the model's are). It only reads the model's weights by name.
"""

import pytest
import torch
from tiny_models import random_ids, shaken_model

# name: norms A, B, C; alpha, s, c as functions of the layer n = 1..L; (embedding norm, final norm)
REFERENCE_TABLE = {
    "post": ("C", lambda n, L: (1, 1, 1), (False, False)),
    "pre": ("A", lambda n, L: (1, 1, 1), (False, True)),
    "peri": ("AB", lambda n, L: (1, 1, 1), (True, True)),
    "output": ("B", lambda n, L: (1, 1, 1), (False, True)),
    "pre_post": ("AC", lambda n, L: (1, 1, 1), (False, False)),
    "deepnorm": ("C", lambda n, L: ((2 * L) ** 0.25, 1, 1), (False, False)),
    "lns": ("A", lambda n, L: (1, 1, n**-0.5), (False, True)),
}
LAYERS, HEADS, KV_HEADS, HEAD_DIM, THETA = 3, 4, 2, 6, 500_000.0
SILU = torch.nn.functional.silu


def reference_logits(weights, ids, rows, ends, scale=lambda n, L: 1.0, eps=None, norm_type="rmsnorm", qk_norm=None):
    """Logits (B, S, V) of a decoder with `rows[l]` = (letters, factors) as its layers' placements."""

    def eps_of(slot, layer):
        value = (eps or {}).get(slot, 1e-6) if not isinstance(eps, float) else eps
        return value[layer] if isinstance(value, list) else value

    def norm(x, name, layer=None):
        slot = name.split(".")[-1]
        gamma = weights[f"{name}.weight"]
        if norm_type == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + eps_of(slot, layer)).sqrt() * gamma
        return x + weights[f"{name}.bias"] if norm_type == "layernorm" else x

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def attention(x, name, layer):
        batch, length, _ = x.shape
        q, k, v = (linear(x, f"{name}.{p}_proj") for p in "qkv")
        if qk_norm == "full":
            q, k = norm(q, f"{name}.q_norm", layer), norm(k, f"{name}.k_norm", layer)
        q, k, v = (y.view(batch, length, -1, HEAD_DIM) for y in (q, k, v))
        if qk_norm == "head":
            q, k = norm(q, f"{name}.q_norm", layer), norm(k, f"{name}.k_norm", layer)
        frequencies = 1.0 / THETA ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
        angles = torch.outer(torch.arange(length).float(), frequencies)
        cos, sin = angles.cos().double()[:, None], angles.sin().double()[:, None]  # (S, 1, E/2), FP32 tables

        def rotate(y):  # pairs (i, i + E/2)
            a, b = y[..., : HEAD_DIM // 2], y[..., HEAD_DIM // 2 :]
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        q, k = rotate(q), rotate(k)
        heads = []
        for h in range(HEADS):
            kv = h // (HEADS // KV_HEADS)
            scores = q[:, :, h] @ k[:, :, kv].transpose(1, 2) / HEAD_DIM**0.5
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, :, kv])
        return linear(torch.cat(heads, -1), f"{name}.o_proj")

    def mlp(x, name, layer):
        return linear(SILU(linear(x, f"{name}.gate_proj")) * linear(x, f"{name}.up_proj"), f"{name}.down_proj")

    x = weights["model.embed_tokens.weight"][ids]
    x = norm(x, "model.embed_norm") if ends[0] else x
    for i, (letters, factors) in enumerate(rows):
        alpha, s, c = factors(i + 1, len(rows))
        s = s * scale(i + 1, len(rows))
        for part, name, f in (("attn", "self_attn", attention), ("mlp", "mlp", mlp)):
            layer = f"model.layers.{i}"
            branch = norm(x, f"{layer}.{part}_input_norm", i) if "A" in letters else x
            branch = f(c * branch, f"{layer}.{name}", i)
            branch = norm(branch, f"{layer}.{part}_output_norm", i) if "B" in letters else branch
            x = alpha * x + s * branch
            x = norm(x, f"{layer}.{part}_residual_norm", i) if "C" in letters else x
    x = norm(x, "model.final_norm") if ends[1] else x
    return linear(x, "lm_head")


def rows_and_ends(placement):
    if placement == "mix":
        placement = ["post", "pre", "pre"]
    if isinstance(placement, list):
        return [REFERENCE_TABLE[name][:2] for name in placement], (False, True)
    letters, factors, ends = REFERENCE_TABLE[placement]
    return [(letters, factors)] * LAYERS, ends


def difference(placement, attention="sdpa", ends=None, reference=None, **changes):
    """Largest |logit of the model - logit of the reference|; `reference` holds what the two call by other names."""
    field = {"layer_placements": placement} if isinstance(placement, list) else {"norm_placement": placement}
    model = shaken_model(**field, **changes).double()
    model.set_attn_implementation(attention)
    ids = random_ids(2, 9)
    rows, row_ends = rows_and_ends(placement)
    same = {k: v for k, v in changes.items() if k in ("norm_type", "qk_norm")}
    with torch.no_grad():
        expected = reference_logits(model.state_dict(), ids, rows, ends or row_ends, **same, **(reference or {}))
        logits = model(ids).logits
    assert logits.dtype == torch.float64
    assert expected.std() > 0.1
    return (logits - expected).abs().max().item()


EVERY = [*REFERENCE_TABLE, "mix"]
EXACT = 1e-10  # FP64 rounding; a forgotten factor or norm moves the logits by 0.01 and more


@pytest.mark.parametrize("placement", EVERY)
def test_every_placement_is_its_equation(placement):
    assert difference(placement) < EXACT


@pytest.mark.parametrize("placement", EVERY)
def test_eager_attention_is_the_same_up_to_its_softmax_in_fp32(placement):
    assert difference(placement, attention="eager") < 1e-6


@pytest.mark.parametrize("placement", EVERY)
@pytest.mark.parametrize("ends", [(False, False), (False, True), (True, False), (True, True)])
def test_norms_at_the_ends_can_be_switched_by_themselves(placement, ends):
    assert difference(placement, ends=ends, embedding_norm=ends[0], final_norm=ends[1]) < EXACT


@pytest.mark.parametrize("placement", EVERY)
@pytest.mark.parametrize("qk_norm", ["full", "head"])
def test_qk_norm_over_all_heads_or_over_one(placement, qk_norm):
    assert difference(placement, qk_norm=qk_norm) < EXACT


@pytest.mark.parametrize("placement", EVERY)
@pytest.mark.parametrize("qk_norm", [None, "full", "head"])
def test_layernorm_in_every_slot(placement, qk_norm):
    assert difference(placement, norm_type="layernorm", qk_norm=qk_norm) < EXACT


@pytest.mark.parametrize("placement", EVERY)
@pytest.mark.parametrize(
    ("value", "scale"),
    [
        (0.3, lambda n, L: 0.3),
        ("1/sqrt(2L)", lambda n, L: (2 * L) ** -0.5),
        ("1/L", lambda n, L: 1 / L),
        ("1/sqrt(l)", lambda n, L: n**-0.5),
    ],
)
def test_residual_scale_multiplies_the_branch(placement, value, scale):
    assert difference(placement, residual_scale=value, reference={"scale": scale}) < EXACT


# Epsilons as large as the mean squares, and different in every slot and layer: none can be exchanged unseen.
SLOTS = [f"{part}_{place}_norm" for part in ("attn", "mlp") for place in ("input", "output", "residual")]
EPS = {slot: [0.1 * (i + 1) + 0.3 * layer for layer in range(LAYERS)] for i, slot in enumerate([*SLOTS, "q_norm"])}
EPS |= {"k_norm": 1.5, "embed_norm": 0.7, "final_norm": 0.9}


@pytest.mark.parametrize("placement", EVERY)
@pytest.mark.parametrize("norm_type", ["rmsnorm", "layernorm"])
def test_an_epsilon_for_each_slot_and_layer(placement, norm_type):
    changes = {"norm_eps": EPS, "norm_type": norm_type, "qk_norm": "head", "embedding_norm": True, "final_norm": True}
    assert difference(placement, ends=(True, True), reference={"eps": EPS}, **changes) < EXACT


@pytest.mark.parametrize("placement", EVERY)
def test_one_epsilon_for_all(placement):
    assert difference(placement, norm_eps=0.5, reference={"eps": 0.5}) < EXACT


@pytest.mark.parametrize("placement", ["pre", "peri"])
def test_biases_of_attention_and_mlp(placement):
    assert difference(placement, attention_bias=True, mlp_bias=True) < EXACT


@pytest.mark.parametrize("names", [["peri", "post", "lns"], ["deepnorm", "output", "pre_post"]])
def test_a_placement_for_each_layer(names):
    assert difference(names) < EXACT


def test_a_row_of_the_users_own():
    row = {"input_norm": True, "output_norm": True, "residual_norm": True, "embedding_norm": True}
    row |= {"alpha": 0.8, "s": "1/sqrt(l)", "c": "1/sqrt(2L)"}
    model = shaken_model(norm_placement=row, residual_scale=0.5).double()
    ids = random_ids(2, 9)
    rows = [("ABC", lambda n, L: (0.8, 0.5 * n**-0.5, (2 * L) ** -0.5))] * LAYERS
    expected = reference_logits(model.state_dict(), ids, rows, (True, False))
    assert (model(ids).logits - expected).abs().max() < EXACT


def test_model_of_the_paper_with_its_gamma_frozen():
    changes = {"output_norm_learnable": False, "embedding_norm": False}
    assert difference("peri", ends=(False, True), **changes) < EXACT


# The comparison can fail: the reference of another row is far away.


@pytest.mark.parametrize("placement", REFERENCE_TABLE)
def test_reference_tells_every_two_rows_apart(placement):
    model = shaken_model(norm_placement=placement).double()
    ids = random_ids(2, 9)
    rows, ends = rows_and_ends(placement)
    letters, factors = rows[0]
    logits = model(ids).logits
    for wrong in (
        [(letters, lambda n, L: (1.01, 1, 1))] * LAYERS,
        [(letters, lambda n, L: (*factors(n, L)[:2], 0.99 * factors(n, L)[2]))] * LAYERS if "A" in letters else None,
        *([(letters.replace(x, ""), factors)] * LAYERS for x in letters),
    ):
        if wrong is not None:
            assert (reference_logits(model.state_dict(), ids, wrong, ends) - logits).abs().max() > 1e-3
