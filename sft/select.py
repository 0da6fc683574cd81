"""Choose among the epoch checkpoints of a fine-tuning, by tasks that are not the five benchmarks.

    python -m sft.select RUN...      ->  RUN/best.json; the best one's benchmarks go to RUN/eval/

The score of a checkpoint is the plain mean of `acc` over OpenBookQA, CommonsenseQA, RTE and MNLI; of equal ones the
earlier epoch's wins. The paper (Peri-LN, arXiv 2502.02732) names the tasks, but no aggregate.

Each evaluation is a separate process (`python -m eval.benchmarks`), whose result stays in RUN/selection/: after an
interruption, what is there is not computed again.
"""

import sys

from periln.sft.arguments.select import TASKS, check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("sft.select", parse, check))  # parses before the imports below, which take seconds

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from periln.runkit.checkpoints import damage_of
from periln.runkit.errors import StoppedBySignal, UsageError, UserError
from periln.runkit.folder import RunFolder, read_json, weights_hash, write_json
from periln.runkit.process import StopRequest, python_m, start_stage
from periln.runkit.progress import progress_bar
from periln.sft.checkpointing import ADAPTER, step_of

METRIC = "acc"
RULE = "plain mean of acc over the tasks; of equal ones the earlier epoch"
BEST = "best.json"


@dataclass(frozen=True)
class Candidate:
    """An epoch's checkpoint."""

    epoch: int
    path: Path

    @property
    def weights(self) -> str:
        return weights_hash(self.path)


def find_run(path: Path) -> RunFolder:
    """The fine-tuning that a run folder is or holds.

    Raises:
        UserError: none, or one that is not completed.
    """
    for folder in (path, path / "sft"):
        if (folder / "recipe.yaml").exists() and RunFolder(folder).recipe.get("stage") == "sft":
            run = RunFolder(folder)
            if run.status != "completed":
                raise UserError(f"{folder} is not completed (status: {run.status or 'not started'})")
            return run
    raise UsageError(f"{path} is not a fine-tuning run and holds none (sft/recipe.yaml with stage: sft)")


def candidates(run: RunFolder) -> list[Candidate]:
    """The checkpoints at the ends of epochs, the earliest first.

    Raises:
        UserError: there are none, or one is damaged: a choice among the rest would not be what was asked for.
    """
    steps = run.summary.get("steps_per_epoch") or 0
    found = [Candidate(step_of(p) // steps, p) for p in run.checkpoints() if steps and step_of(p) % steps == 0]
    if not found:
        raise UserError(f"{run.path} has no epoch checkpoints: fine-tune with save_strategy epoch")
    for one in found:
        damage = damage_of(one.path)
        if damage is not None:
            raise UserError(f"epoch {one.epoch} cannot be scored: {damage}")
    return found


def choose(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """The entry of the highest mean, of equal ones that of the earliest epoch."""
    return min(scores, key=lambda entry: (-entry["mean"], entry["epoch"]))


def evaluation(*words: object) -> list[str]:
    """The command of an evaluation."""
    return [*python_m("eval.benchmarks"), *map(str, words)]


def run_evaluation(command: list[str], stop: StopRequest) -> None:
    """Run an evaluation to its end; a signal that reaches us is passed on to it.

    Raises:
        StoppedBySignal: we were asked to stop.
        UserError: the evaluation failed, and has reported why.
    """
    child = subprocess.Popen([*command, "--stop-with-parent", str(os.getpid())], start_new_session=True)
    told = False
    while (code := child.poll()) is None:
        if stop.exit_code is not None and not told:
            child.terminate()
            told = True
        time.sleep(0.05)
    if stop.exit_code is not None:
        raise StoppedBySignal(stop.exit_code, "stopped; start the selection again to resume from here")
    if code:
        error = UserError(f"the evaluation failed (exit code {code}); see above")
        error.exit_code = code if code in (1, 2) else 1
        raise error


class Selection:
    """The scores of one run's epochs, and the choice."""

    def __init__(self, run: RunFolder, args: argparse.Namespace, stop: StopRequest):
        self.run, self.args, self.stop = run, args, stop
        self.tasks = TASKS[args.suite]
        self.folder = run.path / "selection"
        self.merged: set[Path] = set()  # models of adapters, written only to be scored
        self.options: list[object] = ["--batch-size", args.batch_size, "--device", args.device]
        if args.limit is not None:
            self.options += ["--limit", args.limit]
        if args.threads is not None:
            self.options += ["--threads", args.threads]

    def score(self, one: Candidate) -> dict[str, Any]:
        """An epoch's `acc` on each task and their mean, from its record in selection/ if there is one."""
        file = self.folder / f"{self.args.suite}-{one.path.name}.json"
        if not self._is_result(file, one):
            asked = [one.weights, metadata.version("lm-eval"), *map(str, self.options)]
            short = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
            fresh = file.with_name(f".{file.stem}-{short}.json")
            self.folder.mkdir(exist_ok=True)
            asked = ("--tasks", ",".join(self.tasks), "--out", fresh, *self.options)
            run_evaluation(evaluation(self._loadable(one), *asked), self.stop)
            write_json(file, read_json(fresh) | {"epoch": one.epoch, "selected_from": one.weights})
            for done in self.folder.glob(f".{file.stem}-*.json"):  # and what another selection left unfinished
                done.unlink()
        record = read_json(file)
        acc = {r["task"]: r["value"] for r in record["results"] if r["metric"] == METRIC}
        if missing := [task for task in self.tasks if task not in acc]:
            raise UserError(f"{file} has no {METRIC} of {', '.join(missing)}")
        scores = {task: acc[task] for task in self.tasks}
        return {
            "epoch": one.epoch,
            "step": step_of(one.path),
            "weights_sha256": one.weights,
            "mean": sum(scores.values()) / len(scores),
            "scores": scores,
            "n": {r["task"]: r["n"] for r in record["results"] if r["metric"] == METRIC},
            "harness": record.get("harness"),
        }

    def _loadable(self, one: Candidate) -> Path:
        """The checkpoint, or for an adapter the merged model, which stays only as long as needed."""
        if not (one.path / ADAPTER).exists():
            return one.path
        from periln.sft import lora

        out = self.run.path / "merged" / one.path.name
        if not out.exists() or damage_of(out) is not None:
            lora.merge(one.path, out)
            self.merged.add(out)
        return out

    def _is_result(self, file: Path, one: Candidate) -> bool:
        if not file.exists():
            return False
        record, asked = read_json(file), {"limit": self.args.limit, "batch_size": self.args.batch_size}
        asked |= {"selected_from": one.weights, "harness": {"name": "lm-eval", "version": metadata.version("lm-eval")}}
        return all(record.get(key) == value for key, value in asked.items())

    def select(self, bar: tqdm) -> dict[str, Any]:
        """Score every epoch, write best.json, evaluate the best one; returns the record."""
        scores, found = [], candidates(self.run)
        for one in found:
            bar.set_postfix_str(f"{self.run.path.parent.name}, epoch {one.epoch}")
            scores.append(self.score(one))
            bar.update(1)
        best = choose(scores)
        winner = next(one for one in found if one.epoch == best["epoch"])
        record = {
            "checkpoint": str(winner.path.relative_to(self.run.path)),
            **{key: best[key] for key in ("epoch", "step", "weights_sha256", "mean")},
            "rule": RULE,
            "suite": self.args.suite,
            "tasks": list(self.tasks),
            "limit": self.args.limit,
            "batch_size": self.args.batch_size,
            "epochs": scores,
        }
        model = self._loadable(winner)
        write_json(self.run.path / BEST, record)
        for copy in self.merged - {model}:  # no longer needed; one that was there before stays
            shutil.rmtree(copy, ignore_errors=True)
        run_evaluation(evaluation(model, "--tasks", self.args.suite, *self.options), self.stop)
        bar.update(1)
        return record


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    check(args)
    stop = StopRequest().install()
    runs = [find_run(path) for path in args.runs]
    total = sum(len(candidates(run)) + 1 for run in runs)
    with progress_bar(args, total, "selection", "evaluation") as bar:
        for run in runs:
            with run.locked(wait_seconds=30, tell=tqdm.write):
                record = Selection(run, args, stop).select(bar)
            tqdm.write(f"{run.path}: epoch {record['epoch']} (step {record['step']}), mean acc {record['mean']:.4f}")
