"""The demo: its recipe, its refusals, and the whole path with a kill in the middle."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from hub_store import write_store
from local_hub import LocalHub
from tiny import ROOT, called, command, make_data, timeless

from periln.eval.scoring.gold import METRIC
from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import RunFolder, weights_hash
from periln.runkit.recipes import dump_yaml, read_yaml
from periln.scripts.arguments.demo import parse
from periln.scripts.demo import command as demo
from periln.scripts.demo.recipe import DemoRecipe


def tiny_recipe(folder, **more):
    """A demo that takes seconds, on its own text."""
    text = folder / "text"
    if not text.exists():
        text.mkdir()
        for i in range(60):
            (text / f"{i}.txt").write_text(" ".join(f"the {n} of {n * i % 89}" for n in range(150)))
    recipe = read_yaml(demo.DEFAULT_RECIPE) | {
        "placements": ["post", "peri"],
        "seeds": [1],
        "high_learning_rate": 100.0,
        "text": {"source": str(text), "max_bytes": 10**6, "heldout_share": 0.05},
        "tokenizer": {"vocab_size": 300},
        "model": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 512,
        },
        "evaluation": {"suite": "mini", "limit": 6, "batch_size": 16},
        "sft": {"data": "mini", "epochs": 1, "batch_size": 36, "learning_rate": 1e-3, "max_length": 96},
    }
    recipe["pretraining"] = recipe["pretraining"] | {
        "steps": 40,
        "batch_size": 4,
        "sequence_length": 32,
        "checkpoint_every": 5,
    }
    file = folder / "demo.yaml"
    file.write_text(dump_yaml(recipe | more))
    return file


def resolve(tmp_path, *flags):
    return demo.resolve_recipe(parse(["--out", str(tmp_path / "out"), *map(str, flags)]))


def keep(tmp_path, recipe):
    from periln.runkit.recipes import to_mapping

    RunFolder(tmp_path / "out").claim(to_mapping(recipe))
    (tmp_path / "out" / "data").mkdir()
    (tmp_path / "out" / "data" / "index.json").write_text("{}")


def test_the_embedded_recipe_has_three_placements_two_seeds_and_one_high_rate(tmp_path):
    cells = resolve(tmp_path).cells(tmp_path)
    table = {(c.model["norm_placement"], c.optimizer.learning_rate, c.seed) for c in cells}
    base = {(p, 2e-3, s) for p in ("post", "pre", "peri") for s in (1, 2)}
    assert table == base | {(p, 0.07, 1) for p in ("post", "pre", "peri")}
    assert {c.precision.mode for c in cells} == {"fp16"}
    assert {c.precision.residual_dtype for c in cells} == {"float16"}
    assert {(c.optimizer.weight_decay, c.optimizer.warmup) for c in cells} == {(0.033, 0.1)}


def test_hub_and_limit_are_kept_by_a_resumed_demo(tmp_path):
    recipe = resolve(tmp_path, "--hub")
    assert (recipe.evaluation.suite, recipe.evaluation.limit, recipe.sft.data) == ("hub", 100, "hub")
    keep(tmp_path, recipe)
    assert resolve(tmp_path) == recipe
    assert resolve(tmp_path, "--hub") == recipe
    with pytest.raises(UserError, match=r"evaluation\.limit: 100 -> 7"):
        resolve(tmp_path, "--hub", "--limit", 7)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_failing_process_of_a_stage_stops_the_others_and_gives_its_exit_code(order):
    pair = [[sys.executable, "-c", "import time; time.sleep(30)"], [sys.executable, "-c", "raise SystemExit(2)"]]
    stage = demo.Stage("two", [pair[i] for i in order], 1)
    start = time.monotonic()
    with pytest.raises(UserError, match="the stage 'two' failed") as caught:
        demo.run_stage(stage, demo.StopRequest(), debug=False)
    assert caught.value.exit_code == 2
    assert time.monotonic() - start < 25  # the other one would have slept for 30


@pytest.mark.slow
def test_text_without_documents_leaves_the_folder_free_for_another_demo(tmp_path):
    (tmp_path / "empty").mkdir()
    done = called("scripts.demo", "--out", tmp_path / "out", "--text", tmp_path / "empty")
    assert done.returncode == 2
    assert "no text found" in done.stderr
    assert resolve(tmp_path).text.source == "installed-python"
    again = called("scripts.demo", "--out", tmp_path / "out", "--text", tmp_path / "empty")
    assert "no text found" in again.stderr.splitlines()[0]  # and not: the folder belongs to somebody


def test_a_file_or_another_stages_folder_is_left_alone(tmp_path):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(UserError, match="is a file, not a folder"):
        resolve(tmp_path)
    assert (tmp_path / "out").read_text() == "precious"
    (tmp_path / "out").unlink()
    run = RunFolder(tmp_path / "out")
    run.claim({"stage": "pretrain"})
    assert resolve(tmp_path).stage == "demo"  # nothing was made there yet
    run.metrics_path.write_text('{"step": 0}\n')
    with pytest.raises(UserError, match="is not a demo's folder"):
        resolve(tmp_path)


def test_another_recipe_on_the_same_folder_is_refused_with_the_fields(tmp_path):
    keep(tmp_path, resolve(tmp_path))
    with pytest.raises(UserError, match=r"belongs to another recipe \(.*sft\.data: 'mini' -> 'hub'"):
        resolve(tmp_path, "--hub")
    with pytest.raises(UserError, match=r"placements: .* -> \['pre'\]"):
        resolve(tmp_path, "--placements", "pre")


def test_a_moved_text_and_another_device_do_not_make_another_demo(tmp_path, capsys):
    make_data(tmp_path)
    RunFolder(tmp_path / "out").claim(resolve(tmp_path, "--text", tmp_path / "text"))
    shutil.move(tmp_path / "data", tmp_path / "out" / "data")
    shutil.move(tmp_path / "text", tmp_path / "moved")
    moved = resolve(tmp_path, "--text", tmp_path / "moved", "--device", "cuda")
    assert (moved.text.source, moved.device) == (str(tmp_path / "moved"), "cuda")
    RunFolder(tmp_path / "out").claim(moved)
    said = capsys.readouterr().out
    assert "text.source: " in said and "device: 'cpu' -> 'cuda' (the computation is the same, but" in said
    (shutil.copytree(tmp_path / "moved", tmp_path / "other") / "0.txt").write_text("something else")
    with pytest.raises(UserError, match="holds data of another source"):
        resolve(tmp_path, "--text", tmp_path / "other")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"placements": ["post", "perri"]}, r"placements: 'perri' is unknown \(did you mean 'peri'\?\)"),
        ({"placements": ["pre", "pre"]}, "placements must name at least one, and none twice"),
        ({"tokenizer": {"vocab_size": 200}}, "vocab_size 200 is smaller than the 256 bytes"),
        ({"high_learning_rate": 2e-3}, "high_learning_rate must differ"),
        ({"device": "tpu"}, "device must be one of"),
        ({"placments": ["pre"]}, r"unknown field placments \(did you mean 'placements'"),
    ],
)
def test_recipe_mistakes_are_usage_errors(tmp_path, more, message):
    with pytest.raises(UsageError, match=message):
        resolve(tmp_path, "--recipe", tiny_recipe(tmp_path, **more))
    assert not (tmp_path / "out").exists()


def test_missing_text_and_a_full_disk_end_at_once(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="no text found: text.source /nowhere does not exist"):
        resolve(tmp_path, "--text", "/nowhere")
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"no space on the disk: .* has 1 MB free, the demo needs about \d+ MB"):
        demo.check_disk(tmp_path / "out", resolve(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--placements", "perri"], 2, "error: placements: 'perri' is unknown (did you mean 'peri'?)"),
        (["--text", "/nowhere"], 2, "error: no text found: text.source /nowhere does not exist"),
        (["--limit", "many"], 2, "error: argument --limit: invalid int value: 'many'"),
    ],
)
def test_a_mistake_is_one_sentence_and_an_exit_code(tmp_path, flags, code, message):
    done = called("scripts.demo", "--out", tmp_path / "out", *flags)
    assert done.returncode == code
    assert done.stderr.strip().splitlines() == [message] or done.stderr.startswith(message)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def children_of(pid: int) -> list[int]:
    return [int(p) for p in open(f"/proc/{pid}/task/{pid}/children").read().split()]


def alive(pid: int) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole demo, its process killed during pretraining, its stage left alone, and started again."""
    folder = tmp_path_factory.mktemp("demo")
    words = command("scripts.demo", "--out", folder / "out", "--recipe", tiny_recipe(folder))
    first = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cell = RunFolder(folder / "out" / "post_lr0.002_seed1")
    deadline = time.monotonic() + 120
    while len(cell.metrics()) < 8:
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.05)
    stage = children_of(first.pid)
    first.kill()
    first.wait()
    second = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr[-3000:]
    assert stage
    assert not any(alive(pid) for pid in stage)
    return folder, second


@pytest.mark.slow
def test_a_killed_demo_goes_on_to_its_report(finished):
    folder, second = finished
    out = folder / "out"
    assert (out / "report.html").stat().st_size > 50_000
    last = second.stdout.strip().splitlines()[-1]
    assert last.startswith(f"{out / 'report.html'}: done in ") and ", of which set-up 0:" in last
    assert second.stdout.startswith("set-up (imports) took 0:")
    assert RunFolder(out).status == "completed" and RunFolder(out).summary["setup_seconds"] > 0
    for name in ("post_lr0.002_seed1", "peri_lr0.002_seed1"):
        cell = RunFolder(out / name)
        assert cell.status == "completed"
        assert [r["step"] for r in cell.metrics()] == list(range(40))
        assert {e["file"] for e in cell.evaluations()} == {"benchmarks-mini.json", "heldout.json", "sample.json"}
        assert RunFolder(out / name / "sft").status == "completed"
        evaluated = {e["file"] for e in RunFolder(out / name / "sft").evaluations()}
        assert evaluated == {"benchmarks-mini.json", "heldout.json", "sample.json", "before_after.json"}


@pytest.mark.slow
def test_a_diverged_run_is_recorded_and_neither_evaluated_nor_tuned(finished):
    out = finished[0] / "out"
    diverged = [r for r in map(RunFolder, out.glob("*_lr100_seed1")) if r.status == "diverged"]
    assert diverged
    for cell in diverged:
        assert cell.summary["reason"]
        assert cell.evaluations() == []
        assert not (cell.path / "sft").exists()
        assert not (cell.path / "eval" / "stability").exists()


@pytest.mark.slow
def test_the_final_checkpoints_are_measured_by_the_quick_bench(finished):
    out = finished[0] / "out"
    folder = out / "peri_lr0.002_seed1" / "eval" / "stability"
    found = json.loads((folder / "stability.json").read_text())
    assert [entry["step"] for entry in found["checkpoints"]] == [40] and found["verdict"]
    assert (folder / "angles_00000040.parquet").exists()
    report = (out / "report.html").read_text()
    assert "Figure 7c. Angular distance" in report and "FP16 certificate from the weights alone" in report


@pytest.mark.slow
def test_fine_tuning_was_fp16_too_and_saved_its_chat_template(finished):
    tuned = finished[0] / "out" / "peri_lr0.002_seed1" / "sft"
    seen = json.loads((tuned / "environment.json").read_text())
    assert {d for add in seen["residual_adds"].values() for d in add.values()} == {"float16"}
    assert set(seen["linear_outputs"]) == {"float16"}
    assert seen["parameters"] == ["float32"]
    assert seen["loss_scaler"] is True
    assert "generation" in (RunFolder(tuned).checkpoints()[-1] / "chat_template.jinja").read_text()


@pytest.mark.slow
def test_a_finished_demo_started_again_computes_nothing(finished, monkeypatch):
    """On a machine with one core, which sees nothing but what the two left."""
    folder, _ = finished
    out = folder / "out"
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.json*") if p.name != "summary.json"}
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    done = called("scripts.demo", "--out", out)
    assert done.returncode == 0, done.stderr
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert "pretraining" not in done.stdout and "fine-tuning in" not in done.stdout  # not even started


@pytest.mark.slow
def test_a_stage_with_one_run_unfinished_is_not_passed_over(finished):
    out = finished[0] / "out"
    by_title = {stage.title: stage for stage in demo.plan_stages(demo.resolve_recipe(parse(["--out", str(out)])), out)}
    trained, tuned = by_title["pretraining in FP16"], by_title["fine-tuning in FP16"]
    assert trained.finished and tuned.finished
    for stage in (trained, tuned):
        run = RunFolder(stage.runs[0])
        kept = run.summary
        run.set_status("interrupted")
        assert not stage.finished
        run.set_status(**kept)
    assert not by_title["evaluation"].finished  # it knows by itself what it has


@pytest.mark.slow
def test_a_cell_trained_alone_and_uninterrupted_has_the_same_metrics(finished, tmp_path):
    """Two demo runs with one seed are equal, and the kill left no trace."""
    out = finished[0] / "out"
    file = out / "recipes" / "post_lr0.002_seed1.yaml"
    done = called("scripts.pretrain", "--config", file, "--runs", tmp_path / "alone")
    assert done.returncode == 0, done.stderr
    alone, killed = RunFolder(tmp_path / "alone" / "post_lr0.002_seed1"), RunFolder(out / "post_lr0.002_seed1")
    assert timeless(alone.path) == timeless(killed.path)
    assert weights_hash(alone.checkpoints()[-1]) == weights_hash(killed.checkpoints()[-1])


@pytest.mark.slow
def test_the_lm_eval_command_line_gives_the_reports_scores_from_any_folder(finished, tmp_path):
    cell = RunFolder(finished[0] / "out" / "peri_lr0.002_seed1")
    words = [
        "env", "HF_HUB_OFFLINE=1", f"HF_MODULES_CACHE={tmp_path / 'modules'}", "PYTHONSAFEPATH=1",
        os.path.join(os.path.dirname(sys.executable), "lm_eval"), "run", "--model", "hf",
        "--model_args", f"pretrained={cell.checkpoints()[-1]},trust_remote_code=True", "--device", "cpu",
        "--include_path", str(ROOT / "eval" / "tasks"), "--tasks", "mini_arc_easy,mini_piqa",
        "--batch_size", "16", "--limit", "6", "--output_path", str(tmp_path / "results"),
    ]  # fmt: skip
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    scores = json.loads(next((tmp_path / "results").rglob("results_*.json")).read_text())["results"]
    ours = json.loads((cell.path / "eval" / "benchmarks-mini.json").read_text())["results"]
    compared = 0
    for row in ours:
        if row["task"] in scores and row["metric"] != METRIC:
            assert scores[row["task"]][f"{row['metric']},none"] == row["value"]
            assert scores[row["task"]][f"{row['metric']}_stderr,none"] == row["stderr"]
            compared += 1
    assert compared == 4


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_hands_the_signal_on_once(tmp_path):
    words = command("scripts.demo", "--out", tmp_path / "out", "--recipe", tiny_recipe(tmp_path))
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    cell = RunFolder(tmp_path / "out" / "post_lr0.002_seed1")
    while len(cell.metrics()) < 3 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "start the demo again" in errors
    assert cell.status == "interrupted"
    assert cell.checkpoints()[-1] == cell.checkpoint_path(cell.summary["step"])


@contextlib.contextmanager
def hub_of(store, folder, monkeypatch):
    """A Hub for the processes that a demo starts."""
    with LocalHub(store) as hub:
        for name, value in {"ENDPOINT": hub.url, "HOME": str(folder / "hf"), "HUB_DISABLE_XET": "1"}.items():
            monkeypatch.setenv(f"HF_{name}", value)
        yield hub


@pytest.mark.slow
def test_hub_mode_runs_the_unmodified_tasks_and_lima_from_a_hub(tmp_path, monkeypatch):
    with hub_of(write_store(tmp_path / "store"), tmp_path, monkeypatch) as hub:
        recipe = tiny_recipe(tmp_path, placements=["peri"], high_learning_rate_seeds=[])
        words = ("--out", tmp_path / "out", "--recipe", recipe, "--hub", "--limit", 5, "--debug")
        done = called("scripts.demo", *words)
        asked = "\n".join(hub.requests)
    assert done.returncode == 0, done.stderr[-3000:]
    cell = RunFolder(tmp_path / "out" / "peri_lr0.002_seed1")
    scores = json.loads((cell.path / "eval" / "benchmarks-hub.json").read_text())
    assert {r["task"] for r in scores["results"]} == {"arc_easy", "hellaswag", "piqa", "social_iqa", "winogrande"}
    assert {r["n"] for r in scores["results"]} == {scores["limit"]} == {5}
    assert "GAIR/lima" in asked
    tuned = RunFolder(cell.path / "sft")
    dropped = json.loads((tuned.path / "data.json").read_text())["dropped_rows"]
    assert tuned.summary["conversations"] + len(dropped) == 10  # 12 rows, of which 2 are multi-turn
    assert tuned.summary["conversations"] > len(dropped)
    assert "limit 5" in (tmp_path / "out" / "report.html").read_text()


def test_cuda_without_a_device_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="device: cuda was asked for"):
        demo.main(parse(["--out", str(tmp_path / "out"), "--device", "cuda"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_missing_data_set_is_one_sentence_before_any_training(tmp_path, monkeypatch):
    with hub_of(tmp_path / "empty", tmp_path, monkeypatch):
        done = called("scripts.demo", "--out", tmp_path / "out", "--hub")
    assert done.returncode == 1
    assert not list((tmp_path / "out").glob("*/metrics.jsonl"))
    first, second = [line for line in done.stderr.strip().splitlines() if line.startswith("error: ")]
    assert "arc_easy" in first
    assert "'benchmarks from the Hub' failed" in second
    assert "Traceback" not in done.stderr


def test_set_up_is_counted_from_the_start_of_make(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(demo.time, "time", lambda: 1_000_100.0)
        assert demo.setup_seconds(1_000_000.0) == 100
    assert 0 < demo.setup_seconds(None) < 24 * 3600  # of this process


def test_the_recipe_says_all_that_the_stages_are_told(tmp_path):
    recipe = resolve(tmp_path, "--hub", "--limit", "3")
    assert isinstance(recipe, DemoRecipe)
    commands = [" ".join(c) for stage in demo.plan_stages(recipe, tmp_path / "out") for c in stage.commands]
    assert "--check-data" in commands[0]  # before any training
    assert "--check-data" in commands[1]
    assert any("--suite hub" in c and "--limit 3" in c for c in commands)
    assert not any("HF_HUB_OFFLINE" in c for c in commands)
    mini = [" ".join(c) for s in demo.plan_stages(resolve(tmp_path), tmp_path / "out") for c in s.commands]
    assert all("HF_HUB_OFFLINE=1" in c for c in mini)
