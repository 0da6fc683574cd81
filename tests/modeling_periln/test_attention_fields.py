"""Layer types, windows, ropes by layer type, partial and absent ropes, and the two scales, against a float64 reference.

The reference shares no code with the model. It computes every score that there is and masks by the definitions:
token q sees token k where 0 <= q - k, and in a sliding layer q - k < window.
"""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
from tiny_models import SIZES, random_ids, shaken_model, tiny_config, tiny_model

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM

FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW, LENGTH, LAYERS = 5, 16, 3
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
LOCAL = {"rope_type": "default", "rope_theta": 500.0}
TYPES = [SLIDING, FULL, SLIDING]
MIXED = {"sliding_window": WINDOW, "layer_types": TYPES}
TWO_ROPES = MIXED | {"rope_parameters": {FULL: ROPE | {"rope_type": "linear", "factor": 2.0}, SLIDING: LOCAL}}
HALF = {"head_dim": 8, "rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}
ALL = {
    "head_dim": 8,
    "rope_parameters": {FULL: ROPE | {"partial_rotary_factor": 0.25}, SLIDING: LOCAL},
    "no_rope_layers": [1, 1, 0],
    "query_pre_attn_scalar": 9,
    "embedding_multiplier": 2.5,
    "norm_gain": "centered",
}
CASES = {
    "a window for all": {"sliding_window": WINDOW},
    "a window of two": {"sliding_window": 2},
    "sliding and full layers": MIXED,
    "full layers by name": {"layer_types": [FULL] * LAYERS},
    "two ropes": TWO_ROPES,
    "half of the head": HALF,
    "layers without rope": {"no_rope_layers": [1, 0, 1]},
    "a scale of the scores": {"query_pre_attn_scalar": 2.5},
    "a factor of the table": {"embedding_multiplier": 4.5},
    "a factor of a tied table": {"embedding_multiplier": 4.5, "tie_word_embeddings": True, "embedding_norm": False},
    "all of them": MIXED | ALL,
}


def fields(case: str) -> dict:
    return copy.deepcopy(CASES[case])


def model_of(case: str, seed: int = 0, **more) -> PeriLlamaForCausalLM:
    return shaken_model(seed, norm_placement="pre", num_hidden_layers=LAYERS, **fields(case), **more)


def reference(model: PeriLlamaForCausalLM, ids: torch.Tensor, given: dict) -> torch.Tensor:
    """Logits (B, S, V) in float64 of the row `pre`, from the fields as they were written."""
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    head, heads, groups = given.get("head_dim", SIZES["head_dim"]), 4, 2
    window, centered = given.get("sliding_window"), given.get("norm_gain") == "centered"
    types = given.get("layer_types") or [FULL if window is None else SLIDING] * LAYERS
    length = ids.shape[1]

    def norm(x, name):
        gain = w[f"{name}.weight"] + centered
        return gain * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turned(x, rope):
        dims = int(head * rope.get("partial_rotary_factor", 1.0))
        steps = torch.arange(length).float()
        speeds = 1.0 / rope.get("factor", 1.0) / rope["rope_theta"] ** (torch.arange(0, dims, 2) / dims)
        angles = torch.outer(steps, speeds)[:, None]
        cos, sin = angles.cos().double(), angles.sin().double()  # FP32 tables, as the model's
        a, b, rest = x[..., : dims // 2], x[..., dims // 2 : dims], x[..., dims:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)

    x = given.get("embedding_multiplier", 1.0) * w["model.embed_tokens.weight"][ids]
    for i, kind in enumerate(types):
        prefix = f"model.layers.{i}."
        rope = given.get("rope_parameters", {"rope_theta": 500_000.0})
        rope = rope.get(kind, rope)
        read = norm(x, f"{prefix}attn_input_norm")
        q, k, v = (
            (read @ w[f"{prefix}self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head)) for p in ("q", "k", "v")
        )
        if given.get("no_rope_layers", [1] * LAYERS)[i]:
            q, k = turned(q, rope), turned(k, rope)
        apart = torch.arange(length)[:, None] - torch.arange(length)[None]
        hidden = (apart < 0) | ((apart >= window) if kind == SLIDING else torch.zeros_like(apart).bool())
        out = []
        for h in range(heads):
            scores = q[:, :, h] @ k[:, :, h // groups].mT / math.sqrt(given.get("query_pre_attn_scalar", head))
            out.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, :, h // groups])
        x = x + torch.cat(out, -1) @ w[f"{prefix}self_attn.o_proj.weight"].T
        read = norm(x, f"{prefix}mlp_input_norm")
        gate = torch.nn.functional.silu(read @ w[f"{prefix}mlp.gate_proj.weight"].T)
        x = x + (gate * (read @ w[f"{prefix}mlp.up_proj.weight"].T)) @ w[f"{prefix}mlp.down_proj.weight"].T
    return norm(x, "model.final_norm") @ w["lm_head.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_the_model_is_the_reference(case, attention):
    model, ids = model_of(case).double(), random_ids(2, LENGTH)
    model.set_attn_implementation(attention)
    expected = reference(model, ids, CASES[case])
    assert expected.std() > 0.1
    exact = 1e-9 if attention == "sdpa" else 1e-5  # eager attention has its softmax in FP32
    assert (model(ids).logits - expected).abs().max() < exact


@torch.no_grad()
@pytest.mark.parametrize("case", [case for case in CASES if case != "full layers by name"])
def test_every_field_changes_the_function(case):
    """The equality above can fail: without its field each model is another."""
    model, ids = model_of(case), random_ids(2, LENGTH)
    kept = {key: value for key, value in fields(case).items() if key in ("head_dim", "norm_gain", "embedding_norm")}
    tied = {"tie_word_embeddings": fields(case).get("tie_word_embeddings", False)}
    plain = tiny_model(norm_placement="pre", num_hidden_layers=LAYERS, **kept, **tied)
    plain.load_state_dict(model.state_dict())
    assert (model(ids).logits - plain(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_a_model_trains_generates_and_compiles(case):
    model, ids = model_of(case), random_ids(2, LENGTH)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    how = {"max_new_tokens": LENGTH, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids[:, :3], **how, use_cache=False)
    assert torch.equal(model.generate(ids[:, :3], **how), expected)
    assert torch.equal(model.generate(ids[:, :3], **how, cache_implementation="static"), expected)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert (compiled(ids).logits - model(ids).logits).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("case", ["two ropes", "all of them", "a window for all"])
def test_a_model_exports(case):
    model, ids = model_of(case), random_ids(2, LENGTH)
    exported = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    logits = exported.module()(ids, use_cache=False).logits
    assert (logits - model(ids).logits).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_is_the_same_model_and_keeps_its_fields(case, tmp_path):
    model, ids = model_of(case), random_ids(2, LENGTH)
    model.save_pretrained(tmp_path)
    loaded = PeriLlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    saved = json.loads((tmp_path / "config.json").read_text())
    for name in ("layer_types", "sliding_window", "no_rope_layers", "query_pre_attn_scalar", "embedding_multiplier"):
        assert saved.get(name) == getattr(model.config, name, None), name
        assert name not in CASES[case] or saved[name] == CASES[case][name]
    half = PeriLlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tables = [b for n, b in half.named_buffers() if "inv_freq" in n]
    assert tables and all(b.dtype == torch.float32 for b in tables)
    assert half(ids).logits.isfinite().all()


def test_a_model_of_before_has_nothing_of_the_new(tmp_path):
    """Transformers' caches and masks take the presence of `layer_types` for layers of several types."""
    config = tiny_config()
    assert not hasattr(config, "layer_types") and not hasattr(PeriLlamaConfig, "layer_types")
    assert "layer_types" not in config.to_dict()
    written = config.to_dict()
    for name in ("sliding_window", "no_rope_layers", "query_pre_attn_scalar", "embedding_multiplier"):
        del written[name]
    (tmp_path / "config.json").write_text(json.dumps(written, default=str))
    old = PeriLlamaConfig.from_pretrained(tmp_path)
    assert not hasattr(old, "layer_types") and old.sliding_window is None and old.embedding_multiplier == 1.0
    model = tiny_model()
    assert type(model.model.embed_tokens) is torch.nn.Embedding
    assert {layer.self_attn.rotate.__name__ for layer in model.model.layers} == {"rotate"}
    again = copy.deepcopy(config)
    assert again == config and not hasattr(again, "layer_types")


def test_layer_types_can_be_given_at_load_and_later(tmp_path):
    tiny_config(sliding_window=WINDOW).save_pretrained(tmp_path)
    config = PeriLlamaConfig.from_pretrained(tmp_path, layer_types=list(TYPES))
    assert config.layer_types == TYPES
    config = PeriLlamaConfig.from_pretrained(tmp_path, **copy.deepcopy(TWO_ROPES))
    assert config.rope_parameters[FULL]["rope_type"] == "linear" and config.layer_types == TYPES
    later = tiny_config(sliding_window=WINDOW)
    later.layer_types = list(TYPES)
    assert PeriLlamaForCausalLM(later).model.layers[1].self_attn.sliding_window is None
    later.num_hidden_layers = 2
    with pytest.raises(ValueError, match="layer_types has 3 entries for num_hidden_layers=2"):
        PeriLlamaForCausalLM(later)


def test_the_older_name_of_the_share_is_folded_into_the_rope():
    assert tiny_config(head_dim=8, partial_rotary_factor=0.5).rope_parameters["partial_rotary_factor"] == 0.5
    both = tiny_config(**copy.deepcopy(TWO_ROPES), head_dim=8, partial_rotary_factor=0.5).rope_parameters
    assert {rope["partial_rotary_factor"] for rope in both.values()} == {0.5}


WRONG = {
    "a type": ({"layer_types": ["sliding", FULL, FULL]}, "layer_types has 'sliding': use one of"),
    "too few types": ({"layer_types": [FULL]}, "layer_types has 1 entries for num_hidden_layers=3"),
    "no window": ({"layer_types": TYPES}, "sliding_window=None, but layer_types has 'sliding_attention' in some layer"),
    "no sliding layer": ({"layer_types": [FULL] * 3, "sliding_window": 4}, "sliding_window=4, but layer_types has"),
    "a window of none": ({"sliding_window": 0}, "sliding_window=0 must be at least 2"),
    "a window of one": ({"sliding_window": 1}, "sliding_window=1 must be at least 2"),
    "a window that is not a number": ({"sliding_window": "4"}, "sliding_window='4'"),
    "too many layers without rope": (
        {"no_rope_layers": [1] * 4},
        "no_rope_layers has 4 entries for num_hidden_layers=3",
    ),
    "a flag": ({"no_rope_layers": [1, 2, 0]}, r"no_rope_layers=\[1, 2, 0\] must hold 1"),
    "ropes without types": (
        {"rope_parameters": {FULL: ROPE}},
        "rope for 'full_attention', but the model has no layer_",
    ),
    "a missing rope": (
        MIXED | {"rope_parameters": {FULL: ROPE}},
        "rope_parameters has no rope for 'sliding_attention'",
    ),
    "a rope beside": (
        MIXED | {"rope_parameters": {FULL: ROPE, SLIDING: ROPE, "rope_theta": 1e4}},
        "rope_parameters has 'rope_theta' as well as ropes for layer types",
    ),
    "a rope of null": (
        MIXED | {"rope_parameters": {FULL: None, SLIDING: ROPE}},
        r"rope_parameters\['full_attention'\]=None must be a mapping; no_rope_layers says",
    ),
    "a key of a rope": (
        MIXED | {"rope_parameters": {FULL: ROPE | {"thetta": 1}, SLIDING: ROPE}},
        r"rope_parameters\['full_attention'\] has an unknown key 'thetta'",
    ),
    "an odd share": (
        {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
        r"'partial_rotary_factor'\]=0.5 would rotate 3 of head_dim=6",
    ),
    "a share above one": (
        {"rope_parameters": ROPE | {"partial_rotary_factor": 2.0}},
        r"'partial_rotary_factor'\]=2.0 would rotate 12 of head_dim=6",
    ),
    "a scale": ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0 must be a number above 0"),
    "a factor": ({"embedding_multiplier": -1.0}, "embedding_multiplier=-1.0 must be a number above 0"),
    "chunks": ({"attention_chunk_size": 4}, "attention_chunk_size=4: attention of this family is causal"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_by_name(case):
    given, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        tiny_config(**copy.deepcopy(given))


def test_tokens_given_as_embeddings_are_scaled_already():
    """As in Gemma: the factor belongs to the table, and what `get_input_embeddings` gives begins the stream."""
    model, ids = model_of("a factor of the table"), random_ids(2, 7)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)
    model.resize_token_embeddings(70)
    assert model.get_input_embeddings().multiplier == 4.5
    with torch.no_grad():
        assert torch.equal(model.get_input_embeddings()(ids), embedded)


def test_an_adapter_trains_on_a_model_with_all_fields():
    peft = pytest.importorskip("peft")
    model, ids = model_of("all of them"), random_ids(2, LENGTH)
    before = model(ids).logits.detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    tuned = adapted.eval()(input_ids=ids).logits.detach()
    assert (tuned - before).abs().max() > 1e-4
    assert (adapted.merge_and_unload()(ids).logits - tuned).abs().max() < 1e-4


REMOTE = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "modeling_periln" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.tensor([[3, 1, 4, 1, 5]])
print(model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None).tolist())
"""


@pytest.mark.slow
def test_all_fields_are_carried_by_remote_code(tmp_path):
    model = model_of("all of them")
    model.save_pretrained(tmp_path / "model")
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None).tolist()
    command = [sys.executable, "-I", "-c", REMOTE, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected
