"""The model that an adapter belongs to, found again when the run folder that holds both has been moved.

PEFT's adapter_config.json names its base by an absolute path, as it must: PEFT would look for a relative one from the
working folder. So base.json beside it names the same folder relative to the adapter, and the hash of its weights.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import modeling_periln  # noqa: F401 (registers PeriLlama with the auto classes)
from periln.runkit.errors import UserError
from periln.runkit.folder import read_json, weights_hash, write_json

FILE = "base.json"


def is_adapter(checkpoint: Path) -> bool:
    return (checkpoint / "adapter_config.json").exists()


def write_base(folder: Path, checkpoint: Path, base: Path) -> None:
    """Write base.json into `folder`, for an adapter that will stand at `checkpoint`."""
    path = Path(os.path.relpath(base.resolve(), checkpoint.resolve())).as_posix()
    write_json(folder / FILE, {"path": path, "weights_sha256": weights_hash(base)})


def base_of(checkpoint: Path) -> Path:
    """The folder of the model that an adapter was trained on: that of base.json, else that of adapter_config.json.

    Raises:
        UserError: neither is there, or what is there has other weights.
    """
    named = Path(read_json(checkpoint / "adapter_config.json").get("base_model_name_or_path") or "")
    places, expected = [named], None
    if (checkpoint / FILE).exists():
        record = read_json(checkpoint / FILE)
        places.insert(0, checkpoint.resolve() / record["path"])
        expected = record["weights_sha256"]
    there = [place.resolve() for place in places if (place / "config.json").exists()]
    if not there:
        raise UserError(f"the base model of {checkpoint} is missing: {places[0].resolve()}")
    for place in there:
        if expected in (None, weights_hash(place)):
            return place
    raise UserError(f"the base model of {checkpoint} has other weights than it was trained on: {there[0]}")


@contextmanager
def quiet_peft() -> Iterator[None]:
    """PEFT asks a model for `is_gradient_checkpointing`, of which Transformers warns whoever runs it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.* is deprecated", FutureWarning)
        yield


def load_float32(checkpoint: Path) -> torch.nn.Module:
    """A checkpoint in FP32; an adapter with its base around it.

    Raises:
        UserError: see `base_of`.
    """
    place = base_of(checkpoint) if is_adapter(checkpoint) else checkpoint
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, use_safetensors=True)
    if not is_adapter(checkpoint):
        return model
    with quiet_peft():
        return PeftModel.from_pretrained(model, checkpoint)
