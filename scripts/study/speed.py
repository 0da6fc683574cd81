"""How fast this machine trains: a minute of the pretraining command itself."""

import json
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

from periln.runkit.errors import UserError
from periln.runkit.process import python_m
from periln.runkit.recipes import dump_yaml
from periln.scripts.study.sizes import Size

SKIPPED, SECONDS, LONGEST = 10, 30.0, 240.0  # steps that are not counted, seconds that are, and when to give up


def measure(size: Size, device: str) -> float:
    """Tokens a second of one process with one thread (or one GPU), the median over its steps.

    Raises:
        UserError: the trial did not train.
    """
    with tempfile.TemporaryDirectory(prefix="periln-speed-") as folder:
        root = Path(folder)
        prepare = ["--source", "installed-python", "--max-bytes", "1500000", "--vocab-size", str(size.vocabulary)]
        prepare += ["--context", str(size.length), "--out", str(root / "data"), "--workers", "1"]
        _run([*python_m("scripts.prepare_data"), *prepare])
        recipe = {
            "name": "speed",
            "data": str(root / "data"),
            "device": device,
            "steps": 1_000_000,
            "batch_size": size.batch,
            "sequence_length": size.length,
            "model": {**size.shape.model(size.length), "vocab_size": size.vocabulary, "norm_placement": "peri"},
            "checkpoint_every": 1_000_000,
            "layer_stats_every": 1000,
            "flight": {"steps": 0},
            "trackers": [],
        }
        (root / "speed.yaml").write_text(dump_yaml(recipe))
        words = ["--config", str(root / "speed.yaml"), "--runs", str(root), "--threads", "1"]
        rates = _watched([*python_m("scripts.pretrain"), *words], root / "speed" / "metrics.jsonl")
    if not rates:
        raise UserError("the speed could not be measured: no step was trained; give --tokens-per-second")
    return median(rates)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"the speed could not be measured: {done.stderr.strip().splitlines()[-1:] or 'no reason given'}"
        )


def _watched(command: list[str], metrics: Path) -> list[float]:
    start, began = time.monotonic(), 0.0
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while child.poll() is None and time.monotonic() - start < LONGEST:
            time.sleep(0.5)
            if not began and metrics.exists() and metrics.read_text().count("\n") > SKIPPED:
                began = time.monotonic()
            if began and time.monotonic() - began > SECONDS:
                break
    finally:
        child.kill()
        child.wait()
    rates = []
    for line in metrics.read_text().splitlines()[SKIPPED:] if metrics.exists() else ():
        try:
            rates.append(float(json.loads(line)["tokens_per_second"]))
        except ValueError:
            break
    return rates
