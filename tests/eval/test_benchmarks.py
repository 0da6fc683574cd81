"""Scores against the lm_eval command line, what is not computed twice, and what bad input is told."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hub_store import write_store
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from small_models import make_model, make_run, make_tokenizer, serving, write_weights

from periln.eval import benchmarks
from periln.eval.scoring import harness
from periln.eval.scoring.gold import METRIC
from periln.eval.scoring.harness import Benchmarks, Settings
from periln.eval.scoring.likelihood import ContinuationLM
from periln.eval.scoring.own_tasks import OwnTasks
from periln.eval.targets import find_target
from periln.runkit.errors import UsageError, UserError, run_command
from periln.runkit.tasks import SUITES

FIVE = SUITES["hub"]
PLACEMENTS = ("post", "pre", "peri")


def call(*words: object) -> int:
    return run_command(benchmarks.main, benchmarks.parse([str(word) for word in words]))


def records(folder: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("benchmarks-*.json"))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {placement: make_run(folder / placement, placement) for placement in PLACEMENTS}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    store = write_store(tmp_path_factory.mktemp("store"))
    model = store / "models" / "someone" / "a-model"
    model.mkdir(parents=True)
    tokenizer = make_tokenizer()
    make_model(tokenizer, "output").save_pretrained(model)
    tokenizer.save_pretrained(model)
    (store / "models" / "someone" / "pickled").mkdir()
    (store / "models" / "someone" / "pickled" / "config.json").write_text("{}")
    (store / "models" / "someone" / "pickled" / "pytorch_model.bin").write_bytes(b"no")
    with serving(store, tmp_path_factory.mktemp("home")) as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def one_list_of_tasks():
    """The harness's list of its thousands of tasks takes seconds: it is read once."""
    import lm_eval._cli.run
    import lm_eval.evaluator
    import lm_eval.tasks

    from periln.eval.scoring.harness import MINI_FOLDER

    made, real = [], lm_eval.tasks.TaskManager

    def shared(*more, include_defaults=True, **options):
        if not include_defaults:
            return real(*more, include_defaults=False, **options)
        made.extend([] if made else [real(include_path=str(MINI_FOLDER))])
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        for module in (lm_eval.tasks, lm_eval.evaluator, lm_eval._cli.run):
            if hasattr(module, "TaskManager"):
                patch.setattr(module, "TaskManager", shared)
        yield


def command_line(monkeypatch, *words: object) -> None:
    """`lm_eval` itself, in this process."""
    from lm_eval.__main__ import cli_evaluate

    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", *map(str, words)])
    cli_evaluate()


def answers_of(folder: Path) -> dict[str, list[float]]:
    """Log-likelihoods that the command line wrote, task by task."""
    found = {}
    for file in sorted(folder.rglob("samples_*.jsonl")):
        task = file.name.removeprefix("samples_").rsplit("_", 1)[0]
        docs = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda doc: doc["doc_id"])
        found[task] = [float(answer[0][0]) for doc in docs for answer in doc["resps"]]
    return found


@pytest.mark.slow
def test_scores_are_those_of_the_lm_eval_command_line_on_the_unmodified_tasks(runs, hub, tmp_path, monkeypatch):
    tasks = Benchmarks(FIVE, Settings(batch_size=7))
    for placement, run in runs.items():
        assert call(run.path, "--batch-size", 4, "--device", "cpu") == 0
        (ours,) = records(run.path / "eval")
        model = f"pretrained={run.checkpoints()[-1]}"
        where = ("--output_path", tmp_path / placement, "--device", "cpu", "--log_samples")
        command_line(
            monkeypatch, "--model", "hf", "--model_args", model, "--tasks", ",".join(FIVE), "--batch_size", 4, *where
        )
        (file,) = (tmp_path / placement).rglob("results_*.json")
        theirs = json.loads(file.read_text())["results"]
        assert {row["task"] for row in ours["results"]} == set(FIVE)
        assert {row["task"] for row in ours["results"] if row["metric"] == METRIC} == set(FIVE)
        for row in ours["results"]:
            if row["metric"] == METRIC:  # lm_eval has nothing like it: see test_shared_scoring.py
                continue
            assert row["value"] == theirs[row["task"]][f"{row['metric']},none"], (placement, row)
            assert row["stderr"] == theirs[row["task"]][f"{row['metric']}_stderr,none"]
        lm, target = tasks.load_model(find_target(run.path)), find_target(run.path)
        command_answers = answers_of(tmp_path / placement)  # at another batch size
        for task in FIVE:
            docs = tasks.run(task, lm, target, log_samples=True)["samples"][task]
            found = [answer[0][0] for doc in docs for answer in doc["resps"]]
            assert found == pytest.approx(command_answers[task], abs=1e-3)
            assert len(set(found)) > 10


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("logits_cache", [True, False])
def test_log_likelihoods_are_bit_for_bit_those_of_the_harness(size, logits_cache):
    tokenizer = make_tokenizer()
    model, texts = make_model(tokenizer), ("a", "ab", " water", " and eggs and water", " " * 700)
    pairs = [(f"{i} {'so ' * i}".strip(), text) for i in range(1, 9) for text in texts[: 3 + i % 2]]
    pairs += [("long " * 300, " eggs"), ("", " empty context")]  # cut on the left; and none
    options = {"pretrained": model, "tokenizer": tokenizer, "batch_size": size, "device": "cpu"}
    ours, theirs = (kind(**options, logits_cache=logits_cache) for kind in (ContinuationLM, HFLM))
    encoded = [(pair, *ours._encode_pair(*pair)) if pair[0] else (pair, [3], [4, 5]) for pair in pairs]
    assert any(len(context) + len(answer) > ours.max_length for _, context, answer in encoded)
    found = ours._loglikelihood_tokens(encoded, disable_tqdm=True)
    assert found == theirs._loglikelihood_tokens(encoded, disable_tqdm=True)
    assert len({answer for answer, _ in found}) > 20


def test_an_automatic_batch_is_not_larger_than_the_memory_holds(monkeypatch):
    import psutil

    from periln.eval.scoring.likelihood import fitting_batch_size

    for free, expected in ((1000e9, 64), (4e9, 9), (1e6, 1)):  # 4e9 / 4 over 2 x 4 bytes x 128 x 100,000 is 9.8
        memory = type("Memory", (), {"available": free})
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        assert fitting_batch_size(128, 100_000, torch.device("cpu")) == expected


def test_whole_texts_with_an_automatic_batch_are_read_in_batches_that_the_memory_holds(monkeypatch):
    import psutil

    model, tokenizer = make_model(make_tokenizer()), make_tokenizer()
    three = int(4 * 2 * 4 * 3.5 * 512 * len(tokenizer))  # bytes, a quarter of which holds three windows' logits twice
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": three}))
    texts = [Instance("loglikelihood_rolling", {}, ("eggs and water " * n,), n) for n in (300, 2, 150)]
    rows, found = [], []
    for size in ("auto", 1):
        lm = ContinuationLM(pretrained=model, tokenizer=tokenizer, batch_size=size, device="cpu")
        call = lm._model_call
        monkeypatch.setattr(lm, "_model_call", lambda ids, call=call: rows.append(len(ids)) or call(ids))
        found.append(lm.loglikelihood_rolling(texts, disable_tqdm=True))
        if size == "auto":
            assert lm.batch_sizes == {0: 3}
            assert max(rows) == 3
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_what_was_scored_stays_and_a_stop_costs_one_task(tmp_path, monkeypatch, capsys):
    run, asked = make_run(tmp_path / "run"), []
    words = (run.path, "--tasks", "mini_piqa,mini_arc_easy", "--limit", 3, "--device", "cpu")
    real = Benchmarks.run

    def counted(self, name, *more):
        asked.append(name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(self, name, *more)

    monkeypatch.setattr(Benchmarks, "run", counted)
    assert call(*words) == 130
    (half,) = records(run.path / "eval")
    assert half["tasks"] == ["mini_piqa"]
    assert call(*words) == 0
    assert asked == ["mini_piqa", "mini_arc_easy", "mini_arc_easy"]
    (whole,) = records(run.path / "eval")
    assert whole["tasks"] == ["mini_piqa", "mini_arc_easy"]
    assert whole["results"][: len(half["results"])] == half["results"]
    assert {row["n"] for row in whole["results"]} == {3}
    assert call(*words) == 0
    assert len(asked) == 3  # nothing is computed again ...
    assert "mini_arc_easy" in capsys.readouterr().out  # ... but shown
    assert call(*words, "--again") == 0
    assert len(asked) == 5


def test_a_task_that_is_computed_again_takes_no_other_task_s_results_away(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    words = (run.path, "--limit", 3, "--device", "cpu", "--tasks")
    assert call(*words, "mini_piqa,mini_arc_easy") == 0
    (before,) = records(run.path / "eval")
    with monkeypatch.context() as patch:
        patch.setattr(Benchmarks, "load", lambda self: pytest.fail("the tasks were loaded for nothing"))
        assert call(*words, "mini_arc_easy") == 0
    assert call(*words, "mini_piqa", "--again") == 0
    (after,) = records(run.path / "eval")
    assert after["tasks"] == ["mini_arc_easy", "mini_piqa"]
    assert sorted(after["results"], key=str) == sorted(before["results"], key=str)


def test_the_few_tasks_that_are_looked_up_without_the_whole_list_are_those_of_the_list():
    import lm_eval.tasks

    whole = lm_eval.tasks.TaskManager()
    few = harness._manager_of([*harness.FOLDERS, "mini_piqa"], OwnTasks([], []))
    assert len(few.all_tasks) < 100 < len(whole.all_tasks)
    for name in harness.FOLDERS:
        assert few.task_index[name] == whole.task_index[name]


def test_a_score_beyond_all_numbers_is_recorded_as_none_and_shown_as_such():
    scores = {"alias": "t", "word_perplexity,none": float("inf"), "word_perplexity_stderr,none": "N/A", "acc,none": 0.5}
    answer = {"results": {"t": scores}, "n-samples": {"t": {"effective": 4}}, "n-shot": {"t": 0}}
    rows = harness._results(answer)
    assert [(row["metric"], row["value"], row["stderr"], row["n"]) for row in rows] == [
        ("word_perplexity", None, None, 4),
        ("acc", 0.5, None, 4),
    ]
    record = {"results": rows, "harness": {"version": "1"}, "num_fewshot": 0, "limit": None, "batch_size": 1}
    text = benchmarks.table([("model", record | {"dtype": "float32", "device": "cpu"})]).text
    assert list(text["value ± standard error"]) == ["not finite", "0.5000"]


def test_log_likelihoods_that_are_no_numbers_are_no_scores(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    model = make_model(make_tokenizer())
    model.model.layers[0].mlp.down_proj.weight.data[3, 3] = torch.nan
    write_weights(run, model)
    assert call(run.path, "--tasks", "mini_piqa", "--limit", 3, "--device", "cpu") == 1
    assert "mini_piqa: log-likelihoods are not numbers in torch.float32" in capsys.readouterr().err
    assert not records(run.path / "eval")


def test_other_settings_and_other_weights_have_files_of_their_own(tmp_path):
    run = make_run(tmp_path / "run")
    words = (run.path, "--tasks", "mini_piqa", "--device", "cpu")
    assert call(*words, "--limit", 3) == 0
    assert call(*words, "--limit", 4) == 0
    assert call(*words, "--limit", 3, "--dtype", "bfloat16", "--num-fewshot", 1, "--batch-size", "auto") == 0
    found = {(r["limit"], r["dtype"], r["num_fewshot"], r["batch_size"]) for r in records(run.path / "eval")}
    assert found == {(3, "float32", 0, 16), (4, "float32", 0, 16), (3, "bfloat16", 1, "auto")}
    assert all(row["num_fewshot"] == r["num_fewshot"] for r in records(run.path / "eval") for row in r["results"])
    (automatic,) = [r for r in records(run.path / "eval") if r["batch_size"] == "auto"]
    assert automatic["batch_sizes"] == {"mini_piqa": [64]}
    weights = {r["evaluated"]["weights_sha256"] for r in records(run.path / "eval")}
    assert len(weights) == 1
    model = make_model(make_tokenizer(), seed=5)
    write_weights(run, model)
    assert call(*words, "--limit", 3) == 0
    assert len(records(run.path / "eval")) == 4


def test_a_record_says_what_was_measured(tmp_path):
    run, out = make_run(tmp_path / "run"), tmp_path / "chosen.json"
    assert call(run.path, "--tasks", "mini", "--limit", 2, "--out", out, "--device", "cpu") == 0
    assert not (run.path / "eval").exists()
    record = json.loads(out.read_text())
    assert (record["suite"], record["evaluated"]["path"]) == ("mini", "checkpoints/step_00000003")
    assert record["harness"]["name"] == "lm-eval"
    assert (record["dtype"], record["device"], record["limit"], record["batch_size"]) == ("float32", "cpu", 2, 16)
    metrics = {(row["task"], row["metric"]) for row in record["results"]}
    assert {("mini_piqa", "acc_norm"), ("mini_winogrande", "acc")} <= metrics
    assert ("mini_winogrande", "acc_norm") not in metrics
    assert all(row["stderr"] is not None and row["n"] == 2 for row in record["results"])


def test_a_file_of_something_else_is_left_alone(tmp_path, capsys):
    run, out = make_run(tmp_path / "run"), tmp_path / "mine.json"
    words = (run.path, "--tasks", "mini_piqa", "--device", "cpu", "--out", out)
    for content in ("[1]", '{"evaluated": {"weights_sha256": "another"}}'):
        out.write_text(content)
        assert call(*words, "--limit", 2) == 1
        assert "mine.json holds something else than results of these weights" in capsys.readouterr().err
        assert out.read_text() == content
    assert call(*words, "--limit", 2, "--again") == 0
    assert call(*words, "--limit", 2) == 0
    assert call(*words, "--limit", 3) == 1
    assert json.loads(out.read_text())["limit"] == 2


def test_a_model_of_another_family_is_scored_beside_its_folder(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer, folder = make_tokenizer(), tmp_path / "a-llama"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert call(folder, "--tasks", "mini_winogrande", "--limit", 3, "--device", "cpu", "--out", tmp_path / "out") == 0
    (record,) = records(tmp_path / "out" / "a-llama")
    assert record["evaluated"]["path"] == "a-llama"
    assert [row["metric"] for row in record["results"]] == ["acc", METRIC]
    assert not (folder / "eval").exists()


@pytest.mark.slow
def test_a_model_of_the_hub_is_scored_at_its_commit_and_pickles_are_refused(hub, tmp_path, capsys):
    words = ("--tasks", "mini_piqa", "--limit", 3, "--device", "cpu")
    assert call("someone/a-model", *words) == 2
    assert "give --out, a folder for its results" in capsys.readouterr().err
    assert call("someone/a-model", *words, "--out", tmp_path) == 0
    (folder,) = tmp_path.iterdir()
    (record,) = records(folder)
    assert record["evaluated"]["path"] == "someone/a-model"
    assert folder.name == f"someone--a-model-{record['evaluated']['revision'][:8]}"
    for name, more, message in (
        ("someone/nothing", (), "someone/nothing is not a folder here, and the Hub does not have it"),
        ("someone/a-model", ("--revision", "v9"), "someone/a-model@v9 is not a folder here, and the Hub has no such"),
        ("someone/pickled", (), "has no weights in safetensors; pickled ones"),
    ):
        assert call(name, *words, *more, "--out", tmp_path) == 2
        assert message in capsys.readouterr().err


def test_a_hub_that_does_not_answer_is_one_sentence(tmp_path, monkeypatch, capsys):
    import huggingface_hub.constants as hub_constants

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    assert call("someone/a-model", "--tasks", "mini_piqa", "--out", tmp_path) == 1
    said = capsys.readouterr().err.strip()
    assert said.splitlines()[-1].endswith("and the Hub (http://127.0.0.1:9) does not answer")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "mini_piqua"], "'mini_piqua' is unknown to lm-eval (did you mean 'mini_piqa'"),
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", "mini", "--batch-size", "many"], "--batch-size must be a number or auto, not 'many'"),
        (["--tasks", "mini", "--batch-size", "0"], "batch size must be at least 1, or auto, not 0"),
        (["--tasks", "mini", "--limit", "2.5"], "limit must be at least 1 item a task, or a share of them below 1"),
        (["--tasks", "mini", "--num-fewshot", "-1"], "num_fewshot must be at least 0, not -1"),
        (["--tasks", "mini", "--device", "cuda"], "torch sees no CUDA device"),
        (["--tasks", "mini", "--device", "tpuu"], "--device tpuu is not a device"),
        (["--tasks", "mini", "--revision", "v1"], "--revision v1 is for models of the Hub"),
    ],
)
def test_mistakes_are_said_before_any_work(runs, capsys, monkeypatch, words, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert call(runs["peri"].path, *words) == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_scored_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert call(tmp_path / "adapter", "--tasks", "mini_piqa") == 2
    assert "holds an adapter alone: merge it" in capsys.readouterr().err
    run = make_run(tmp_path / "run")
    checkpoint = shutil.copytree(run.checkpoints()[-1], tmp_path / "alone")
    (checkpoint / "manifest.json").unlink()

    def refuse(**kwargs):
        raise AssertionError

    monkeypatch.setattr("lm_eval.evaluator.evaluate", refuse)
    assert call(run.path, "--tasks", "mini_piqa", "--limit", 1) == 1
    assert "longer than the model's 512 positions" in capsys.readouterr().err
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    with pytest.raises(UserError, match="brings its own code, which runs only with --trust-remote-code"):
        find_target(checkpoint).load("cpu")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights in safetensors"):
        find_target(checkpoint)
    with pytest.raises(UsageError, match="is not a folder here"):
        find_target("no/such", None, False, None)
