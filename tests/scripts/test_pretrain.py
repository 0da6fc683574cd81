"""Pretraining: FP16 that is FP16, runs that repeat, runs that are killed, runs that diverge."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tiny import CLOCK_KEYS, MODEL, ROOT, called, command, run, timeless, train, write_recipe

from modeling_periln import PeriLlamaForCausalLM
from periln.runkit.checkpoints import latest_whole
from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import RunFolder, weights_hash
from periln.scripts import pretrain
from periln.scripts.pretrain import load_recipe
from periln.scripts.training.trainer import Trainer, resolved_config

LONG = 60

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_accelerate")]


def finished(folder, data, **more):
    done = run("scripts.pretrain", "--config", write_recipe(folder, data, **more), "--runs", folder / "runs")
    assert done.returncode == 0, done.stderr
    return RunFolder(folder / "runs" / "run")


@pytest.fixture(scope="module")
def untouched(data, tmp_path_factory):
    """One run that was not interrupted, in its own process."""
    return finished(tmp_path_factory.mktemp("untouched"), data)


@pytest.fixture(scope="module")
def untouched_long(data, tmp_path_factory):
    """The same with so many steps that a process told to die in the first ten is still at work then."""
    return finished(tmp_path_factory.mktemp("untouched"), data, steps=LONG)


def test_everything_that_should_be_fp16_is(untouched):
    seen = json.loads((untouched.path / "environment.json").read_text())
    assert set(seen["residual_adds"]) == {f"model.layers.{i}.{s}_residual" for i in (0, 1) for s in ("attn", "mlp")}
    for add in seen["residual_adds"].values():
        assert set(add.values()) == {"float16"}
    assert seen["linear_outputs"] == {"float16": 2 * 7 + 1}
    assert seen["loss_scaler"] is True


def test_what_should_be_fp32_is(untouched):
    seen = json.loads((untouched.path / "environment.json").read_text())
    assert seen["parameters"] == seen["gradients"] == ["float32"]
    tensors = load_file(untouched.checkpoints()[-1] / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert any((t != t.half().float()).any() for t in tensors.values())  # masters hold more than FP16 can


@pytest.mark.parametrize("placement", ["post", "pre", "peri"])
def test_hooks_see_no_fp32_in_any_sublayer(tmp_path, data, placement):
    recipe, tokens = load_recipe(write_recipe(tmp_path, data, placement=placement))
    trainer = Trainer(recipe, RunFolder(tmp_path / "run"), tokens)
    wide = {}

    def look(name):
        def hook(module, args, output):
            tensors = [t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, torch.Tensor)]
            wide[name] = {t.dtype for t in tensors}

        return hook

    for name, module in trainer.model.named_modules():
        if ".layers." in name or "final_norm" in name or "lm_head" in name:
            module.register_forward_hook(look(name))
    with trainer.engine.arithmetic():
        trainer._gradients(trainer._micro_batches(0))
    assert len(wide) > 20
    assert {n: d for n, d in wide.items() if d != {torch.float16}} == {}


def test_an_fp32_run_would_be_seen(tmp_path, data):
    run_folder = train(tmp_path, data, steps=1, precision={"mode": "fp32", "residual_dtype": None})
    seen = json.loads((run_folder.path / "environment.json").read_text())
    assert seen["linear_outputs"] == {"float32": 15}
    assert {d for add in seen["residual_adds"].values() for d in add.values()} == {"float32"}
    assert seen["loss_scaler"] is False


def test_the_same_recipe_gives_the_same_run(untouched, tmp_path, data):
    again = train(tmp_path, data)
    assert timeless(again.path) == timeless(untouched.path)
    assert weights_hash(again.checkpoints()[-1]) == weights_hash(untouched.checkpoints()[-1])
    other = train(tmp_path / "..", data, name=f"other{tmp_path.name}", seed=2)
    assert timeless(other.path) != timeless(untouched.path)


def test_metrics_have_the_keys_of_the_design(untouched):
    keys = {"step", "loss", "learning_rate", "grad_norm", "loss_scale", "found_inf", "skip_kind", "skips_consecutive"}
    keys |= {"skip_module", "skips_total", "spike", "tokens"} | CLOCK_KEYS
    records = untouched.metrics()
    assert [r["step"] for r in records] == list(range(12))
    assert all(set(r) == keys for r in records)
    assert records[-1]["tokens"] == 12 * 4 * 32
    assert records[-1]["loss"] < records[0]["loss"] - 0.3


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path, data):
    gradients = []
    for micro in (4, 2, 1):
        precision = {"mode": "fp32", "residual_dtype": None}
        recipe, tokens = load_recipe(write_recipe(tmp_path, data, micro_batch_size=micro, precision=precision))
        trainer = Trainer(recipe, RunFolder(tmp_path / "run"), tokens)
        loss = trainer._gradients(trainer._micro_batches(0))
        gradients.append((loss, torch.cat([p.grad.flatten() for p in trainer.model.parameters()])))
    for loss, gradient in gradients[1:]:
        assert loss == pytest.approx(gradients[0][0], rel=1e-6)
        assert (gradient - gradients[0][1]).norm() <= 1e-6 * gradients[0][1].norm()


def test_micro_batches_give_the_losses_of_the_whole_batch_over_twenty_steps(tmp_path, data):
    shared = {"batch_size": 8, "steps": 20, "precision": {"mode": "fp32", "residual_dtype": None}}
    runs = [
        train(tmp_path, data, name=f"micro{n}", micro_batch_size=n, checkpoint_every=20, **shared) for n in (8, 4, 2)
    ]
    whole, *others = [[r["loss"] for r in run.metrics()] for run in runs]
    assert len(whole) == 20
    for losses in others:
        assert losses == pytest.approx(whole, abs=1e-5)


def test_layer_statistics_are_those_of_the_hidden_states(tmp_path, data):
    precision = {"mode": "fp32", "residual_dtype": None}
    recipe, tokens = load_recipe(write_recipe(tmp_path, data, placement="post", precision=precision))
    trainer = Trainer(recipe, RunFolder(tmp_path / "run"), tokens)
    inputs = torch.from_numpy(trainer.order.batch(0)[0])
    states = trainer.model.model(inputs, output_hidden_states=True, use_cache=False).hidden_states
    trainer._train_step(witness=False)
    rows = pd.read_parquet(tmp_path / "run" / "layers" / "step_00000000.parquet")
    rows = rows.set_index(["tensor", "layer", "sublayer", "stat"]).value
    for layer, sublayer in ((0, "embedding"), (1, "mlp"), (2, "mlp")):
        x = states[layer].double()
        assert rows["stream", layer, sublayer, "mean_abs"] == pytest.approx(x.abs().mean().item(), rel=1e-5)
        assert rows["stream", layer, sublayer, "variance"] == pytest.approx(x.var(correction=0).item(), rel=1e-4)
        assert rows["stream", layer, sublayer, "max_abs"] == pytest.approx(x.abs().max().item(), rel=1e-6)
    assert rows["residual_add", 1, "attn", "max_abs"] != rows["stream", 1, "attn", "max_abs"]  # before C and after


def test_gradient_statistics_are_unscaled(tmp_path, data):
    values = []
    for scale in (65536.0, 1024.0):
        recipe, tokens = load_recipe(write_recipe(tmp_path, data, precision={"initial_loss_scale": scale}))
        trainer = Trainer(recipe, RunFolder(tmp_path / f"run{scale}"), tokens)
        record = trainer._train_step(witness=False)
        rows = pd.read_parquet(tmp_path / f"run{scale}" / "layers" / "step_00000000.parquet")
        layers = rows[(rows.tensor == "gradient") & (rows.stat == "norm") & (rows.sublayer == "layer")]
        values.append((layers.value.iloc[0], record["grad_norm"]))
        assert 0 < layers.value.max() < record["grad_norm"] * 1.001
    assert values[0] == pytest.approx(values[1], rel=1e-2)


def test_output_norm_gamma_is_recorded_where_there_is_one(untouched, tmp_path, data):
    rows = pd.read_parquet(untouched.path / "layers" / "step_00000012.parquet")
    gamma = rows[rows.tensor == "output_norm_gamma"]
    assert set(zip(gamma.layer, gamma.sublayer, strict=True)) == {(i, s) for i in (1, 2) for s in ("attn", "mlp")}
    assert (gamma.value != 1).any()


SIGNATURE = """
import sys, torch, modeling_periln
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(20)[None]
torch.save(model(ids).logits, sys.argv[2])
print(model.generate(ids, max_new_tokens=5, do_sample=False)[0].tolist())
"""


def test_a_new_process_gets_the_same_logits_to_the_last_bit(tmp_path, data):
    recipe, tokens = load_recipe(write_recipe(tmp_path, data, steps=2))
    trainer = Trainer(recipe, RunFolder(tmp_path / "run"), tokens)
    for _ in range(2):
        trainer._train_step(witness=False)
        trainer.step += 1
    trainer.save()
    checkpoint = RunFolder(tmp_path / "run").checkpoints()[-1]
    done = subprocess.run(
        [sys.executable, "-c", SIGNATURE, checkpoint, tmp_path / "logits"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # The weights of the model that was saved, without the wrapping of the training run around its forward.
    saved = PeriLlamaForCausalLM(resolved_config(recipe, tokens, trainer.tokenizer))
    saved.load_state_dict(trainer.model.state_dict())
    saved.config.residual_dtype = None
    ids = torch.arange(20)[None]
    assert torch.equal(torch.load(tmp_path / "logits", weights_only=True), saved.eval()(ids).logits)
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["residual_dtype"] is None
    assert set(config["auto_map"]) >= {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


def wait_for(condition, process, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_at_arbitrary_moments_it_ends_as_if_untouched(untouched_long, tmp_path, data):
    file, folder = write_recipe(tmp_path, data, steps=LONG), RunFolder(tmp_path / "runs" / "run")
    draw = random.Random(5)
    for target in (1, 4, 7, 9):
        process = subprocess.Popen(
            command("scripts.pretrain", "--config", file, "--runs", tmp_path / "runs"),
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        wait_for(lambda target=target: len(folder.metrics()) >= target, process)
        time.sleep(draw.random() * 0.2)
        process.kill()
        process.wait()
        assert folder.status == "running"
    done = called("scripts.pretrain", "--config", file, "--runs", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    assert folder.status == "completed"
    assert timeless(folder.path) == timeless(untouched_long.path)
    assert weights_hash(folder.checkpoints()[-1]) == weights_hash(untouched_long.checkpoints()[-1])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_goes_on_exactly(untouched_long, tmp_path, data, number, code):
    file, folder = write_recipe(tmp_path, data, steps=LONG, checkpoint_every=1000), RunFolder(tmp_path / "runs" / "run")
    words = command("scripts.pretrain", "--config", file, "--runs", tmp_path / "runs")
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(folder.metrics()) >= 2, process)
    process.send_signal(number)
    assert process.wait() == code
    assert folder.status == "interrupted"
    assert 2 <= folder.summary["step"] < LONG
    assert len(folder.checkpoints()) == 1
    done = called("scripts.pretrain", "--config", file, "--runs", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    assert timeless(folder.path) == timeless(untouched_long.path)


def test_a_damaged_checkpoint_is_named_and_passed_over(untouched, tmp_path, data):
    file = write_recipe(tmp_path, data, keep_last=3)
    recipe, tokens = load_recipe(file)
    folder = RunFolder(tmp_path / "runs" / "run")
    trainer = Trainer(recipe, folder, tokens)
    folder.path.mkdir(parents=True)
    with open(folder.metrics_path, "a") as metrics:
        for step in range(6):
            metrics.write(json.dumps(trainer._train_step(witness=False)) + "\n")
            trainer.step += 1
            if step % 3 == 2:
                trainer.save()
    weights = folder.checkpoint_path(6) / "model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-5] ^= 1
    weights.write_bytes(flipped)
    said = []
    assert latest_whole(folder, said.append) == folder.checkpoint_path(3)
    assert "step_00000006/model.safetensors is damaged" in said[0]
    done = called("scripts.pretrain", "--config", file, "--runs", tmp_path / "runs")
    # The recipe of an unclaimed folder is not assumed to be this one.
    assert done.returncode == 1
    assert "holds files but no recipe.yaml" in done.stderr


def test_a_forward_overflow_is_seen_named_and_ends_the_run_as_diverged(tmp_path, data):
    run_folder = train(
        tmp_path,
        data,
        placement="pre",
        steps=60,
        optimizer={"learning_rate": 30.0, "warmup": 0.0},
        divergence={"nonfinite_losses": 4},
    )
    assert run_folder.status == "diverged"
    assert "the loss was not finite for 4 steps in a row" in run_folder.summary["reason"]
    last = run_folder.metrics()[-1]
    assert (last["loss"], last["found_inf"], last["skip_kind"]) == (None, True, "forward")
    assert last["step"] < 59
    assert run_folder.finished


def test_a_backward_overflow_skips_and_halves_the_scale(tmp_path, data):
    run_folder = train(tmp_path, data, steps=6, precision={"initial_loss_scale": 2.0**40})
    records = run_folder.metrics()
    assert records[0]["found_inf"]
    assert records[0]["loss"] is not None
    assert records[0]["skip_kind"] == "probe"
    assert records[1]["loss_scale"] == records[0]["loss_scale"] / 2
    assert records[-1]["skips_total"] == sum(r["found_inf"] for r in records)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model": {**MODEL, "norm_placement": "perri"}}, UsageError, "norm_placement='perri'.*did you mean 'peri'"),
        ({"batch_size": 4, "micro_batch_size": 3}, UsageError, r"batch_size 4 is not a multiple of 3 x 1"),
        ({"sequence_length": 200}, UsageError, "sequence_length 200 exceeds model.max_position_embeddings 128"),
        ({"model": {**MODEL, "vocab_size": 299}}, UsageError, "model.vocab_size 299 is not the data's.* 300 tokens"),
        ({"optimizer": {"warmup": 1.5}}, UsageError, "optimizer.warmup is a share of the steps, 0 to 1, not 1.5"),
        ({"optimizer": {"lerning_rate": 1}}, UsageError, r"optimizer\.lerning_rate \(did you mean 'learning_rate'"),
        ({"data": "/nowhere"}, UserError, "data: /nowhere holds no prepared tokens"),
        ({"data_fingerprint": "other"}, UserError, "another fingerprint"),
        ({"device": "tpu"}, UsageError, "device must be one of 'auto', 'cpu', 'cuda', not 'tpu'"),
        ({"steps": 0}, UsageError, "steps must be at least 1, not 0"),
        ({"divergence": {"loss_rise": 0}}, UsageError, "divergence.loss_rise must be above 0, not 0"),
        ({"optimizer": {"eps": 0}}, UsageError, "optimizer.eps must be above 0, not 0"),
        ({"spikes": {"window": 1}}, UsageError, "spikes.window must be at least 2, not 1"),
        ({"flight": {"steps": -1}}, UsageError, "flight.steps must be at least 0 .none., not -1"),
        ({"flight": {"files": 0}}, UsageError, "flight.files must be at least 1, not 0"),
        ({"flight": {"step": 3}}, UsageError, "unknown field flight.step .did you mean 'steps'"),
        ({"model": {**MODEL, "eos_token_id": 7}}, UsageError, "model.eos_token_id is the data's tokenizer's to say"),
        ({"model": {**MODEL, "dtype": "float16"}}, UsageError, "model.dtype belongs to the run.* precision.mode"),
        (
            {"batch_size": 1, "sequence_length": 100_000, "model": {**MODEL, "max_position_embeddings": 100_000}},
            UserError,
            "tokens, fewer than one sequence of sequence_length 100000",
        ),
        ({"name": "../up"}, UsageError, "name '../up' must be a plain folder name"),
        ({"micro_batch_size": 0}, UsageError, "micro_batch_size must be at least 1"),
        ({"optimizer": {"learning_rate": float("nan")}}, UsageError, "optimizer.learning_rate must be float, not nan"),
        ({"optimizer": {"beta2": 1.0}}, UsageError, "optimizer.beta2 must be at least 0 and below 1, not 1.0"),
        ({"divergence": {"window": 0}}, UsageError, "divergence.window must be at least 1, not 0"),
    ],
)
def test_recipe_mistakes_are_found_before_any_work(tmp_path, data, fields, error, message):
    with pytest.raises(error, match=message):
        load_recipe(write_recipe(tmp_path, data, **fields))


def test_what_is_refused_at_the_last_moment_leaves_no_claim_behind(tmp_path, data):
    file = write_recipe(tmp_path, data, heldout_every=1, sequence_length=128, heldout_sequences=1)
    empty = tmp_path / "data"
    shutil.copytree(data, empty)
    (empty / "heldout.jsonl").write_text(json.dumps({"name": "a", "text": "short"}) + "\n")
    words = ["--config", str(file), "--runs", str(tmp_path / "runs"), "--set", f"data={empty}"]
    with pytest.raises(UserError, match="fewer than one sequence of 128 . 1"):
        pretrain.main(pretrain.parse(words))
    assert not (tmp_path / "runs" / "run" / "recipe.yaml").exists()


def test_a_run_that_must_go_on_and_one_that_must_not_exist(tmp_path, data):
    words = ["--config", str(write_recipe(tmp_path, data, steps=3)), "--runs", str(tmp_path / "runs"), "--resume"]

    def start(mode: str) -> None:
        pretrain.main(pretrain.parse([*words, mode]))

    with pytest.raises(UserError, match="--resume must: .*run has no checkpoint to resume from"):
        start("must")
    assert not (tmp_path / "runs").exists()
    start("never")
    with pytest.raises(UserError, match="--resume never: .*run holds a run already .completed."):
        start("never")
    start("must")


def test_the_checkpoint_before_the_first_step_stays_and_is_the_initialization(tmp_path, data):
    folder = train(tmp_path, data, keep_initial=True, keep_last=1, steps=6)
    assert [path.name for path in folder.checkpoints()] == ["step_00000000", "step_00000006"]
    recipe, tokens = load_recipe(tmp_path / "run.yaml")
    fresh = Trainer(recipe, RunFolder(tmp_path / "other"), tokens)
    saved = load_file(folder.checkpoints()[0] / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in fresh.model.state_dict().items())
    plain = train(tmp_path, data, name="plain", steps=6)
    assert timeless(folder.path) == timeless(plain.path)
    # From it a run can begin again.
    shutil.rmtree(folder.checkpoints()[-1])
    folder.set_status("running")
    stale = folder.path / "layers" / "step_00000500.parquet"  # of steps that were done on another machine, say
    stale.write_bytes(b"")
    assert timeless(train(tmp_path, data, keep_initial=True, keep_last=1, steps=6).path) == timeless(plain.path)
    assert not stale.exists()


def test_another_recipe_on_the_same_folder_is_refused_with_the_fields(untouched, data, tmp_path):
    file = write_recipe(tmp_path, data, steps=13)
    done = called("scripts.pretrain", "--config", file, "--runs", untouched.path.parent)
    assert done.returncode == 1
    assert "belongs to another recipe (steps: 12 -> 13)" in done.stderr
    assert "Traceback" not in done.stderr
    assert untouched.status == "completed"
