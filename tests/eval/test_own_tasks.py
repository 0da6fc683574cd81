"""The user's own tasks through `--include-path`: scored, recorded with their definition, and not scored twice."""

import json
import math
from pathlib import Path

import pytest
import torch
from small_models import make_run

from periln.eval import benchmarks, watch
from periln.eval.scoring.harness import Benchmarks
from periln.eval.scoring.own_tasks import OwnTasks
from periln.eval.targets import find_target
from periln.runkit.errors import UsageError, run_command
from periln.runkit.folder import RunFolder

ITEMS = [
    {"a": f"{i} and {i}" + " and more" * (i % 3), "good": "eggs " * (i % 4 + 1) + str(i), "bad": f"water {i}"}
    for i in range(1, 8)
]
CHOICE = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
output_type: multiple_choice
validation_split: validation
doc_to_text: {question}
doc_to_choice: "{{{{[good, bad]}}}}"
doc_to_target: 0
process_results: !function code.results
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
CODE = """\
def results(doc, answers):
    scores = [answer[0] if isinstance(answer, tuple) else answer for answer in answers]
    return {"acc": float(scores[0] > scores[1])}
"""


def call(*words: object) -> int:
    return run_command(benchmarks.main, benchmarks.parse([str(word) for word in words]))


def records(run: RunFolder) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted((run.path / "eval").glob("benchmarks-*.json"))]


def write_choice(folder: Path, name: str = "sums", question: str = '"{{a}}"') -> None:
    (folder / f"{name}.yaml").write_text(CHOICE.format(name=name, question=question, data=folder / "items.jsonl"))


@pytest.fixture
def folder(tmp_path):
    """Two tasks, a group of one of them and of one that this project brings."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (folder / "code.py").write_text(CODE)
    write_choice(folder)
    write_choice(folder, "other")
    return folder


@pytest.fixture(autouse=True)
def a_short_list_of_tasks(monkeypatch):
    """Reading the harness's list of its thousands of tasks takes ten seconds; here it has none of its own."""
    import lm_eval.tasks

    real = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda include_path, **_: real(include_path=include_path, include_defaults=False)
    )


@pytest.fixture
def asked(monkeypatch):
    """The names of the tasks that were computed."""
    names, real = [], Benchmarks.run
    monkeypatch.setattr(Benchmarks, "run", lambda self, name, *more: names.append(name) or real(self, name, *more))
    return names


@torch.no_grad()
def log_likelihood(model, tokenizer, context: str, answer: str) -> float:
    start, ids = len(tokenizer(context)["input_ids"]), tokenizer(f"{context} {answer}")["input_ids"]
    scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(scores[position - 1, ids[position]].item() for position in range(start, len(ids)))


def test_a_task_of_the_users_own_is_scored_and_recorded(folder, tmp_path, asked):
    run = make_run(tmp_path / "run")
    words = (run.path, "--tasks", "sums,mini_piqa", "--include-path", folder, "--limit", 6, "--device", "cpu")
    assert call(*words) == 0
    (record,) = records(run)
    assert record["tasks"] == ["sums", "mini_piqa"]
    own = record["own_tasks"]
    assert list(own) == ["sums"]
    assert own["sums"]["file"] == "sums.yaml" and own["sums"]["tasks"] == ["sums"]
    assert len(own["sums"]["sha256"]) == 64
    (row,) = [row for row in record["results"] if row["task"] == "sums" and row["metric"] == "acc"]
    model, tokenizer = find_target(run.path).load("cpu")
    right = [
        log_likelihood(model, tokenizer, item["a"], item["good"])
        > log_likelihood(model, tokenizer, item["a"], item["bad"])
        for item in ITEMS[:6]
    ]
    assert 0 < sum(right) < 6
    assert row["value"] == sum(right) / 6 and row["n"] == 6
    assert call(*words) == 0
    assert asked == ["sums", "mini_piqa"]  # nothing is computed again


def test_a_stop_costs_one_task_and_a_changed_definition_is_scored_again(folder, tmp_path, asked, monkeypatch):
    run = make_run(tmp_path / "run")
    words = (run.path, "--tasks", "sums,other", "--include-path", folder, "--limit", 3, "--device", "cpu")
    with monkeypatch.context() as patch:
        real = Benchmarks.run

        def stopped(self, name, *more):
            if name == "other":
                raise KeyboardInterrupt
            return real(self, name, *more)

        patch.setattr(Benchmarks, "run", stopped)
        assert call(*words) == 130
    assert records(run)[0]["tasks"] == ["sums"]
    assert call(*words) == 0
    assert asked == ["sums", "other"]
    (before,) = records(run)

    write_choice(folder, "other", '"What is {{a}}?"')
    assert call(*words) == 0
    assert asked == ["sums", "other", "other"]
    (after,) = records(run)
    assert after["own_tasks"]["sums"] == before["own_tasks"]["sums"]
    assert after["own_tasks"]["other"]["sha256"] != before["own_tasks"]["other"]["sha256"]
    assert len(after["results"]) == len(before["results"])

    for name, text in (("code.py", CODE + "\n# not the same\n"), ("items.jsonl", json.dumps(ITEMS[3]) + "\n")):
        del asked[:]
        (folder / name).write_text(text)  # code and data are a part of both
        assert call(*words) == 0
        assert asked == ["sums", "other"]
    assert {row["n"] for row in records(run)[0]["results"]} == {1}


def test_the_definition_does_not_depend_on_where_the_folder_is(folder, tmp_path):
    data = tmp_path / "items.jsonl"
    (folder / "items.jsonl").rename(data)
    for name in ("sums", "other"):
        text = (folder / f"{name}.yaml").read_text()
        (folder / f"{name}.yaml").write_text(text.replace(str(folder / "items.jsonl"), str(data)))
    here = OwnTasks([folder], []).definition("sums")
    elsewhere = folder.rename(tmp_path / "moved")
    assert OwnTasks([elsewhere], []).definition("sums") == here
    data.write_text("{}\n")  # named in `data_files`
    assert OwnTasks([elsewhere], []).definition("sums") != here


def test_a_group_may_hold_own_tasks_and_the_projects(folder, tmp_path):
    (folder / "all.yaml").write_text(
        "group: everything\ntask: [sums, mini_piqa]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    run = make_run(tmp_path / "run")
    words = ("--tasks", "everything", "--include-path", folder, "--limit", 3, "--device", "cpu")
    assert call(run.path, *words) == 0
    (record,) = records(run)
    assert record["tasks"] == ["everything"]
    assert record["own_tasks"]["everything"]["tasks"] == ["everything", "mini_piqa", "sums"]
    scores = {row["task"]: row["value"] for row in record["results"] if row["metric"] == "acc"}
    assert scores["everything"] == pytest.approx((scores["sums"] + scores["mini_piqa"]) / 2)
    before = OwnTasks([folder], []).definition("everything")
    write_choice(folder, "other", '"not a member"')
    assert OwnTasks([folder], []).definition("everything") == before
    write_choice(folder, "sums", '"a member"')
    assert OwnTasks([folder], []).definition("everything") != before


def test_a_watch_scores_own_tasks_and_forgets_an_old_definition(folder, tmp_path):
    run = make_run(tmp_path / "run")
    words = [str(run.path), "--tasks", "sums", "--include-path", str(folder), "--limit", "4", "--device", "cpu"]

    def watched() -> str:
        assert run_command(watch.main, watch.parse(words)) == 0
        return (run.path / "eval" / "watch.csv").read_text()

    assert "sums,acc," in watched()
    write_choice(folder, "sums", '"how many"')
    again = watched()
    assert again.count("sums,acc,") == 1
    assert [record["own_tasks"]["sums"] for record in records(run)] == [
        {**OwnTasks([folder], []).definition("sums"), "tasks": ["sums"]}
    ]
    benchmarks_of_old = Benchmarks(["sums"], watch.settings_of(watch.parse(words)), [folder])
    benchmarks_of_old.definitions["sums"] = {"file": "sums.yaml", "sha256": "0" * 64}
    assert watch.curve(run, benchmarks_of_old).empty
    assert watch.scored_steps(run, benchmarks_of_old) == set()


def test_what_is_wrong_with_a_folder_is_said_before_any_work(folder, tmp_path, capsys):
    run = make_run(tmp_path / "run")

    def said(*words: object, tasks: str = "sums") -> str:
        assert call(run.path, "--tasks", tasks, *words) == 2
        return capsys.readouterr().err

    assert f"--include-path {tmp_path / 'none'} is not a folder" in said("--include-path", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert f"--include-path {tmp_path / 'empty'} defines no task" in said("--include-path", tmp_path / "empty")
    (folder / "broken.yaml").write_text("task: [unfinished")
    error = said("--include-path", folder, tasks="brokn")
    assert "task 'brokn' is unknown" in error and "broken.yaml" in error and "passed over" in error
    (folder / "again.yaml").write_text((folder / "sums.yaml").read_text())
    assert "Duplicate task name 'sums'" in said("--include-path", folder)
    (folder / "again.yaml").unlink()
    second = tmp_path / "second"
    second.mkdir()
    write_choice(second, "sums")
    assert "two folders define a task 'sums'" in said("--include-path", folder, "--include-path", second)
    write_choice(folder, "piqa")
    assert "'piqa' is the name of a benchmark; rename your task" in said("--include-path", folder)
    assert not records(run)


def test_a_result_of_an_own_task_is_none_of_another_with_its_name(folder, tmp_path):
    """Without the folder the name means the harness's task, and with it the user's."""
    run = make_run(tmp_path / "run")
    assert call(run.path, "--tasks", "sums", "--include-path", folder, "--limit", 3, "--device", "cpu") == 0
    settings = benchmarks.settings_of(benchmarks.parse(["x", "--limit", "3", "--device", "cpu"]))
    (record,) = records(run)
    assert Benchmarks(["sums"], settings, [folder]).is_scored(record, "sums")
    assert not Benchmarks(["sums"], settings).is_scored(record, "sums")
    assert all(math.isfinite(row["value"]) for row in record["results"])
    with pytest.raises(UsageError, match="unknown"):
        Benchmarks(["no_such_task_of_ours"], settings, [folder]).load()
