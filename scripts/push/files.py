"""What of a checkpoint goes to the Hub: a fixed list of files, cleaned, and searched for what must stay here.

A file whose name is not on the list is never sent, whatever else is in the folder: the trainer's state, optimizers,
pickles, caches, editors' copies.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers.dynamic_module_utils import get_relative_import_files

from periln.model_cards.cards import CardOptions, render_card
from periln.model_cards.subject import Subject
from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import read_json
from periln.runkit.public import found_in, local_roots, path_in, public, secrets
from periln.runkit.recipes import dump_yaml, read_yaml

WEIGHTS = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
CONFIGS = ("config.json", "generation_config.json", "adapter_config.json")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "added_tokens.json")
TOKENIZER = (*VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
TEMPLATES = "additional_chat_templates"
CONVERSION = "conversion.json"  # of an export: what it was compared with, and the difference
RECORDS = ("recipe.yaml", "environment.json", "summary.json")
CARD = "README.md"
# Where a library notes its source: no reader needs it, and it is often a local path.
_ORIGINS = (
    "_name_or_path",
    "name_or_path",
    "tokenizer_file",
    "vocab_file",
    "added_tokens_file",
    "special_tokens_map_file",
)
_PRIVATE = ("host", "pid")


@dataclass(frozen=True)
class Upload:
    """One file: its path in the repository, and its content as bytes or as a file here that is sent as it is."""

    name: str
    content: bytes | Path

    @property
    def size(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)


def is_ours(name: str) -> bool:
    """Whether a file in a repository could be of an earlier push: one that is not sent again is then out of date."""
    folder, _, base = name.rpartition("/")
    if folder in ("eval", "eval/stability"):
        return base.endswith(".json")
    if folder == "figures":
        return base.endswith((".png", ".svg"))
    return not folder and (bool(WEIGHTS.fullmatch(base)) or base in (*CONFIGS, *TOKENIZER, CONVERSION, *RECORDS))


def files_of(subject: Subject, options: CardOptions) -> list[Upload]:
    """Everything that is sent of a checkpoint, in the order of the names; the weights last.

    Raises:
        UserError: the folder is not a complete model, or its adapter needs a model that is only here.
    """
    folder: Any = subject.checkpoint
    found = [*_weights(folder), *_configs(folder), *_code(folder), *_tokenizer(folder), *_records(subject)]
    figures = [Upload(f"figures/{p.name}", p) for p in subject.figures()]
    options = replace(options, figures=tuple(Path(f.name).name for f in figures))
    found += [*figures, Upload(CARD, public_lines(render_card(subject, options)).encode())]
    return sorted(found, key=lambda f: (bool(WEIGHTS.fullmatch(f.name)), f.name))


def public_lines(text: str) -> str:
    return "".join(public(line) if path_in(line) else line for line in text.splitlines(keepends=True))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _weights(folder: Path) -> list[Upload]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = {index.name, *read_json(index)["weight_map"].values()}
    else:
        names = {n for n in ("model.safetensors", "adapter_model.safetensors") if (folder / n).exists()}
    if not names:
        raise UsageError(f"{folder} has no weights (model.safetensors): nothing but safetensors is sent")
    for name in names:
        if not WEIGHTS.fullmatch(name) or not (folder / name).is_file():
            raise UserError(
                f"{index} names {name}, which is {'missing' if WEIGHTS.fullmatch(name) else 'no weights file'}"
            )
    return [Upload(name, folder / name) for name in sorted(names)]


def _configs(folder: Path) -> list[Upload]:
    found = []
    for name in (name for name in CONFIGS if (folder / name).exists()):
        config = {k: v for k, v in read_json(folder / name).items() if k not in _ORIGINS}
        if config.get("use_cache") is False:
            config["use_cache"] = True  # a trainer's switch, that would make every generation slow
        base = str(config.get("base_model_name_or_path") or "")
        if name == "adapter_config.json" and (Path(base).exists() or path_in(base) or base.startswith(("/", "."))):
            raise UsageError(f"{folder} is an adapter of a model on this machine: merge it, and push the merged model")
        found.append(Upload(name, _json(config)))
    return found


def _code(folder: Path) -> list[Upload]:
    """The modules that `auto_map` names, and their relative imports."""
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    names: set[str] = set()
    for reference in (config.get("auto_map") or {}).values():
        module = folder / f"{str(reference).rpartition('--')[2].split('.')[0]}.py"
        if not module.is_file():
            raise UserError(f"{folder / 'config.json'} names {module.name}, which is missing: save the model again")
        names |= {module.name, *(Path(f).name for f in get_relative_import_files(module))}
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise UserError(f"{folder} lacks the code {missing[0]}: save the model again")
    return [Upload(name, folder / name) for name in sorted(names)]


def _tokenizer(folder: Path) -> list[Upload]:
    found = []
    for name in (name for name in TOKENIZER if (folder / name).is_file()):
        if name == "tokenizer_config.json":
            config = {k: v for k, v in read_json(folder / name).items() if k not in _ORIGINS}
            if (positions := _positions(folder)) is not None:
                config["model_max_length"] = positions  # a checkpoint may be older than this rule
            found.append(Upload(name, _json(config)))
        else:
            found.append(Upload(name, folder / name))
    more = sorted((folder / TEMPLATES).glob("*.jinja"))
    return found + [Upload(f"{TEMPLATES}/{path.name}", path) for path in more]


def _positions(folder: Path) -> int | None:
    """How many positions the model of a folder has; None for an adapter, whose base says it."""
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    return config.get("max_position_embeddings")


def _records(subject: Subject) -> list[Upload]:
    """Recipe, environment, summary and evaluations without paths, hosts and process numbers."""
    found, root = [], subject.records
    if (subject.checkpoint / CONVERSION).exists():
        found.append(Upload(CONVERSION, _json(public(read_json(subject.checkpoint / CONVERSION)))))
    for name in RECORDS if subject.run is not None else ():
        if (root / name).exists():
            record = read_yaml(root / name) if name.endswith(".yaml") else read_json(root / name)
            record = public({k: v for k, v in record.items() if k not in _PRIVATE})
            found.append(Upload(name, dump_yaml(record).encode() if name.endswith(".yaml") else _json(record)))
    for file in sorted((root / "eval").glob("*.json")):
        if subject.is_about_this(record := read_json(file)):
            found.append(Upload(f"eval/{file.name}", _json(public(record))))
    steps = re.compile(r".*_(\d{8})")
    for file in sorted((root / "eval" / "stability").glob("*.json")):
        numbered = steps.fullmatch(file.stem)
        if numbered is None or subject.step is None or int(numbered[1]) == subject.step:
            found.append(Upload(f"eval/stability/{file.name}", _json(public(read_json(file)))))
    return found


def check_uploads(uploads: list[Upload], subject: Subject, token: str | None) -> None:
    """Search every byte for tokens and local paths, before any of them is sent.

    In what is generated or configured here, and in what safetensors calls metadata, any absolute path counts; in
    weights, vocabularies and code, which may hold anything that looks like one, the places where this run lies, the
    home and the working folder.

    Raises:
        UserError: names the file and what was found; a token is not repeated.
    """
    roots, tokens = local_roots(subject.checkpoint, subject.records), secrets(token)
    vocabulary_roots = [root for root in roots if not root.endswith("/")]
    for upload in tqdm(uploads, desc="checking", unit="file", leave=False, delay=1):
        found = found_in(upload.content, vocabulary_roots if upload.name in VOCABULARIES else roots, tokens)
        if found is None and (isinstance(upload.content, bytes) or upload.name.endswith(".safetensors")):
            where = path_in(_plain(upload))
            found = f"the path {where}" if where else None
        if found:
            raise UserError(f"nothing was sent: {upload.name} holds {found}")


def _plain(upload: Upload) -> str:
    """The strings of a file, without JSON's and YAML's escapes; the chat template of a tokenizer is program text."""
    if isinstance(upload.content, Path):
        return "\n".join(_strings(_metadata(upload.content)))
    text = upload.content.decode()
    if upload.name.endswith(".json"):
        value = json.loads(text)
        if upload.name == "tokenizer_config.json":
            value = {k: v for k, v in value.items() if k not in ("chat_template", "added_tokens_decoder")}
        return "\n".join(_strings(value))
    return "\n".join(_strings(yaml.safe_load(text))) if upload.name.endswith(".yaml") else text


def _metadata(weights: Path) -> dict[str, str]:
    try:
        with safe_open(weights, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{weights} is not a safetensors file ({error})") from error


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [s for pair in value.items() for part in pair for s in _strings(part)]
    if isinstance(value, list):
        return [s for part in value for s in _strings(part)]
    return [value] if isinstance(value, str) else []
