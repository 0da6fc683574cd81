"""Checkpoint folders: a Transformers model folder, whole or not there, with a manifest of sizes and hashes.

Which checkpoint represents a run is decided here, for every stage. Reading imports neither torch nor Transformers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from periln.runkit.control_tokens import END_OF_TURN
from periln.runkit.errors import UserError
from periln.runkit.folder import RunFolder, read_json, sha256_of, write_folder, write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def write_checkpoint(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, torch.Tensor] | None = None,
) -> Iterator[Path]:
    """Write a checkpoint: model with its code, tokenizer, what the block adds, and the manifest last.

    `weights` replace the model's own state dict where that is sharded over processes.

    The residual dtype is taken out of the saved configuration: it belongs to the run, not to the checkpoint. The saved
    generation configuration ends an answer where the text or a turn ends: whatever is fine-tuned on conversations
    from here, by any trainer, and every adapter, which has no such configuration, stops by it.
    """
    from transformers.utils import logging as transformers_logging

    with write_folder(path) as folder:
        residual_dtype = getattr(model.config, "residual_dtype", None)
        if residual_dtype is not None:
            model.config.residual_dtype = None
        ends, model.generation_config.eos_token_id = model.generation_config.eos_token_id, ends_of(model, tokenizer)
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            model.save_pretrained(folder, state_dict=weights)
        finally:
            model.generation_config.eos_token_id = ends
            if residual_dtype is not None:
                model.config.residual_dtype = residual_dtype
            if bars:
                transformers_logging.enable_progress_bar()
        save_tokenizer(tokenizer, model.config, folder)
        yield folder
        write_json(folder / "manifest.json", _manifest(folder))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, folder: Path) -> None:
    """Write a tokenizer whose `model_max_length` is the number of positions of the model that it is saved with."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    before = tokenizer.model_max_length
    try:
        if positions is not None:
            tokenizer.model_max_length = positions
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.model_max_length = before


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | list[int] | None:
    """The ids that end a generation: the model's own, the text's and, if there are turns, the turn's."""
    known: int | list[int] | None = model.generation_config.eos_token_id
    turn = tokenizer.get_added_vocab().get(END_OF_TURN)
    if turn is None:
        return known
    first = known if isinstance(known, list) else [known]
    return [end for end in dict.fromkeys([*first, tokenizer.eos_token_id, turn]) if end is not None]


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    return {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in files}


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint so that a kill midway leaves nothing that looks whole."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words, or None."""
    try:
        manifest = read_json(path / "manifest.json")
    except UserError as error:
        return str(error)
    entries = manifest.items() if isinstance(manifest, dict) else [("", None)]
    for name, entry in entries:
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= set(entry):
            return f"{path / 'manifest.json'} is damaged"
        file = path / name
        if not file.exists():
            return f"{file} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{file} has {file.stat().st_size} bytes instead of {entry['bytes']}"
        if sha256_of(file) != entry["sha256"]:
            return f"{file} is damaged (its hash is not the manifest's)"
    return None


def whole_checkpoints(run: RunFolder, tell: Callable[[str], None] = print) -> Iterator[Path]:
    """The checkpoints without damage, newest first; damaged ones are named and passed over."""
    for path in reversed(run.checkpoints()):
        damage = damage_of(path)
        if damage is None:
            yield path
        else:
            tell(f"passing over a checkpoint: {damage}")


def latest_whole(run: RunFolder, tell: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint without damage; damaged ones are named and passed over."""
    return next(whole_checkpoints(run, tell), None)


def checked(checkpoint: Path) -> Path:
    """The checkpoint that a path names, unless it is damaged. Only a folder outside a run may lack a manifest.

    Raises:
        UserError: what is wrong with it.
    """
    inside = checkpoint.parent.name == "checkpoints" and (checkpoint.parent.parent / "recipe.yaml").exists()
    if (inside or (checkpoint / "manifest.json").exists()) and (damage := damage_of(checkpoint)):
        raise UserError(f"the checkpoint is damaged: {damage}")
    return checkpoint


def named_best(run: RunFolder) -> Path | None:
    """The checkpoint that best.json of a fine-tuning names; None without one. It is not checked."""
    file = run.path / "best.json"
    if not file.exists() or run.recipe.get("stage") != "sft":
        return None
    name = read_json(file).get("checkpoint")
    return run.path / name if name else None


def chosen_checkpoint(run: RunFolder, tell: Callable[[str], None] = print) -> Path | None:
    """The checkpoint that represents a run: a fine-tuning's chosen one, else the newest without damage.

    Raises:
        UserError: the chosen one is missing or damaged; another would not be the model that was chosen.
    """
    best = named_best(run)
    return checked(best) if best is not None else latest_whole(run, tell)
