"""Convert between PeriLlama and the architectures that serving engines know (`architectures.py`).

    python -m modeling_periln.convert SRC DST --to llama|olmo2|hyperclovax|glm4|...|peri_llama
    python -m modeling_periln.convert --refresh-code CHECKPOINT...      # see refresh.py

In memory: `to_native(model, "llama")`, `from_native(model)`. What converts, and what is folded where, is in
`conversions.py`; `admissible_exports(config)` says it for one configuration. On disk the weights pass through one
shard at a time, DST appears only when it is complete, and only if its logits are the source's. SRC may also be a run
folder (its newest complete checkpoint) or a PEFT adapter (merged into its base first): `sources.py`.
"""

import argparse
import contextlib
import copy
import json
import os
import re
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from .admission import export_remarks
from .configuration_periln import PeriLlamaConfig
from .conversions import (
    ARCHITECTURES,
    PERI_LLAMA,
    ConversionRefused,
    Recipe,
    admissible_exports,
    architecture,
    export_recipe,
    import_factors,
    import_recipe,
    native_config,
    periln_config,
)
from .convert_options import NO_TEXT, WIKITEXT, parse
from .modeling_periln import PeriLlamaForCausalLM
from .pipes import until_unread
from .proof import TOLERANCE, ConversionFailed, compare, in_words, model_class
from .refresh import refresh
from .sources import (
    ADAPTER_CONFIG,
    COMPANIONS,
    base_of,
    check_whole,
    checkpoint_of,
    copy_companions,
    is_adapter,
    merge,
    read_json,
)
from .version import __version__

# In memory


def to_native(model: PreTrainedModel, target: str) -> PreTrainedModel:
    """A new model of Transformers' own class, the same function as `model` (a PeriLlamaForCausalLM).

    It has the model's device, dtype, mode and attention implementation, and shares no memory with it. Folded weights
    (see `conversions.py`) are computed in FP32 at least and then rounded to the model's dtype, so only in FP32 are
    the logits equal to 1e-5.

    Args:
        target: a key of `ARCHITECTURES`, such as `llama`, `olmo2` or `gemma3_text`.

    Raises:
        ConversionRefused: (a ValueError) the model or its configuration does not admit it; which field, and why.
    """
    architecture(target)
    _require_class(model, PeriLlamaForCausalLM, f"to_native(..., {target!r})")
    return _built(model, native_config(model.config, target), export_recipe(model.config, target))


def from_native(model: PreTrainedModel) -> PeriLlamaForCausalLM:
    """A new PeriLlamaForCausalLM, the same function as `model`, which is of one of `ARCHITECTURES`.

    `architectures.py` says which row each becomes. HyperCLOVA X's residual multiplier becomes `residual_scale`, its
    others are folded into weights. Device, dtype and the rest as in `to_native`.

    Raises:
        ConversionRefused: (a ValueError) no row is this architecture, or a field has a value that no row has.
    """
    config = periln_config(model.config)
    _require_class(model, ARCHITECTURES[model.config.model_type].model_class, "from_native")
    return _built(model, config, import_recipe(model.config))


def _require_class(model: PreTrainedModel, wanted: type, caller: str) -> None:
    # By name: a class loaded from a repository's own code is not the same object as ours.
    if wanted.__name__ not in (c.__name__ for c in type(model).__mro__):
        raise ConversionRefused(f"{caller} needs a {wanted.__name__}, not a {type(model).__name__}")


@torch.no_grad()
def _built(source: PreTrainedModel, config: PreTrainedConfig, recipe: Mapping[str, Recipe]) -> PreTrainedModel:
    """A model of `config` with the weights that `recipe` makes of those of `source`."""
    have, weights = source.state_dict(), {}
    _check_names(have, recipe, source.config.tie_word_embeddings)
    for name, (sources, make) in recipe.items():
        tensor = make(*(have[s] for s in sources)).to(source.dtype)
        if tensor.is_meta:
            raise ConversionRefused(f"{sources[0]} is on the meta device: load the model without offloading")
        weights[name] = tensor.clone(memory_format=torch.contiguous_format)
    config._attn_implementation = source.config._attn_implementation
    with torch.device("meta"):  # no time and no random numbers for weights that are there already
        model = model_class(config)(config)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    _scale_table(model, config)
    model.generation_config = copy.deepcopy(source.generation_config)
    return model.to(source.device).train(source.training)


def _scale_table(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """The number that a table's rows are multiplied by, where it is a buffer that no state dict holds."""
    table, kind, size = model.model.embed_tokens, config.model_type, config.hidden_size
    for name, _ in list(table.named_buffers(recurse=False)):
        factor = config.embedding_multiplier if kind == PERI_LLAMA else architecture(kind).table_factor(size, 1.0)
        table.register_buffer(name, torch.tensor(float(factor)), persistent=False)


def _check_names(have: Mapping[str, Any], recipe: Mapping[str, Recipe], tied: bool) -> None:
    """Every weight is present and used: nothing of the source is lost silently."""
    wanted = {source for sources, _ in recipe.values() for source in sources}
    known = {name for name in have if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")}
    missing, unused = wanted - set(have), set(have) - wanted - known
    if missing:
        raise ConversionFailed(f"{len(missing)} weights are missing, the first is {min(missing)}")
    if unused:
        raise ConversionFailed(f"{len(unused)} weights have no place in the model, the first is {min(unused)}")


# On disk


def convert(
    src: Path | str,
    dst: Path | str,
    to: str,
    max_shard_size: int | str = "5GB",
    revision: str | None = None,
    text: Path | str | None = None,
) -> dict[str, Any]:
    """Convert the model `src` to the new model folder `dst`, and prove that it is the same function.

    Weights keep their dtype, except that a folded one that its dtype cannot hold is written in FP32. In memory there
    is never more than one shard of the export, until it is checked: then the source and the export are loaded one
    after the other in FP32 and compared on random tokens and on text (`proof.py`).

    Args:
        src: a folder with `config.json` and safetensors, sharded or not; a run folder, whose newest complete checkpoint
            is taken; an adapter's folder, which is merged into its base in FP32; or a Hub id, at `revision`.
        dst: a folder that does not exist, or is empty; it appears when everything is done.
        to: a key of `ARCHITECTURES`, or `peri_llama`.
        max_shard_size: bytes, or such as `500MB`, `5GB` (powers of 1000).
        text: a file, `wikitext`, or `none`; None: WikiText if available, else the record says why not.

    Returns:
        The record that `dst/conversion.json` holds.

    Raises:
        ConversionRefused: (a ValueError) what cannot be converted, and why; or `src`, `dst` or `text` is not as above.
        ConversionFailed: weights are missing or damaged, or the export's logits differ by over 1e-5 of the largest.
    """
    dst, limit = Path(os.path.realpath(dst)), _bytes(max_shard_size)
    given = _fetched(str(src), revision)
    src = checkpoint_of(given)
    check_whole(src)
    base = base_of(src, lambda name: _fetched(name, None)) if is_adapter(src) else None
    if base is not None:
        check_whole(base)
    config = _read_config(base or src, to)
    notes = [f"{src.name} is the newest complete checkpoint of the run"] if src != given else []
    notes += [f"the adapter is merged into its base, {base.name}, in FP32"] if base is not None else []
    if text not in (None, WIKITEXT, NO_TEXT) and not Path(text).is_file():
        raise ConversionRefused(f"--text {text} is not a file; give one, or {WIKITEXT}, or {NO_TEXT}")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ConversionRefused(f"{dst} exists and is not an empty folder: nothing is overwritten")
    target = periln_config(config) if to == PERI_LLAMA else native_config(config, to)
    recipe = import_recipe(config) if to == PERI_LLAMA else export_recipe(config, to)
    dst.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as temporary:
        folder = temporary.enter_context(_temporary_sibling(dst))
        if base is not None:
            adapter, src = src, temporary.enter_context(_temporary_sibling(dst, "merged"))
            merge(adapter, base, src)
            target.dtype = torch.float32
        with contextlib.ExitStack() as stack:
            files = _open_weights(src, stack)
            _check_names(files, recipe, tied=config.tie_word_embeddings)
            _write_weights(files, recipe, folder, limit)
        target.save_pretrained(folder)
        for file in folder.glob("*.safetensors"):  # safetensors makes them unreadable for others
            file.chmod((folder / "config.json").stat().st_mode)
        if to == PERI_LLAMA:
            custom_object_save(PeriLlamaForCausalLM, folder)
        copy_companions(src, folder, config)
        record = {
            "from": config.model_type,
            "to": to,
            "remarks": [*notes, *remarks(config, to)],
            **compare(src, folder, config, target, text),
            "versions": {m.__name__: m.__version__ for m in (transformers, torch)} | {"modeling_periln": __version__},
        }
        (folder / "conversion.json").write_text(json.dumps(record, indent=2) + "\n")
        os.replace(folder, dst)
    return record


def _fetched(src: str, revision: str | None) -> Path:
    """The model's folder; for a Hub id, the files that a conversion reads are downloaded."""
    if Path(src).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", src):
        return Path(src)
    wanted = ["config.json", ADAPTER_CONFIG, "*.safetensors", "model.safetensors.index.json", *COMPANIONS]
    wanted += ["additional_chat_templates/*"]
    try:
        return Path(snapshot_download(src, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        at = f" at revision {revision}" if revision else ""
        reason = (str(error).splitlines() or [""])[0]
        raise ConversionRefused(f"{src}{at} is not a folder here, and was not found on the Hub: {reason}") from error


def _read_config(src: Path, to: str) -> PreTrainedConfig:
    if not (src / "config.json").is_file():
        raise ConversionRefused(f"{src} is not a model folder: it has no config.json")
    kind = read_json(src / "config.json").get("model_type")
    if to != PERI_LLAMA and architecture(to) and kind != PERI_LLAMA:
        raise ConversionRefused(f"{src} is {kind!r}: only {PERI_LLAMA} converts to {to}, so convert it to that first")
    if to == PERI_LLAMA and kind not in ARCHITECTURES:
        raise ConversionRefused(f"{src} is {kind!r}: only {list(ARCHITECTURES)} convert to {PERI_LLAMA}")
    config_class: Any = PeriLlamaConfig if kind == PERI_LLAMA else ARCHITECTURES[str(kind)].config_class
    return config_class.from_pretrained(src)


def remarks(config: PreTrainedConfig, to: str) -> list[str]:
    """What the conversion folds, and what the other configuration has no field for."""
    if config.model_type != PERI_LLAMA:
        return [f"a factor of {factor:g} is folded into {name}" for name, factor in import_factors(config).items()]
    return export_remarks(config, to)


def _open_weights(folder: Path, stack: contextlib.ExitStack) -> dict[str, safe_open]:
    """The opened file of each tensor of a model folder; `get_tensor` reads one."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file() and not single.is_file():
        raise ConversionRefused(f"{folder} has no model.safetensors and no {index.name}")
    names = set(read_json(index).get("weight_map", {}).values()) if index.is_file() else {single.name}
    opened: dict[str, safe_open] = {}
    for path in (folder / name for name in sorted(names)):
        if not path.is_file():
            raise ConversionFailed(f"{path} is missing, though the index names it")
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except Exception as error:  # safetensors' own kind, which is not an OSError
            raise ConversionFailed(f"{path} is damaged: {error}") from error
        opened |= dict.fromkeys(file.keys(), file)
    return opened


@torch.no_grad()
def _write_weights(files: Mapping[str, safe_open], recipe: Mapping[str, Recipe], folder: Path, limit: int) -> None:
    """Write the tensors that `recipe` makes as safetensors of at most `limit` bytes each, with an index if several."""
    parameters, shards = 0, list[dict[str, int]]()
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        save_file(shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in shard.items()})
        shard.clear()

    for name, (sources, make) in recipe.items():
        inputs = [files[source].get_tensor(source) for source in sources]
        tensor = _narrowed(make(*inputs), inputs[0].dtype).clone(memory_format=torch.contiguous_format)
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > limit:
            flush()
        shard[name] = tensor
        parameters += tensor.numel()
        del inputs, tensor
    flush()
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        (folder / f"shard-{i}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = {"total_parameters": parameters, "total_size": sum(sum(names.values()) for names in shards)}
        index = json.dumps({"metadata": total, "weight_map": weight_map}, indent=2, sort_keys=True)
        (folder / "model.safetensors.index.json").write_text(index + "\n")


def _narrowed(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in `dtype` if that holds every value, else as it is."""
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


@contextlib.contextmanager
def _temporary_sibling(dst: Path, kind: str = "partial") -> Iterator[Path]:
    """A new folder next to `dst` that is removed afterwards, unless it was moved."""
    folder = dst.with_name(f".{dst.name}.{os.getpid()}.{kind}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _bytes(size: int | str) -> int:
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]B)?\s*", str(size).upper())
    if not match or not float(match[1]):
        raise ConversionRefused(f"max_shard_size={size!r} is not a size: write bytes, or such as 500MB or 5GB")
    return int(float(match[1]) * units[match[2] or ""])


# The command line


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0; 1 if the conversion failed; 2 if it was refused. SIGTERM exits with 143."""
    return until_unread(lambda: run(parse(argv)))


def run(args: argparse.Namespace) -> int:
    """Do what the arguments ask, and print the outcome or one sentence on what went wrong. See `main`."""
    if args.refresh_code:
        return _refresh(args)
    transformers.utils.logging.disable_progress_bar()
    # SIGTERM unwinds the stack, as SIGINT does, so that the unfinished folder is removed.
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) if in_main_thread else None
    try:
        record = convert(args.src, args.dst, args.to, args.max_shard_size, args.revision, args.text)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    except Exception as error:
        return _failed(error, args.debug)
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)
    for remark in record["remarks"]:
        print(remark)
    for line in in_words(record):
        print(line)
    print(f"{args.dst}: {record['from']} -> {record['to']}, largest logit {record['largest_logit']:.6g},", end=" ")
    print(f"largest difference {record['largest_difference']:.3g} (allowed {TOLERANCE:g} of the largest logit)")
    return 0


def _refresh(args: argparse.Namespace) -> int:
    for folder in args.refresh_code:
        try:
            print(f"{folder}: {refresh(folder)}")
        except Exception as error:
            return _failed(error, args.debug)
    return 0


def _failed(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    known = isinstance(error, (ConversionRefused, ConversionFailed))
    message = (str(error).splitlines() or [""])[0]
    print(f"error: {message if known else f'{type(error).__name__}: {message}'}", file=sys.stderr)
    return 2 if isinstance(error, ConversionRefused) else 1


__all__ = [
    "ConversionFailed",
    "ConversionRefused",
    "admissible_exports",
    "convert",
    "from_native",
    "main",
    "run",
    "to_native",
]

if __name__ == "__main__":
    sys.exit(main())
