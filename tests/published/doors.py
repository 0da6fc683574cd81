"""What the tests of published checkpoints share: texts, models, our commands, and records of what was measured.

PUBLISHED_TOKENS (tokens of each text, 256 a window), PUBLISHED_LENGTH (the longest text) and PUBLISHED_LIMIT (items a
task) raise what is measured; PUBLISHED_RECORDS names a folder for the numbers, which docs/results/redraw_published.py
draws.
"""

import json
import os
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from published_models import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from periln.eval.texts.samples import text_samples

TOKENS = int(os.environ.get("PUBLISHED_TOKENS", "512"))
MOST = 40000  # tokens of a text from which windows are drawn
LENGTH = int(os.environ.get("PUBLISHED_LENGTH", "1024"))
LIMIT = os.environ.get("PUBLISHED_LIMIT", "8")
FULL_BENCH = os.environ.get("PUBLISHED_FULL_BENCH") == "1"
VLLM_PYTHON = os.environ.get("VLLM_PYTHON")
RECORDS = os.environ.get("PUBLISHED_RECORDS")
DATA = Path(os.environ.get("PUBLISHED_DATA", ROOT / "data"))
HUB = DATA / "hub" / "datasets"
VALIDATION = "WikiText-2, validation"  # what the cure reads; nothing else is measured on it
TEXTS = {
    VALIDATION: ("Salesforce/wikitext/wikitext-2-raw-v1/validation-*.parquet", "text"),
    "WikiText-2": ("Salesforce/wikitext/wikitext-2-raw-v1/test-*.parquet", "text"),
    "C4": ("allenai/c4/en-demo/*.parquet", "text"),
    "LIMA": ("GAIR/lima/plain_text/*.parquet", "conversations"),
}


def record(name: str, values: dict) -> None:
    """Keep numbers with the date and the versions."""
    if RECORDS:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        values = values | {"date": f"{date.today():%Y-%m-%d}", "versions": versions}
        Path(RECORDS, f"{name}.json").write_text(json.dumps(values, indent=1) + "\n")


def texts(name: str) -> list[str]:
    pattern, column = TEXTS[name]
    files = sorted(HUB.glob(pattern))
    if not files:
        pytest.skip(f"{name} is not in {HUB}: name the data with PUBLISHED_DATA")
    rows = [row for file in files for row in pd.read_parquet(file)[column]]
    return [row if isinstance(row, str) else "\n".join(row) for row in rows if len(row)]


def samples(folder: Path, name: str, tokens: int = TOKENS, width: int = 256) -> list[torch.Tensor]:
    """Batches of one sample (1, width) of a text, `tokens` in all; more tokens add to the same first ones."""
    tokenizer, vocabulary, most = AutoTokenizer.from_pretrained(folder), 2**31, max(MOST, tokens)
    found = text_samples(tokenizer, iter(texts(name)), name, max(1, most // width), width, 0, vocabulary)
    order = torch.randperm(len(found.ids), generator=torch.Generator().manual_seed(0))[: max(1, tokens // width)]
    return [found.ids[number : number + 1] for number in order.tolist()]


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def periln(*words: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "periln", *map(str, words)], capture_output=True, text=True, cwd=ROOT, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def processor_seconds() -> float:
    """Of all commands that have ended so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@torch.no_grad()
def plain_pass(folder: Path, tokens: int = 256) -> float:
    """Processor seconds of a plain forward pass of one sample, the least of three."""
    model, ids, found = load(folder), torch.arange(1, tokens + 1)[None], []
    for _ in range(3):
        started = time.process_time()
        model(input_ids=ids, use_cache=False)
        found.append(time.process_time() - started)
    return min(found)
