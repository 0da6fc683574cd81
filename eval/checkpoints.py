"""What is evaluated: a run folder's newest checkpoint, or a checkpoint folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import modeling_periln  # noqa: F401 (registers PeriLlama with the auto classes)
from runkit.errors import UserError
from runkit.folder import RunFolder, weights_hash


@dataclass(frozen=True)
class Target:
    """A checkpoint to evaluate, and the folder whose `eval/` gets the results."""

    name: str
    checkpoint: Path
    results: Path

    def evaluated(self) -> dict[str, Any]:
        """What was evaluated: path (within the run folder), revision, hash of the weights."""
        inside = self.checkpoint.is_relative_to(self.results.parent)
        path = self.checkpoint.relative_to(self.results.parent) if inside else self.checkpoint.name
        return {"path": str(path), "revision": None, "weights_sha256": weights_hash(self.checkpoint)}

    def load(self, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Model (in the saved dtype, in evaluation mode) and tokenizer."""
        model = AutoModelForCausalLM.from_pretrained(self.checkpoint).to(torch.device(device)).eval()
        return model, AutoTokenizer.from_pretrained(self.checkpoint)


def find_target(path: Path) -> Target | None:
    """The target that a run folder or checkpoint folder stands for.

    None for a run that has diverged, and for the fine-tuning that would have followed from one.

    Raises:
        UserError: the path is neither, or a run without a checkpoint, or a checkpoint without a tokenizer.
    """
    path = path.resolve()
    if (path / "recipe.yaml").exists():
        run = RunFolder(path)
        if run.status == "diverged":
            return None
        if not run.checkpoints():
            raise UserError(f"{path} has no checkpoint (status: {run.status or 'not started'})")
        checkpoint, results, name = run.checkpoints()[-1], path / "eval", path.name
    elif (path / "config.json").exists() or (path / "adapter_config.json").exists():
        # A checkpoint of a run writes to the run; any other to a folder beside it.
        run = path.parent.parent if (path.parent.parent / "recipe.yaml").exists() else path.parent
        checkpoint, results, name = path, run / "eval" if run != path.parent else path / "eval", path.name
    elif not path.exists() and RunFolder(path.parent).status == "diverged":
        return None
    else:
        raise UserError(f"{path} is neither a run folder (recipe.yaml) nor a checkpoint (config.json)")
    if (checkpoint / "adapter_config.json").exists():
        raise UserError(
            f"{checkpoint} holds an adapter alone: merge it (sft.train --peft --merge), and evaluate merged/"
        )
    if not (checkpoint / "tokenizer_config.json").exists():
        raise UserError(f"{checkpoint} has no tokenizer (tokenizer_config.json)")
    return Target(name, checkpoint, results)
