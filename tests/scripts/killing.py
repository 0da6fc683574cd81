"""Start a pretraining run, kill it with SIGKILL after a moment, and again, until it was killed often enough; then let
it end. Every start is a separate process, forked from this one, which has done the imports and nothing else.

    python killing.py RECIPE RUNS KILLS SEED  ->  what the kills left lying about, as JSON
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from periln.runkit.errors import run_command
from periln.scripts import pretrain


def start(recipe: str, runs: str) -> int:
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os._exit(run_command(pretrain.main, pretrain.parse(["--config", recipe, "--runs", runs])))
    return pid


def ended(pid: int) -> int | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def main(recipe: str, runs: str, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    draw, left, done = random.Random(seed), Counter(), 0
    folder = Path(runs) / Path(recipe).stem
    metrics = folder / "metrics.jsonl"
    while done < kills:
        before = metrics.stat().st_size if metrics.exists() else 0
        pid = start(recipe, runs)
        while ended(pid) is None and (metrics.stat().st_size if metrics.exists() else 0) <= before:
            time.sleep(0.005)  # until it is back where it was, so that the whole run takes long enough
        time.sleep(draw.random() * 0.15)
        if (code := ended(pid)) is not None:
            sys.exit(f"the run ended by itself ({code}) after {done} kills")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        done += 1
        hidden = {path.suffix for path in (folder / "checkpoints").glob(".step_*")}
        left.update(hidden or {"between"})
    code = os.waitstatus_to_exitcode(os.waitpid(start(recipe, runs), 0)[1])
    print(json.dumps({"kills": done, "left": left, "exit": code}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
