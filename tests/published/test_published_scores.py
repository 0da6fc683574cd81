"""The two published checkpoints through lm-eval's own command, on five tasks of a local Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from doors import DATA, HUB, LIMIT, record
from published_models import CACHE, ROOT, model_folder

pytestmark = [pytest.mark.published, pytest.mark.slow]
TASKS = "arc_easy,hellaswag,piqa,social_iqa,winogrande"
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """The environment of a process that reads the local Hub."""
    pytest.importorskip("lm_eval")
    if not HUB.exists():
        pytest.skip(f"no {HUB}: name the data with PUBLISHED_DATA")
    from local_hub import LocalHub
    from small_models import environment

    with LocalHub(DATA / "hub") as hub:
        online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        yield online | environment(hub, tmp_path_factory.mktemp("home"))


def run(words: list, where: dict) -> None:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=where, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def lm_eval(folder: Path, dtype: str, out: Path, where: dict, *more: str) -> dict[tuple[str, str], tuple[float, float]]:
    """Score and standard error of each task and metric, from the `lm_eval` command."""
    command = [HERE / "lm_eval_fp16.py"] if dtype == "float16" else ["-m", "lm_eval"]
    model = ["--model", "hf", "--model_args", f"pretrained={folder},dtype={dtype}"]
    tasks = ["--tasks", TASKS, "--limit", LIMIT, "--batch_size", "16", "--output_path", out]
    run([sys.executable, *command, *model, *tasks, *more], where)
    (file,) = out.rglob("results_*.json")
    return {
        (task, metric): (values[f"{metric},none"], values[f"{metric}_stderr,none"])
        for task, values in json.loads(file.read_text())["results"].items()
        for metric in ("acc", "acc_norm")
        if f"{metric},none" in values
    }


def answers(out: Path) -> dict[tuple[str, int], float]:
    """Whether each item of each task was right (`acc`), from lm-eval's log of samples."""
    found = {}
    for file in out.rglob("samples_*.jsonl"):
        task = file.name.removeprefix("samples_").rpartition("_")[0]
        for line in file.read_text().splitlines():
            item = json.loads(line)
            found[task, item["doc_id"]] = item["acc"]
    return found


def test_scores_are_those_of_lm_eval(where, tmp_path):
    """SmolLM2 on the first items of the five tasks; ours against the `lm_eval` command's."""
    folder = model_folder("smollm2")
    run([sys.executable, "-m", "eval.benchmarks", folder, "--tasks", TASKS, "--limit", LIMIT, "--out", tmp_path], where)
    results = [json.loads(path.read_text()) for path in tmp_path.glob("*/*.json")]
    mine = {(row["task"], row["metric"]): row["value"] for file in results for row in file.get("results", []) if file}
    theirs = lm_eval(folder, "float32", tmp_path / "theirs", where)
    assert theirs and {key: mine[key] for key in theirs} == {key: score for key, (score, _) in theirs.items()}
    rows = [[task, metric, *values] for (task, metric), values in theirs.items()]
    record("smollm2_tasks", {"limit": LIMIT, "rows": rows})


@pytest.fixture(scope="module")
def scored(where, tmp_path_factory) -> dict[str, tuple[dict, dict]]:
    """Scores and answers of Gemma 3: the original in FP32 and BF16, the cured one in FP16."""
    if not (CACHE / "gemma3-fp16").exists():
        pytest.skip("Gemma 3 is not cured yet: run test_published.py first")
    jobs = {
        "original FP32": (model_folder("gemma3"), "float32"),
        "original BF16": (model_folder("gemma3"), "bfloat16"),
        "cured FP16": (CACHE / "gemma3-fp16", "float16"),
    }
    found = {}
    for name, (folder, dtype) in jobs.items():
        out = tmp_path_factory.mktemp(name.replace(" ", "-"))
        found[name] = lm_eval(folder, dtype, out, where, "--log_samples"), answers(out)
    return found


def test_cured_gemma_scores_in_fp16_as_the_original_in_fp32(scored):
    (reference, expected), rows = scored["original FP32"], {}
    for name, (scores, given) in scored.items():
        assert given.keys() == expected.keys() and len(expected) >= 5 * int(LIMIT)
        changed = sum(given[key] != expected[key] for key in expected)
        rows[name] = {"changed": changed, "scores": [[task, metric, *pair] for (task, metric), pair in scores.items()]}
    record("gemma3_tasks", {"limit": LIMIT, "items": len(expected), "rows": rows})
    for key, (score, error) in scored["cured FP16"][0].items():
        assert abs(score - reference[key][0]) <= error, key
    assert rows["cured FP16"]["changed"] <= rows["original BF16"]["changed"]
