"""The trainer's state beside a checkpoint's weights: optimizer, scaler, random numbers; safetensors only.

Tensors are stored whole and under their parameter's name, so that any engine, on any number of processes, can resume
from what another has written.
"""

from pathlib import Path
from typing import Any

import safetensors.torch as safetensors
import torch
from transformers import PreTrainedTokenizerBase

from periln.runkit.checkpoints import remove_checkpoint, write_checkpoint
from periln.runkit.errors import UserError
from periln.runkit.folder import RunFolder, read_json, write_json
from periln.scripts.training.engine import Engine, sharded_like, whole

BEST = "best.json"


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _random_states(engine: Engine) -> dict[str, torch.Tensor]:
    """The random state of every rank, on all ranks."""
    states = engine.gather(_random_state())
    return {f"{rank}.{device}": value for rank, state in enumerate(states) for device, value in state.items()}


def _moments(engine: Engine) -> dict[str, torch.Tensor]:
    """The optimizer's state, whole, on the main rank only (collective)."""
    if engine.zero:
        return engine.zero.moments(keep=engine.is_main)
    tensors = {}
    states = engine.optimizer.state
    for name, parameter in engine.parameters():
        for key, value in states.get(parameter, {}).items():
            value = whole(value)
            if engine.is_main:
                tensors[f"{name}/{key}"] = value.detach().cpu().contiguous()
    return tensors


def _weights(engine: Engine) -> dict[str, torch.Tensor] | None:
    """The whole state dict on the main rank where parameters are sharded (collective); None where they are not."""
    if engine.name not in ("fsdp2", "zero3"):
        return None
    weights = {}
    for name, value in engine.model.state_dict(keep_vars=True).items():
        value = engine.whole(value)
        if engine.is_main:
            weights[name] = value.detach().cpu()
    return weights


def save_checkpoint(
    run: RunFolder, step: int, engine: Engine, tokenizer: PreTrainedTokenizerBase, keep: set[int]
) -> None:
    """Save after `step` steps, then remove every checkpoint that is not in `keep` (steps). Called on all ranks."""
    weights, tensors, random = _weights(engine), _moments(engine), _random_states(engine)
    if engine.is_main:
        with write_checkpoint(run.checkpoint_path(step), engine.model, tokenizer, weights) as folder:
            state = folder / "trainer_state"
            state.mkdir()
            safetensors.save_file(tensors, state / "optimizer.safetensors")
            safetensors.save_file(random, state / "rng.safetensors")
            scaler = engine.scaler.state_dict() if engine.scaler else None
            write_json(state / "state.json", {"step": step, "scaler": scaler, "processes": engine.processes})
        for old in run.checkpoints():
            if int(old.name.removeprefix("step_")) not in keep | {step}:
                remove_checkpoint(old)
    engine.wait()


def _load(engine: Engine, weights: dict[str, torch.Tensor], moments: dict[str, dict[str, torch.Tensor]]) -> None:
    have, optimizer = engine.model.state_dict(), engine.optimizer.optimizer
    for name, value in weights.items():
        have[name].copy_(sharded_like(value, have[name]))
    for name, parameter in engine.parameters():
        if name in moments:
            optimizer.state[parameter] = {
                key: sharded_like(value, parameter) if value.ndim else value.to(parameter.device)
                for key, value in moments[name].items()
            }


@torch.no_grad()
def load_trainer_state(path: Path, engine: Engine) -> int:
    """Put weights, optimizer, scaler and random numbers back, bit for bit; returns the number of steps done.

    Raises:
        UserError: the checkpoint's tensors are not the model's.
    """
    weights: dict[str, Any] = {}
    for file in sorted(path.glob("*.safetensors")):
        weights |= safetensors.load_file(file)
    have = engine.model.state_dict()
    tied = set(engine.model.all_tied_weights_keys) if engine.model.config.tie_word_embeddings else set()
    missing, unexpected = set(have) - set(weights) - tied, set(weights) - set(have)
    if unexpected or missing:
        raise UserError(f"{path} does not fit the model (missing {sorted(missing)}, unexpected {sorted(unexpected)})")
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in safetensors.load_file(path / "trainer_state" / "optimizer.safetensors").items():
        parameter, key = name.rsplit("/", 1)
        moments.setdefault(parameter, {})[key] = value
    if engine.zero:
        engine.zero.load(weights, moments)
    else:
        _load(engine, weights, moments)
    state = read_json(path / "trainer_state" / "state.json")
    if engine.scaler is not None and state["scaler"]:
        engine.scaler.load_state_dict(state["scaler"])
    random = safetensors.load_file(path / "trainer_state" / "rng.safetensors")
    if state["processes"] == engine.processes:
        torch.set_rng_state(random[f"{engine.rank}.cpu"])
        if f"{engine.rank}.cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random[f"{engine.rank}.cuda"])
    return state["step"]
