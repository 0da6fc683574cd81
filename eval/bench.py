"""Compare the speed of evaluation with the harness's own HFLM: documents a second, same model, same machine, one run.

    python -m eval.bench RUN_OR_CHECKPOINT --tasks arc_easy,hellaswag --limit 200

Both answer the same requests in turn, and the order changes from pair to pair; the ratio is that of the medians, its
interval that of a bootstrap over pairs. Every log-likelihood of every pair is compared. With `--scoring plain`, one
that differs by a bit is an error; with `--scoring shared`, one that differs by more than 1e-4 nats is, and so is a
question whose answers are ranked differently although their gaps exceed 2e-4.
"""

import sys

from periln.eval.arguments.bench import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("eval.bench", parse, check))  # parses before the imports below, which take seconds

import argparse
import sys
import time
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from periln.eval.arguments.shared import task_names
from periln.eval.options import settings_of
from periln.eval.scoring.harness import SHARED, Benchmarks
from periln.eval.scoring.shared import TOLERANCE
from periln.eval.targets import Target, find_target
from periln.eval.text_table import Table, to_terminal
from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import write_text
from periln.runkit.process import quiet_transformers, start_stage
from periln.runkit.progress import progress_bar

OURS, THEIRS = "documents/s", "HFLM's"


def requests_of(benchmarks: Benchmarks, name: str) -> tuple[list[Any], int]:
    """The log-likelihood requests of a task, and their number of documents.

    Raises:
        UsageError: a task of another kind.
    """
    found, count = [], 0
    for task in benchmarks.loaded(name):
        limit = benchmarks.settings.limit
        task.build_all_requests(limit=None if limit is None else int(limit), rank=0, world_size=1)
        found += task.instances
        count += len({instance.doc_id for instance in task.instances})
    if any(instance.request_type != "loglikelihood" for instance in found):
        raise UsageError(f"task {name!r} is not answered by log-likelihoods alone")
    return found, count


def compare(
    ours: Any, theirs: Any, requests: list[Any], pairs: int, bar: tqdm, tolerance: float = 0.0
) -> tuple[np.ndarray, float]:
    """Seconds of ours and of theirs, an array of (pairs, 2), and the largest difference of a log-likelihood in nats.

    Raises:
        UserError: a log-likelihood differs by more than `tolerance`, or ranks of answers differ.
    """
    seconds, worst = np.zeros((pairs, 2)), 0.0
    for model in (ours, theirs):  # once before the clock
        model.loglikelihood(requests[: 4 * 8], disable_tqdm=True)
    for pair in range(pairs):
        answers: list[Any] = [None, None]
        for which in (0, 1) if pair % 2 else (1, 0):
            start = time.perf_counter()
            answers[which] = (ours, theirs)[which].loglikelihood(requests, disable_tqdm=True)
            seconds[pair, which] = time.perf_counter() - start
        if answers[0] != answers[1] and not tolerance:
            raise UserError(f"pair {pair}: the log-likelihoods differ from HFLM's")
        worst = max(worst, *(abs(a - b) for (a, _), (b, _) in zip(*answers, strict=True)))
        if worst > tolerance:
            raise UserError(f"pair {pair}: a log-likelihood differs from HFLM's by {worst:.2g}")
        if moved := ranked_otherwise(requests, answers[0], answers[1], 2 * tolerance):
            raise UserError(f"pair {pair}: the answers of document {moved[0]} are ranked differently by HFLM")
        bar.update(1)
    return seconds, worst


def ranked_otherwise(requests: list[Any], ours: list[Any], theirs: list[Any], gap: float) -> list[Any]:
    """Documents with two answers that the two rank differently, where the gap is larger than `gap` nats."""
    by_document: dict[Any, list[tuple[float, float]]] = {}
    for request, (a, _), (b, _) in zip(requests, ours, theirs, strict=True):
        by_document.setdefault((request.task_name, request.doc_id), []).append((a, b))
    return [
        number
        for number, found in by_document.items()
        if any((a > c) != (b > d) and abs(b - d) > gap for a, b in found for c, d in found if (a, b) != (c, d))
    ]


def interval(seconds: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the ratio of medians, theirs over ours."""
    chosen = np.random.default_rng(0).integers(0, len(seconds), (draws, len(seconds)))
    medians = np.median(seconds[chosen], axis=1)
    low, high = np.quantile(medians[:, 1] / medians[:, 0], (0.025, 0.975))
    return float(low), float(high)


def measure(benchmarks: Benchmarks, target: Target, pairs: int, bar: tqdm) -> pd.DataFrame:
    """A row a task: documents a second of both, their ratio and its interval."""
    from lm_eval.models.huggingface import HFLM

    ours = benchmarks.load_model(target)
    # The same model object, so that only the scoring differs.
    options = {"tokenizer": ours.tokenizer, "batch_size": benchmarks.settings.batch_size}
    theirs = HFLM(pretrained=ours.model, device=benchmarks.settings.device, **options)
    rows = []
    for name in benchmarks.tasks:
        bar.set_postfix_str(name)
        requests, count = requests_of(benchmarks, name)
        tolerance = TOLERANCE if benchmarks.settings.scoring == SHARED else 0.0
        seconds, worst = compare(ours, theirs, requests, pairs, bar, tolerance)
        if why := getattr(ours, "why_not", None):
            raise UserError(f"{target.name}, {name}: its answers cannot share their beginning: {why}")
        medians, (low, high) = np.median(seconds, axis=0), interval(seconds)
        speeds = {OURS: count / medians[0], THEIRS: count / medians[1]}
        rows.append({"task": name, "documents": count} | speeds | {"ratio": medians[1] / medians[0]})
        rows[-1] |= {"low": low, "high": high, "largest difference": worst}
    return pd.DataFrame(rows)


def table(frame: pd.DataFrame, benchmarks: Benchmarks, pairs: int) -> Table:
    """The rows as text."""
    lines = [
        {
            "block": "evaluation speed against HFLM",
            "task": row.task,
            "documents": str(row.documents),
            OURS: f"{row[OURS]:.1f}",
            THEIRS: f"{row[THEIRS]:.1f}",
            "ratio": f"{row.ratio:.3f}",
            "95 % interval": f"{row.low:.3f} to {row.high:.3f}",
        }
        for _, row in frame.iterrows()
    ]
    note = f"Medians of {pairs} pairs, batch size {benchmarks.settings.batch_size}, {benchmarks.settings.device}; "
    equal = "every log-likelihood equal to the bit."
    if benchmarks.settings.scoring == SHARED:
        equal = f"log-likelihoods within {frame['largest difference'].max():.1e} nats, ranks of the answers equal."
    return Table("Bench", pd.DataFrame(lines), frame, (note + equal,))


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    check(args)
    quiet_transformers()
    settings, names = settings_of(args), task_names(args.tasks)
    target = find_target(args.target, args.revision, args.trust_remote_code, args.out)
    if target is None:
        raise UserError(f"{args.target} has diverged: there is nothing to measure with")
    benchmarks = Benchmarks(names, settings, args.include_path)
    with progress_bar(args, len(names) * args.pairs, "bench", "pair") as bar:
        frame = measure(benchmarks, target, args.pairs, bar)
    print(to_terminal(table(frame, benchmarks, args.pairs), 100))
    if args.out is not None:
        write_text(args.out / "eval_bench.csv", frame.to_csv(index=False))
