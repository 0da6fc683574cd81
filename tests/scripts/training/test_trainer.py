"""What a recipe can switch in the trainer, and what the trainer says of what went wrong."""

import json
import shutil
import sqlite3

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType
from tiny import run, train, write_recipe
from torch import nn
from transformers import AutoTokenizer

from periln.runkit.errors import UsageError
from periln.runkit.folder import RunFolder
from periln.scripts.data.token_data import TokenData
from periln.scripts.pretrain import load_recipe
from periln.scripts.training import tracking
from periln.scripts.training.heldout import heldout_sequences
from periln.scripts.training.overflow import FirstNonFinite
from periln.scripts.training.trainer import Trainer, peak_flops

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_accelerate")]

FP32 = {"mode": "fp32", "residual_dtype": None}


def losses(run: RunFolder) -> list[float]:
    return [r["loss"] for r in run.metrics()]


def trainer_of(tmp_path, data, **fields) -> Trainer:
    recipe, tokens = load_recipe(write_recipe(tmp_path, data, **fields))
    return Trainer(recipe, RunFolder(tmp_path / "run"), tokens)


def test_compiling_and_checkpointing_change_no_loss(tmp_path, data):
    plain = train(tmp_path, data, steps=20, precision=FP32, layer_stats_every=7)
    for switches in (["activation_checkpointing"], ["compile"], ["activation_checkpointing", "compile"]):
        fields = dict.fromkeys(switches, True)
        other = train(tmp_path, data, name="-".join(switches), steps=20, precision=FP32, layer_stats_every=7, **fields)
        assert np.abs(np.subtract(losses(other), losses(plain))).max() < 1e-5
        for file in (plain.path / "layers").iterdir():  # hooks that stay are compiled with the layers
            ours, theirs = (pd.read_parquet(r.path / "layers" / file.name).value for r in (other, plain))
            assert np.allclose(ours, theirs, rtol=1e-3, atol=1e-6)


def test_checkpointing_changes_no_loss_in_fp16_either(tmp_path, data):
    plain = train(tmp_path, data)
    other = train(tmp_path, data, name="checkpointing", activation_checkpointing=True)
    assert losses(other) == losses(plain)


def test_with_document_masking_another_documents_tokens_change_nothing(tmp_path, data):
    trainer = trainer_of(tmp_path, data, precision=FP32, document_masking=True, sequence_length=128)
    batches = (trainer._micro_batches(step)[0] for step in range(50))
    batch, row = next((b, i) for b in batches for i, p in enumerate(b["position_ids"]) if (p == 0).sum() > 1)
    positions = batch["position_ids"]
    start = int((positions[row] == 0).nonzero()[1])
    inputs = {"input_ids": batch["input_ids"][row : row + 1], "position_ids": positions[row : row + 1]}
    changed = inputs | {"input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, :start] = (changed["input_ids"][0, :start] + 1) % 256
    first, second = (trainer.model(**x, use_cache=False).logits[0, start:] for x in (inputs, changed))
    assert torch.equal(first, second)
    plain = trainer_of(tmp_path, data, precision=FP32, sequence_length=128)
    assert all("position_ids" not in batch for batch in plain._micro_batches(0))


def test_document_masking_is_trained_with_and_recorded(tmp_path, data):
    masked = train(tmp_path, data, name="masked", document_masking=True, steps=3)
    plain = train(tmp_path, data, steps=3)
    assert losses(masked) != losses(plain)
    assert (masked.recipe["document_masking"], plain.recipe["document_masking"]) == (True, False)


def test_the_z_term_changes_the_run_but_is_not_in_its_loss(tmp_path, data):
    plain = train(tmp_path, data)
    other = train(tmp_path, data, name="z", optimizer={"z_loss": 0.1})
    assert losses(other)[0] == losses(plain)[0]
    assert other.metrics()[0]["grad_norm"] != plain.metrics()[0]["grad_norm"]
    assert losses(other)[-1] != losses(plain)[-1]


def test_the_checkpoints_that_stay_are_those_that_the_recipe_names(tmp_path, data):
    kept = {"keep_last": 1, "keep_every": 6, "checkpoint_every": 2, "heldout_every": 2, "keep_best": True}
    # A rate that is good at first and then far too high: the best is not the last.
    rate = {"learning_rate": 20.0, "warmup": 1.0, "gradient_clip": None}
    run = train(tmp_path, data, precision=FP32, optimizer=rate, divergence={"loss_rise": 1e9}, **kept)
    held = {r["step"] + 1: r["heldout_loss"] for r in run.metrics() if "heldout_loss" in r}
    assert list(held) == [2, 4, 6, 8, 10, 12]
    best = min(held, key=held.get)
    assert best < 12
    assert json.loads((run.path / "best.json").read_text()) == {"step": best, "heldout_loss": held[best]}
    assert [int(p.name[5:]) for p in run.checkpoints()] == sorted({best, 6, 12})


def test_the_heldout_loss_is_that_of_the_heldout_text(tmp_path, data):
    trainer = trainer_of(tmp_path, data, precision=FP32, heldout_every=5, heldout_sequences=3)
    inputs, targets = trainer.heldout
    assert inputs.shape == targets.shape == (3, 32)
    text = json.loads((data / "heldout.jsonl").read_text().splitlines()[0])["text"]
    ids = trainer.tokenizer(text, add_special_tokens=False).input_ids
    assert inputs[0].tolist() == ids[:32]
    assert targets[0].tolist() == ids[1:33]
    with torch.no_grad():
        logits = trainer.model(inputs, use_cache=False).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    trainer.step = 4
    assert trainer._train_step(witness=False)["heldout_loss"] != pytest.approx(expected, abs=1e-7)  # after the update
    with torch.no_grad():
        logits = trainer.model(inputs, use_cache=False).logits
    after = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    trainer.recipe.heldout_every = 6
    trainer.recipe.optimizer.learning_rate = 0.0
    trainer.step = 5
    assert trainer._train_step(witness=False)["heldout_loss"] == pytest.approx(after, abs=1e-6)


def test_heldout_text_that_spells_a_special_token_is_only_text_as_in_the_shards(tmp_path, data):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    (folder / "heldout.jsonl").write_text(json.dumps({"name": "a", "text": "<|end_of_text|>" * 9}) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    inputs, targets = heldout_sequences(TokenData(folder), tokenizer, 8, 4)
    assert tokenizer.eos_token_id not in inputs
    assert "".join(tokenizer.decode(inputs.flatten())).startswith("<|end_of_text|>")
    assert targets[0].tolist() == [*inputs[0, 1:].tolist(), inputs[1, 0].item()]


def test_the_first_module_that_overflows_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Identity()), nn.Linear(2, 2))
    with FirstNonFinite(model) as seen:
        model(torch.ones(1, 2))
    assert seen.name is None
    with torch.no_grad():
        model[1][0].weight.fill_(float("inf"))
    with FirstNonFinite(model) as seen:
        model(torch.ones(1, 2))
    assert seen.name == "1.0"


@pytest.mark.parametrize(
    ("large", "module"),
    [(["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj"), (["self_attn.v_proj"], "self_attn.o_proj")],
)
def test_a_forward_overflow_is_recorded_with_its_module(tmp_path, data, large, module):
    trainer = trainer_of(tmp_path, data)
    layer = trainer.model.model.layers[1]
    with torch.no_grad():
        for name in large:
            layer.get_submodule(name).weight.fill_(1.0)
        layer.get_submodule(module).weight.fill_(3e4)
    record = trainer._train_step(witness=False)
    assert (record["skip_kind"], record["loss"], record["found_inf"]) == ("forward", None, True)
    assert record["skip_module"] == f"model.layers.1.{module}"
    fine = trainer_of(tmp_path, data)._train_step(witness=False)
    assert (fine["skip_kind"], fine["skip_module"]) == (None, None)


def test_a_diverged_run_leaves_its_last_records(tmp_path, data):
    run = train(tmp_path, data, divergence={"loss_rise": 0.01, "window": 2}, optimizer={"learning_rate": 1.0}, steps=40)
    assert run.status == "diverged"
    dump = json.loads((run.path / "divergence.json").read_text())
    assert dump["reason"] == run.summary["reason"]
    assert dump["records"] == run.metrics()[-64:]


class Recorder(GeneralTracker):
    """A tracker that remembers."""

    name, requires_logging_directory = "trackio", False
    made: list = []

    def __init__(self, run_name: str, **kwargs):
        super().__init__()
        self.run_name, self.kwargs, self.logged, self.finished, self.config = run_name, kwargs, [], False, None
        self.made.append(self)

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **kwargs):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_a_tracker_gets_every_step_and_the_recipe(tmp_path, data, monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", Recorder)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [LoggerType.TRACKIO])
    monkeypatch.setattr(Recorder, "made", [])
    run = train(tmp_path, data, trackers=["trackio"], steps=3)
    (tracker,) = Recorder.made
    assert [step for step, _ in tracker.logged] == [0, 1, 2]
    assert [values["loss"] for _, values in tracker.logged] == losses(run)
    assert tracker.config["optimizer.learning_rate"] == 2e-3
    assert tracker.finished


def test_a_tracker_that_is_unknown_or_not_there_is_said_before_any_work(tmp_path, data, monkeypatch):
    with pytest.raises(UsageError, match="trackers: 'tensorbord' is unknown.*did you mean 'tensorboard'"):
        load_recipe(write_recipe(tmp_path, data, trackers=["tensorbord"]))
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(UsageError, match="trackers: wandb is not installed: pip install wandb"):
        load_recipe(write_recipe(tmp_path, data, trackers=["wandb"]))


def test_trackio_is_the_default_where_it_is_installed(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", Recorder)
    monkeypatch.setattr(Recorder, "made", [])
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    train(tmp_path, data, trackers=None, steps=1)
    assert "trackers: none, trackio is not installed" in capsys.readouterr().out
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [LoggerType.TRACKIO])
    run = train(tmp_path, data, trackers=None, name="second", steps=1)
    assert f"trackers: trackio, in {tmp_path / 'elsewhere'}" in capsys.readouterr().out
    train(tmp_path, data, trackers=[], name="third", steps=1)
    (tracker,) = Recorder.made
    assert (tracker.kwargs["name"], tracker.kwargs["embed"]) == ("second", False)
    assert run.recipe["trackers"] is None  # a machine without it continues the run


def test_a_tracker_that_fails_is_named_and_ends_nothing(tmp_path, data, monkeypatch, capsys):
    class Full(Recorder):
        def log(self, values, step=None, **kwargs):
            print("chatter")
            if step == 1:
                raise OSError("no space left")
            super().log(values, step)

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", Full)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [LoggerType.TRACKIO])
    monkeypatch.setattr(Full, "made", [])
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    assert train(tmp_path, data, trackers=["trackio"], steps=3).status == "completed"
    said = capsys.readouterr().out
    assert said.count("trackers: trackio failed and is left out (OSError: no space left)") == 1
    assert "chatter" not in said
    assert [step for step, _ in Full.made[0].logged] == [0]


def test_the_real_trackio_keeps_a_run_beside_the_run_folders(tmp_path, data):
    pytest.importorskip("trackio", reason="trackio is not installed")
    file = write_recipe(tmp_path, data, trackers=None, steps=4)
    done = run("scripts.pretrain", "--config", file, "--runs", tmp_path / "runs", env=["-u", "TRACKIO_DIR"])
    assert done.returncode == 0, done.stderr
    place = tmp_path / "runs" / ".trackio"
    assert f"trackers: trackio, in {place}" in done.stdout
    with sqlite3.connect(f"file:{place / 'peri-llama.db'}?mode=ro", uri=True) as base:
        rows = base.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    records = RunFolder(tmp_path / "runs" / "run").metrics()
    assert [(name, step) for name, step, _ in rows] == [("run", r["step"]) for r in records]
    assert [json.loads(metrics)["loss"] for _, _, metrics in rows] == [r["loss"] for r in records]


def test_mfu_is_a_share_of_a_known_devices_peak_and_else_absent(tmp_path, data, monkeypatch):
    trainer = trainer_of(tmp_path, data)
    assert trainer._train_step(witness=False)["mfu"] is None
    trainer.peak_flops = 1e9
    record = trainer._train_step(witness=False)
    assert record["mfu"] == pytest.approx(record["tokens_per_second"] * trainer.flops_per_token / 1e9)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H200")
    assert peak_flops(torch.device("cuda")) == 989e12
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Another GPU")
    assert peak_flops(torch.device("cuda")) is None


def test_a_damaged_checkpoint_that_is_written_again_does_not_push_a_good_one_out(tmp_path, data):
    trainer = trainer_of(tmp_path, data, keep_last=2)
    for step in (3, 6):
        trainer.step = step
        trainer.save()
    trainer.save()  # step 6 once more, as after a resume from step 3
    assert [int(path.name[5:]) for path in trainer.run.checkpoints()] == [3, 6]
    trainer.step = 5  # stopped before it came to the damaged one again
    trainer.save()
    assert [int(path.name[5:]) for path in trainer.run.checkpoints()] == [3, 5]
