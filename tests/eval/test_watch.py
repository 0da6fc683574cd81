"""A second process that scores checkpoints while a real training writes and removes them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from small_models import make_model, make_run, make_tokenizer

from periln.eval import watch
from periln.eval.scoring.gold import METRIC
from periln.eval.scoring.harness import Settings
from periln.runkit.checkpoints import remove_checkpoint, write_checkpoint
from periln.runkit.errors import UserError, run_command
from periln.runkit.folder import RunFolder
from periln.runkit.recipes import dump_yaml
from periln.scripts.prepare_data import prepare

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("--tasks", "mini_piqa", "--limit", 4, "--device", "cpu", "--threads", 1)


def call(*words: object) -> int:
    return run_command(watch.main, watch.parse([str(word) for word in words]))


def start(module: str, *words: object) -> subprocess.Popen:
    command = [sys.executable, "-m", module, *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def write_recipe(folder: Path, steps: int) -> Path:
    text = folder / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text(" ".join(f"the {n} of {n * i % 89}" for n in range(150)))
    prepare(str(text), folder / "data", vocab_size=300, max_bytes=10**6, heldout_share=0.05, context=256)
    model = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model |= {"max_position_embeddings": 256, "norm_placement": "peri"}
    recipe = {"name": "run", "data": str(folder / "data"), "model": model, "steps": steps, "batch_size": 4}
    recipe |= {"sequence_length": 32, "checkpoint_every": 5, "keep_last": 1, "layer_stats_every": 1000}
    file = folder / "recipe.yaml"
    file.write_text(dump_yaml(recipe))
    return file


@pytest.mark.slow
def test_a_training_is_watched_to_its_end_although_it_removes_its_checkpoints(tmp_path):
    recipe, run = write_recipe(tmp_path, steps=60), RunFolder(tmp_path / "runs" / "run")
    watcher = start("eval.watch", run.path, "--every", 3, "--wait", 900, *TASKS)
    assert "to begin" in watcher.stderr.readline()
    trainer = start("scripts.pretrain", "--config", recipe, "--runs", tmp_path / "runs", "--threads", 1)
    assert trainer.wait() == 0, trainer.stderr.read()[-2000:]
    out, errors = watcher.communicate(timeout=900)
    assert watcher.returncode == 0, errors[-2000:]
    assert "the run is completed; " in out
    assert [path.name for path in run.checkpoints()] == ["step_00000060"]  # the others are gone
    table = pd.read_csv(run.path / "eval" / "watch.csv")
    # Five steps take this model no time: where a checkpoint went before the watch saw it, the watch says so.
    missed = {int(step) for line in re.findall(r"not scored: steps (.+)", errors) for step in line.split(", ")}
    assert set(table.step) | missed == {15, 30, 45, 60} and not set(table.step) & missed
    assert 60 in set(table.step)
    assert list(table.tokens) == [step * 4 * 32 for step in table.step]
    assert set(table.metric) == {"acc", "acc_norm", METRIC}
    hashes = {r["evaluated"]["weights_sha256"] for r in run.evaluations() if r.get("tasks") == ["mini_piqa"]}
    assert len(hashes) == len(set(table.step))
    assert (run.path / "eval" / "watch.png").read_bytes().startswith(b"\x89PNG")
    assert not list((run.path / "eval" / ".watch").iterdir())


@pytest.fixture
def trained(tmp_path):
    """A completed run with checkpoints 3 (from `make_run`), 6 and 9."""
    run = make_run(tmp_path / "run")
    tokenizer = make_tokenizer()
    for step in (6, 9):
        with write_checkpoint(run.checkpoint_path(step), make_model(tokenizer, seed=step), tokenizer):
            pass
    recipe = run.recipe
    (run.path / "recipe.yaml").write_text(dump_yaml(recipe | {"steps": 9}))
    run.set_status("completed", step=9)
    return run


def steps_scored(run: RunFolder) -> list[int]:
    return sorted({int(Path(r["evaluated"]["path"]).name.removeprefix("step_")) for r in run.evaluations()})


def test_every_second_checkpoint_and_the_last_are_scored_and_a_stopped_watch_goes_on(trained, monkeypatch):
    real, scored = watch.Benchmarks.score, []

    def stopped(self, target, *more):
        if scored:
            raise KeyboardInterrupt
        scored.append(target.path)
        return real(self, target, *more)

    monkeypatch.setattr(watch.Benchmarks, "score", stopped)
    assert call(trained.path, "--every", 2, *TASKS) == 130
    assert steps_scored(trained) == [6]
    remove_checkpoint(trained.checkpoint_path(9))  # it was held already
    monkeypatch.setattr(watch.Benchmarks, "score", real)
    assert call(trained.path, "--every", 2, *TASKS) == 0
    assert steps_scored(trained) == [6, 9]
    record = trained.evaluations()[-1]
    assert record["evaluated"]["path"] == "checkpoints/step_00000009"
    assert call(trained.path, "--every", 1, *TASKS) == 0
    assert steps_scored(trained) == [3, 6, 9]


@pytest.mark.parametrize("again", [False, True], ids=["gone", "written again"])
def test_a_checkpoint_that_is_removed_while_it_is_linked_is_not_held(trained, monkeypatch, again):
    held, real, removed = watch.Held(trained, lambda step: step == 6, set()), watch._link, []
    held.folder.mkdir(parents=True)

    def link_and_remove(file, to):
        real(file, to)
        if not removed:
            removed.append(file)
            copy = shutil.copytree(file.parent, trained.path / "copy")
            remove_checkpoint(file.parent)
            if again:
                copy.rename(file.parent)

    monkeypatch.setattr(watch, "_link", link_and_remove)
    held.look()
    assert removed and held.next() is None and not list(held.folder.iterdir())


def test_a_checkpoint_that_went_unseen_is_named_at_the_end(trained, capsys):
    remove_checkpoint(trained.checkpoint_path(6))
    assert call(trained.path, *TASKS) == 0
    assert steps_scored(trained) == [3, 9]
    assert "hence not scored: steps 6\n" in capsys.readouterr().err
    assert call(trained.path, "--every", 3, *TASKS) == 0  # of which step 6 is none
    assert "not scored" not in capsys.readouterr().err


def test_a_curve_holds_one_setting_only(trained):
    assert call(trained.path, *TASKS) == 0
    frame = watch.curve(trained, watch.Benchmarks(["mini_piqa"], Settings(limit=4)))
    assert list(frame[frame.metric == "acc"].step) == [3, 6, 9]
    assert watch.curve(trained, watch.Benchmarks(["mini_piqa"], Settings(limit=5))).empty
    assert json.loads(json.dumps(list(frame.tokens))) == [step * 2 * 16 for step in frame.step]


def test_a_trainer_that_is_gone_ends_the_watch_after_a_while(tmp_path):
    run = make_run(tmp_path / "run")
    for status, over in (("completed", True), ("diverged", True), ("interrupted", False), ("failed", False)):
        run.set_status(status)
        assert (watch.Ending(run, 60).reached() is not None) == over
        assert f"the run is {status}" == watch.Ending(run, 0).reached()
    run.set_status("running")  # by this process
    assert watch.Ending(run, 0).reached() is None
    summary = json.loads((run.path / "summary.json").read_text())
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    (run.path / "summary.json").write_text(json.dumps(summary | {"pid": child.pid}))
    assert f"process {child.pid}) is gone" in watch.Ending(run, 0).reached()
    (run.path / "summary.json").write_text(json.dumps(summary | {"host": "another", "pid": child.pid}))
    assert watch.Ending(run, 0).reached() is None
    os.remove(run.path / "summary.json")
    assert watch.Ending(run, 0).reached() == "the run has not begun"


def test_what_cannot_be_watched_is_said(tmp_path, capsys):
    assert call(tmp_path / "none", "--wait", 0, *TASKS) == 2
    assert "is not a run folder (recipe.yaml), nor became one in 0 seconds" in capsys.readouterr().err
    run = make_run(tmp_path / "run")
    assert call(run.path, "--every", 0, *TASKS) == 2
    assert "--every must be at least 1, not 0" in capsys.readouterr().err
    (run.path / "recipe.yaml").write_text("stage: sft\n")
    with pytest.raises(UserError, match="has no checkpoint_every"):
        watch.due_steps(run, 1)
