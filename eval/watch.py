"""Score a run's checkpoints while it trains, from a second process: score against tokens.

    python -m eval.watch runs/400m-peri --every 4 --tasks arc_easy,piqa --limit 500

Every n-th checkpoint (by `checkpoint_every` of the run's recipe) and the last are scored as by `eval.benchmarks`, into
the run's `eval/`; RUN/eval/watch.csv and watch.png are drawn anew after each. A checkpoint is held by hard links as
soon as it appears, so that the trainer may remove it meanwhile (`keep_last`). The watch ends with the run; after a stop
or a kill the same command resumes it.
"""

import sys

from periln.eval.arguments.watch import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("eval.watch", parse, check))  # parses before the imports below, which take seconds

import argparse
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from periln.eval.arguments.shared import task_names
from periln.eval.options import settings_of
from periln.eval.scoring.harness import Benchmarks, Settings, result_file
from periln.eval.targets import Target
from periln.runkit.errors import StoppedBySignal, UsageError, UserError
from periln.runkit.figure_style import STYLE
from periln.runkit.folder import RunFolder, write_bytes, write_text
from periln.runkit.process import StopRequest, quiet_transformers, start_stage
from periln.runkit.progress import progress_bar

POLL_SECONDS = 0.1


class Held:
    """Checkpoints of a run that are still to be scored, linked into RUN/eval/.watch/ by a thread as they appear."""

    def __init__(self, run: RunFolder, due: Callable[[int], bool], done: set[int]):
        self.run, self.due, self.done = run, due, done
        self.folder = run.path / "eval" / ".watch"
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="checkpoint-links")

    def __enter__(self) -> "Held":
        self.folder.mkdir(parents=True, exist_ok=True)
        for half in self.folder.glob(".*"):
            shutil.rmtree(half)  # of a watch that was killed
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self.look()

    def look(self) -> None:
        """Link what is due and not yet held."""
        with self._lock:
            for path in self.run.checkpoints():
                step = int(path.name.removeprefix("step_"))
                if self.due(step) and step not in self.done and not (self.folder / path.name).exists():
                    self._hold(path, step)

    def _hold(self, path: Path, step: int) -> None:
        half = self.folder / f".{path.name}"
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir()
        try:
            folder = path.stat().st_ino
            for file in path.iterdir():
                if file.is_file():  # the trainer's state, a folder, is not needed
                    _link(file, half / file.name)
            if path.stat().st_ino != folder:  # what is removed is renamed first: only a folder that stayed was whole
                raise FileNotFoundError(path)
            half.rename(self.folder / path.name)
        except FileNotFoundError:  # removed meanwhile
            shutil.rmtree(half)

    def next(self) -> Path | None:
        """The oldest checkpoint that is held."""
        return min(self.folder.glob("step_*"), default=None)

    def release(self, path: Path) -> None:
        """Release a checkpoint that was scored."""
        with self._lock:
            self.done.add(int(path.name.removeprefix("step_")))
            shutil.rmtree(path)


def _link(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        shutil.copyfile(file, to)


# --- what is due, and when the run is over -------------------------------------------------------------------


def due_steps(run: RunFolder, every: int) -> Callable[[int], bool]:
    """Whether a step's checkpoint is to be scored: every n-th that the recipe asks for, and the last.

    Raises:
        UsageError, UserError: n below 1; a run without `checkpoint_every`.
    """
    if every < 1:
        raise UsageError(f"--every must be at least 1, not {every}")
    recipe = run.recipe
    spacing, last = recipe.get("checkpoint_every"), recipe.get("steps")
    if not spacing:
        raise UserError(f"{run.path / 'recipe.yaml'} has no checkpoint_every: only pretraining runs can be watched")
    return lambda step: step > 0 and (step % (spacing * every) == 0 or step == last)


def why_over(run: RunFolder) -> str | None:
    """Why nothing more will come, in words; None while the run seems alive."""
    summary = run.summary
    status = summary.get("status")
    if status in ("completed", "diverged", "interrupted", "failed"):
        return f"the run is {status}"
    if status == "running" and summary.get("host") == socket.gethostname() and not _alive(summary.get("pid")):
        return f"its trainer (process {summary.get('pid')}) is gone"
    return None if status == "running" else "the run has not begun"


def _alive(pid: int | None) -> bool:
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


class Ending:
    """When to stop waiting: at once for a run that is done, after `patience` seconds for one that may continue."""

    def __init__(self, run: RunFolder, patience: float):
        self.run, self.patience = run, patience
        self._since: float | None = None

    def reached(self) -> str | None:
        """The reason, once it is time."""
        why = why_over(self.run)
        if why is None:
            self._since = None
            return None
        if self.run.finished:
            return why
        self._since = self._since or time.monotonic()
        return why if time.monotonic() - self._since >= self.patience else None


def missed_steps(run: RunFolder, due: Callable[[int], bool], scored: set[int]) -> list[int]:
    """Steps that were due up to the run's last one, were not scored and no longer have a checkpoint."""
    there = {int(path.name.removeprefix("step_")) for path in run.checkpoints()}
    last = max(there | scored, default=0)
    return [step for step in range(1, last + 1) if due(step) and step not in there | scored]


# --- score against tokens ------------------------------------------------------------------------------------


def _records(run: RunFolder, settings: Settings) -> Iterator[tuple[int, dict[str, Any]]]:
    """Step and record of every checkpoint scored with these settings."""
    asked = settings.recorded()
    for record in run.evaluations():
        name = Path((record.get("evaluated") or {}).get("path") or "").name
        if name.startswith("step_") and not any(record.get(key) != asked[key] for key in asked):
            yield int(name.removeprefix("step_")), record


def curve(run: RunFolder, benchmarks: Benchmarks) -> pd.DataFrame:
    """step, tokens, task, metric, value, stderr, n: of every checkpoint scored with the settings of `benchmarks`.

    Scores by an earlier definition of one of the user's own tasks are left out.
    """
    recipe, rows = run.recipe, []
    tokens_a_step = recipe["batch_size"] * recipe["sequence_length"]
    for step, record in _records(run, benchmarks.settings):
        own = record.get("own_tasks") or {}
        changed = [name for name in own if name in benchmarks.definitions and not benchmarks.is_scored(record, name)]
        old = {task for name in changed for task in own[name]["tasks"]}
        scores = [row for row in record["results"] if row["task"] not in old]
        rows += [{"step": step, "tokens": step * tokens_a_step} | row for row in scores]
    columns = ["step", "tokens", "task", "metric", "value", "stderr", "n"]
    return pd.DataFrame(rows, columns=columns).sort_values(["task", "metric", "step"], kind="stable")


def draw(frame: pd.DataFrame, title: str) -> bytes:
    """acc (or another metric that a task has) of every task against tokens, ± one standard error, as PNG."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        for task, rows in frame.groupby("task", sort=False):
            metric = "acc" if "acc" in set(rows.metric) else rows.metric.iloc[0]
            of = rows[rows.metric == metric]
            error = of.stderr.astype(float).fillna(0.0)
            line = axes.plot(of.tokens, of.value, marker="o", label=f"{task} ({metric})")[0]
            axes.fill_between(of.tokens, of.value - error, of.value + error, color=line.get_color(), alpha=0.15, lw=0)
        axes.set(xlabel="training tokens", ylabel="score ± standard error", title=title)
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.legend(frameon=False)
        data = BytesIO()
        figure.savefig(data, format="png", dpi=150, metadata={"Software": None})
    return data.getvalue()


def write_curve(run: RunFolder, benchmarks: Benchmarks) -> None:
    """watch.csv and watch.png of the run."""
    frame = curve(run, benchmarks)
    if len(frame):
        write_text(run.path / "eval" / "watch.csv", frame.to_csv(index=False))
        write_bytes(run.path / "eval" / "watch.png", draw(frame, run.path.resolve().name))


# --- the command ---------------------------------------------------------------------------------------------


def scored_steps(run: RunFolder, benchmarks: Benchmarks) -> set[int]:
    """Steps that have results of all the tasks with these settings already."""
    records = _records(run, benchmarks.settings)
    return {step for step, record in records if all(benchmarks.is_scored(record, name) for name in benchmarks.tasks)}


def watch(run: RunFolder, benchmarks: Benchmarks, args: argparse.Namespace, bar: tqdm) -> str:
    """Score checkpoints until the run is over; returns why it is.

    Raises:
        StoppedBySignal: asked to stop.
    """
    stop, ending = StopRequest().install(), Ending(run, args.wait)
    done = set() if args.again else scored_steps(run, benchmarks)
    with Held(run, due_steps(run, args.every), done) as held:
        benchmarks.load()  # takes seconds, in which checkpoints come and go
        while True:
            if stop.exit_code is not None:
                raise StoppedBySignal(stop.exit_code, "stopped; start the watch again to resume from here")
            over = ending.reached()  # before looking, so that what was saved before the end is seen
            held.look()
            path = held.next()
            if path is not None:
                bar.set_postfix_str(path.name)
                inside = f"checkpoints/{path.name}"
                target = Target(path.name, path, run.path / "eval", inside, trust_remote_code=args.trust_remote_code)
                benchmarks.score(target, result_file(target, benchmarks.settings), args.again)
                write_curve(run, benchmarks)
                held.release(path)
                bar.update(1)
            elif over:
                return over
            else:
                time.sleep(POLL_SECONDS)


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    check(args)
    quiet_transformers()
    run, deadline = RunFolder(args.run), time.monotonic() + args.wait
    benchmarks = Benchmarks(task_names(args.tasks), settings_of(args), args.include_path)
    if not (run.path / "recipe.yaml").exists():
        tqdm.write(f"waiting for {run.path} to begin", file=sys.stderr)
    while not (run.path / "recipe.yaml").exists():
        if time.monotonic() > deadline:
            raise UsageError(f"{run.path} is not a run folder (recipe.yaml), nor became one in {args.wait:g} seconds")
        time.sleep(POLL_SECONDS)
    with progress_bar(args, None, f"watching {run.path.name}", "checkpoint") as bar:
        why = watch(run, benchmarks, args, bar)
    write_curve(run, benchmarks)
    if missed := missed_steps(run, due_steps(run, args.every), scored_steps(run, benchmarks)):
        steps = ", ".join(map(str, missed))
        print(f"warning: removed before they could be held, hence not scored: steps {steps}", file=sys.stderr)
    print(f"{why}; {bar.n} checkpoints scored: {run.path / 'eval' / 'watch.csv'}, watch.png")
