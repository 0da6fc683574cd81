"""A tiny model with a tokenizer, as a checkpoint of a run, and a Hub with a few rows of our own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from local_hub import LocalHub
from transformers import PreTrainedTokenizerBase

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from periln.runkit.checkpoints import write_checkpoint
from periln.runkit.folder import RunFolder
from periln.scripts.prepare_data import train_tokenizer

TEXTS = ["a first text about water and eggs", "short", "a third one, " * 30]


def make_tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, 280, 256)


def make_model(tokenizer: PreTrainedTokenizerBase, placement: str = "peri", seed: int = 0) -> PeriLlamaForCausalLM:
    torch.manual_seed(seed)
    config = PeriLlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        norm_placement=placement,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    return PeriLlamaForCausalLM(config).eval()


def make_run(path: Path, placement: str = "peri", step: int = 3, seed: int = 1) -> RunFolder:
    """A completed pretraining run with one checkpoint of random weights."""
    tokenizer = make_tokenizer()
    run = RunFolder(path)
    model = {"norm_placement": placement, "num_hidden_layers": 2, "hidden_size": 32}
    recipe = {"stage": "pretrain", "model": model, "optimizer": {"learning_rate": 1e-3}, "seed": seed}
    run.claim(recipe | {"steps": step, "batch_size": 2, "sequence_length": 16, "checkpoint_every": step})
    with write_checkpoint(run.checkpoint_path(step), make_model(tokenizer, placement, seed), tokenizer):
        pass
    run.set_status("completed", step=step, parameters_non_embedding=1000)
    return run


@contextmanager
def serving(store: Path, home: Path) -> Iterator[LocalHub]:
    """The Hub's client of this process talks to a Hub on loopback, with its own cache."""
    import datasets.config
    import huggingface_hub.constants as hub_constants

    with LocalHub(store) as hub, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(hub, home).items():
            patch.setenv(name, value)
        # Both libraries read the environment once, when they are imported.
        patch.setattr(hub_constants, "ENDPOINT", hub.url)
        patch.setattr(
            hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(hub_constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        patch.setattr(datasets.config, "HUB_DATASETS_URL", hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
        yield hub


def environment(hub: LocalHub, home: Path) -> dict[str, str]:
    """The same for a process."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": hub.token,
        "PYTHONPATH": os.getcwd(),
    }


def write_weights(run, model):
    """Put another model into the run's newest checkpoint, as whole as before."""
    with write_checkpoint(run.checkpoints()[-1], model, make_tokenizer()):
        pass
