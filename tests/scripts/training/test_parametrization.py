"""Rules of width and depth: their factors, what they set in model and optimizer, exact resume, refusals."""

import json
import os
import shutil
import subprocess

import pytest
import torch
from test_engines import FP32, environment, torchrun
from tiny import MODEL, ROOT, timeless, train, write_recipe

from modeling_periln import PeriLlamaForCausalLM
from modeling_periln.convert import to_native
from periln.runkit.errors import UsageError
from periln.runkit.folder import RunFolder, weights_hash
from periln.runkit.recipes import from_mapping
from periln.scripts.optimizers import read_options
from periln.scripts.optimizers.muon import width_power
from periln.scripts.parametrization import Factors, Parametrization, factors_by_kind, kind_of, scale_initial_weights
from periln.scripts.pretrain import load_recipe
from periln.scripts.recipe import Recipe
from periln.scripts.training.steps import make_optimizer, scales_of, set_rate
from periln.scripts.training.trainer import Trainer
from periln.scripts.training.zero import check_zero

MUP = {"rule": "mup", "base_width": 8}
COMPLETEP = {"rule": "completep", "base_width": 8, "base_depth": 1}


def recipe_of(rules=None, model=None, **more) -> Recipe:
    fields = {"name": "r", "data": "d", "steps": 1, "batch_size": 2, "sequence_length": 8}
    model = {**MODEL, "vocab_size": 30, "attention_bias": True, **(model or {})}
    return from_mapping(Recipe, {**fields, "model": model, "parametrization": rules or {}, **more})


def model_of(recipe: Recipe) -> PeriLlamaForCausalLM:
    torch.manual_seed(0)
    return PeriLlamaForCausalLM(recipe.model_config())


@pytest.mark.parametrize(
    ("rule", "rate", "eps", "scale"),
    [("mup", 1.0, 1.0, 1.0), ("depth_mup", 0.5, 0.5, 0.5), ("completep", 1.0, 0.25, 0.25)],
)
def test_the_factors_are_those_of_the_papers_tables(rule, rate, eps, scale):
    """Width 8 times and depth 4 times the base: m = 8, r = 4."""
    rules = {"rule": rule, "base_width": 8, "base_depth": None if rule == "mup" else 2}
    recipe = recipe_of(rules, {"hidden_size": 64, "num_hidden_layers": 8})
    recipe.check()
    kinds = scales_of(recipe, recipe.model_config())
    assert kinds["embedding"] == kinds["end"] == Factors(eps=1 / 8)
    assert kinds["head"] == Factors(init=1 / 8, rate=1 / 8, decay=8)
    assert kinds["vector"] == Factors(rate=rate, eps=eps / 8)
    assert kinds["matrix"] == Factors(init=8**-0.5, rate=rate / 8, decay=8, eps=eps / 8)
    assert recipe.model_config().residual_scale == scale


def test_every_parameter_has_a_kind():
    model = model_of(recipe_of(model={"norm_placement": "peri", "qk_norm": "head"}))
    kinds = {name: kind_of(name, p) for name, p in model.named_parameters()}
    assert {n for n, kind in kinds.items() if kind == "matrix"} == {n for n in kinds if n.endswith("_proj.weight")}
    assert kinds["model.embed_tokens.weight"] == "embedding" and kinds["lm_head.weight"] == "head"
    assert kinds["model.embed_norm.weight"] == kinds["model.final_norm.weight"] == "end"
    assert kinds["model.layers.0.self_attn.q_proj.bias"] == kinds["model.layers.1.mlp_output_norm.weight"] == "vector"


def test_at_the_base_size_every_rule_is_the_standard():
    for rule in ("mup", "depth_mup", "completep"):
        rules = {"rule": rule, "base_width": 32, "base_depth": None if rule == "mup" else 2}
        recipe = recipe_of(rules)
        assert set(scales_of(recipe, recipe.model_config()).values()) == {Factors()}
        assert recipe.model_config() == recipe_of().model_config()


def test_the_first_weights_are_the_same_draws_in_another_scale():
    recipe = recipe_of(MUP)
    ours, plain = model_of(recipe), model_of(recipe_of())
    scale_initial_weights(ours, scales_of(recipe, ours.config))
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        factor = {"matrix": 0.5, "head": 0.25}.get(kind_of(name, p), 1.0)
        assert torch.equal(p, q * factor), name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_first_step_moves_each_parameter_by_its_rate(name):
    """Adam's first step is the rate in every entry, whatever the gradient; Muon's of the hidden ones has its size."""
    recipe = recipe_of(COMPLETEP, optimizer={"name": name, "weight_decay": 0.0, "eps": 1e-12})
    moved = {}
    for asked in (recipe, recipe_of(optimizer={"name": name, "weight_decay": 0.0, "eps": 1e-12})):
        model = model_of(asked)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = make_optimizer(model, asked.optimizer, scales_of(asked, model.config))
        set_rate(optimizer, 1e-2)
        for n, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n)))
        optimizer.step()
        moved[asked.parametrization.rule] = {n: (p - before[n]).norm().item() for n, p in model.named_parameters()}
    hidden = {"adamw": 1 / 4, "muon": 1 / 2}[name]
    for n, p in model.named_parameters():
        expected = {"matrix": hidden, "head": 1 / 4}.get(kind_of(n, p), 1.0)
        assert moved["completep"][n] / moved["standard"][n] == pytest.approx(expected, rel=1e-3), n


def test_muons_powers_of_the_width():
    powers = {
        rule: width_power(read_options("muon", {"adjust_rate": rule})) for rule in ("original", "match_rms_adamw")
    }
    assert powers == {"original": 0.0, "match_rms_adamw": -0.5}


def test_a_decay_is_the_same_pull_at_any_width():
    recipe = recipe_of(COMPLETEP, optimizer={"weight_decay": 0.1})
    model = model_of(recipe)
    optimizer = make_optimizer(model, recipe.optimizer, scales_of(recipe, model.config))
    set_rate(optimizer, 0.5)
    for p in model.parameters():
        torch.nn.init.constant_(p, 2.0)
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        expected = torch.full_like(p, 2.0 if p.ndim < 2 else 2.0 * (1 - 0.5 * 0.1))
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0, msg=name)


def test_scores_are_divided_by_a_head_that_grows():
    recipe = recipe_of({**MUP, "base_head_dim": 4}, {"num_attention_heads": 2})
    recipe.check()
    config = recipe.model_config()
    attention = PeriLlamaForCausalLM(config).model.layers[0].self_attn
    assert (config.head_dim, attention.scaling) == (16, pytest.approx(4**0.5 / 16))  # 4^-1/2 at the base, then 1/head


@pytest.mark.parametrize(
    ("rules", "model", "more", "message"),
    [
        ({"rule": "mupp"}, {}, {}, "parametrization.rule must be one of 'standard'.*not 'mupp'"),
        ({"rule": "mup", "base_widht": 8}, {}, {}, "unknown field parametrization.base_widht .*'base_width'"),
        ({"rule": "mup"}, {}, {}, "parametrization.base_width is missing: parametrization.rule mup needs it"),
        ({"rule": "completep", "base_width": 8}, {}, {}, "parametrization.base_depth is missing"),
        (
            {"base_width": 8},
            {},
            {},
            "parametrization.base_width is 8, which parametrization.rule standard does",
        ),
        ({**MUP, "base_depth": 2}, {}, {}, "parametrization.base_depth is 2, which parametrization.rule mup does not"),
        ({**MUP, "base_width": 0}, {}, {}, "parametrization.base_width must be at least 1, or null, not 0"),
        (MUP, {"tie_word_embeddings": True}, {}, "parametrization.rule mup: model.tie_word_embeddings"),
        (MUP, {}, {"init_from": "x"}, "parametrization.rule mup: init_from x has weights that did not begin by it"),
        ({**MUP, "base_head_dim": 8}, {"query_pre_attn_scalar": 4.0}, {}, "say the same: give one"),
        (COMPLETEP, {"residual_scale": "1/sqrt(L)"}, {}, "completep sets model.residual_scale, which is '1/sqrt"),
        (COMPLETEP, {"depth_scaled_init": True}, {}, "model.depth_scaled_init would scale"),
        (COMPLETEP, {"norm_placement": "post"}, {}, "norm_placement 'post' does"),
    ],
)
def test_a_mistake_is_refused_by_name(rules, model, more, message):
    with pytest.raises(UsageError, match=message):
        recipe_of(rules, model, **more).check()


def test_not_under_deepspeed(monkeypatch):
    monkeypatch.setattr("periln.scripts.training.zero.zero_stage", lambda: 2)
    with pytest.raises(UsageError, match="parametrization.rule mup: not with DeepSpeed"):
        check_zero(recipe_of(MUP), 2)


def test_the_default_is_the_standard():
    recipe = recipe_of()
    assert recipe.parametrization == Parametrization()
    assert scales_of(recipe, recipe.model_config()) is None
    assert set(factors_by_kind(Parametrization(), recipe.model_config()).values()) == {Factors()}


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_that_was_killed_is_the_run_that_was_not(tmp_path, data):
    fields = {"parametrization": COMPLETEP, "keep_last": 4}
    whole = train(tmp_path, data, name="whole", **fields)
    killed = train(tmp_path, data, name="killed", **fields)
    for step in (9, 12):
        shutil.rmtree(killed.checkpoint_path(step))
    killed.set_status("running", step=10)
    again = train(tmp_path, data, name="killed", **fields)
    assert timeless(again.path) == timeless(whole.path)
    assert weights_hash(again.checkpoints()[-1]) == weights_hash(whole.checkpoints()[-1])
    plain = train(tmp_path, data, name="plain")
    assert weights_hash(plain.checkpoints()[-1]) != weights_hash(whole.checkpoints()[-1])
    seen = json.loads((whole.path / "environment.json").read_text())["parametrization"]
    assert seen["matrix"]["rate"] == 0.25 and seen["head"]["init"] == 0.25
    assert json.loads((plain.path / "environment.json").read_text())["parametrization"] is None
    losses = [record["loss"] for record in whole.metrics()]
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
def test_a_checkpoint_is_a_plain_one_of_the_family(tmp_path, data):
    model = {**MODEL, "norm_placement": "pre"}
    run = train(tmp_path, data, model=model, parametrization=COMPLETEP, steps=3)
    loaded = PeriLlamaForCausalLM.from_pretrained(run.checkpoints()[-1])
    assert loaded.config.residual_scale == 0.5
    ids = torch.arange(20)[None]
    ours, theirs = (m.float().eval()(ids).logits for m in (loaded, to_native(loaded, "llama")))
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
def test_sharded_it_is_the_run_on_one_process(tmp_path, data):
    shared = {"parametrization": COMPLETEP, "precision": FP32, "device": "cpu", "batch_size": 8, "micro_batch_size": 2}
    one = train(tmp_path, data, name="one", steps=6, **shared)
    file = write_recipe(tmp_path, data, name="two", steps=6, **shared)
    words = torchrun("fsdp2", "--config", file, "--runs", tmp_path / "runs")
    env = environment("fsdp2") | {"OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [[r["loss"] for r in run.metrics()] for run in (one, RunFolder(tmp_path / "runs" / "two"))]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
def test_the_trainer_scales_weights_and_rates(tmp_path, data):
    recipe, tokens = load_recipe(write_recipe(tmp_path, data, parametrization=MUP))
    plain, _ = load_recipe(write_recipe(tmp_path, data, name="plain"))
    ours, theirs = (Trainer(r, RunFolder(tmp_path / r.name), tokens) for r in (recipe, plain))
    for (name, p), q in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(p, q * {"matrix": 0.5, "head": 0.25}.get(kind_of(name, p), 1.0))
    assert {group["rate_factor"] for group in ours.engine.optimizer.param_groups} == {1.0, 0.25}
