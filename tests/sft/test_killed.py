"""A fine-tuning that is killed again and again ends as if nothing had happened, to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small import ROOT, make_run, timeless, write_recipe

from periln.runkit.checkpoints import damage_of
from periln.runkit.folder import RunFolder, read_json, weights_hash

KILLS = 4
CASES = {
    # A scale that overflows in the first steps: what was skipped is counted on, and the scale comes back.
    "weights": ("peri", [], {"initial_loss_scale": 2.0**24}),
    # Dropout draws from the random state, which must come back too.
    "adapter": ("pre", ["--peft"], {"peft": {"dropout": 0.3, "target_modules": ["q_proj", "down_proj"]}}),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(what the kills left, the run of each case)."""
    runs, cases = {}, []
    for name, (placement, flags, fields) in CASES.items():
        folder = tmp_path_factory.mktemp(name)
        runs[name] = make_run(folder, placement)
        cases.append(
            " ".join(map(str, (write_recipe(folder, save_every=1, epochs=4, **fields), runs[name].path, *flags)))
        )
    words = [sys.executable, Path(__file__).with_name("killing.py"), str(KILLS), "5", *cases]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout.splitlines()[-1])
    print(reports)
    return dict(zip(CASES, reports, strict=True)), runs


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_often_it_ends_with_the_same_losses_and_weights_in_fp16(killed, case):
    reports, runs = killed
    assert (reports[case]["kills"], reports[case]["exits"]) == (KILLS, [0, 0])
    one, other = RunFolder(runs[case].path / "killed"), RunFolder(runs[case].path / "untouched")
    assert [r["step"] for r in one.metrics()] == list(range(16))
    assert timeless(one) == timeless(other)
    assert one.summary == other.summary
    names = [path.name for path in one.checkpoints()]
    assert names == [
        "step_00000004",
        "step_00000008",
        "step_00000012",
        "step_00000016",
    ]  # the epochs' ends, and nothing else
    assert names == [path.name for path in other.checkpoints()]
    for path, same in zip(one.checkpoints(), other.checkpoints(), strict=True):
        assert damage_of(path) is None
        assert weights_hash(path) == weights_hash(same)
    states = [r.checkpoints()[-1] / "trainer_state" for r in (one, other)]
    for name in ("state.json", "trainer_state.json"):
        assert read_json(states[0] / name) == read_json(states[1] / name)
    for name in ("optimizer.safetensors", "rng.safetensors"):
        assert (states[0] / name).read_bytes() == (states[1] / name).read_bytes()
    if case == "weights":
        assert one.summary["skipped_steps"] > 3
        assert read_json(states[0] / "state.json")["scaler"]["scale"] < 2.0**24


@pytest.mark.slow
def test_some_of_the_kills_fell_into_the_writing_of_a_checkpoint(killed):
    left = [report["left"] for report in killed[0].values()]
    assert any(".tmp" in one or ".removed" in one for one in left)
