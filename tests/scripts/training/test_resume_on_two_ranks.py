"""Two gloo processes resume a run of theirs with fields that may change: every rank adopts what the run began with."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT, make_data, timeless, write_recipe

from periln.runkit.folder import RunFolder, weights_hash, write_text
from periln.runkit.recipes import dump_yaml

pytestmark = pytest.mark.slow
FIELDS = {
    "precision": {"mode": "fp32", "residual_dtype": None},
    "device": "cpu",
    "micro_batch_size": 1,  # two a rank
    "checkpoint_every": 3,
    "keep_last": 9,
    "heldout_every": 6,
    "heldout_sequences": 5,
}


def start(folder: Path, data: Path, runs: Path, **fields) -> subprocess.CompletedProcess:
    file = write_recipe(folder, data, **FIELDS | fields)
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    words += ["-m", "scripts.pretrain", "--config", str(file), "--runs", str(runs)]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, RunFolder]:
    folder = tmp_path_factory.mktemp("whole")
    data = make_data(folder)
    done = start(folder, data, folder / "runs")
    assert done.returncode == 0, done.stderr[-3000:]
    return data, RunFolder(folder / "runs" / "run")


def stopped(whole: tuple[Path, RunFolder], runs: Path) -> RunFolder:
    """A copy of the run, as if it had been stopped after its sixth step."""
    run = RunFolder(runs / "run")
    shutil.copytree(whole[1].path, run.path)
    for path in run.checkpoints():
        if int(path.name.removeprefix("step_")) > 6:
            shutil.rmtree(path)
    run.set_status("interrupted", step=6)
    return run


def test_harmless_changes_and_younger_fields_leave_the_bits_as_they_were(whole, tmp_path):
    run = stopped(whole, tmp_path / "runs")
    recipe = run.recipe
    for name in ("flight", "keep_best", "document_masking", "stage"):  # of a version without them
        del recipe[name]
    del recipe["spikes"]["window"]
    write_text(run.path / "recipe.yaml", dump_yaml(recipe))
    shutil.copytree(whole[0], tmp_path / "archive")
    done = start(tmp_path, tmp_path / "archive", tmp_path / "runs", keep_last=1, checkpoint_every=4)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout + done.stderr
    assert said.count("keep_last: 9 -> 1 (this does not decide the result)") == 1  # by one rank
    assert said.count("(only the place differs)") == 1
    assert run.status == "completed" and timeless(run.path) == timeless(whole[1].path)
    assert weights_hash(run.checkpoints()[-1]) == weights_hash(whole[1].checkpoints()[-1])
    assert [path.name for path in run.checkpoints()] == ["step_00000012"]
    assert run.recipe["keep_last"] == 1 and run.recipe["flight"] == whole[1].recipe["flight"]


def test_what_decides_the_result_is_refused_once_and_changes_nothing(whole, tmp_path):
    run = stopped(whole, tmp_path / "runs")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    done = start(tmp_path, whole[0], tmp_path / "runs", seed=2)
    assert done.returncode != 0
    assert done.stderr.count("belongs to another recipe (seed: 1 -> 2)") == 1
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
