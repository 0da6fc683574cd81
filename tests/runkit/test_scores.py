"""Which score counts: the same number in Table 2, on the card, in the zoo and in the report of a fine-tuning."""

import pytest

from periln.eval.arguments.tables import parse as tables_parse
from periln.eval.records.frames import load
from periln.eval.tables.command import main as tables_main
from periln.eval.tables.scores import from_runs
from periln.model_cards.facts import mean_accuracy
from periln.model_cards.subject import Subject
from periln.runkit.folder import RunFolder, write_json
from periln.runkit.scores import precedence, protocol, that_count
from periln.runkit.tasks import SUITES
from periln.sft.compare import scores_of

WEIGHTS = "a"


def write_record(run: RunFolder, name: str, value: float, shots: int, n: int, limit: int | None = None) -> None:
    rows = [{"task": task, "metric": "acc", "value": value, "stderr": 0.01, "n": n} for task in SUITES["hub"]]
    head = {"evaluated": {"path": "checkpoints/step_00000009", "weights_sha256": WEIGHTS}, "suite": "hub"}
    head |= {"harness": {"name": "lm-eval", "version": "0.4.13"}, "num_fewshot": shots, "limit": limit}
    write_json(run.path / "eval" / name, head | {"dtype": "float32", "results": rows})


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.claim({"stage": "pretrain", "model": {}, "optimizer": {"learning_rate": 1e-3}, "seed": 1})
    run.set_status("completed", step=9)
    return run


def every_mean(run: RunFolder) -> set[float]:
    table = from_runs(load(run.path), "hub").rows
    compared = scores_of(run, WEIGHTS)
    return {
        round(float(table[list(SUITES["hub"])].mean(axis=1).iloc[0]), 6),
        round(mean_accuracy(Subject(None, run))[0] / 100, 6),
        round(sum(row["value"] for row in compared.values()) / 5, 6),
    }


@pytest.mark.parametrize("names", [("a.json", "b.json"), ("b.json", "a.json")])
def test_fewest_examples_come_before_most_items_whatever_the_files_are_called(run, names, capsys):
    write_record(run, names[0], 0.30, shots=0, n=100)
    write_record(run, names[1], 0.60, shots=5, n=5000)
    assert every_mean(run) == {0.30}
    assert mean_accuracy(Subject(None, run))[1] == "mean of five, 0-shot"
    tables_main(tables_parse([str(run.path), "--table", "means"]))
    assert "Scored with 0 examples before an item, all items." in " ".join(capsys.readouterr().out.split())


def test_of_as_many_examples_the_most_items_count_and_the_limit_is_printed(run):
    write_record(run, "a.json", 0.25, shots=0, n=20, limit=20)
    assert mean_accuracy(Subject(None, run))[1] == "mean of five, 0-shot, limit 20"
    write_record(run, "b.json", 0.75, shots=0, n=10, limit=10)
    assert every_mean(run) == {0.25}
    write_record(run, "c.json", 0.50, shots=0, n=5000)
    assert every_mean(run) == {0.50}


def test_the_chosen_checkpoint_comes_first_then_the_latest_one():
    old, new = {"task": "x", "at_step": 4.0, "n": 9}, {"task": "x", "at_step": 8.0, "n": 3}
    assert that_count([new, old], ("task",)) == [0]
    assert that_count([new, old | {"chosen": True}], ("task",)) == [1]
    assert precedence({"n": float("nan"), "limit": None}) > precedence({"n": 7})


def test_a_protocol_names_what_differs():
    assert protocol([{"num_fewshot": 0}, {"num_fewshot": 5, "limit": 20.0}]) == "0- and 5-shot, limit 20 and none"
