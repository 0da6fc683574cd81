"""The report before and after a fine-tuning, from records alone."""

import shutil

import pytest

from periln.runkit.errors import run_command
from periln.runkit.folder import RunFolder, weights_hash, write_json
from periln.sft import compare


def side(weights: str, loss: float | None, word: str) -> dict:
    samples = [{"prompt": f"question {i}?", "text": f"{word} {i} | so"} for i in range(5)]
    return {"weights_sha256": weights, "loss": loss, "samples": samples}


def scores(weights: str, value: float, n: int = 9, task: str = "piqa") -> dict:
    row = {"task": task, "metric": "acc", "value": value, "stderr": 0.125, "n": n}
    return {
        "evaluated": {"weights_sha256": weights},
        "harness": {"name": "lm-eval"},
        "results": [row, row | {"metric": "x"}],
    }


@pytest.fixture
def tuned(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.claim({"stage": "pretrain"})
    found = RunFolder(run.path / "sft")
    found.claim({"stage": "sft"})
    found.set_status("completed", step=4)
    words = {"loss_on": "the conversations", "answers": "greedy", "evaluated": {"path": "checkpoints/step_00000004"}}
    before_after = {"before": side("a", 2.5, "old"), "after": side("b", None, "new")}
    write_json(found.path / "eval" / "before_after.json", words | before_after)
    return found


def test_scores_are_taken_of_the_very_weights_and_what_is_missing_is_said(tuned, capsys):
    write_json(tuned.path.parent / "eval" / "benchmarks-1.json", scores("a", 0.25, n=3))
    write_json(tuned.path.parent / "eval" / "benchmarks-2.json", scores("a", 0.5))
    write_json(tuned.path.parent / "eval" / "benchmarks-3.json", scores("another", 0.75, n=99))
    assert run_command(compare.main, compare.parse([str(tuned.path.parent)])) == 0
    said = capsys.readouterr().out
    assert "| piqa | 0.5000 ± 0.1250 (0-shot, n=9) | not evaluated |" in said
    assert "| loss, the conversations | 2.5000 | not finite |" in said
    assert "| question 4? | old 4 \\| so | new 4 \\| so |" in said
    write_json(tuned.path / "eval" / "benchmarks-1.json", scores("b", 0.75))
    write_json(tuned.path / "eval" / "benchmarks-2.json", scores("chosen", 1.0))
    assert "| 0.7500 ± 0.1250 (0-shot, n=9) |" in compare.report(tuned)
    best = {"weights_sha256": "chosen", "checkpoint": "checkpoints/step_00000002", "rule": "the rule"}
    write_json(tuned.path / "best.json", best)
    assert "| 1.0000 ± 0.1250 (0-shot, n=9) |" in compare.report(tuned)
    assert "Scores after: checkpoints/step_00000002, chosen by the rule." in compare.report(tuned)


def test_an_adapter_has_the_scores_of_its_merged_model(tuned):
    merged = tuned.path / "merged" / "step_00000004"
    merged.mkdir(parents=True)
    (merged / "model.safetensors").write_bytes(b"weights")
    write_json(tuned.path / "eval" / "benchmarks-1.json", scores("b", 0.25))
    write_json(tuned.path / "eval" / "benchmarks-2.json", scores(weights_hash(merged), 0.75))
    assert "| piqa | not evaluated | 0.7500 ± 0.1250 (0-shot, n=9) |" in compare.report(tuned)


def test_a_checkpoint_outside_of_a_run_has_its_scores_in_its_own_folder(tuned, tmp_path):
    write_json(tmp_path / "one" / "model" / "eval" / "benchmarks-1.json", scores("a", 0.5))
    for name in ("model-sft", "model-sft-lora"):
        shutil.copytree(tuned.path, tmp_path / "one" / name)
        assert "| piqa | 0.5000 ± 0.1250 (0-shot, n=9) | not evaluated |" in compare.report(
            RunFolder(tmp_path / "one" / name)
        )


def test_a_report_is_not_written_over_something_else(tuned, tmp_path, capsys):
    words = compare.parse([str(tuned.path), "--out", str(tmp_path / "r.md")])
    assert run_command(compare.main, words) == run_command(compare.main, words) == 0
    (tmp_path / "r.md").write_text("mine")
    assert run_command(compare.main, words) == 1
    assert (tmp_path / "r.md").read_text() == "mine"
    (tuned.path / "eval" / "before_after.json").unlink()
    assert run_command(compare.main, words) == 1
    assert "before_after.json is missing" in capsys.readouterr().err
