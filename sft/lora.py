"""LoRA through PEFT: adapters for a model, and merging them into one that needs no PEFT."""

import dataclasses
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import TrainableTokensWrapper
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from periln.runkit.checkpoints import damage_of, write_checkpoint
from periln.runkit.control_tokens import ROLES
from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import read_json
from periln.sft.base import is_adapter, load_float32, quiet_peft
from periln.sft.recipe import Lora
from periln.sft.tokens import stop_at_turns, turn_end

PROBE = (2, 16)  # rows and tokens of the batch on which a merged model is compared
TOLERANCE = 1e-5  # of the largest logit, or of 1


def resolved(lora: Lora, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, knows_turns: bool) -> Lora:
    """The section `peft` for a model of this configuration: names are checked, `auto` is replaced by rows.

    `knows_turns`: whether the model has been trained on conversations before. Otherwise it must learn what the
    turn tokens mean, and to end a turn: no adapter of an attention matrix can raise the logit of an untrained row.

    Raises:
        UsageError: a name that no module has, an id that is not a row, or a matrix that embedding and head share.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embedding, head = (_name_of(model, m) for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    tied = model.config.get_text_config().tie_word_embeddings
    names = {name for name, _ in model.named_modules()}
    rows = lora.trainable_token_indices
    if rows == "auto":
        # A matrix with an adapter, or trained whole, learns these rows itself.
        others = [*(lora.target_modules or []), *(lora.modules_to_save or [])]
        ids = tokenizer.convert_tokens_to_ids(list(ROLES))
        free = [name for name in ([embedding] if tied else [embedding, head]) if name not in others]
        rows = None if knows_turns else dict.fromkeys(free, ids) or None
    elif isinstance(rows, list):
        rows = {embedding: rows}
    whole = {"modules_to_save": lora.modules_to_save, "trainable_token_indices": rows}
    for field, given in whole.items():
        for name in given or []:
            if name == head and field != "modules_to_save" and model.get_output_embeddings().bias is not None:
                raise UsageError(f"peft.{field}: PEFT would leave out the bias of {head}; use modules_to_save")
            if not any(known == name or known.endswith(f".{name}") for known in names):
                raise UsageError(f"peft.{field}: the model has no module {name!r}")
    for field, given in {"target_modules": lora.target_modules, **whole}.items():
        shared = [name for name in given or [] if name in (embedding, head)]
        if tied and shared and shared != [embedding] * (field == "trainable_token_indices"):
            raise UsageError(
                f"peft.{field}: {shared[-1]} is one matrix with {embedding if shared[-1] == head else head} in this "
                f"model (tie_word_embeddings): train rows of it, with trainable_token_indices of {embedding}"
            )
    size = model.get_input_embeddings().weight.shape[0]
    for name, ids in (rows or {}).items():
        if max(ids) >= size:
            raise UsageError(f"peft.trainable_token_indices: {name} has {size} rows, not one of the number {max(ids)}")
    return dataclasses.replace(lora, trainable_token_indices=rows)


def _name_of(model: PreTrainedModel, module: torch.nn.Module) -> str:
    """The last part of a module's name, as PEFT's fields take it."""
    return next(name for name, other in model.named_modules() if other is module).rpartition(".")[2]


def stops_at_turns(checkpoint: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether generation from this checkpoint, and so from an adapter on it, ends where a turn ends."""
    file = checkpoint / "generation_config.json"
    ends = read_json(file).get("eos_token_id") if file.exists() else None
    return turn_end(tokenizer) in (ends if isinstance(ends, list) else [ends])


def add_adapters(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """The model with adapters, which alone are trained; their initial values follow from the seed.

    Raises:
        UsageError: no module has one of the names of `target_modules`.
    """
    torch.manual_seed(seed)
    rows = lora.trainable_token_indices
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
        trainable_token_indices=None if rows == "auto" else rows,  # `resolved` says what auto is for a checkpoint
    )
    try:
        with quiet_peft():
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"peft.target_modules: {' '.join(str(error).split())[:300]}") from error
    head = adapted.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        head.bias = None  # TRL asks for it, and PEFT's wrapper has only the weight
    return adapted


def check_adapters(config: PreTrainedConfig, lora: Lora) -> None:
    """Raise what `add_adapters` would, for a model of this configuration, without its weights."""
    with torch.device("meta"):
        add_adapters(AutoModelForCausalLM.from_config(config), lora, seed=0)


@torch.no_grad()
def merge(checkpoint: Path, out: Path) -> tuple[float, float]:
    """Write the model of an adapter checkpoint with the adapter merged in, to the folder `out`.

    Returns:
        the largest difference of a logit before and after, and the largest logit, on random tokens.

    Raises:
        UserError: no adapter, one whose base model is missing, or a merged model that computes something else; names
        the
            path.
    """
    if not is_adapter(checkpoint):
        raise UsageError(f"{checkpoint} holds no adapter (adapter_config.json): there is nothing to merge")
    model = load_float32(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, PROBE, generator=generator)
    before = model(input_ids=ids).logits
    merged = model.merge_and_unload()
    difference, largest = (merged(input_ids=ids).logits - before).abs().max().item(), before.abs().max().item()
    if not difference <= TOLERANCE * max(1.0, largest):
        raise UserError(f"{checkpoint}: merged in, it changes a logit by {difference:.1e}; {out} is not written")
    stop_at_turns(merged, tokenizer)
    with write_checkpoint(out, merged, tokenizer):
        pass
    damage = damage_of(out)
    if damage is not None:
        raise UserError(f"the merged model was not written: {damage}")
    return difference, largest
