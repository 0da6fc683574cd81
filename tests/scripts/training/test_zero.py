"""DeepSpeed's ZeRO-2 and ZeRO-3: the run of one process, and checkpoints that any engine resumes from.

Two gloo processes are really started on the CPU. Skipped where DeepSpeed is not installed; what it is refused for is
tested without it.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import yaml
from tiny import ROOT, called, make_data, write_recipe

from periln.runkit.errors import UsageError
from periln.runkit.folder import RunFolder, write_json
from periln.scripts.pretrain import load_recipe
from periln.scripts.training import zero

pytestmark = pytest.mark.slow

installed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
FP32 = {"mode": "fp32", "residual_dtype": None}
STEPS = 20


def start(stage: int | None, *args: object) -> None:
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    if stage:  # as the launch file says it
        file = ROOT / "scripts" / "launch" / f"deepspeed_zero{stage}.yaml"
        words = ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", "2"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true"}
    words = [sys.executable, *map(str, [*words, "-m", "scripts.pretrain", *args])]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    make_data(folder)
    return folder


def recipe_of(place, name, **fields):
    shared = {"steps": STEPS, "device": "cpu", "batch_size": 8, "micro_batch_size": 2, "checkpoint_every": 10}
    held = {"heldout_every": 10, "heldout_sequences": 5}
    return write_recipe(place, place / "data", name, **(shared | held | fields))


@pytest.fixture(scope="module")
def runs(place):
    """Every run by (stage, precision); stage 0 is one process in FP32, DDP in FP16."""
    found = {}
    for name, fields in (("fp32", FP32), ("fp16", {"initial_loss_scale": 2.0**34})):  # overflows at first
        file = recipe_of(place, f"run_{name}", precision=fields)
        for stage in (0, 2, 3):
            args = ("--config", file, "--runs", place / str(stage))
            if stage:
                start(stage, *args)
            elif name == "fp16":  # DDP: a rank's gradients are twice those of one process, and overflow a step later
                start(None, *args)
            else:
                assert called("scripts.pretrain", *args).returncode == 0
            found[stage, name] = RunFolder(place / str(stage) / f"run_{name}")
    return found


def column(folder: RunFolder, key: str) -> list:
    assert [r["step"] for r in folder.metrics()] == list(range(STEPS))
    return [r.get(key) for r in folder.metrics()]


@installed
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_ran_under_zero_and_gave_the_losses_of_one_process(runs, stage):
    ours, theirs = runs[stage, "fp32"], runs[0, "fp32"]
    seen = json.loads((ours.path / "environment.json").read_text())
    assert (seen["engine"], seen["processes"], seen["parameters"]) == (f"zero{stage}", 2, ["float32"])
    assert np.abs(np.subtract(column(ours, "loss"), column(theirs, "loss"))).max() < 1e-5
    assert np.allclose(column(ours, "grad_norm"), column(theirs, "grad_norm"), rtol=1e-4)
    held = [[h for h in column(r, "heldout_loss") if h is not None] for r in (ours, theirs)]
    assert held[0] == pytest.approx(held[1], abs=1e-5)


@installed
@pytest.mark.parametrize("stage", [2, 3])
def test_fp16_and_its_loss_scale_are_those_of_the_other_engines(runs, stage):
    ours, theirs = runs[stage, "fp16"], runs[0, "fp16"]
    assert json.loads((ours.path / "environment.json").read_text())["linear_outputs"] == {"float16": 15}
    for key in ("loss_scale", "found_inf", "skip_kind", "skips_total"):
        assert column(ours, key) == column(theirs, key)
    assert any(column(ours, "found_inf"))
    assert np.abs(np.subtract(column(ours, "loss"), column(theirs, "loss"))).max() < 1e-3


@installed
@pytest.mark.parametrize("stage", [2, 3])
def test_layer_statistics_and_the_flight_recorder_see_sharded_gradients(runs, stage):
    keys = ["step", "layer", "sublayer", "tensor", "stat"]
    ours, theirs = (runs[s, "fp32"].path / "layers" / "step_00000005.parquet" for s in (stage, 0))
    ours, theirs = (pd.read_parquet(file).set_index(keys).value for file in (ours, theirs))
    assert set(ours.index) == set(theirs.index)
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=2e-3, abs=1e-9), key
    flights = [sorted((runs[s, "fp16"].path / "flight").glob("*.parquet")) for s in (stage, 0)]
    assert [f.name for f in flights[0]] == [f.name for f in flights[1]] != []
    ours, theirs = (pd.read_parquet(files[-1]).set_index(keys).value for files in flights)
    for key, value in theirs.items():
        if np.isfinite(value):
            assert ours[key] == pytest.approx(value, rel=2e-2, abs=1e-6), key
        else:
            assert not np.isfinite(ours[key]), key


@installed
@pytest.mark.parametrize(("writer", "reader"), [(2, 0), (3, 2), (0, 3)])
def test_any_engine_goes_on_from_its_checkpoint(runs, place, writer, reader):
    written = runs[writer, "fp32"]
    target = place / f"{writer}_to_{reader}"
    copy = RunFolder(target / written.path.name)
    shutil.copytree(written.path, copy.path)
    shutil.rmtree(copy.checkpoint_path(STEPS))
    copy.truncate_metrics(15)
    write_json(copy.path / "summary.json", {"status": "running", "step": 0})
    args = ("--config", place / "run_fp32.yaml", "--runs", target)
    if reader:
        start(reader, *args)
    else:
        assert called("scripts.pretrain", *args).returncode == 0
    assert copy.status == "completed"
    assert np.abs(np.subtract(column(copy, "loss"), column(runs[0, "fp32"], "loss"))).max() < 1e-5


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ZERO_STAGE": "1"}, "zero_stage 1: this trainer runs DeepSpeed's stages 2 and 3"),
        ({"CONFIG_FILE": "ds.json"}, "deepspeed_config_file: give zero_stage alone"),
        ({"OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device cpu: this trainer does not offload"),
    ],
)
def test_what_it_cannot_do_is_refused_before_any_work(tmp_path, data, monkeypatch, variables, message):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for name, value in variables.items():
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
    with pytest.raises(UsageError, match=message):
        load_recipe(write_recipe(tmp_path, data))


def test_compiling_one_process_or_no_deepspeed_are_refused(tmp_path, data, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(zero, "is_deepspeed_available", lambda: False)
    with pytest.raises(UsageError, match="DeepSpeed was asked for, but is not installed: pip install deepspeed"):
        load_recipe(write_recipe(tmp_path, data))
    monkeypatch.setattr(zero, "is_deepspeed_available", lambda: True)
    with pytest.raises(UsageError, match="DeepSpeed was asked for one process: it shards over several"):
        load_recipe(write_recipe(tmp_path, data))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="compile: not with DeepSpeed"):
        load_recipe(write_recipe(tmp_path, data, compile=True, precision=FP32))


@pytest.mark.parametrize("stage", [2, 3])
def test_the_launch_files_ask_for_nothing_but_a_stage(stage):
    launch = yaml.safe_load((ROOT / "scripts" / "launch" / f"deepspeed_zero{stage}.yaml").read_text())
    assert (launch["distributed_type"], launch["deepspeed_config"]) == ("DEEPSPEED", {"zero_stage": stage})
