"""Optimizers as rows: which parameters Muon takes, its step against a slow twin, exact resume, refusals."""

import os
import shutil
import subprocess

import pytest
import torch
from test_engines import FP32, environment, torchrun
from tiny import MODEL, ROOT, timeless, train, write_recipe

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from periln.runkit.errors import UsageError
from periln.runkit.folder import RunFolder, weights_hash
from periln.runkit.recipes import from_mapping
from periln.scripts.optimizers import ROWS
from periln.scripts.pretrain import load_recipe
from periln.scripts.recipe import Optimizer, Recipe
from periln.scripts.training.checkpoint import safetensors
from periln.scripts.training.steps import make_optimizer, set_rate
from periln.scripts.training.zero import check_zero

MUON = {"name": "muon", "learning_rate": 2e-3, "warmup": 0.0}


def tiny_model(**changes):
    torch.manual_seed(0)
    shape = {**MODEL, "vocab_size": 30, "attention_bias": True, "max_position_embeddings": 64, **changes}
    return PeriLlamaForCausalLM(PeriLlamaConfig(**shape))


def orthogonalized(matrix, steps):
    """The quintic Newton-Schulz iteration of Jordan et al., written out from the post."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm()
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).float()


def test_muon_takes_the_hidden_matrices_and_adamw_all_else():
    model = tiny_model()
    optimizer = make_optimizer(model, Optimizer(name="muon"))
    hidden = {id(p) for group in optimizer.parts[0].param_groups for p in group["params"]}
    others = {id(p) for group in optimizer.parts[1].param_groups for p in group["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[i] for i in hidden} == {name for name in names.values() if name.endswith("_proj.weight")}
    assert hidden | others == names.keys()
    assert not hidden & others
    assert {names[i] for i in others} >= {"model.embed_tokens.weight", "lm_head.weight", "model.final_norm.weight"}


@pytest.mark.parametrize("rule", ["match_rms_adamw", "original"])
def test_two_steps_are_those_of_the_post(rule):
    model = tiny_model()
    options = {"momentum": 0.9, "adjust_rate": rule, "rate_factor": 3.0}
    optimizer = make_optimizer(model, Optimizer(name="muon", options=options, weight_decay=0.1))
    w = model.model.layers[0].mlp.up_proj.weight  # (64, 32)
    expected, momentum = w.detach().clone(), torch.zeros_like(w)
    for step, rate in enumerate((0.02, 0.01)):
        set_rate(optimizer, rate)
        gradient = torch.randn(w.shape, generator=torch.Generator().manual_seed(step))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        w.grad = gradient
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        direction = orthogonalized(0.1 * gradient + 0.9 * momentum, 5)
        size = 0.2 * 64**0.5 if rule == "match_rms_adamw" else (64 / 32) ** 0.5
        expected = expected * (1 - 3 * rate * 0.1) - 3 * rate * size * direction
        assert (w - expected).norm() < 0.1 * (3 * rate * size * direction).norm()  # BF16, rounded elsewhere


def test_what_muon_leaves_to_adamw_is_what_adamw_does():
    both = [tiny_model(), tiny_model()]
    for model, name in zip(both, ("muon", "adamw"), strict=True):
        optimizer = make_optimizer(model, Optimizer(name=name))
        for seed in range(3):
            for n, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * n + seed))
            optimizer.step()
    for (name, p), q in zip(both[0].named_parameters(), both[1].parameters(), strict=True):
        assert torch.equal(p, q) == (not name.endswith("_proj.weight")), name


def test_every_row_has_the_state_that_its_plan_counts():
    for name, row in ROWS.items():
        model = tiny_model()
        optimizer = make_optimizer(model, Optimizer(name=name))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        for parameter, p in model.named_parameters():
            kept = sum(t.numel() for t in optimizer.state[p].values() if t.ndim)
            each = row.hidden_state if parameter.endswith("_proj.weight") else row.other_state
            assert kept == each * p.numel(), (name, parameter)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"name": "muno"}, r"optimizer.name 'muno' is none of adamw, muon \(did you mean 'muon'\?\)"),
        ({"options": {"momentum": 0.9}}, "optimizer.options.momentum: adamw has no options"),
        ({"name": "muon", "options": {"momentun": 0.9}}, "unknown field optimizer.options.momentun.*'momentum'"),
        ({"name": "muon", "options": {"momentum": 1.0}}, "optimizer.options.momentum must be at least 0 and below 1"),
        ({"name": "muon", "options": {"rate_factor": 0}}, "optimizer.options.rate_factor must be above 0, not 0"),
        ({"name": "muon", "options": {"newton_schulz_steps": 0}}, "newton_schulz_steps must be at least 1 and below"),
        ({"name": "muon", "options": {"adjust_rate": "rms"}}, "adjust_rate must be one of 'match_rms_adamw'"),
    ],
)
def test_a_mistake_is_refused_by_name(optimizer, message):
    fields = {"name": "r", "data": "d", "steps": 1, "batch_size": 1, "sequence_length": 8, "model": dict(MODEL)}
    with pytest.raises(UsageError, match=message):
        from_mapping(Recipe, {**fields, "optimizer": optimizer}).check()


@pytest.mark.parametrize("stage", ["2", "3"])
def test_muon_under_zero_is_refused_with_the_reason(monkeypatch, stage):
    fields = {"name": "r", "data": "d", "steps": 1, "batch_size": 2, "sequence_length": 8, "model": dict(MODEL)}
    recipe = from_mapping(Recipe, {**fields, "optimizer": MUON})
    monkeypatch.setattr("periln.scripts.training.zero.zero_stage", lambda: int(stage))
    with pytest.raises(UsageError, match="optimizer.name muon: not with DeepSpeed's ZeRO: it keeps flat pieces"):
        check_zero(recipe, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("precision", [FP32, {}])
def test_a_muon_run_that_was_killed_is_the_run_that_was_not(tmp_path, data, precision):
    fields = {"optimizer": MUON, "precision": precision, "keep_last": 4}
    whole = train(tmp_path, data, name="whole", **fields)
    killed = train(tmp_path, data, name="killed", **fields)
    for step in (9, 12):
        shutil.rmtree(killed.checkpoint_path(step))
    killed.set_status("running", step=10)
    again = train(tmp_path, data, name="killed", **fields)
    assert timeless(again.path) == timeless(whole.path)
    assert weights_hash(again.checkpoints()[-1]) == weights_hash(whole.checkpoints()[-1])
    losses = [record["loss"] for record in whole.metrics()]
    assert losses[-1] < losses[0] - 0.3
    state = safetensors.load_file(whole.checkpoint_path(12) / "trainer_state" / "optimizer.safetensors")
    assert "model.layers.0.mlp.up_proj.weight/momentum_buffer" in state
    assert "model.layers.0.mlp.up_proj.weight/exp_avg" not in state
    assert "model.embed_tokens.weight/exp_avg_sq" in state


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
def test_another_optimizer_is_another_run(tmp_path, data):
    train(tmp_path, data, steps=3)
    load_recipe(write_recipe(tmp_path, data, steps=3, optimizer=MUON))
    found = RunFolder(tmp_path / "runs" / "run").check_claim
    with pytest.raises(Exception, match="belongs to another recipe .*optimizer.name: 'adamw' -> 'muon'"):
        found(load_recipe(tmp_path / "run.yaml")[0])


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_muon_sharded_is_muon_on_one_process(tmp_path, data, engine):
    shared = {"optimizer": MUON, "precision": FP32, "device": "cpu", "batch_size": 8, "micro_batch_size": 2}
    one = train(tmp_path, data, name="one", steps=6, **shared)
    file = write_recipe(tmp_path, data, name="two", steps=6, **shared)
    words = torchrun(engine, "--config", file, "--runs", tmp_path / "runs")
    env = environment(engine) | {"OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    two = RunFolder(tmp_path / "runs" / "two")
    ours, theirs = ([record["loss"] for record in run.metrics()] for run in (one, two))
    assert theirs == pytest.approx(ours, abs=2e-3)  # BF16 products of other pieces
    states = [run.checkpoint_path(6) / "trainer_state" / "optimizer.safetensors" for run in (one, two)]
    ours, theirs = map(safetensors.load_file, states)
    name = "model.layers.0.mlp.up_proj.weight/momentum_buffer"
    assert ours.keys() == theirs.keys()
    assert ours[name].shape == theirs[name].shape
    assert (ours[name] - theirs[name]).norm() < 0.02 * ours[name].norm()
