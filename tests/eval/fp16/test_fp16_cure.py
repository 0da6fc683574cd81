"""Cures of FP16 overflows: the function stays, the overflow goes; what cannot be cured is refused with its reason."""

import copy
import json
import re

import pandas as pd
import pytest
import small_models
import torch
from stability_families import VOCABULARY, build
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from periln.eval.fp16 import __main__ as command
from periln.eval.fp16 import peaks
from periln.eval.fp16.cure import Wish, cure, logits_of
from periln.eval.fp16.exponents import NoExactRewrite, Plan
from periln.eval.fp16.families import SLOTS
from periln.eval.fp16.layout import FIXED, find_layout
from periln.eval.fp16.rewrite import apply
from periln.eval.structure.anatomy import find_anatomy
from periln.eval.targets import Model
from periln.runkit.errors import UserError, run_command
from periln.runkit.fp16 import HalfMatmul

IDS = torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(5))
OUTPUT_NORMS = {
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm"),
    "hyperclovax_peri": ("post_norm1", "post_norm2"),
}
PERI = ("attn_output_norm", "mlp_output_norm")
READS_STREAM = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


@torch.no_grad()
def with_stream_overflow(family):
    """Output norms with gains in the thousands, as Gemma 3 has them; what reads the stream unnormed is fit to that."""
    model, offset = build(family), 1.0 if "gemma" in family else 0.0
    for layer in model.model.layers:
        for name in OUTPUT_NORMS.get(family, PERI):
            weight = getattr(layer, name).weight
            weight.copy_((weight + offset) * 5e4 - offset)
    if family in ("olmo2", "peri_llama:output"):
        model.model.embed_tokens.weight.mul_(5e4)
        for name, module in model.named_modules():
            if name.endswith(READS_STREAM):
                module.weight.mul_(1 / 500)
    return model


@torch.no_grad()
def with_branch_overflow(family):
    """Large matrices in the MLP of layer 2, as GLM-4 has before its output norm."""
    model = build(family)
    mlp = model.model.layers[1].mlp
    mlp.down_proj.weight.mul_(1e4)
    fused = getattr(mlp, "gate_up_proj", None)
    up = mlp.up_proj.weight if fused is None else fused.weight[len(fused.weight) // 2 :]
    up.mul_(1e3)
    return model


@torch.no_grad()
def with_backward_overflow(family, eps=1e-16):
    """A branch so small that its output norm's Jacobian, gamma sqrt(D) / |a|, is huge; the forward pass is tame."""
    model = build(family)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.mul_(1e-3)
        for name in OUTPUT_NORMS.get(family, PERI):
            norm = getattr(layer, name)
            setattr(norm, "eps" if hasattr(norm, "eps") else "variance_epsilon", eps)
    if family.startswith("peri_llama"):
        model.config.norm_eps = dict.fromkeys(PERI, eps)
    model.lm_head.weight.mul_(1e3)
    return model


def exponents_of(layout, uniform, seed):
    """Arbitrary exponents that the function allows."""
    generator = torch.Generator().manual_seed(seed)
    found = {g: int(torch.randint(-9, 10, (1,), generator=generator)) for g in sorted(layout.groups)}
    if uniform:
        found |= dict.fromkeys((n.reads for n in layout.norms), -3)
    if layout.tied is not None:
        found[layout.tied[0]] = -found[layout.tied[1]]
    for group, other in layout.opposites:
        found[other] = -found[group]
    return found | {FIXED: 0}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "family",
    [f"peri_llama:{p}" for p in ("peri", "output", "pre", "lns", "post", "pre_post", "deepnorm", "mix")]
    + ["gemma2", "gemma3", "olmo2", "glm4", "hyperclovax_peri", "llama", "qwen3", "neox_parallel", "neox_sequential"]
    + ["mistral", "olmo3", "exaone4", "peri_llama:fields", "peri_llama:fields_tied", "peri_llama:scalar"],
)
def test_any_powers_of_two_leave_the_function_as_it_is(family, seed):
    model = build(family, seed)
    reference = logits_of(model, IDS)
    layout = find_layout(find_anatomy(model))
    uniform = layout.epsilon != SLOTS
    epsilon = apply(model, layout, Plan(exponents_of(layout, uniform, seed), uniform, 0.0))
    assert epsilon.exact
    difference = (logits_of(model, IDS) - reference).abs().max().item()
    # Powers of two round nothing; only Gemma's gains, stored as gain - 1, are rounded (to FP32 here).
    rounded = {"peri_llama:fields": 5e-5}.get(family, 2e-5 if "gemma" in family else 0.0)
    assert difference <= max(rounded * reference.abs().max().item(), 1e-30)


@pytest.mark.parametrize("row", ["hybrid", "sub_ln", "normformer"])
def test_norms_inside_a_sublayer_are_refused_by_name(row):
    model = build(f"peri_llama:{row}")
    with pytest.raises(UserError, match=r"no rewrite is known, it has a norm inside \((v|inner)_norm\)"):
        cure(model, [IDS], Wish())


@pytest.mark.parametrize("kind", ["dyt", "derf"])
def test_a_norm_without_freedom_of_scale_is_refused_by_name(kind):
    with pytest.raises(UserError, match=rf"PeriLlamaNorm, {kind}\) .*depends on the scale of what it reads"):
        cure(build(f"peri_llama:{kind}"), [IDS], Wish())


def test_a_forgotten_part_would_be_seen():
    """The check above has teeth: each single matrix, norm or table left out moves the logits."""
    reference = logits_of(build("peri_llama:output"), IDS)
    for kind in ("matrices", "norms", "tables"):
        model = build("peri_llama:output")
        layout = find_layout(find_anatomy(model))
        plan = Plan(exponents_of(layout, False, 0), False, 0.0)
        getattr(layout, kind)[0] = getattr(layout, kind)[0].__class__(
            **vars(getattr(layout, kind)[0])
            | dict.fromkeys(("gives", "reads") if kind != "tables" else ("gives",), FIXED)
        )
        apply(model, layout, plan)
        assert (logits_of(model, IDS) - reference).abs().max() > 1e-4 * reference.abs().max(), kind


STREAM = ["gemma3", "gemma2", "olmo2", "glm4", "hyperclovax_peri", "peri_llama:peri", "peri_llama:output"]


def check_cured(model, way):
    reference = logits_of(model, IDS)
    record, *_ = cure(model, [IDS], Wish())
    assert record["before"][way] is not None
    assert record["after"]["forward"] is None and record["after"]["backward"] is None
    largest = reference.abs().max().item()
    exact = record["epsilon"]["exact"] and not record["model_type"].startswith("gemma")
    assert record["differences"]["fp32"] <= (0.0 if exact else 1e-5) * largest
    half = model.half()
    with HalfMatmul():
        assert (logits_of(half, IDS) - reference).abs().max() <= 1e-2 * largest
    # PyTorch's own FP16 kernels, which accumulate as they like, agree as well.
    assert (logits_of(half, IDS) - reference).abs().max() <= 1e-2 * largest
    return record


@pytest.mark.parametrize("family", STREAM)
def test_an_overflow_of_the_stream_is_cured(family):
    model = with_stream_overflow(family)
    assert not logits_of(copy.deepcopy(model).half(), IDS).isfinite().all()
    record = check_cured(model, "forward")
    assert record["exponents"]["stream"] < 0
    after = [p["forward"] * 2.0 ** p["exponent"] for p in record["peaks"]]
    assert max(after) <= 65504 / 4  # the margin, 2 bits


@pytest.mark.parametrize("loss_scale", [2.0**12, 2.0**16])
def test_of_two_plans_the_one_that_keeps_the_gradients_finite_too_is_taken(loss_scale):
    """With OLMo 2's one epsilon the plan that keeps it exact overflows backward; the other, as accurate, does not."""
    model = with_stream_overflow("olmo2")
    reference = logits_of(model, IDS)
    record, *_ = cure(model, [IDS], Wish(loss_scale=loss_scale))
    assert record["after"]["forward"] is None and record["after"]["backward"] is None
    assert record["after"]["loss_scale"] == loss_scale and not record["uniform"]
    for difference in ("fp32", "fp16_pass"):  # there is one epsilon for all norms, and it was left
        assert record["differences"][difference] <= 1e-2 * reference.abs().max().item()


BRANCH = ["glm4", "hyperclovax_peri", "gemma2", "gemma3", "peri_llama:peri", "peri_llama:pre", "llama"]


@pytest.mark.parametrize("family", BRANCH)
def test_an_overflow_of_a_modules_output_is_cured(family):
    record = check_cured(with_branch_overflow(family), "forward")
    assert (
        "mlp of layer 2" in record["before"]["forward"]["where"]
        or "layers.1.mlp" in record["before"]["forward"]["where"]
    )
    if "gemma" in family:  # moving the stream too would round gains, stored as gain - 1, to FP16
        assert set(record["exponents"]) <= {"model.layers.1.mlp.output", "model.layers.1.mlp.hidden"}
    if family == "peri_llama:peri":  # an epsilon a slot: nothing else has to move
        assert all("layers.1.mlp" in group for group in record["exponents"])


@torch.no_grad()
def with_large_rows(family, part, factor=3e5):
    """Queries, or values, of layer 2 far beyond 65504; what they are multiplied with is small by as much."""
    model = build(family)
    attention = next(m for n, m in model.named_modules() if n.endswith(("layers.1.self_attn", "layers.1.attention")))
    if hasattr(attention, "query_key_value"):
        fused, size = attention.query_key_value, attention.head_size
        rows = {name: torch.arange(fused.out_features) // size % 3 == i for i, name in enumerate("qkv")}
        large = [(p, rows[part]) for p in (fused.weight, fused.bias)]
        small = [(p, rows["k"]) for p in (fused.weight, fused.bias)] if part == "q" else [(attention.dense.weight, ...)]
    else:
        every = {name: getattr(attention, f"{name}_proj") for name in "qkvo"}
        large = [(p, ...) for p in every[part].parameters()]
        small = [(p, ...) for p in every["k"].parameters()] if part == "q" else [(every["o"].weight, ...)]
    for (weight, at), k in [(w, factor) for w in large] + [(w, 3 / factor) for w in small]:
        weight[at] *= k
    return model


@pytest.mark.parametrize("part", ["q", "v"])
@pytest.mark.parametrize("family", ["llama", "glm4", "gemma2", "neox_parallel", "peri_llama:peri"])
def test_queries_and_values_that_overflow_are_cured_against_keys_and_the_output_matrix(family, part):
    record = check_cured(with_large_rows(family, part), "forward")
    moved = {group.rpartition(".")[2]: e for group, e in record["exponents"].items()}
    if part == "q":
        assert moved["queries"] == -moved["keys"] < 0
    else:
        assert moved["values"] < 0 and "queries" not in moved


def test_an_overflow_of_the_backward_pass_alone_is_cured_by_scaling_the_branch_up():
    model = with_backward_overflow("peri_llama:peri")
    record = check_cured(model, "backward")
    assert record["before"]["forward"] is None
    assert any(e > 0 for e in record["exponents"].values())


def test_a_weight_s_gradient_that_overflows_moves_what_its_matrix_gives():
    """At this loss scale no tensor's gradient is too large after the first choice, but the down projection's is."""
    model = with_backward_overflow("peri_llama:peri")
    reference = logits_of(model, IDS)
    record, *_ = cure(model, [IDS], Wish(loss_scale=2.0**8))
    assert record["before"]["forward"] is None and record["before"]["backward"] is not None
    assert record["after"]["backward"] is None and record["after"]["largest_finite_loss_scale"] >= 2.0**8
    assert (logits_of(model, IDS) - reference).abs().max() == 0
    weights = {p["tensor"]: p for p in record["peaks"] if p["tensor"].startswith("the weight of model.layers.0.mlp")}
    assert weights["the weight of model.layers.0.mlp.down_proj"]["gradient_headroom_bits"] >= 2.0  # the margin


def test_a_backward_overflow_where_nothing_can_move_is_refused_with_the_loss_scale_that_helps():
    model = build("llama")
    model.lm_head.weight.data.mul_(3e4)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.mul_(60)
        layer.mlp.up_proj.weight.data.mul_(60)
    with pytest.raises(NoExactRewrite, match="gradient.*loss scale"):
        cure(model, [IDS], Wish(loss_scale=2.0**14))


@pytest.mark.parametrize("placement", ["post", "pre_post"])
def test_a_stream_with_norms_on_it_has_no_stream_scale(placement):
    with pytest.raises(NoExactRewrite, match="mlp of layer 2.*Post-LN, pre_post.*rewrite \\(1\\) does not exist"):
        cure(with_branch_overflow(f"peri_llama:{placement}"), [IDS], Wish())


@pytest.mark.parametrize("placement", ["post", "pre_post", "mix"])
def test_each_of_its_sums_can_be_scaled_when_that_is_asked_for(placement):
    model = with_branch_overflow(f"peri_llama:{placement}")
    reference = logits_of(model, IDS)
    record, *_ = cure(model, [IDS], Wish(scale_sums=True))
    assert record["before"]["forward"] is not None and record["after"]["forward"] is None
    assert (logits_of(model, IDS) - reference).abs().max() == 0


def test_what_a_nonlinear_function_reads_cannot_be_scaled():
    model = build("peri_llama:peri")
    model.model.layers[0].mlp.gate_proj.weight.data.mul_(3e5)
    with pytest.raises(NoExactRewrite, match="in the gate of the mlp of layer 1 is .*not linear"):
        cure(model, [IDS], Wish())
    model = build("llama")
    model.lm_head.weight.data.mul_(3e5)
    with pytest.raises(NoExactRewrite, match="in the head's logits is"):
        cure(model, [IDS], Wish())


def test_a_model_without_a_known_rewrite_is_refused_by_name():
    with pytest.raises(UserError, match="'gpt2'.*known are peri_llama, gemma2"):
        cure(build("gpt2"), [IDS], Wish())


@pytest.mark.parametrize("slot", ["embedding_norm", "input_norm", "q_norm"])
def test_a_slot_with_its_own_epsilon_is_refused_before_anything_is_changed(slot):
    """Written to the configuration's `norm_eps`, the new one would be lost when the model is loaded."""
    placement = {"input_norm": True, "output_norm": True, "embedding_norm": True, "final_norm": True}
    config = build("peri_llama:peri").config.to_dict() | {"norm_placement": placement | {slot: {"eps": 1e-5}}}
    model = PeriLlamaForCausalLM(PeriLlamaConfig.from_dict(config)).eval()
    before, layout = copy.deepcopy(model.state_dict()), find_layout(find_anatomy(model))
    with pytest.raises(UserError, match="norm_placement gives a slot its own eps 1e-05"):
        apply(model, layout, Plan(exponents_of(layout, False, 0), False, 0.0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_epsilon_left_as_it_is_moves_the_logits_and_is_reported():
    model = with_stream_overflow("hyperclovax_peri")
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-2  # not small next to the squares of the modules' outputs
    model.config.rms_norm_eps = 1e-2
    reference = logits_of(model, IDS)
    record, *_ = cure(model, [IDS], Wish(keep_eps=True, tolerance=1.0))
    assert not record["epsilon"]["exact"] and "one epsilon" in record["remains"][0]
    measured = (logits_of(model, IDS) - reference).abs().max().item()
    assert record["differences"]["fp32"] == pytest.approx(measured) and measured > 1e-7
    exact = with_stream_overflow("hyperclovax_peri")
    record, *_ = cure(exact, [IDS], Wish())
    assert record["epsilon"]["exact"] and record["differences"]["fp32"] == 0


def test_a_model_that_is_finite_but_not_accurate_in_fp16_is_told_of():
    """Values so small that FP16 has a bit or two for them, behind an output norm that makes them matter."""
    sound, model = with_stream_overflow("peri_llama:peri"), with_stream_overflow("peri_llama:peri")
    model.model.layers[0].self_attn.v_proj.weight.data.mul_(2e-6)
    remarks = [" ".join(cure(m, [IDS], Wish())[0]["remains"]) for m in (sound, model)]
    assert "accurate" not in remarks[0]
    assert "finite is not accurate" in remarks[1] and "by the rounding of weights alone" in remarks[1]


MANY = torch.randint(0, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(6))


@torch.no_grad()
def largest_logits(model, batches):
    """What the head gives, before any cap."""
    return [model.lm_head(model.model(input_ids=ids).last_hidden_state).abs().max().item() for ids in batches]


@pytest.mark.parametrize("family", STREAM)
def test_logits_are_left_out_of_samples_where_they_hide_nothing(family, monkeypatch):
    """Behind the samples with gradients; nothing but the largest logit itself may differ from passes with the head."""
    model, batches = with_stream_overflow(family), list(MANY.split(2))
    logits = largest_logits(model, batches)
    found, *_ = cure(copy.deepcopy(model), batches, Wish(gradients=1, fp16=1))
    left = found["logits_left_out"]
    assert left["samples"] == 4 and max(logits[1:]) <= left["bound"] < 65504 / 4
    monkeypatch.setattr(peaks._Headless, "_bound", lambda self, ids: torch.inf)
    whole, *_ = cure(copy.deepcopy(model), batches, Wish(gradients=1, fp16=1))
    assert whole["logits_left_out"] is None
    of = [{p["tensor"]: p for p in record["peaks"]} for record in (found, whole)]
    few, every = of[0].pop("the head's logits, where computed"), of[1].pop("the head's logits")
    assert every["forward"] == pytest.approx(max(logits), rel=1e-6)
    assert logits[0] <= few["forward"] * (1 + 1e-6) and few["forward"] <= every["forward"]
    assert of[0] == of[1]
    for name in set(found) - {"logits_left_out", "peaks"}:
        assert found[name] == whole[name], name


def test_the_head_is_run_where_its_logits_might_reach_the_limit():
    model, batches = with_stream_overflow("peri_llama:peri"), list(MANY.split(2))
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4 / max(largest_logits(model, batches)))
    record, *_ = cure(copy.deepcopy(model), batches, Wish(gradients=1))
    assert record["logits_left_out"] is None
    (row,) = [p for p in record["peaks"] if p["tensor"] == "the head's logits"]
    assert row["forward"] == pytest.approx(1e4, rel=1e-5)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    with pytest.raises(NoExactRewrite, match="the head's logits is .*, and what follows is not linear"):
        cure(model, batches, Wish(gradients=1))


def test_what_is_between_the_final_norm_and_the_head_is_not_overlooked():
    model = build("llama")
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 3,), prepend=True)
    headless = peaks._Headless(find_layout(find_anatomy(build("llama"))), model, 65504.0)
    headless.norm = model.model.norm
    headless.run(MANY)
    assert headless.left_out is None and not headless.can


def test_more_margin_leaves_more_headroom():
    least = {}
    for margin in (0.0, 5.0):
        record, *_ = cure(with_stream_overflow("peri_llama:peri"), [IDS], Wish(margin=margin))
        least[margin] = min(p["headroom_bits"] for p in record["peaks"])
    assert 0 <= least[0.0] < 1 and 5 <= least[5.0] < 6


# The command


def run(*args):
    return command.main(command.parse([*map(str, args), "--samples", "2", "--tokens", "16"]))


def refused(*args):
    """The exit code and message of the command."""
    arguments = command.parse([*map(str, args), "--samples", "2", "--tokens", "16"])
    return run_command(command.main, arguments)


@pytest.mark.parametrize("family", ["gemma3", "peri_llama:peri"])
def test_the_command_writes_a_model_that_its_stock_class_runs_in_fp16(family, tmp_path):
    source = with_stream_overflow(family)
    reference = logits_of(source, IDS)
    source.save_pretrained(tmp_path / "source")
    run(tmp_path / "source", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "fp16_rewrite.json").read_text())
    assert record["before"]["forward"] is not None and record["after"]["forward"] is None
    assert "not finite" in (tmp_path / "out" / "fp16_rewrite.md").read_text()
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert type(wide).__name__ == type(source).__name__
    largest = reference.abs().max()
    assert (logits_of(wide, IDS) - reference).abs().max() <= 2e-6 * largest
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16).eval()
    with HalfMatmul():
        assert (logits_of(half, IDS) - reference).abs().max() <= 1e-2 * largest


def test_a_half_precision_source_keeps_its_dtype_except_where_that_would_round(tmp_path):
    source = with_stream_overflow("gemma3").bfloat16()
    source.save_pretrained(tmp_path / "source")
    run(tmp_path / "source", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "fp16_rewrite.json").read_text())
    assert record["dtype"] == "bfloat16" and record["written_in_fp32"]
    assert all("norm" in name for name in record["written_in_fp32"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_peaks_are_measured_on_wikitext_or_on_a_text_and_the_tokenizer_goes_along(tmp_path, monkeypatch):
    """`--data wikitext`, the usual one, through the real client and a Hub on loopback; `--text` a file."""
    tokenizer = small_models.make_tokenizer()
    torch.manual_seed(0)
    source = small_models.make_model(tokenizer)
    source.model.layers[0].mlp_output_norm.weight.data.fill_(4e4)
    for part in (source, tokenizer):
        part.save_pretrained(tmp_path / "source")
    folder = tmp_path / "store" / "datasets" / "Salesforce" / "wikitext"
    (folder / "wikitext-2-raw-v1").mkdir(parents=True)
    rows = pd.DataFrame({"text": ["", " = Eggs = \n", "Water boils, and eggs are boiled in it. " * 9]})
    rows.to_parquet(folder / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet", index=False)
    files = "configs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n  - split: test\n"
    (folder / "README.md").write_text(f"---\n{files}    path: wikitext-2-raw-v1/test-*.parquet\n---\n")
    count, load = [], Model.tokenizer
    monkeypatch.setattr(Model, "tokenizer", lambda *args: count.append(1) or load(*args))
    with small_models.serving(tmp_path / "store", tmp_path / "home"):
        run(tmp_path / "source", tmp_path / "wiki")
    (tmp_path / "text.txt").write_text("a text of our own about water, " * 40)
    run(tmp_path / "source", tmp_path / "text", "--text", tmp_path / "text.txt")
    data = [json.loads((tmp_path / out / "fp16_rewrite.json").read_text())["data"] for out in ("wiki", "text")]
    assert [d["data"] for d in data] == ["wikitext", str(tmp_path / "text.txt")]
    assert data[0]["ids_sha256"] != data[1]["ids_sha256"] and data[0]["samples"] == 2
    assert len(count) == 2  # once a run
    again = AutoTokenizer.from_pretrained(tmp_path / "wiki")
    assert again("eggs")["input_ids"] == tokenizer("eggs")["input_ids"]
    assert again.model_max_length == source.config.max_position_embeddings != tokenizer.model_max_length


def test_nothing_is_overwritten_and_nothing_is_left_behind_by_a_refusal(tmp_path, capsys, monkeypatch):
    build("glm4").save_pretrained(tmp_path / "tame")
    with_stream_overflow("peri_llama:peri").save_pretrained(tmp_path / "wild")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert refused(tmp_path / "wild", tmp_path / "full") == 2
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert "nothing is overwritten" in capsys.readouterr().err
    assert refused(tmp_path / "nowhere", tmp_path / "out") == 2 and "nowhere" in capsys.readouterr().err
    assert refused(tmp_path / "wild", tmp_path / "out", "--margin", "40") == 2 and "--margin" in capsys.readouterr().err
    assert refused(tmp_path / "tame", tmp_path / "out") == 0
    assert re.search(r"nothing has to move: .* finite, and the least headroom, \d+\.\d bits", capsys.readouterr().out)
    assert refused(tmp_path / "wild", tmp_path / "out", "--text", "story.txt") == 2
    assert "'story.txt' is not a file" in capsys.readouterr().err
    assert refused(tmp_path / "wild", tmp_path / "out", "--data", "wikitext") == 2
    assert "has no tokenizer" in capsys.readouterr().err
    # A written model that is not what was announced is removed.
    monkeypatch.setattr(command, "logits_of", lambda model, ids: logits_of(model, ids) + 1.0)
    assert refused(tmp_path / "wild", tmp_path / "out") == 1 and "removed" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "tame", "wild"]
