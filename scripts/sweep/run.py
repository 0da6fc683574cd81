"""Running a sweep's cells: each in its own process, several at a time, until all are done or nothing helps."""

import os
import shlex
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from periln.runkit.errors import INTERRUPTED, USAGE, StoppedBySignal, UserError
from periln.runkit.folder import RunFolder
from periln.runkit.process import StopRequest, python_m
from periln.scripts.sweep.cells import Cell, Sweep

FINISHED = ("completed", "diverged")


@dataclass(frozen=True)
class Way:
    """How cells are run."""

    jobs: int = 1
    threads: int | None = None  # CPU threads of each; None: the processors shared out among the jobs
    retries: int = 1  # further attempts for a cell that failed
    launch: str | None = None  # instead of `python`, for example "accelerate launch --config_file ..."

    def command(self, sweep: Sweep, cell: Cell) -> list[str]:
        threads = self.threads or (max(1, (os.cpu_count() or 1) // self.jobs) if self.jobs > 1 else None)
        words = ["--config", sweep.recipe_file(cell), "--runs", sweep.path]
        words += ["--threads", threads] if threads else []
        if self.launch:
            return [*shlex.split(self.launch), "-m", "periln.scripts.pretrain", *map(str, words)]
        return [*python_m("scripts.pretrain"), *map(str, words), "--stop-with-parent", str(os.getpid())]


@dataclass
class Job:
    """A cell that is being run."""

    cell: Cell
    process: subprocess.Popen
    log_start: int  # bytes of the log that earlier attempts wrote
    start: float = field(default_factory=time.monotonic)


def failure_of(log: Path, log_start: int, code: int) -> str:
    """Why an attempt failed, in words: the last error that its trainer named, else its exit code."""
    lines = log.read_bytes()[log_start:].decode(errors="replace").splitlines()
    said = next((line for line in reversed(lines) if line.startswith("error: ")), None)
    return said.removeprefix("error: ") if said else f"exit code {code}"


def run_sweep(sweep: Sweep, way: Way, stop: StopRequest, tell: Callable[[str], None] = print) -> None:
    """Run every cell that is not finished.

    Finished cells (completed, or diverged: that is a result) are left alone. A cell that fails, or is killed by
    someone else, goes to the end of the queue and on from its last checkpoint, `way.retries` times; a mistake in its
    recipe is not tried again. A stop is handed on to the running cells, once, and they save.

    Raises:
        StoppedBySignal: all cells have stopped; the same command resumes.
        UserError: some cells have failed for good; the others are finished.
    """
    with RunFolder(sweep.path).locked():
        sweep.write_recipes(tell)
        _run(sweep, way, stop, tell)


def _run(sweep: Sweep, way: Way, stop: StopRequest, tell: Callable[[str], None]) -> None:
    queue = deque(cell for cell in sweep.cells if cell.state not in FINISHED)
    done, total = len(sweep.cells) - len(queue), len(sweep.cells)
    if done:
        tell(f"{done} of {total} cells are finished already")
    attempts: dict[str, int] = {}
    failed: dict[str, str] = {}
    running: list[Job] = []
    told = False
    try:
        while running or (queue and not stop.exit_code):
            while queue and len(running) < way.jobs and not stop.exit_code:
                running.append(_start(sweep, queue.popleft(), way))
            if stop.exit_code and not told:
                _signal(running, signal.SIGINT if stop.exit_code == INTERRUPTED else signal.SIGTERM)
                told = True
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                cell, code = job.cell, job.process.returncode
                minutes = f"{(time.monotonic() - job.start) / 60:.1f} min"
                if cell.state in FINISHED:
                    done += 1
                    reason = cell.run.summary.get("reason")
                    tell(f"[{done}/{total}] {cell.name}: {cell.state}{f', {reason}' if reason else ''} ({minutes})")
                elif not stop.exit_code:
                    attempts[cell.name] = attempts.get(cell.name, 0) + 1
                    why = failure_of(sweep.log_file(cell), job.log_start, code)
                    again = attempts[cell.name] <= way.retries and code != USAGE
                    tell(f"{cell.name} failed: {why}{' (will be tried again)' if again else ''}")
                    if again:
                        queue.append(cell)
                    else:
                        failed[cell.name] = why
            time.sleep(0.05)
    finally:
        _signal(running, signal.SIGTERM)  # left over only by a second signal, or an error of ours
    if stop.exit_code:
        raise StoppedBySignal(
            stop.exit_code, f"stopped with {done} of {total} cells finished; the same command resumes"
        )
    if failed:
        name, why = next(iter(failed.items()))
        raise UserError(f"{len(failed)} of {total} cells failed; {name}: {why} (see {sweep.path / 'logs'})")


def _start(sweep: Sweep, cell: Cell, way: Way) -> Job:
    log = sweep.log_file(cell)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as out:
        log_start = out.tell()
        # A separate session: a Ctrl-C at the terminal reaches us alone, and is passed on once.
        process = subprocess.Popen(
            way.command(sweep, cell), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    return Job(cell, process, log_start)


def _signal(jobs: list[Job], number: int) -> None:
    for job in jobs:
        if job.process.poll() is None:
            job.process.send_signal(number)
