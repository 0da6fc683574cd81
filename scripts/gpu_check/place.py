"""Where and on what the sections work: device, sizes, data, and trainers on them."""

import gc
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState

from periln.runkit.folder import RunFolder
from periln.runkit.recipes import from_mapping, merge, read_yaml
from periln.scripts.recipe import Recipe
from periln.scripts.synthetic_data import RandomTokens, synthetic_folder
from periln.scripts.training.trainer import Trainer

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
QUIET = {"trackers": [], "keep_initial": False, "heldout_every": None, "keep_every": None, "checkpoint_every": 10**6}


@dataclass
class Place:
    """A device and a folder; on a CPU everything is of toy size."""

    out: Path
    device: torch.device

    @property
    def toy(self) -> bool:
        return self.device.type == "cpu"

    def describe(self) -> dict[str, Any]:
        name = None if self.toy else torch.cuda.get_device_name(self.device)
        return {"device": self.device.type, "device_name": name, "size": "toy" if self.toy else "full"}

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @cached_property
    def data(self) -> Path:
        return synthetic_folder(self.out)

    def tiny(self, **fields: Any) -> Recipe:
        """A recipe of seconds on any device; `fields` are merged over it."""
        shape = {"steps": 100, "batch_size": 4, "sequence_length": 32, "layer_stats_every": 100}
        return self.recipe({"name": "tiny", "model": TINY} | QUIET | shape, **fields)

    def large(self, placement: str, **fields: Any) -> Recipe:
        """The shipped 400M recipe with a batch of two micro batches; at toy size the tiny one."""
        if self.toy:
            tiny = {"name": placement, "model": {"norm_placement": placement}, "micro_batch_size": 2}
            return self.tiny(**merge(tiny, fields))
        base = read_yaml(RECIPES / f"400m-{placement}.yaml") | QUIET
        return self.recipe(base, **merge({"batch_size": 4, "compile": True, "layer_stats_every": 10**6}, fields))

    def recipe(self, base: dict[str, Any], **fields: Any) -> Recipe:
        found = merge(base | {"data": str(self.data), "device": self.device.type}, fields)
        recipe = from_mapping(Recipe, found)
        recipe.check()
        return recipe

    def trainer(self, recipe: Recipe) -> Trainer:
        """The real trainer on random tokens, whatever precision Accelerate had in this process before."""
        gc.collect()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        data = RandomTokens(self.data, recipe.model["vocab_size"])
        number = 0
        while (folder := self.out / "runs" / f"{recipe.name}_{number}").exists():
            number += 1
        return Trainer(recipe, RunFolder(folder), data)


def step(trainer: Trainer, witness: bool = False) -> dict[str, Any]:
    """One step of a trainer and its record."""
    record = trainer._train_step(witness=witness)
    trainer.step += 1
    return record
