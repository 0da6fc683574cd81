"""Running the cells: each in processes of its own, so many side by side, most informative first."""

import os
import resource
import subprocess
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from periln.runkit.errors import USAGE, StoppedBySignal, UserError
from periln.runkit.folder import RunFolder, write_text
from periln.runkit.process import StopRequest, python_m
from periln.runkit.recipes import dump_yaml
from periln.runkit.studies import ENDED, Study, best_rates
from periln.scripts.study.plan import recipe_of

ATTEMPTS = 2
SCORED = ("E5",)  # groups whose models are asked the five tasks


@dataclass(frozen=True)
class Way:
    """How cells are run: side by side, niceness, bytes of memory for each, every nth from the ith on, groups."""

    workers: int
    nice: int
    memory: int
    shard: tuple[int, int] = (1, 1)
    groups: tuple[str, ...] = ()


@dataclass
class Job:
    """A cell at work: training first, then the measuring of what it left."""

    cell: dict[str, Any]
    slot: int
    process: subprocess.Popen
    stage: str
    begin: float = field(default_factory=time.monotonic)


class Runner:
    """The cells of a study that are still to be run, and those at work."""

    def __init__(self, study: Study, way: Way, stop: StopRequest):
        self.study, self.way, self.stop = study, way, stop
        self.plan = study.plan
        self.done = study.results()
        index, parts = way.shard
        mine = [cell for i, cell in enumerate(study.cells) if i % parts == index - 1]
        mine = [cell for cell in mine if not way.groups or cell["group"] in way.groups]
        self.queue = deque(cell for cell in mine if cell["name"] not in self.done)
        self.total, self.before = len(mine), len(mine) - len(self.queue)
        self.failed: dict[str, int] = {}
        self.jobs: list[Job] = []
        self.spent, self.planned, self.start = 0.0, 0.0, time.monotonic()

    # --- one cell --------------------------------------------------------------------------------------
    def _rate(self, cell: dict[str, Any]) -> float | None:
        return cell["rate"] if cell["rate"] is not None else best_rates(self.plan, self.done).get(cell["like"])

    def _next(self) -> dict[str, Any] | None:
        """The first cell of the queue whose rate is known."""
        for cell in self.queue:
            if self._rate(cell) is not None:
                self.queue.remove(cell)
                return cell
        return None

    def _spawn(self, cell: dict[str, Any], slot: int, stage: str) -> Job:
        name = cell["name"]
        if stage == "train":
            file = self.study.path / "recipes" / f"{name}.yaml"
            rate = self._rate(cell)
            assert rate is not None
            write_text(file, dump_yaml(recipe_of(self.plan, cell, rate, str(self.study.path / "data"))))
            words = [*python_m("scripts.pretrain"), "--config", file, "--runs", self.study.path / "cells"]
        elif stage == "score":
            words = ["env", "HF_HUB_OFFLINE=1", "HF_DATASETS_OFFLINE=1", *python_m("eval.evaluate")]
            words += [self.study.run_path(name), "--suite", "mini", "--device", self.plan["device"]]
        else:
            words = [*python_m("eval.study"), "measure", self.study.path, "--cell", name]
        words += ["--threads", 1, "--stop-with-parent", os.getpid()]
        if self.plan["device"] == "cuda":
            words = ["env", f"CUDA_VISIBLE_DEVICES={slot}", *words]
        log = self.study.path / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as out:
            # A session of its own: Ctrl-C comes to us alone, and is handed on once.
            child = subprocess.Popen(
                list(map(str, words)), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        _bound(child.pid, self.way)
        return Job(cell, slot, child, stage)

    # --- all of them -----------------------------------------------------------------------------------
    def run(self) -> None:
        """Run to the end, or until asked to stop.

        Raises:
            StoppedBySignal: the cells at work have saved; the same command resumes them.
            UserError: cells that failed, with the first reason.
        """
        print(f"{self.before} of {self.total} cells are done; about {self._left()} left", flush=True)
        try:
            while True:
                if not self.stop.exit_code:
                    self._fill()
                if not self.jobs:
                    break
                for job in [job for job in self.jobs if job.process.poll() is not None]:
                    self._ended(job)
                if self.stop.exit_code:
                    for job in self.jobs:
                        job.process.terminate()
                    for job in self.jobs:
                        job.process.wait()
                    break
                time.sleep(0.1)
        finally:
            for job in self.jobs:
                if job.process.poll() is None:
                    job.process.terminate()
        if self.stop.exit_code:
            raise StoppedBySignal(self.stop.exit_code, f"stopped with {self._count()}; the same command resumes")
        lost = [name for name, times in self.failed.items() if times >= ATTEMPTS]
        if lost:
            log = self.study.path / "logs" / f"{lost[0]}.log"
            raise UserError(f"{len(lost)} of {self.total} cells failed, {lost[0]} first: see {log}")
        if self.queue:
            print(f"{len(self.queue)} cells wait for E2's cells of other shards, which say their rates", flush=True)

    def _fill(self) -> None:
        used = {job.slot for job in self.jobs}
        for slot in range(self.way.workers):
            if slot not in used and (cell := self._next()) is not None:
                run = RunFolder(self.study.run_path(cell["name"]))
                stage = self._after_training(cell, run) if run.status in ENDED else "train"
                self.jobs.append(self._spawn(cell, slot, stage))

    def _after_training(self, cell: dict[str, Any], run: RunFolder) -> str:
        """What comes after a cell's training: its scores, where they are asked for and are not there yet."""
        scored = cell["group"] in SCORED and run.status == "completed" and not list(run.path.glob("eval/*.json"))
        return "score" if scored else "measure"

    def _ended(self, job: Job) -> None:
        self.jobs.remove(job)
        name, code = job.cell["name"], job.process.returncode
        run = RunFolder(self.study.run_path(name))
        stage = self._after_training(job.cell, run) if job.stage == "train" else "measure"
        if job.stage == "score" and code and not self.stop.exit_code:
            print(f"{name}: the five tasks could not be asked of it (exit code {code})", flush=True)
        passed = job.stage == "score" or (job.stage == "train" and run.status in ENDED)
        if passed and not self.stop.exit_code:
            self.spent += time.monotonic() - job.begin
            self.jobs.append(self._spawn(job.cell, job.slot, stage))
            return
        if job.stage == "measure" and code == 0:
            self.done = self.study.results()
            self.spent += time.monotonic() - job.begin
            self.planned += job.cell["seconds"]
            result = self.done[name]
            loss = result.get("heldout_loss")
            said = f"held-out loss {loss:.4f}" if loss is not None else "no loss"
            print(f"[{self._count()}] {name}: {result['status']}, {said}; about {self._left()} left", flush=True)
        elif not self.stop.exit_code:
            self.failed[name] = self.failed.get(name, 0) + 1
            again = self.failed[name] < ATTEMPTS and code != USAGE
            self.failed[name] = self.failed[name] if again else ATTEMPTS
            print(f"{name} failed (exit code {code}){': it is tried again' if again else ''}", flush=True)
            if again:
                self.queue.append(job.cell)

    def _count(self) -> str:
        mine = self.total - len(self.queue) - len(self.jobs)
        return f"{mine} of {self.total}"

    def _left(self) -> str:
        """The time that is left, by the pace of the cells that this process has ended."""
        pace = self.spent / self.planned if self.planned else 1.0
        planned = sum(cell["seconds"] for cell in self.queue) + sum(job.cell["seconds"] for job in self.jobs) / 2
        seconds = pace * planned / self.way.workers
        return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"


def _bound(pid: int, way: Way) -> None:
    """Lower a child's priority and bound its memory, where the system can."""
    try:
        os.setpriority(os.PRIO_PROCESS, pid, max(way.nice, os.getpriority(os.PRIO_PROCESS, 0)))
        if hasattr(resource, "prlimit"):
            resource.prlimit(pid, resource.RLIMIT_DATA, (way.memory, way.memory))
    except (OSError, ValueError):
        pass  # it has ended, or may not be lowered


def prepare(study: Study, workers: int, stop: StopRequest) -> None:
    """The text and its tokens, where they are not there yet.

    Raises:
        UserError: prepare_data failed; it has said why.
    """
    data = dict(study.plan["data"])
    out = study.path / data.pop("path")
    words = [word for name, value in data.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += ["--out", str(out), "--workers", str(workers), "--stop-with-parent", str(os.getpid())]
    child = subprocess.Popen([*python_m("scripts.prepare_data"), *words], start_new_session=True)
    while child.poll() is None:
        if stop.exit_code:
            child.terminate()
            child.wait()
            raise StoppedBySignal(stop.exit_code, "stopped while the text was prepared; the same command resumes")
        time.sleep(0.1)
    if child.returncode:
        raise UserError(f"the study's text could not be prepared (exit code {child.returncode}); see above")


def log_session(path: Path, entry: dict[str, Any]) -> None:
    """One line for every start of `run`: from which commit, where, when."""
    import json

    with open(path / "sessions.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")
