"""The trainer's state beside a checkpoint's weights: optimizer, scaler, random numbers; safetensors only."""

from pathlib import Path

import safetensors.torch as safetensors
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from runkit.checkpoints import remove_checkpoint, write_checkpoint
from runkit.errors import UserError
from runkit.folder import RunFolder, read_json, write_json


def save_checkpoint(
    run: RunFolder,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    keep_last: int,
) -> None:
    """Save after `step` steps, then remove all but the last `keep_last` checkpoints."""
    with write_checkpoint(run.checkpoint_path(step), model, tokenizer) as folder:
        state = folder / "trainer_state"
        state.mkdir()
        moments = optimizer.state_dict()["state"]
        tensors = {f"{i}.{k}": v.contiguous() for i, entry in moments.items() for k, v in entry.items()}
        safetensors.save_file(tensors, state / "optimizer.safetensors")
        rng = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            rng["cuda"] = torch.cuda.get_rng_state()
        safetensors.save_file(rng, state / "rng.safetensors")
        write_json(state / "state.json", {"step": step, "scaler": scaler.state_dict() if scaler else None})
    for old in run.checkpoints()[:-keep_last]:
        remove_checkpoint(old)


def load_trainer_state(
    path: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
) -> int:
    """Put weights, optimizer, scaler and random numbers back, bit for bit; returns the number of steps done.

    Raises:
        UserError: the checkpoint's tensors are not the model's.
    """
    weights = {}
    for file in sorted(path.glob("*.safetensors")):
        weights |= safetensors.load_file(file)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise UserError(f"{path} does not fit the model (missing {missing}, unexpected {unexpected})")
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in safetensors.load_file(path / "trainer_state" / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    state = read_json(path / "trainer_state" / "state.json")
    if scaler is not None and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    rng = safetensors.load_file(path / "trainer_state" / "rng.safetensors")
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])
    return state["step"]
