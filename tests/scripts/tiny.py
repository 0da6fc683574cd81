"""A run small enough to be repeated, and the commands as a user would start them."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState

from periln.command_line import arguments_of
from periln.runkit.errors import run_command
from periln.runkit.folder import RunFolder
from periln.runkit.recipes import dump_yaml
from periln.scripts import pretrain
from periln.scripts.prepare_data import prepare
from periln.start import start

ROOT = Path(__file__).resolve().parents[2]
CLOCK_KEYS = {"tokens_per_second", "step_seconds", "data_wait", "mfu", "peak_memory_bytes"}
MODEL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}


def make_data(folder: Path) -> Path:
    """A prepared data folder with a vocabulary of 300."""
    text = folder / "text"
    text.mkdir()
    for i in range(60):
        (text / f"{i}.txt").write_text(" ".join(f"the {n} of {n * i % 89}" for n in range(150)))
    prepare(str(text), folder / "data", vocab_size=300, max_bytes=10**6, heldout_share=0.05, context=128)
    return folder / "data"


def write_recipe(folder: Path, data_folder: Path, name: str = "run", placement: str = "peri", **more) -> Path:
    """A recipe file; `more` replaces fields."""
    recipe = {
        "name": name,
        "data": str(data_folder),
        "model": {**MODEL, "norm_placement": placement},
        "steps": 12,
        "batch_size": 4,
        "sequence_length": 32,
        "layer_stats_every": 5,
        "checkpoint_every": 3,
        "trackers": [],
    }
    file = folder / f"{Path(name).name}.yaml"
    file.write_text(dump_yaml(recipe | more))
    return file


def command(module: str, *args: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, args)]


def run(module: str, *args: object, env: list[str] | None = None) -> subprocess.CompletedProcess:
    """Run a command of the project to its end."""
    words = [*(["env", *env] if env else []), *command(module, *args)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


@contextlib.contextmanager
def caught(number: int, stream: str):
    """What this process and its children write to a descriptor, as a file; `sys.stdout` or `sys.stderr` goes there."""
    kept = os.dup(number)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        os.dup2(file.fileno(), number)
        try:
            here = getattr(contextlib, f"redirect_{stream}")
            with open(os.dup(file.fileno()), "a", buffering=1, encoding="utf-8") as text, here(text):
                yield file
        finally:
            os.dup2(kept, number)
            os.close(kept)


def called(module: str, *args: object) -> subprocess.CompletedProcess:
    """What `run` gives, from this process: nothing is imported again; afterwards signals are handled as before.

    For a command that is to run to its end, in this process's environment.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    arguments = importlib.import_module(arguments_of(module))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with caught(1, "stdout") as out, caught(2, "stderr") as err:
        try:
            code = start(module, arguments.parse, arguments.check, list(map(str, args)))
        except SystemExit as stop:
            code = stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read())
    return subprocess.CompletedProcess(args, code, *said)


def train(folder: Path, data_folder: Path, **fields) -> RunFolder:
    """A whole run in this process, whatever precision Accelerate had in it before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    file = write_recipe(folder, data_folder, **fields)
    assert run_command(pretrain.main, pretrain.parse(["--config", str(file), "--runs", str(folder / "runs")])) == 0
    return RunFolder(folder / "runs" / fields.get("name", "run"))


def timeless(run_folder: Path) -> list[dict]:
    """metrics.jsonl without what a clock or an allocator measured."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK_KEYS} for line in lines]
