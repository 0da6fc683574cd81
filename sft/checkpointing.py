"""Checkpoints of a fine-tuning: a model folder with the trainer's state next to the weights, all or nothing.

The Trainer's own saving (pickles, written in place) is not used. What it would pickle is stored here as safetensors and
JSON: nothing in a checkpoint is ever unpickled, by us or by anyone who gets it.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch as safetensors
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from periln.runkit.checkpoints import damage_of, remove_checkpoint, write_checkpoint
from periln.runkit.errors import UserError
from periln.runkit.folder import RunFolder, read_json, write_json
from periln.sft.base import write_base

STATE = "trainer_state"
STATES_KEPT = 2  # checkpoints that can be resumed from: the newest, and one in case that is damaged
ADAPTER = "adapter_model.safetensors"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


# --- writing ---------------------------------------------------------------------------------------------
def _moments(trainer: Any) -> dict[str, torch.Tensor]:
    """The optimizer's state by the names of its parameters."""
    states = trainer.optimizer.state
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in trainer.model.named_parameters()
        for key, value in states.get(parameter, {}).items()
    }


def _random_state() -> dict[str, torch.Tensor]:
    """Only torch draws random numbers in a step (dropout); the order of the rows follows from seed and epoch."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def save(run: RunFolder, trainer: Any, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write the checkpoint of the trainer's step."""
    model, state = trainer.model, trainer.state
    base = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    kept = base.config.use_cache
    base.config.use_cache = True  # the Trainer switches it off, which config.json would then record
    path = run.checkpoint_path(state.global_step)
    try:
        with write_checkpoint(path, model, tokenizer) as folder:
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form
            if base is not model:
                write_base(folder, path, Path(base.config._name_or_path))
            inside = folder / STATE
            inside.mkdir()
            safetensors.save_file(_moments(trainer), inside / "optimizer.safetensors")
            safetensors.save_file(_random_state(), inside / "rng.safetensors")
            scaler = trainer.accelerator.scaler
            more = {
                "step": state.global_step,
                "scaler": scaler.state_dict() if scaler is not None else None,
                "scheduler": {"last_epoch": trainer.lr_scheduler.last_epoch},
                "learning_rates": [group["lr"] for group in trainer.optimizer.param_groups],
                "tokens": trainer._total_train_tokens,
            }
            write_json(inside / "state.json", more)
            # What the Trainer reads back itself; its log history is our metrics.jsonl.
            counters = ("global_step", "epoch", "max_steps", "num_train_epochs", "train_batch_size", "total_flos")
            when = ("logging_steps", "eval_steps", "save_steps")
            plain = TrainerState(**{name: getattr(state, name) for name in counters + when})
            plain.save_to_json(str(inside / "trainer_state.json"))
    finally:
        base.config.use_cache = kept
    return path


def prune(
    run: RunFolder, step: int, steps_per_epoch: int, keep: int | None, epochs_too: bool, finished: bool = False
) -> None:
    """Of the checkpoints up to `step`, remove those that are no longer needed, and the trainer's state of those that
    will not be resumed from.

    The `STATES_KEPT` newest stay, whatever they are (of a finished run only the newest), and of those at the end of
    an epoch (`epochs_too`) the `keep` newest, or all. A kill midway leaves only whole checkpoints.
    """
    checkpoints = [path for path in run.checkpoints() if step_of(path) <= step]
    newest = checkpoints[-1 if finished else -STATES_KEPT :]
    ends = [path for path in checkpoints if epochs_too and step_of(path) % steps_per_epoch == 0]
    stay = [*newest, *(ends if keep is None else ends[-keep:])]
    for path in checkpoints:
        if path not in stay:
            remove_checkpoint(path)
        elif path not in newest:
            _drop_state(path)


def _drop_state(path: Path) -> None:
    try:
        manifest = read_json(path / "manifest.json")
    except UserError:
        return  # damaged: its reader will report that
    kept = {name: entry for name, entry in manifest.items() if not name.startswith(f"{STATE}/")}
    if kept != manifest:
        write_json(path / "manifest.json", kept)
    shutil.rmtree(path / STATE, ignore_errors=True)


# --- reading ---------------------------------------------------------------------------------------------
def latest_resumable(run: RunFolder, tell: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole and has the trainer's state; damaged ones are named and passed over."""
    for left_over in run.checkpoints_path.glob(".step_*"):
        shutil.rmtree(left_over)  # left by a save or a removal that was killed
    for path in reversed(run.checkpoints()):
        damage = damage_of(path)
        if damage is not None:
            tell(f"passing over a checkpoint: {damage}")
        elif f"{STATE}/state.json" in read_json(path / "manifest.json"):
            return path
    return None


@torch.no_grad()
def load_weights(path: Path, model: torch.nn.Module) -> None:
    """Weights, or an adapter's weights, from a checkpoint into the model.

    Raises:
        UserError: the tensors are not the model's.
    """
    if (path / ADAPTER).exists():
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        tensors, have = safetensors.load_file(path / ADAPTER), get_peft_model_state_dict(model)
        if tensors.keys() != have.keys():
            raise UserError(f"{path} does not fit the model: {sorted(tensors.keys() ^ have.keys())[:4]}")
        set_peft_model_state_dict(model, tensors)
        return
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= safetensors.load_file(file)
    have = model.state_dict()
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    missing, unexpected = have.keys() - tensors.keys() - tied, tensors.keys() - have.keys()
    if missing or unexpected:
        raise UserError(f"{path} does not fit the model (missing {sorted(missing)}, unexpected {sorted(unexpected)})")
    for name, value in tensors.items():
        have[name].copy_(value)


def load_state(path: Path, trainer: Any) -> None:
    """Optimizer, learning rate, scaler and counters back into a trainer that has built them, bit for bit."""
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in safetensors.load_file(path / STATE / "optimizer.safetensors").items():
        parameter, key = name.rsplit("/", 1)
        moments.setdefault(parameter, {})[key] = value
    optimizer = trainer.optimizer.optimizer
    for name, parameter in trainer.model.named_parameters():
        if name in moments:
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in moments[name].items()}
    state = read_json(path / STATE / "state.json")
    for group, rate in zip(optimizer.param_groups, state["learning_rates"], strict=True):
        group["lr"] = rate
    scheduler = trainer.lr_scheduler
    scheduler.last_epoch, scheduler._last_lr = state["scheduler"]["last_epoch"], state["learning_rates"]
    if trainer.accelerator.scaler is not None and state["scaler"]:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    trainer._total_train_tokens = state["tokens"]


def load_random_state(path: Path) -> None:
    random = safetensors.load_file(path / STATE / "rng.safetensors")
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
