"""Start a fine-tuning, kill it with SIGKILL after a moment, and again, until it was killed often enough; then let it
end. Every start is a separate process, forked from this one, which has done the imports and nothing else.

    python killing.py KILLS SEED 'RECIPE RUN [FLAG...]'...  ->  for each, what the kills left lying about, as JSON

The result is in RUN/killed; that of a run that was not killed is in RUN/untouched.
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
from periln.sft import before_after, train


def start(words: list[str], name: str) -> int:
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os._exit(run_command(train.main, train.parse([*words, "--name", name])))
    return pid


def ended(pid: int) -> int | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def kill(kills: int, draw: random.Random, recipe: str, run: str, *flags: str) -> dict:
    words = ["--config", recipe, "--model", run, *flags]
    left, done = Counter(), 0
    folder = Path(run) / "killed"
    while done < kills:
        before = size(folder / "metrics.jsonl")
        pid = start(words, "killed")
        while (code := ended(pid)) is None and size(folder / "metrics.jsonl") <= before:
            time.sleep(0.002)  # until it is back where it was, so that the whole run takes long enough
        time.sleep(draw.random() * 0.04)
        if code is not None or (code := ended(pid)) is not None:
            sys.exit(f"the run ended by itself ({code}) after {done} kills")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        done += 1
        left.update({path.suffix for path in (folder / "checkpoints").glob(".step_*")} or {"between"})
    codes = [os.waitstatus_to_exitcode(os.waitpid(start(words, name), 0)[1]) for name in ("killed", "untouched")]
    return {"kills": done, "left": left, "exits": codes}


if __name__ == "__main__":
    torch.set_num_threads(1)
    before_after.NEW_TOKENS = 5
    generator = random.Random(int(sys.argv[2]))
    print(json.dumps([kill(int(sys.argv[1]), generator, *case.split()) for case in sys.argv[3:]]))
