"""The model that an adapter belongs to, found again after the run folder that holds both was moved.

PEFT's adapter_config.json names its base by an absolute path, as it must: PEFT would look for a relative one from the
working folder. So base.json next to it names the same folder relative to the adapter, and the hash of its weights.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from modeling_periln import refresh, sources
from modeling_periln.conversions import ConversionRefused
from modeling_periln.proof import ConversionFailed
from periln.runkit.errors import UserError
from periln.runkit.folder import weights_hash, write_json


@contextmanager
def _in_our_words() -> Iterator[None]:
    try:
        yield
    except (ConversionRefused, ConversionFailed) as error:
        raise UserError(str(error)) from error


def is_adapter(checkpoint: Path) -> bool:
    """Whether a checkpoint is an adapter. Raises UserError where it holds a model as well."""
    with _in_our_words():
        return sources.is_adapter(checkpoint)


def write_base(folder: Path, checkpoint: Path, base: Path) -> None:
    """Write base.json into `folder`, for an adapter that will be at `checkpoint`."""
    path = Path(os.path.relpath(base.resolve(), checkpoint.resolve())).as_posix()
    write_json(folder / sources.BASE_RECORD, {"path": path, "weights_sha256": weights_hash(base)})


def base_of(checkpoint: Path) -> Path:
    """The folder of the model that an adapter was trained on: that of base.json, else that of adapter_config.json.

    Raises:
        UserError: neither exists, or it has other weights.
    """
    with _in_our_words():
        return sources.base_of(checkpoint)


def name_base_again(checkpoint: Path) -> bool:
    """Have an adapter that was moved together with its base name it by its present path; returns whether it named
    another.

    Raises:
        UserError: see `base_of`.
    """
    with _in_our_words():
        return bool(refresh.refresh_base(checkpoint))


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence Transformers' warning about `is_gradient_checkpointing`, which PEFT asks a model for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.* is deprecated", FutureWarning)
        yield


def load_float32(checkpoint: Path) -> torch.nn.Module:
    """A checkpoint in FP32; an adapter on its base.

    Raises:
        UserError: see `base_of`.
    """
    place = base_of(checkpoint) if is_adapter(checkpoint) else checkpoint
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, use_safetensors=True)
    if not is_adapter(checkpoint):
        return model
    with quiet_peft():
        return PeftModel.from_pretrained(model, checkpoint)
