"""A retrofitted model on disk: as any checkpoint of the family, with what the source has beside its weights."""

import json
import shutil
from pathlib import Path

import torch
from transformers.dynamic_module_utils import custom_object_save

from modeling_periln import PeriLlamaForCausalLM
from modeling_periln.sources import COMPANIONS

RECORD = "retrofit.json"


def write_model(model: PeriLlamaForCausalLM, source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Weights in `dtype` where it holds them exactly, else in FP32; configuration, code, and the source's tokenizer."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    state = {name: _narrowed(tensor, dtype) for name, tensor in model.state_dict().items() if name not in tied}
    model.save_pretrained(folder, state_dict=state)
    custom_object_save(model, folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(config, indent=2) + "\n")
    for name in COMPANIONS:
        if (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", folder / "additional_chat_templates")


def _narrowed(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    narrow = tensor.to(dtype)
    return (narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor).clone()


def stored_dtype(config) -> torch.dtype:
    """The dtype that a configuration states; FP32 where it states none."""
    dtype = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
