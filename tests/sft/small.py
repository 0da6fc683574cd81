"""A pretrained run and a fine-tuning recipe small enough to be repeated."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from periln.runkit.checkpoints import write_checkpoint
from periln.runkit.errors import run_command
from periln.runkit.folder import RunFolder
from periln.runkit.recipes import dump_yaml
from periln.scripts.prepare_data import train_tokenizer
from periln.sft import before_after, train

ROOT = Path(__file__).resolve().parents[2]
CLOCK_KEYS = {"tokens_per_second", "step_seconds", "data_wait", "mfu", "peak_memory_bytes"}
before_after.NEW_TOKENS = 5  # generation would take longer than everything else
TOPICS = ("eggs", "water", "moons", "bread", "rivers", "clocks", "boats", "stones")


def make_model(placement: str = "peri") -> tuple[PeriLlamaForCausalLM, PreTrainedTokenizerBase]:
    """Random weights, and a tokenizer of 300 tokens."""
    tokenizer = train_tokenizer(["a little text about eggs and water"], 300, 128)
    torch.manual_seed(0)
    config = PeriLlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        norm_placement=placement,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return PeriLlamaForCausalLM(config).eval(), tokenizer


def make_run(folder: Path, placement: str = "peri", scale: float = 1.0) -> RunFolder:
    """A `completed` pretraining run with one checkpoint; `scale` blows one of its matrices up."""
    model, tokenizer = make_model(placement)
    model.model.layers[0].mlp.down_proj.weight.data.mul_(scale)
    run = RunFolder(folder / "run")
    run.claim({"stage": "pretrain"})
    with write_checkpoint(run.checkpoint_path(1), model, tokenizer):
        pass
    run.set_status("completed", step=1)
    return run


def write_conversations(folder: Path, rows: int = 14) -> Path:
    """Short conversations of different lengths, a row each."""
    file = folder / "talk.jsonl"
    topics = [TOPICS[i % len(TOPICS)] for i in range(rows)]
    lines = [{"conversations": [f"how many {t}?", " ".join([t] * (i % 7 + 1))]} for i, t in enumerate(topics)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def write_recipe(folder: Path, **fields) -> Path:
    """Four steps an epoch, the last of them smaller; `fields` replace the recipe's."""
    recipe = {
        "data": str(folder / "talk.jsonl"),
        "epochs": 3,
        "batch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 1e-3,
        "max_length": 64,
    }
    if not (folder / "talk.jsonl").exists():
        write_conversations(folder)
    file = folder / "sft.yaml"
    file.write_text(dump_yaml(recipe | fields))
    return file


def words(recipe: Path, run: RunFolder, *more: object) -> list[str]:
    return ["--config", str(recipe), "--model", str(run.path), *map(str, more)]


def tune(recipe: Path, run: RunFolder, *more: object) -> int:
    """sft.train in this process."""
    return run_command(train.main, train.parse(words(recipe, run, *more)))


def command(module: str, *args: object) -> subprocess.CompletedProcess:
    """A command of the project, to its end."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, args)], cwd=ROOT, capture_output=True, text=True, check=False
    )


def timeless(run: RunFolder) -> list[dict]:
    """metrics.jsonl without what a clock or an allocator measured."""
    return [{k: v for k, v in record.items() if k not in CLOCK_KEYS} for record in run.metrics()]
