"""One process, DDP and FSDP2: the same run. Two gloo processes are really started, under torchrun, on the CPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from tiny import ROOT, called, make_data, write_recipe

from periln.runkit.folder import RunFolder, write_json
from periln.runkit.recipes import read_yaml

pytestmark = pytest.mark.slow

FP32 = {"mode": "fp32", "residual_dtype": None}
STEPS = 20
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "-m", "scripts.pretrain"]
ENGINES = {"ddp": {}, "fsdp2": {"ACCELERATE_USE_FSDP": "true"}}


def torchrun(engine: str, *args: object) -> list[str]:
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    return [*words, "-m", "scripts.pretrain", *map(str, args)]


def environment(engine: str) -> dict[str, str]:
    return os.environ | {"ACCELERATE_USE_CPU": "true"} | ENGINES[engine]


def start(engine: str, *args: object) -> subprocess.CompletedProcess:
    done = subprocess.run(
        torchrun(engine, *args), cwd=ROOT, env=environment(engine), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def runs(place):
    """Every run by (engine, precision)."""
    found = {}
    for precision, fields in (("fp32", FP32), ("fp16", {})):
        shared = {
            "steps": STEPS,
            "precision": fields,
            "device": "cpu",
            "batch_size": 8,
            "micro_batch_size": 2,  # two a rank
            "checkpoint_every": 10,
            "keep_last": 2,
            "heldout_every": 10,
            "heldout_sequences": 5,  # one rank gets one more than the other
        }
        file = write_recipe(place, place / "data", f"run_{precision}", **shared)
        for engine in ("single", *ENGINES):
            target = place / engine
            done = None
            if engine == "single":
                done = called("scripts.pretrain", "--config", file, "--runs", target)
            else:
                start(engine, "--config", file, "--runs", target)
            assert done is None or done.returncode == 0, done
            found[engine, precision] = RunFolder(target / f"run_{precision}")
    return found


def seen(folder: RunFolder) -> dict:
    return json.loads((folder.path / "environment.json").read_text())


def losses(folder: RunFolder) -> list[float]:
    records = folder.metrics()
    assert [r["step"] for r in records] == list(range(STEPS))
    return [r["loss"] for r in records]


def difference(a: RunFolder, b: RunFolder) -> float:
    return max(abs(x - y) for x, y in zip(losses(a), losses(b), strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_really_ran_this_engine(runs, engine):
    for precision in ("fp32", "fp16"):
        found = seen(runs[engine, precision])
        assert (found["engine"], found["processes"]) == (engine, 2)
        assert found["parameter_class"] == {"ddp": "Parameter", "fsdp2": "DTensor"}[engine]
        assert found["parameters"] == found["gradients"] == ["float32"]


@pytest.mark.parametrize("engine", ENGINES)
def test_fp16_is_fp16_under_every_engine(runs, engine):
    found = seen(runs[engine, "fp16"])
    assert found["linear_outputs"] == {"float16": 15}
    assert {d for add in found["residual_adds"].values() for d in add.values()} == {"float16"}
    assert found["loss_scaler"] is True


@pytest.mark.parametrize("engine", ENGINES)
def test_losses_and_norms_are_those_of_one_process(runs, engine):
    assert difference(runs[engine, "fp32"], runs["single", "fp32"]) < 1e-5
    assert 0 < difference(runs[engine, "fp16"], runs["single", "fp16"]) < 1e-3
    for ours, theirs in zip(runs[engine, "fp16"].metrics(), runs["single", "fp16"].metrics(), strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5e-3)
    for ours, theirs in zip(runs[engine, "fp32"].metrics(), runs["single", "fp32"].metrics(), strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours.get("heldout_loss") == pytest.approx(theirs.get("heldout_loss"), abs=1e-5)
    assert sum("heldout_loss" in r for r in runs[engine, "fp32"].metrics()) == STEPS // 10


def test_compiled_and_checkpointed_layers_are_sharded_too(place, runs):
    """As the shipped recipe of 3.2B parameters runs."""
    fields = read_yaml(place / "run_fp16.yaml") | {"compile": True, "activation_checkpointing": True}
    file = write_recipe(place, fields.pop("data"), **fields | {"name": "compiled"})
    start("fsdp2", "--config", file, "--runs", place / "fsdp2")
    assert difference(RunFolder(place / "fsdp2" / "compiled"), runs["single", "fp16"]) < 1e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_layer_statistics_are_those_of_the_whole_batch(runs, engine):
    import pandas as pd

    keys = ["layer", "sublayer", "tensor", "stat"]
    ours, theirs = (
        pd.read_parquet(runs[e, "fp32"].path / "layers" / "step_00000005.parquet").set_index(keys).value
        for e in (engine, "single")
    )
    assert set(ours.index) == set(theirs.index)
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=2e-3, abs=1e-9), key


@pytest.mark.parametrize(("writer", "reader"), [("fsdp2", "single"), ("single", "fsdp2"), ("fsdp2", "ddp")])
def test_a_checkpoint_of_one_engine_is_resumed_by_another(runs, place, writer, reader):
    written = runs[writer, "fp32"]
    target = place / f"{writer}_to_{reader}"
    copy = RunFolder(target / written.path.name)
    shutil.copytree(written.path, copy.path)
    shutil.rmtree(copy.checkpoint_path(STEPS))
    copy.truncate_metrics(15)  # records past the checkpoint's step, as a killed run leaves them
    write_json(copy.path / "summary.json", {"status": "running", "step": 0})
    args = ("--config", place / "run_fp32.yaml", "--runs", target)
    done = called("scripts.pretrain", *args) if reader == "single" else start(reader, *args)
    assert done.returncode == 0, done.stderr
    assert seen(copy)["engine"] == reader
    assert copy.status == "completed"
    assert difference(copy, runs["single", "fp32"]) < 1e-5


def stop_after_some_steps(folder: RunFolder, process: subprocess.Popen, whole_group: bool) -> None:
    """SIGTERM, or SIGINT to all, once the run has taken a few steps."""
    deadline = time.monotonic() + 90
    while len(folder.metrics()) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()[-2000:]
        time.sleep(0.05)
    if whole_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("name", "command", "whole_group"),
    [
        ("torchrun", torchrun("ddp"), False),
        # The simple launcher dies of SIGTERM and tells its child nothing; the child sees that its parent has gone.
        ("accelerate", ACCELERATE, False),
        # Ctrl-C goes to launcher and child alike, and the launcher's death is a second request half a second later.
        ("ctrl_c", ACCELERATE, True),
    ],
)
def test_a_signal_to_the_launcher_stops_the_run_after_a_step_and_saves_it(place, name, command, whole_group):
    more = {"steps": 5000, "checkpoint_every": 1000, "device": "cpu"}
    if whole_group:  # steps that last longer than it takes to see that the parent has gone
        more |= {"batch_size": 256, "micro_batch_size": 8, "sequence_length": 128}
    file = write_recipe(place, place / "data", f"long_{name}", **more)
    folder = RunFolder(place / name / f"long_{name}")
    words = [*command, "--config", str(file), "--runs", str(folder.path.parent)]
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment("ddp"), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    stop_after_some_steps(folder, process, whole_group)
    process.wait(timeout=60)
    wait_for(lambda: folder.status == "interrupted")
    step = folder.summary["step"]
    assert folder.checkpoints() == [folder.checkpoint_path(step)]
    assert len(folder.metrics()) == step
    assert (folder.checkpoint_path(step) / "manifest.json").exists()
