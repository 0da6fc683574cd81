"""What a conversion starts from: a model folder, a run's newest checkpoint, or an adapter merged into its base."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from .conversions import ConversionRefused
from .proof import TOLERANCE, ConversionFailed

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE_RECORD = "base.json"  # next to an adapter of our fine-tuning: the base's path from there, and its weights' hash
COMPANIONS = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json", "merges.txt",
    "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
_CHECKED = (
    ".safetensors",
    "config.json",
    ".safetensors.index.json",
)  # of the files in a manifest, those that a conversion reads
_PROBE = (2, 16)  # rows and tokens on which a merged model is compared with its adapter


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        ConversionFailed: it does not; names the path.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionFailed(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ConversionFailed(f"{path} is damaged: it holds no mapping")
    return found


def checkpoint_of(src: Path) -> Path:
    """A run folder's newest complete checkpoint; any other folder unchanged.

    Raises:
        ConversionRefused: a run that has diverged, or has no complete checkpoint; names it.
    """
    if not (src / "recipe.yaml").is_file():
        return src
    summary = src / "summary.json"
    if summary.is_file() and read_json(summary).get("status") == "diverged":
        raise ConversionRefused(f"{src} has diverged: name one of its checkpoints, if that is what you want")
    steps = [path for path in (src / "checkpoints").glob("step_*") if path.name.removeprefix("step_").isdigit()]
    complete = [path for path in sorted(steps) if (path / "manifest.json").is_file()]
    if not complete:
        raise ConversionRefused(f"{src} is a run folder without a complete checkpoint")
    return complete[-1]


def check_whole(folder: Path) -> None:
    """Compare weights and configuration with the manifest that a checkpoint of a run has; other folders have none.

    Raises:
        ConversionFailed: a file is missing or differs; names it.
    """
    if not (folder / "manifest.json").is_file():
        return
    for name, entry in read_json(folder / "manifest.json").items():
        if "/" in name or not name.endswith(_CHECKED):
            continue
        file = folder / name
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= set(entry):
            raise ConversionFailed(f"{folder / 'manifest.json'} is damaged")
        if not file.is_file():
            raise ConversionFailed(f"{file} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise ConversionFailed(f"{file} is damaged: it has {file.stat().st_size} bytes instead of {entry['bytes']}")
        with open(file, "rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != entry["sha256"]:
                raise ConversionFailed(f"{file} is damaged: its hash is not the manifest's")


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter.

    Raises:
        ConversionRefused: it holds a model's weights as well; Transformers would load both.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    if any(folder.glob("model*.safetensors")):
        raise ConversionRefused(f"{folder} holds a model and an adapter ({ADAPTER_CONFIG}): move one of them away")
    return True


def base_of(adapter: Path, fetch: Callable[[str], Path] | None = None) -> Path:
    """The folder of an adapter's base model, which `base.json` finds where both have been moved together.

    `fetch` finds a base that is not a local folder on the Hub; it returns None if the base is missing.

    Raises:
        ConversionRefused: no base, a missing base, or one with other weights than base.json says; an adapter that is
            not a causal LM's, or not in safetensors.
    """
    config = read_json(adapter / ADAPTER_CONFIG)
    task, base = config.get("task_type"), config.get("base_model_name_or_path")
    if task not in (None, "CAUSAL_LM"):
        raise ConversionRefused(f"{adapter} is an adapter for task_type={task!r}: only CAUSAL_LM is converted")
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise ConversionRefused(f"{adapter} has no {ADAPTER_WEIGHTS}; pickled weights (.bin) are not read")
    if not isinstance(base, str) or not base:
        raise ConversionRefused(f"{adapter / ADAPTER_CONFIG} names no base model (base_model_name_or_path={base!r})")
    record = read_json(adapter / BASE_RECORD) if (adapter / BASE_RECORD).is_file() else {}
    places = [adapter / str(record["path"])] if "path" in record else []
    places.append(adapter / base)  # of an absolute path, that path
    found = [checkpoint_of(place) for place in places if place.is_dir()]
    if not found and fetch is not None:
        found = [checkpoint_of(fetch(base))]
    found = [place.resolve() for place in found if (place / "config.json").is_file()]
    if not found:
        raise ConversionRefused(f"the base model of {adapter} is missing: {base}")
    expected = record.get("weights_sha256")
    for place in found:
        if expected is None or _weights_hash(place) == expected:
            return place
    raise ConversionRefused(f"the base model of {adapter} has other weights than it was trained on: {found[0]}")


def _weights_hash(folder: Path) -> str:
    """SHA-256 over the safetensors files, in the order of their names, as fine-tuning records it."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as opened:
            while piece := opened.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


@torch.no_grad()
def merge(adapter: Path, base: Path, folder: Path) -> None:
    """Write the base with the adapter merged into its weights to `folder`, in FP32, and the files next to the weights.

    Raises:
        ConversionRefused: PEFT is not installed, or has no way to merge this kind of adapter.
        ConversionFailed: the adapter's weights are damaged, incomplete or another base's, or the merged model computes
            something else.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ConversionRefused(f"{adapter} is an adapter: merging it needs PEFT (pip install peft)") from error

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
    try:
        with warnings.catch_warnings(), safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
            warnings.simplefilter("ignore")  # about missing weights; they are refused here
            adapted = peft.PeftModel.from_pretrained(model, adapter).eval()
            have = set(file.keys())
            own = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    except Exception as error:  # a damaged file, another shape, another version's fields: each has its own kind
        text = " ".join(str(error).split())[:300]
        raise ConversionFailed(f"{adapter} cannot be loaded onto its base {base}: {text}") from error
    _check_adapter_names(adapter / ADAPTER_WEIGHTS, have, own, set(adapted.state_dict()))
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = adapted.active_peft_config.peft_type.value
        raise ConversionRefused(f"{adapter} is of the kind {kind}, which has no weights to merge into the base")
    ids = torch.randint(0, model.config.vocab_size, _PROBE, generator=torch.Generator().manual_seed(0))
    before = adapted(input_ids=ids).logits
    merged: PreTrainedModel = adapted.merge_and_unload()
    difference, largest = (merged(input_ids=ids).logits - before).abs().max().item(), before.abs().max().item()
    if not difference <= TOLERANCE * max(1.0, largest):
        raise ConversionFailed(f"{adapter}: merged in, it changes a logit by {difference:.1e}")
    merged.save_pretrained(folder)
    for source in (base, adapter):  # the adapter's files come last: its tokenizer may have a chat template
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)


def _check_adapter_names(file: Path, have: set[str], own: set[str], all_names: set[str]) -> None:
    """Every weight of the adapter is present and used: PEFT would take missing ones for untrained."""
    missing, unused = own - have, have - own - all_names
    if missing:
        raise ConversionFailed(f"{file}: {len(missing)} weights are missing, the first is {min(missing)}")
    if unused:
        raise ConversionFailed(f"{file}: {len(unused)} weights have no place in the base, the first is {min(unused)}")


def copy_companions(src: Path, folder: Path, config: PreTrainedConfig) -> None:
    """The tokenizer's files and the generation configuration; the latter is made where the source has none."""
    for file in filter(Path.is_file, (src / name for name in COMPANIONS)):
        shutil.copyfile(file, folder / file.name)
    about = folder / "tokenizer_config.json"
    if about.is_file():  # the source's may state another length than its model's
        record = json.loads(about.read_text(encoding="utf-8"))
        record["model_max_length"] = config.max_position_embeddings
        about.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if (src / "additional_chat_templates").is_dir():
        shutil.copytree(src / "additional_chat_templates", folder / "additional_chat_templates")
    if not (folder / "generation_config.json").is_file():
        tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**tokens).save_pretrained(folder)
