"""Choosing an epoch: the rule, what is recorded, and a selection that is stopped and resumed."""

import json
import sys
from importlib import metadata

import pytest
from small import make_model

from periln.runkit.checkpoints import write_checkpoint
from periln.runkit.errors import UserError, run_command
from periln.runkit.folder import RunFolder, weights_hash
from periln.sft import select

# In place of `python -m eval.benchmarks`: scores from a table, every call noted down.
EVALUATOR = """
import hashlib, json, pathlib, sys
words = sys.argv[2:]
folder, target = pathlib.Path(sys.argv[1]), pathlib.Path(words[0])
with open(folder / "calls", "a") as calls:
    calls.write(json.dumps(words) + "\\n")
table = json.loads((folder / "table.json").read_text())
if target.name in table.get("fail", []):
    sys.exit("error: the Hub does not answer")
if "--out" in words:
    tasks = words[words.index("--tasks") + 1].split(",")
    limit = int(words[words.index("--limit") + 1]) if "--limit" in words else None
    results = [{"task": t, "metric": m, "value": v * (m == "acc"), "stderr": 0.1, "n": 7}
               for t, v in zip(tasks, table[target.name]) for m in ("acc", "acc_norm")]
    pathlib.Path(words[words.index("--out") + 1]).write_text(json.dumps(
        {"evaluated": {"path": str(target)}, "harness": table["harness"], "limit": limit,
         "batch_size": int(words[words.index("--batch-size") + 1]), "results": results}))
"""
STEPS = (6, 12, 18)
NAMES = [f"step_{step:08d}" for step in STEPS]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A completed fine-tuning of three epochs, and a stand-in for the evaluator."""
    folder = RunFolder(tmp_path / "run" / "sft")
    folder.claim({"stage": "sft"})
    model, tokenizer = make_model()
    for step in STEPS:
        model.lm_head.weight.data.mul_(1.5)
        with write_checkpoint(folder.checkpoint_path(step), model, tokenizer):
            pass
    folder.set_status("completed", step=18, steps_per_epoch=6)
    (tmp_path / "evaluator.py").write_text(EVALUATOR)
    words = [sys.executable, str(tmp_path / "evaluator.py"), str(tmp_path)]
    monkeypatch.setattr(select, "evaluation", lambda *more: [*words, *map(str, more)])
    return folder


def table(tmp_path, scores, fail=(), version=None):
    harness = {"name": "lm-eval", "version": version or metadata.version("lm-eval")}
    more = {"fail": list(fail), "harness": harness}
    (tmp_path / "table.json").write_text(json.dumps(dict(zip(NAMES, scores, strict=True)) | more))


def calls(tmp_path):
    return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


def chosen(run, *more):
    return run_command(select.main, select.parse([str(run.path.parent), *more]))


def test_the_highest_mean_wins_and_of_equal_ones_the_earlier_epoch():
    def entry(epoch, mean):
        return {"epoch": epoch, "mean": mean}

    assert select.choose([entry(1, 0.3), entry(2, 0.5), entry(3, 0.4)])["epoch"] == 2
    assert select.choose([entry(3, 0.5), entry(2, 0.5), entry(1, 0.4)])["epoch"] == 2


def test_the_choice_its_scores_and_the_rule_are_recorded(tmp_path, run):
    table(tmp_path, [(0.1, 0.2, 0.3, 0.4), (0.4, 0.4, 0.1, 0.3), (0.4, 0.4, 0.1, 0.3)])
    assert chosen(run, "--limit", "7") == 0
    best = json.loads((run.path / "best.json").read_text())
    assert (best["epoch"], best["step"], best["checkpoint"]) == (2, 12, "checkpoints/step_00000012")
    assert best["weights_sha256"] == weights_hash(run.checkpoint_path(12))
    assert best["mean"] == pytest.approx(0.3)
    assert [e["mean"] for e in best["epochs"]] == pytest.approx([0.25, 0.3, 0.3])
    assert best["epochs"][0]["scores"] == {"openbookqa": 0.1, "commonsense_qa": 0.2, "rte": 0.3, "mnli": 0.4}
    assert (best["tasks"], best["limit"], best["rule"]) == (list(select.TASKS["hub"]), 7, select.RULE)
    last = calls(tmp_path)[-1]
    assert last[:3] == [str(run.checkpoint_path(12)), "--tasks", "hub"]  # the best one's five benchmarks


def test_a_selection_that_failed_goes_on_where_it_was(tmp_path, run, capsys):
    scores = [(0.1,) * 4, (0.2,) * 4, (0.3,) * 4]
    table(tmp_path, scores, fail=[NAMES[1]])
    assert chosen(run) == 1
    assert "the evaluation failed (exit code 1)" in capsys.readouterr().err
    assert not (run.path / "best.json").exists()
    table(tmp_path, scores)
    assert chosen(run) == 0
    assert [call[0].split("/")[-1] for call in calls(tmp_path)] == [NAMES[i] for i in (0, 1, 1, 2, 2)]
    assert json.loads((run.path / "best.json").read_text())["epoch"] == 3
    assert chosen(run, "--limit", "3") == 0  # other options are another measurement
    assert sum("--out" in call for call in calls(tmp_path)) == 4 + 3


def test_scores_of_another_harness_are_not_compared_with_this_one_s(tmp_path, run):
    scores = [(0.1,) * 4, (0.2,) * 4, (0.3,) * 4]
    table(tmp_path, scores, version="0.0.1")
    assert chosen(run) == 0
    table(tmp_path, scores)
    assert chosen(run) == 0
    assert sum("--out" in call for call in calls(tmp_path)) == 6
    assert chosen(run) == 0
    assert sum("--out" in call for call in calls(tmp_path)) == 6


def test_of_merged_adapters_the_best_stays_and_one_that_was_there(tmp_path, run, monkeypatch):
    def merge(checkpoint, out):
        with write_checkpoint(out, *make_model()):
            pass

    monkeypatch.setattr("periln.sft.lora.merge", merge)
    for path in run.checkpoints():
        (path / "model.safetensors").rename(path / select.ADAPTER)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest[select.ADAPTER] = manifest.pop("model.safetensors")
        (path / "manifest.json").write_text(json.dumps(manifest))
    merge(None, run.path / "merged" / NAMES[2])
    table(tmp_path, [(0.1,) * 4, (0.3,) * 4, (0.2,) * 4])
    assert chosen(run) == 0
    assert sorted(path.name for path in (run.path / "merged").iterdir()) == NAMES[1:]
    assert calls(tmp_path)[-1][0] == str(run.path / "merged" / NAMES[1])


def test_a_run_of_which_an_epoch_is_damaged_or_that_is_not_done_is_not_chosen_from(tmp_path, run, capsys):
    (run.checkpoint_path(6) / "model.safetensors").unlink()
    with pytest.raises(UserError, match="epoch 1 cannot be scored: .*model.safetensors is missing"):
        select.candidates(run)
    run.set_status("interrupted")
    assert chosen(run) == 1
    assert "is not completed (status: interrupted)" in capsys.readouterr().err
    with pytest.raises(UserError, match="is not a fine-tuning run and holds none"):
        select.find_run(tmp_path)
