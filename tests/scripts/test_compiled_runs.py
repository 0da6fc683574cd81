"""Compiled runs: few graphs, the same run after a kill, and overflows that are overflows."""

import json
import subprocess
import time

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import MODEL, ROOT, command, run, timeless, train, write_recipe
from torch._dynamo.utils import counters

from periln.runkit.folder import RunFolder, weights_hash
from periln.scripts.pretrain import load_recipe
from periln.scripts.training.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_accelerate", "fresh_compiler")]

FP32 = {"mode": "fp32", "residual_dtype": None}
KEYS = ["tensor", "layer", "sublayer", "stat"]


def trainer_of(tmp_path, data, **fields) -> Trainer:
    recipe, tokens = load_recipe(write_recipe(tmp_path, data, **fields))
    return Trainer(recipe, RunFolder(tmp_path / "run"), tokens)


def rows_of(run_folder: RunFolder, step: int) -> pd.Series:
    return pd.read_parquet(run_folder.path / "layers" / f"step_{step:08d}.parquet").set_index(KEYS).value


@pytest.mark.parametrize("micro_batches", [3, 9, 12])
def test_any_number_of_micro_batches_makes_two_graphs_a_class(tmp_path, data, quick_compiler, micro_batches):
    fields = {"batch_size": 2 * micro_batches, "micro_batch_size": 2, "heldout_every": 2, "heldout_sequences": 3}
    trainer = trainer_of(tmp_path, data, compile=True, precision=FP32, **fields)
    for _ in range(3):
        trainer._train_step(witness=trainer.step == 0)
        trainer.step += 1
    # Training and evaluation: the layers, the two norms at the ends and the hook of the first. The loss is compiled on
    # a GPU alone.
    assert counters["stats"]["unique_graphs"] == 2 * 3
    assert not counters["graph_break"]
    rows = rows_of(trainer.run, 0)
    assert rows["stream", 2, "mlp", "max_abs"] > 0


def test_the_graphs_of_a_deeper_model_are_as_many(tmp_path, data, quick_compiler):
    model = MODEL | {"num_hidden_layers": 11, "norm_placement": "peri"}
    trainer = trainer_of(tmp_path, data, compile=True, model=model, precision=FP32)
    trainer._train_step(witness=True)
    assert counters["stats"]["unique_graphs"] == 3
    seen = trainer.layer_stats.take().sums
    assert seen[:, 3].min() > 0


def test_statistics_steps_are_compiled_without_the_recorder_too(tmp_path, data, quick_compiler, monkeypatch):
    trainers = {}
    for name, fields in (("plain", {}), ("compiled", {"compile": True})):
        (tmp_path / name).mkdir()
        trainer = trainers[name] = trainer_of(tmp_path / name, data, flight={"steps": 0}, precision=FP32, **fields)
        monkeypatch.setattr(trainer.engine, "uncompiled", lambda: pytest.fail("a training step was made eagerly"))
        trainer._train_step(witness=False)
    ours, theirs = (rows_of(trainers[name].run, 0) for name in ("compiled", "plain"))
    assert counters["stats"]["unique_graphs"] == 3
    assert np.allclose(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("size", ["400m", "3.2b"])
def test_a_shipped_recipe_of_a_gpu_compiles_when_its_model_is_small(tmp_path, data, quick_compiler, size):
    shipped = ROOT / "scripts" / "recipes" / f"{size}-peri.yaml"
    small = ["steps=3", "batch_size=2", "micro_batch_size=1", "sequence_length=16", "device=cpu", "heldout_every=null"]
    small += [f"model.{name}={value}" for name, value in MODEL.items()] + ["model.vocab_size=512", f"data={data}"]
    recipe, tokens = load_recipe(shipped, small)
    trainer = Trainer(recipe, RunFolder(tmp_path / "run"), tokens)
    trainer._train_step(witness=True)
    # The layers, the hook of the first norm, and that norm (of the embedding, FP32) apart from the last (FP16).
    assert counters["stats"]["unique_graphs"] == 4
    assert trainer.layer_stats.take().sums[:, 3].min() > 0


@pytest.mark.parametrize("mode", ["fp32", "fp16"])
def test_a_compiled_run_that_is_killed_ends_as_if_untouched(tmp_path, data, mode):
    precision = FP32 if mode == "fp32" else {"mode": "fp16"}
    # So many steps that a process killed after the fifth is at work then.
    file = write_recipe(tmp_path, data, steps=60, compile=True, precision=precision, layer_stats_every=5)
    untouched = RunFolder(tmp_path / "untouched" / "run")
    done = run("scripts.pretrain", "--config", file, "--runs", untouched.path.parent)
    assert done.returncode == 0, done.stderr
    folder = RunFolder(tmp_path / "killed" / "run")
    words = command("scripts.pretrain", "--config", file, "--runs", folder.path.parent)
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(folder.metrics()) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert folder.status == "running"
    done = run("scripts.pretrain", "--config", file, "--runs", folder.path.parent)
    assert done.returncode == 0, done.stderr
    assert timeless(folder.path) == timeless(untouched.path)
    assert weights_hash(folder.checkpoints()[-1]) == weights_hash(untouched.checkpoints()[-1])
    assert rows_of(folder, 10).equals(rows_of(untouched, 10))


def test_compiled_fp16_is_the_eager_ones_arithmetic(tmp_path, data):
    plain = train(tmp_path, data, steps=20, layer_stats_every=7)
    other = train(tmp_path, data, name="compiled", steps=20, layer_stats_every=7, compile=True)
    ours, theirs = ([r["loss"] for r in folder.metrics()] for folder in (other, plain))
    assert np.abs(np.subtract(ours, theirs)).max() < 1e-3
    assert ours[-1] < ours[0] - 0.3
    seen = json.loads((other.path / "environment.json").read_text())
    assert {d for add in seen["residual_adds"].values() for d in add.values()} == {"float16"}
    rows, expected = rows_of(other, 0), rows_of(plain, 0)
    for key, value in expected.items():
        assert rows[key] == pytest.approx(value, rel=2e-2, abs=1e-5), key


def plant_an_overflow(trainer: Trainer) -> None:
    """Stream 60,000 and attention 30,000, both of which FP16 holds; their sum it does not."""
    model, width = trainer.model.model, trainer.model.config.hidden_size
    with torch.no_grad():
        model.embed_tokens.weight.fill_(60_000.0)
        model.layers[0].self_attn.v_proj.weight.fill_(1 / width)
        model.layers[0].self_attn.o_proj.weight.fill_(30_000 / width)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_planted_overflow_is_inf_and_skips_the_step_compiled_or_not(tmp_path, data, compiled):
    trainer = trainer_of(tmp_path, data, placement="pre", compile=compiled)
    plant_an_overflow(trainer)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    record = trainer._train_step(witness=True)
    assert (record["loss"], record["found_inf"], record["skip_kind"]) == (None, True, "forward")
    assert record["skip_module"] == "model.layers.0.attn_residual"
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    rows = rows_of(trainer.run, 0)
    assert rows["stream", 0, "embedding", "max_abs"] == 60_000
    assert rows["branch", 1, "attn", "max_abs"] == pytest.approx(30_000, rel=1e-3)
    for stat in ("max_abs", "mean_abs"):
        assert rows["residual_add", 1, "attn", stat] == float("inf")
    # The next norm read inf, not 90,000, of which it would have made ones: nothing behind it is finite.
    assert not np.isfinite(rows["branch", 1, "mlp", "max_abs"])
