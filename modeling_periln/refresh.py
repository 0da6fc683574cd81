"""Bring a checkpoint up to date: `periln-convert --refresh-code CHECKPOINT`.

A checkpoint's own code is as old as the checkpoint, and runs wherever `trust_remote_code=True` loads it: it is replaced
by the installed package's. An adapter names its base by an absolute path, which leads nowhere when both have been
moved: it is replaced by the present one. Weights, tokenizer and every other field stay as they are, to the byte.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import custom_object_save

from .configuration_periln import AUTO_MAP, PeriLlamaConfig
from .conversions import PERI_LLAMA, ConversionRefused
from .modeling_periln import PeriLlamaForCausalLM
from .sources import ADAPTER_CONFIG, BASE_RECORD, base_of, is_adapter

CONFIG, MANIFEST = "config.json", "manifest.json"


def refresh(folder: Path) -> str:
    """Do what a model or an adapter needs, and say what was done. Raises as `refresh_code`, `refresh_base`."""
    if is_adapter(folder):
        changed, known = refresh_base(folder), "it names its base by the right path already"
    else:
        changed, known = refresh_code(folder), "the code is this version already"
    return f"{', '.join(changed)} replaced" if changed else known


def refresh_base(adapter: Path) -> list[str]:
    """Have an adapter name its base by the path at which it is found now, in adapter_config.json and manifest.json.

    PEFT's own classes look nowhere else for the base (they resolve a relative path from the working folder).

    Returns:
        The names of the files that changed; empty if the base is where it says, or is one of the Hub.

    Raises:
        ConversionRefused: no base next to it, or one with other weights. ConversionFailed: a damaged file.
    """
    config, manifest = _read_json(adapter / ADAPTER_CONFIG), _read_manifest(adapter)
    named = Path(str(config.get("base_model_name_or_path") or ""))
    beside = _read_json(adapter / BASE_RECORD).get("path") if (adapter / BASE_RECORD).is_file() else None
    places = [adapter / str(place) for place in (beside, named) if place is not None]
    there = [place.resolve() for place in places if place.is_dir()]
    if (beside is None and not there) or (named.is_absolute() and there[:1] == [named.resolve()]):
        return []
    base = base_of(adapter)
    with tempfile.TemporaryDirectory(dir=adapter.parent, prefix=f".{adapter.name}.base.") as folder:
        changed = [Path(folder) / ADAPTER_CONFIG]
        _write_json(changed[0], config | {"base_model_name_or_path": str(base)})
        if manifest is not None:  # first: after a kill between the two, the same command writes the same bytes
            changed.insert(0, Path(folder) / MANIFEST)
            _write_json(changed[0], manifest | {ADAPTER_CONFIG: _entry(changed[1])})
        for file in changed:
            shutil.copymode(adapter / file.name, file)
            os.replace(file, adapter / file.name)
    return sorted(file.name for file in changed)


def refresh_code(folder: Path | str) -> list[str]:
    """Bring the `.py` files and the `auto_map` of a checkpoint folder to what this package saves.

    All new files are written next to the folder first and then replace the old ones, each in one step; a checkpoint's
    `manifest.json` (sizes and hashes) follows last. The same command completes what a kill interrupted. A file that
    is a hard link or a symbolic link is replaced, not written through.

    Returns:
        The names of the files that changed; empty if the code was this package's already.

    Raises:
        ConversionRefused: (a ValueError) the folder is not a PeriLlama checkpoint, or this package cannot read it.
    """
    folder = Path(os.path.realpath(folder))
    config, manifest = _read_config(folder), _read_manifest(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.code.") as beside:
        new = Path(beside)
        custom_object_save(PeriLlamaForCausalLM, new)
        if config.get("auto_map") != AUTO_MAP:
            _write_json(new / CONFIG, config | {"auto_map": AUTO_MAP})
        changed = [file for file in sorted(new.iterdir()) if not _is_same(file, folder / file.name)]
        changed.sort(key=lambda file: file.name == CONFIG)  # auto_map follows the code that it names
        entries = {file.name: _entry(file) for file in sorted(new.iterdir()) if file.name != CONFIG or file in changed}
        if manifest is not None and any(manifest.get(name) != entry for name, entry in entries.items()):
            _write_json(new / MANIFEST, dict(sorted((manifest | entries).items())))
            changed.append(new / MANIFEST)
        for file in changed:
            there = folder / file.name
            shutil.copymode(there if there.exists() else folder / CONFIG, file)
            os.replace(file, there)
    return [file.name for file in changed]


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration as it is written, once it is known that this package can read it."""
    if not (folder / CONFIG).is_file():
        raise ConversionRefused(f"{folder} is not a model folder: it has no {CONFIG}")
    config = _read_json(folder / CONFIG)
    if config.get("model_type") != PERI_LLAMA:
        raise ConversionRefused(f"{folder} is {config.get('model_type')!r}: only the code of {PERI_LLAMA} is refreshed")
    try:
        PeriLlamaConfig.from_pretrained(folder)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConversionRefused(f"{folder / CONFIG} cannot be read by the installed package: {reason}") from error
    return config


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    return _read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionRefused(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionRefused(f"{file} holds a {type(content).__name__}, not an object")
    return content


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _entry(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _is_same(file: Path, other: Path) -> bool:
    return other.is_file() and other.read_bytes() == file.read_bytes()
