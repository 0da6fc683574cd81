"""Retrofits of tiny models: what is exact, what is calibrated and how, what is refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from modeling_periln.convert import from_native
from periln.runkit.errors import UsageError, UserError, run_command
from periln.scripts.arguments.retrofit import RULES, check, parse
from periln.scripts.retrofit import command
from periln.scripts.retrofit.calibrate import calibrate
from periln.scripts.retrofit.fit import fit
from periln.scripts.retrofit.fold import build, fold
from periln.scripts.retrofit.plan import make_plan
from periln.scripts.retrofit.samples import find_samples

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def model_of(placement, seed=0, **fields) -> PeriLlamaForCausalLM:
    """Random weights large enough that every norm matters; gains from 0.5 to 1.5."""
    torch.manual_seed(seed)
    config = PeriLlamaConfig(**{**SIZES, "norm_placement": placement, "initializer_range": 0.2, **fields})
    model = PeriLlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


def ids_of(rows=6, tokens=40, seed=1):
    return torch.randint(0, 320, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def retrofitted(model, to, rule="least-squares", ids=None, soften=0.0):
    plan = make_plan(model.config, to)
    folded = fold(model, plan)
    if plan.is_exact:
        return plan, build(plan.target, folded.state_dict())
    return plan, calibrate(folded, plan, ids_of() if ids is None else ids, rule, soften).model


# --- what is exact ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "to", "fields"),
    [
        ("peri", "sandwich", {}),
        ("peri", "sandwich", {"tie_word_embeddings": True}),
        ("peri", "sandwich", {"tie_word_embeddings": True, "embedding_multiplier": 5.0, "norm_gain": "centered"}),
        ("lns", "pre", {}),
        ("pre", "lns", {"attention_bias": True, "mlp_bias": True}),
        ("pre", {"input_norm": True, "s": 0.5, "c": "1/sqrt(l)", "final_norm": True}, {"mlp_bias": True}),
        ("output", {"output_norm": True, "s": "1/L", "c": 0.7, "final_norm": True}, {"attention_bias": True}),
        (
            "peri",
            {"input_norm": True, "output_norm": True, "s": 0.5, "final_norm": True},
            {"residual_scale": "1/sqrt(L)"},
        ),
    ],
)
def test_what_folds_is_the_same_function(source, to, fields):
    model = model_of(source, **fields)
    plan, other = retrofitted(model, to)
    assert plan.is_exact
    assert other.config.norm_placement == to
    before, after = logits(model, ids_of()), logits(other, ids_of())
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()
    assert plan.unties == bool(fields.get("tie_word_embeddings"))
    # Not for nothing: the target's configuration with the source's own tensors is another function.
    state = {k: v for k, v in model.state_dict().items() if k in other.state_dict()}
    naive = PeriLlamaForCausalLM(plan.target).eval()
    naive.load_state_dict(state, strict=False)
    assert (logits(naive, ids_of()) - before).abs().max() > 1e-2


@pytest.mark.parametrize("to", ["pre", "output"])
def test_the_exact_part_of_an_inexact_retrofit_is_exact(to):
    model = model_of("peri", tie_word_embeddings=True)
    plan = make_plan(model.config, to)
    assert [change.exact for change in plan.changes].count(True) == 1
    before, after = logits(model, ids_of()), logits(fold(model, plan), ids_of())
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()


# --- what is calibrated ----------------------------------------------------------------------------------------


def branches(model, ids):
    """Inputs of every output norm (or of the place where one would be), by module name."""
    found, handles = {}, []
    for name, module in model.named_modules():
        if name.endswith("_output_norm"):
            handles.append(module.register_forward_pre_hook(lambda m, a, name=name: found.update({name: a[0]})))
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("rule", RULES)
def test_gains_are_those_of_the_branches_that_the_finished_model_has(rule):
    """Each layer saw what the layers before it became: measured again in the finished model, the gains are the same."""
    model = model_of("pre")
    _, other = retrofitted(model, "peri", rule)
    for name, y in branches(other, ids_of()).items():
        norm = other.get_submodule(name)
        y = y.double()
        n = y / (y.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        wanted = {
            "unit": torch.ones(32),
            "scalar": (y.square().sum() / n.square().sum()).sqrt().expand(32),
            "channel": (y.square().sum((0, 1)) / n.square().sum((0, 1))).sqrt(),
            "least-squares": (y * n).sum((0, 1)) / n.square().sum((0, 1)),
        }[rule]
        torch.testing.assert_close(norm.weight.double(), wanted.double(), rtol=1e-4, atol=1e-5)
        assert norm.variance_epsilon <= 1e-3 * y.square().mean()


def test_least_squares_is_the_least_and_errors_are_those_of_the_numbers():
    generator = torch.Generator().manual_seed(0)
    want, have = (torch.randn(5, 40, 8, generator=generator) + 0.5 for _ in range(2))
    errors = {}
    for rule in RULES:
        found = fit(want, have, rule)
        direct = (want - found.gain * have).square().sum() / want.square().sum()
        assert found.error == pytest.approx(direct.item(), rel=1e-5)
        errors[rule] = found.error
    assert min(errors, key=errors.get) == "least-squares"
    assert fit(want * 0 + 3, have * 0, "channel").gain.tolist() == [1.0] * 8


@pytest.mark.parametrize("rule", RULES)
def test_branches_that_are_silent_stay_so(rule):
    model = model_of("pre")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    _, other = retrofitted(model, "sandwich", rule)
    torch.testing.assert_close(logits(other, ids_of()), logits(model, ids_of()))


def test_where_all_tokens_have_branches_of_one_size_a_scalar_is_exact():
    """One token of text: rms(branch) is one number, and the norm a constant factor."""
    model, ids = model_of("pre"), ids_of(1, 1)
    _, other = retrofitted(model, "peri", "scalar", ids)
    torch.testing.assert_close(logits(other, ids), logits(model, ids), rtol=1e-2, atol=1e-2)
    _, back = retrofitted(other, "pre", "channel", ids)
    torch.testing.assert_close(logits(back, ids), logits(other, ids), rtol=1e-3, atol=1e-3)


def test_a_removed_output_norm_becomes_rows_and_a_removed_input_norm_columns():
    model = model_of("peri", attention_bias=True, mlp_bias=True)
    ids = ids_of()
    _, other = retrofitted(model, "pre", "channel", ids)
    ratio = other.model.layers[0].self_attn.o_proj.weight / model.model.layers[0].self_attn.o_proj.weight
    assert ratio.std(dim=1).max() < 1e-4  # one factor a row
    bias = other.model.layers[0].self_attn.o_proj.bias / model.model.layers[0].self_attn.o_proj.bias
    torch.testing.assert_close(bias[bias.isfinite()], ratio[:, 0][bias.isfinite()], rtol=1e-3, atol=1e-5)
    _, other = retrofitted(model, "output", "channel", ids)
    ratio = other.model.layers[0].mlp.up_proj.weight / model.model.layers[0].mlp.up_proj.weight
    assert ratio.std(dim=0).max() < 1e-3 * ratio.abs().mean()  # one factor a column
    assert torch.equal(other.model.layers[0].mlp.up_proj.bias, model.model.layers[0].mlp.up_proj.bias)


def test_a_softened_norm_gives_the_function_back_and_its_epsilons_are_stored(tmp_path):
    model, ids = model_of("pre"), ids_of()
    before, apart = logits(model, ids), {}
    for soften in (0.0, 4.0, 1e4):
        _, other = retrofitted(model, "sandwich", "least-squares", ids, soften)
        apart[soften] = (logits(other, ids) - before).abs().max().item()
        if soften:
            for name, y in branches(other, ids).items():
                largest = y.double().square().mean(-1).max().item()
                assert other.get_submodule(name).variance_epsilon == pytest.approx(soften * largest, rel=1e-5)
        other.save_pretrained(tmp_path / str(soften))
        again = PeriLlamaForCausalLM.from_pretrained(tmp_path / str(soften)).eval()
        torch.testing.assert_close(logits(again, ids), logits(other, ids), rtol=0, atol=1e-5)
    assert apart[1e4] < 0.01 * apart[4.0] < 0.01 * apart[0.0]


def test_an_epsilon_of_the_mapping_stays():
    row = {"input_norm": True, "output_norm": {"eps": 0.25}, "final_norm": True}
    _, other = retrofitted(model_of("pre"), row, soften=9.0)
    assert {layer.mlp_output_norm.variance_epsilon for layer in other.model.layers} == {0.25}


def test_a_centered_gain_is_stored_as_its_difference_from_one():
    model = model_of("pre", norm_gain="centered")
    _, centered = retrofitted(model, "sandwich", "scalar")
    norm, y = centered.model.layers[0].attn_output_norm, branches(centered, ids_of())["model.layers.0.attn_output_norm"]
    rms = y.square().mean().sqrt()
    torch.testing.assert_close(1 + norm.weight, rms.expand(32), rtol=1e-3, atol=0)


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "to", "fields", "message"),
    [
        ("pre", "pre", {}, "--to pre: the norms of SRC are already as asked"),
        ("peri", "sandwich", {"embedding_norm": False}, "already as asked"),
        ("mix", "mix", {}, "--to mix: all layers of SRC are already as asked"),
        ("pre", "sandwich", {"layer_placements": ["sandwich"] * 3}, "all layers of SRC are already as asked"),
        ("pre", "perri", {}, "did you mean 'peri'"),
        ("pre", {"input": True}, {}, "unknown key 'input'"),
        ("pre", "post", {}, "final_norm is there in one of SRC and the target alone"),
        ("mix", "pre", {}, "attn_residual_norm of layer 1 is there in one"),
        ("pre", "sub_ln", {}, "attn_inner_norm of layer 1"),
        ("pre", "hybrid", {}, "q_norm of layer 1"),
        ("post", "deepnorm", {}, "attn: alpha of layer 1 is 1 in SRC and"),
        ("post", "learned_residual", {}, "alpha of layer 1 is 1 in SRC and learned"),
        ("pre", "sandwich", {"norm_type": "layernorm"}, "only an rmsnorm with a gain a channel"),
        ("pre", "sandwich", {"norm_gain": "scalar"}, "only an rmsnorm with a gain a channel"),
        ("pre", {"input_norm": {"kind": "layernorm"}, "final_norm": True}, {}, "a norm that stays is not changed"),
        ("pre", {"input_norm": {"eps": 0.1}, "output_norm": True, "final_norm": True}, {}, "epsilon 0.1 in the target"),
        ({"input_norm": {"eps": 0.1}, "final_norm": True}, "sandwich", {}, "and epsilon 1e-06 in the target: a norm"),
        ({"input_norm": {"eps": 1e-6}, "final_norm": True}, "sandwich", {}, None),
        ("sandwich", "peri", {"qk_norm": "full", "output_norm_learnable": False}, None),
        ("output", {"output_norm": {"gain": "scalar"}, "final_norm": True}, {}, "a norm that stays is not changed"),
    ],
)
def test_what_is_neither_exact_nor_a_gains_to_mend_is_refused(source, to, fields, message):
    config = PeriLlamaConfig(**{**SIZES, "norm_placement": source, **fields})
    if message is None:
        make_plan(config, to)
        return
    with pytest.raises(UsageError) as caught:
        make_plan(config, to)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_layers_that_are_kept_have_the_norms_of_the_source():
    model = model_of("lns", residual_scale="1/L")
    plan = make_plan(model.config, "peri", keep=[0, 2])
    assert [change.layers for change in plan.changes if change.slot == "mlp_output_norm"] == [(1,)]
    assert [change.layers for change in plan.changes if change.slot == "attn_c"] == [(1,)]
    assert plan.target.stream_plan().embedding_norm is not None
    other = calibrate(fold(model, plan), plan, ids_of(), "scalar").model
    kinds = [type(layer.mlp_output_norm).__name__ for layer in other.model.layers]
    assert [kind == "Identity" for kind in kinds] == [True, False, True]
    whole = make_plan(model.config, "sandwich", keep=[0, 1])
    far, near = (logits(calibrate(fold(model, p), p, ids_of(), "unit").model, ids_of()) for p in (plan, whole))
    assert not torch.allclose(far, near)
    row = {"input_norm": True, "output_norm": True, "final_norm": True}
    assert make_plan(model.config, row, keep=[1]).target.stream_plan().layers[1] == model.config.stream_plan().layers[1]
    with pytest.raises(UsageError, match="--keep 4: the model has layers 1 to 3"):
        make_plan(model.config, "peri", keep=[3])
    with pytest.raises(UsageError, match="all layers of SRC are already|the norms of SRC are already"):
        make_plan(model.config, "sandwich", keep=[0, 1, 2])


def test_frozen_gains_cannot_be_calibrated():
    row = {"attn": {"output_norm": True}, "input_norm": True, "final_norm": True}
    config = PeriLlamaConfig(**SIZES, norm_placement=row, output_norm_learnable=False)
    with pytest.raises(UsageError, match="output_norm_learnable=False of SRC freezes the gains"):
        make_plan(config, "sandwich")
    assert make_plan(config, "pre").target.output_norm_learnable


# --- the command -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory, data):
    """A tied tiny Llama in BF16 with the data's tokenizer beside it."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(7)
    config = LlamaConfig(**SIZES, rms_norm_eps=1e-5, tie_word_embeddings=True, initializer_range=0.2)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(data / "tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(f"the {n} of {n * n % 89} and {n * 7 % 31}" for n in range(4000)))
    return file


def run(*words):
    args = parse([str(word) for word in words])
    check(args)
    command.main(args)


SMALL = ("--samples", 6, "--check-samples", 3, "--tokens", 48)


def test_a_llama_becomes_peri(tmp_path, llama, text, capsys):
    run(llama, tmp_path / "peri", "--to", "peri", "--data", text, *SMALL)
    record = json.loads((tmp_path / "peri" / "retrofit.json").read_text())
    rules = record["calibration"]["rules"]
    assert set(rules) == set(RULES)
    losses = {rule: one["calibration"]["loss"] for rule, one in rules.items()}
    assert record["calibration"]["chosen"] == min(losses, key=losses.get)
    assert set(record["new_gains"]) == {"embed_norm", "attn_output_norm", "mlp_output_norm"}
    assert len(rules["unit"]["places"]) == 1 + 2 * 3
    assert record["exact"]["largest_difference"] <= 1e-5 * record["exact"]["largest_logit"]
    out = capsys.readouterr().out
    assert "attn_output_norm" in out and "least-squares" in out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "peri", dtype=torch.float32)
    assert model.config.norm_placement == "peri"
    assert AutoTokenizer.from_pretrained(tmp_path / "peri").get_vocab()
    # The loss on text that was not calibrated on, computed again.
    tokenizer = AutoTokenizer.from_pretrained(llama)
    check_ids = find_samples(tokenizer, str(text), 6, 3, 48, 0, 320).check
    found = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in check_ids]).mean().item()
    assert found == pytest.approx(rules[record["calibration"]["chosen"]]["check"]["loss"], abs=1e-4)
    source = from_native(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32))
    p, q = (logits(one, check_ids).double().log_softmax(-1) for one in (source, model))
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    assert kl == pytest.approx(rules[record["calibration"]["chosen"]]["check"]["kl"], rel=1e-3)


def test_there_and_exactly_back_to_sandwich(tmp_path, llama, text):
    run(llama, tmp_path / "peri", "--to", "peri", "--data", text, "--rules", "scalar", *SMALL)
    run(tmp_path / "peri", tmp_path / "sandwich", "--to", "sandwich")
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float32) for n in ("peri", "sandwich")]
    assert not models[1].config.tie_word_embeddings
    before, after = (logits(model, ids_of()) for model in models)
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()


def test_a_dry_run_writes_nothing(tmp_path, llama, capsys):
    run(llama, tmp_path / "new", "--to", "{input_norm: true, output_norm: true, final_norm: true}", "--dry-run")
    assert "appears" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "peri"], "changes the function .*: give calibration text with --data"),
        (["--to", "pre"], "are already as asked"),
        (["--to", "peri", "--data", "missing.txt"], "missing.txt does not exist"),
        (["--to", "peri", "--data", "TEXT", "--samples", "9999"], "give more text"),
        (["--to", "{a"], "is not YAML"),
        (["--to", "peri", "--rules", "scaler"], "did you mean 'scalar'"),
        (["--to", "peri", "--tokens", "1"], "--tokens must be at least 4"),
        (["--to", "peri", "--soften", "-1"], "--soften must be at least 0"),
        (["--to", "peri", "--keep", "9", "--data", "TEXT"], "--keep 9: the model has layers 1 to 3"),
    ],
)
def test_refusals_come_before_work_in_one_sentence(tmp_path, llama, text, words, message):
    with pytest.raises(UserError, match=message) as caught:
        run(llama, tmp_path / "new", *[text if word == "TEXT" else word for word in words])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_other_families_are_refused(tmp_path, llama, text, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("kept")
    with pytest.raises(UsageError, match="nothing is overwritten"):
        run(llama, tmp_path / "there", "--to", "peri", "--data", text)
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "gpt" / "model.safetensors").write_bytes(b"")
    args = parse([str(tmp_path / "gpt"), str(tmp_path / "new"), "--to", "peri", "--data", str(text)])
    assert run_command(command.main, args) == 2
    assert "this family cannot hold" in capsys.readouterr().err
