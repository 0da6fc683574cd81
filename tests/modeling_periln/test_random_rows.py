"""Random rows against the equation, forward and backward, in float64.

A row is drawn from all that one can hold: attention and MLP apart, kinds, gains, epsilons, norms on q, k and v and
inside the sublayers, constant, named and learned factors; one row or a list of them, with random sizes and switches.
The reference reads what was drawn, as it was written, and the weights by name. It shares no code with the model.
"""

import math
import random

import pytest
import torch
from tiny_models import random_ids, shaken

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM

EXACT = 1e-9
KINDS = ("rmsnorm", "layernorm", "dyt", "derf", "l2")
RULES = {
    "1/sqrt(l)": lambda n, L: n**-0.5,
    "1/sqrt(2L)": lambda n, L: (2 * L) ** -0.5,
    "1/L": lambda n, L: 1 / L,
    "(2L)^(1/4)": lambda n, L: (2 * L) ** 0.25,
}


# Drawing


def draw_norm(r: random.Random, gains=("channel", "centered", "scalar", "none")) -> dict:
    norm = {"kind": r.choice(KINDS), "gain": r.choice(gains)}
    norm = {key: value for key, value in norm.items() if r.random() < 0.7}
    if norm.get("kind", "rmsnorm") not in ("dyt", "derf") and r.random() < 0.5:
        norm["eps"] = r.choice([1e-3, 0.1, 0.7])
    return norm


def draw_slot(r: random.Random, gains=("channel", "centered", "scalar", "none")) -> bool | dict:
    return draw_norm(r, gains) if r.random() < 0.4 else r.random() < 0.5


def draw_factor(r: random.Random, learned: bool = True) -> float | str | dict:
    kind = r.choice(["constant", "rule", "scalar", "channel"] if learned else ["constant", "rule"])
    value = round(r.uniform(0.3, 1.5), 2) if kind != "rule" else r.choice(list(RULES))
    return value if kind in ("constant", "rule") else {"learned": kind, "init": value}


def draw_part(r: random.Random) -> dict:
    part = {slot: draw_slot(r) for slot in ("input_norm", "output_norm", "residual_norm")}
    part |= {"alpha": draw_factor(r), "s": draw_factor(r), "c": draw_factor(r, learned=False)}
    return {key: value for key, value in part.items() if r.random() < 0.7}


def draw_row(r: random.Random, qk_norm: bool) -> dict:
    row = draw_part(r) | {"attn": draw_part(r), "mlp": draw_part(r)}
    for slot in ("v_norm",) if qk_norm else ("q_norm", "k_norm", "v_norm"):
        if r.random() < 0.5:
            row[slot] = r.choice(["head", "full", {"over": r.choice(["head", "full"])} | draw_norm(r)])
    row["attn_inner_norm"] = draw_slot(r, ("channel", "centered", "scalar", "head", "none"))
    row["mlp_inner_norm"] = draw_slot(r)
    return row


def draw(seed: int) -> dict:
    """The fields of a configuration."""
    r = random.Random(seed)
    kv = r.choice([1, 2, 3])
    layers = r.choice([1, 2, 3])
    fields = {"num_key_value_heads": kv, "num_attention_heads": kv * r.choice([1, 2]), "head_dim": r.choice([4, 8])}
    fields |= {"hidden_size": r.choice([10, 17]), "intermediate_size": r.choice([9, 14]), "num_hidden_layers": layers}
    fields |= {"vocab_size": 31, "max_position_embeddings": 32}
    fields |= {"attention_bias": r.random() < 0.3, "mlp_bias": r.random() < 0.3}
    fields |= {"norm_type": r.choice(KINDS[:2]), "norm_gain": r.choice(["channel", "centered", "scalar"])}
    fields |= {
        "norm_eps": {"attn_input_norm": 0.2, "q_norm": [0.1 * (i + 1) for i in range(layers)], "final_norm": 0.3}
    }
    fields |= {"qk_norm": r.choice([None, None, "head", "full"]), "residual_scale": r.choice([1.0, 0.5, "1/sqrt(2L)"])}
    rows = [draw_row(r, fields["qk_norm"] is not None) for _ in range(layers)]
    if r.random() < 0.5:
        fields |= {"layer_placements": rows, "embedding_norm": r.random() < 0.5, "final_norm": r.random() < 0.5}
    else:
        fields["norm_placement"] = rows[0] | {"embedding_norm": draw_slot(r), "final_norm": draw_slot(r)}
    if r.random() < 0.5:
        fields |= {"sliding_window": 3, "layer_types": ["sliding_attention"] + ["full_attention"] * (layers - 1)}
    fields |= {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}}
    fields |= {"no_rope_layers": [r.choice([0, 1]) for _ in range(layers)]}
    return fields | {"embedding_multiplier": r.choice([1.0, 2.5]), "query_pre_attn_scalar": r.choice([None, 5.0])}


# The reference


class Reference:
    """The model that `given` describes, computed from the weights `w`, by name."""

    def __init__(self, w: dict[str, torch.Tensor], given: dict):
        self.w, self.given, self.layers = w, given, given["num_hidden_layers"]

    def norm(self, x, spec, name, layer=None):
        """`spec` as a slot is written: true, or a mapping; over the last dimension."""
        if spec is None or spec is False:
            return x
        spec = {} if spec is True or isinstance(spec, str) else spec
        kind = spec.get("kind") or self.given["norm_type"]
        gain = spec.get("gain") or self.given["norm_gain"]
        slot = name.split(".")[-1]
        if slot == "inner_norm":
            slot = "attn_inner_norm" if "self_attn" in name else "mlp_inner_norm"
        eps = spec.get("eps", self.given["norm_eps"].get(slot, 1e-6))
        eps = eps[layer] if isinstance(eps, list) else eps
        if kind == "rmsnorm":
            y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
        elif kind == "layernorm":
            centered = x - x.mean(-1, keepdim=True)
            y = centered / torch.sqrt((centered * centered).mean(-1, keepdim=True) + eps)
        elif kind == "l2":
            y = x / torch.sqrt((x * x).sum(-1, keepdim=True) + eps)
        elif kind == "dyt":
            y = torch.tanh(self.w[f"{name}.alpha"] * x)
        else:
            y = torch.erf(self.w[f"{name}.alpha"] * x + self.w[f"{name}.shift"])
        if gain == "head":
            return torch.cat(
                [w * h for w, h in zip(self.w[f"{name}.weight"], y.chunk(self.heads, -1), strict=True)], -1
            )
        if gain != "none":
            y = y * (self.w[f"{name}.weight"] + (gain == "centered"))
        biased = kind in ("layernorm", "dyt", "derf") and gain in ("channel", "centered")
        return y + self.w[f"{name}.bias"] if biased else y

    def factor(self, value, name, layer, scale=1.0):
        if isinstance(value, dict):
            return self.w[name]
        return scale * (RULES[value](layer + 1, self.layers) if isinstance(value, str) else value)

    def linear(self, x, name):
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    @property
    def heads(self):
        return self.given["num_attention_heads"]

    def attention(self, x, row, prefix, layer):
        given, size, length = self.given, self.given["head_dim"], x.shape[1]
        read = {}
        for p in "qkv":
            spec = given["qk_norm"] if p != "v" and given["qk_norm"] else row.get(f"{p}_norm")
            over = spec.get("over", "head") if isinstance(spec, dict) else spec
            y, name = self.linear(x, f"{prefix}.{p}_proj"), f"{prefix}.{p}_norm"
            y = self.norm(y, spec, name, layer) if over == "full" else y
            y = y.unflatten(-1, (-1, size))
            read[p] = self.norm(y, spec, name, layer) if over == "head" else y
        if given["no_rope_layers"][layer]:
            half = size // 2  # of each head the first half is turned, in pairs (i, i + half / 2)
            speeds = 1.0 / 100.0 ** (torch.arange(0, half, 2).float() / half)
            angles = torch.outer(torch.arange(length).float(), speeds)[:, None]
            cos, sin = angles.cos().double(), angles.sin().double()  # FP32 tables, as the model's
            for p in "qk":
                a, b, rest = read[p].split([half // 2, half // 2, size - half], -1)
                read[p] = torch.cat((a * cos - b * sin, a * sin + b * cos, rest), -1)
        out = []
        for h in range(self.heads):
            kv = h * given["num_key_value_heads"] // self.heads
            scores = read["q"][:, :, h] @ read["k"][:, :, kv].mT / math.sqrt(given["query_pre_attn_scalar"] or size)
            apart = torch.arange(length)[:, None] - torch.arange(length)[None]
            slides = given.get("layer_types", [""] * self.layers)[layer] == "sliding_attention"
            hidden = (apart < 0) | (apart >= (given["sliding_window"] if slides else length))
            out.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ read["v"][:, :, kv])
        inner = self.norm(torch.cat(out, -1), row["attn_inner_norm"], f"{prefix}.inner_norm", layer)
        return self.linear(inner, f"{prefix}.o_proj")

    def mlp(self, x, row, prefix, layer):
        gate = self.linear(x, f"{prefix}.gate_proj")
        gated = gate * torch.sigmoid(gate) * self.linear(x, f"{prefix}.up_proj")
        return self.linear(
            self.norm(gated, row["mlp_inner_norm"], f"{prefix}.inner_norm", layer), f"{prefix}.down_proj"
        )

    def logits(self, ids):
        given = self.given
        rows = given.get("layer_placements") or [given["norm_placement"]] * self.layers
        ends = given.get("norm_placement") or given
        scale = self.factor(given["residual_scale"], "", 0)
        x = given["embedding_multiplier"] * self.w["model.embed_tokens.weight"][ids]
        x = self.norm(x, ends["embedding_norm"], "model.embed_norm")
        for i, row in enumerate(rows):
            for part, f, module in (("attn", self.attention, "self_attn"), ("mlp", self.mlp, "mlp")):
                at, said = f"model.layers.{i}.{part}", row | row[part]
                branch = self.norm(x, said.get("input_norm"), f"{at}_input_norm", i)
                branch = self.factor(said.get("c", 1.0), "", i) * branch
                branch = f(branch, row, f"model.layers.{i}.{module}", i)
                branch = self.norm(branch, said.get("output_norm"), f"{at}_output_norm", i)
                alpha = self.factor(said.get("alpha", 1.0), f"{at}_residual.alpha", i)
                s = self.factor(said.get("s", 1.0), f"{at}_residual.s", i, scale)
                x = self.norm(alpha * x + s * branch, said.get("residual_norm"), f"{at}_residual_norm", i)
        x = self.norm(x, ends["final_norm"], "model.final_norm")
        return x @ self.w["lm_head.weight"].T


def pair(seed: int) -> tuple[PeriLlamaForCausalLM, Reference]:
    given = draw(seed)
    torch.manual_seed(seed)
    model = shaken(PeriLlamaForCausalLM(PeriLlamaConfig(**given)).eval(), seed).double()
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    return model, Reference(weights, given)


@pytest.mark.parametrize("seed", range(24))
def test_a_random_row_is_its_equation_and_so_is_its_gradient(seed):
    model, reference = pair(seed)
    ids = random_ids(2, 7, vocab=31, seed=seed)
    logits, expected = model(ids, use_cache=False).logits, reference.logits(ids)
    assert (logits - expected).abs().max() <= EXACT * max(1.0, expected.abs().max().item())
    weighting = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    (logits * weighting).sum().backward()
    (expected * weighting).sum().backward()
    for name, p in model.named_parameters():
        other = reference.w[name].grad
        assert other is not None and p.grad is not None, name
        assert (p.grad - other).abs().max() <= 1e-8 * max(1.0, other.abs().max().item()), name


def test_the_reference_notices_what_is_changed():
    """Another row, kind, gain, factor or window moves the logits: equality above means something."""
    changes = [("qk_norm", "full"), ("norm_type", "l2"), ("query_pre_attn_scalar", 2.0), ("residual_scale", 0.9)]
    model, reference = pair(3)
    ids = random_ids(2, 7, vocab=31)
    moved = 0
    for field, value in changes:
        other = Reference(reference.w, reference.given | {field: value})
        try:
            moved += (other.logits(ids) - model(ids).logits).abs().max().item() > 1e-6
        except (KeyError, RuntimeError):  # the weights are those of another model
            moved += 1
    assert moved == len(changes)
