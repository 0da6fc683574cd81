"""A run that is killed again and again: `make test-slow KILLS=1000 COMPILE=1`; sixty times, eager, when left out.

A few kills are in test_pretrain.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT, make_data, run, timeless, write_recipe

from periln.runkit.folder import RunFolder, weights_hash

KILLS = int(os.environ.get("KILLS") or 60)
COMPILED = os.environ.get("COMPILE", "") not in ("", "0")


@pytest.mark.slow
@pytest.mark.kills
def test_killed_often_it_ends_as_if_untouched_in_fp16(tmp_path):
    shared = {
        "compile": COMPILED,
        "steps": 20 * KILLS,  # 4 a kill were made on a busy machine; a run that ends too early fails, and says so
        "checkpoint_every": 2,
        "layer_stats_every": 7,
        "heldout_every": 10,
    }
    file = write_recipe(tmp_path, make_data(tmp_path), **shared)
    words = [sys.executable, Path(__file__).with_name("killing.py"), file, tmp_path / "killed", str(KILLS), "3"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    print(report)
    assert (report["kills"], report["exit"]) == (KILLS, 0)
    if KILLS >= 60:  # then some fell into the writing of a checkpoint
        assert report["left"][".tmp"] > 0 and report["left"]["between"] > 0
    seldom = ["--set", "checkpoint_every=1000"]
    untouched = run("scripts.pretrain", "--config", file, *seldom, "--runs", tmp_path / "untouched")
    assert untouched.returncode == 0, untouched.stderr
    one, other = RunFolder(tmp_path / "killed" / "run"), RunFolder(tmp_path / "untouched" / "run")
    assert timeless(one.path) == timeless(other.path)
    assert weights_hash(one.checkpoints()[-1]) == weights_hash(other.checkpoints()[-1])
    assert one.summary["spikes"] == other.summary["spikes"]
