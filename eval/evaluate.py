"""Evaluate checkpoints in one process: a suite of benchmarks, held-out loss, samples, into each run's `eval/`.

    python -m eval.evaluate RUN_OR_CHECKPOINT... --suite mini --heldout data/heldout.jsonl

What the demo runs. For any tasks, dtypes and models: `eval.benchmarks`, through the same `harness.Benchmarks`.
"""

import sys

from periln.eval.arguments.evaluate import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("eval.evaluate", parse, check))  # parses before the imports below, which take seconds

import argparse
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from periln.eval.scoring.generation import generate_samples
from periln.eval.scoring.harness import Benchmarks, Settings
from periln.eval.targets import Target, find_target
from periln.eval.texts.windows import heldout_loss, read_texts
from periln.runkit.folder import called, read_json, weights_hash, write_json
from periln.runkit.process import quiet_transformers, start_stage
from periln.runkit.progress import progress_bar
from periln.runkit.tasks import SUITES

PROMPTS = ("The function returns", "import os\n")
CHAT_PROMPTS = ("How do I boil an egg?", "Write a Python function that adds two numbers.")


def _once(file: Path, options: dict[str, Any], weights: str, compute: Callable[[], dict[str, Any]]) -> None:
    """Compute and write `file`, unless it already holds the result for these weights and options."""
    if file.exists():
        old = read_json(file)
        same = old["evaluated"]["weights_sha256"] == weights and all(old.get(k) == v for k, v in options.items())
        if same:
            return
    write_json(file, compute())


def scores_file(target: Target, args: argparse.Namespace) -> Path:
    """Where a suite's scores of a target are."""
    return target.results / f"benchmarks-{args.suite}.json"


def evaluate_target(
    target: Target, benchmarks: Benchmarks, texts: list[str] | None, args: argparse.Namespace, bar: tqdm
) -> None:
    """All that is asked of one checkpoint; existing results are not computed again."""
    weights = weights_hash(target.checkpoint)
    more = {"batch_size": args.batch_size}
    which = {"text_sha256": hashlib.sha256("\0".join(texts or []).encode()).hexdigest(), "context": args.context}

    def loss() -> dict[str, Any]:
        model, tokenizer = target.load(args.device)
        dtype = str(model.dtype).removeprefix("torch.")
        measured = heldout_loss(model, tokenizer, texts, args.context, args.batch_size)
        head = {"evaluated": target.evaluated(), "harness": None, "suite": None, "limit": None} | which
        return head | {"batch_size": args.batch_size, "dtype": dtype} | measured

    def samples() -> dict[str, Any]:
        model, tokenizer = target.load(args.device)
        chat = tokenizer.chat_template is not None
        prompts = list(CHAT_PROMPTS if chat else PROMPTS)
        return {"evaluated": target.evaluated(), "samples": generate_samples(model, tokenizer, prompts, chat)}

    benchmarks.score(target, scores_file(target, args))
    bar.update(1)
    if texts is not None:
        _once(target.results / "heldout.json", which | more, weights, loss)
    bar.update(1)
    _once(target.results / "sample.json", {}, weights, samples)
    bar.update(1)


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    check(args)
    settings = Settings(args.num_fewshot, args.limit, args.batch_size, "auto", args.device)
    settings.check()
    quiet_transformers()
    targets = [(path, find_target(path)) for path in args.targets]
    texts = read_texts(args.heldout) if args.heldout else None
    benchmarks = Benchmarks(SUITES[args.suite], settings)
    there = [target for _, target in targets if target is not None]
    if args.check_data or any(benchmarks.lacking(target, scores_file(target, args)) for target in there):
        benchmarks.load()  # problems with a task or its data are reported before the first score
    if args.check_data:
        return
    with progress_bar(args, 3 * len(targets), "evaluation", "part") as bar:
        for path, target in targets:
            if target is None:
                tqdm.write(f"{called(path)}: diverged, not evaluated")
                bar.update(3)
                continue
            bar.set_postfix_str(target.name)
            evaluate_target(target, benchmarks, texts, args, bar)
