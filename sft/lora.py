"""LoRA through PEFT: adapters for a model, and merged back into one that needs no PEFT."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from runkit.checkpoints import damage_of, write_checkpoint
from runkit.errors import UsageError, UserError

from .base import is_adapter, load_float32
from .conversations import END_OF_TURN
from .recipe import Lora

PROBE = (2, 16)  # rows and tokens of the batch on which a merged model is compared
TOLERANCE = 1e-5  # of the largest logit, or of 1


def add_adapters(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """The model with adapters that alone are trained; what they start from follows from the seed.

    Raises:
        UsageError: no module has one of the names of `target_modules`.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"peft.target_modules: {' '.join(str(error).split())[:300]}") from error


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
        UserError: no adapter, one whose base model is gone, or a merged model that computes something else; names the
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
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)}
    merged.generation_config.eos_token_id = sorted(ends)
    with write_checkpoint(out, merged, tokenizer):
        pass
    damage = damage_of(out)
    if damage is not None:
        raise UserError(f"the merged model was not written: {damage}")
    return difference, largest
