"""Whether prepared data are those that are asked for: by what the text and the tokenizer are, not by where.

The index of prepared data keeps a hash of the source's files, and of the tokenizer's, where these are local. A command
that names them at another place is answered with the data found there, after they were read and compared.
"""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from periln.runkit.errors import UserError
from periln.runkit.folder import read_json, sha256_of
from periln.runkit.resume import resumption
from periln.scripts.data.sources import HUB, OF_THIS_MACHINE, LocalFiles

HASHED = 16 << 30  # bytes; of a larger source no hash is kept: reading it once more would take too long
PLACES = ("source", "tokenizer")


def is_local(name: str, value: str) -> bool:
    """Whether the option's value is a path on this machine."""
    if name == "source":
        return value not in OF_THIS_MACHINE and not value.startswith(HUB)
    return Path(value).is_absolute()  # as `prepare` resolves a tokenizer's folder


def without_places(options: Any) -> dict[str, Any]:
    """The options as the fingerprint has them: without paths on this machine."""
    return {k: v for k, v in asdict(options).items() if not (k in PLACES and is_local(k, v))}


def content_of(options: Any) -> dict[str, str]:
    """Hashes of the local files that a preparation reads, for its index."""
    found = {}
    for name in PLACES:
        if is_local(name, value := getattr(options, name)) and (digest := _hash(name, value)):
            found[f"{name}_sha256"] = digest
    return found


def _hash(name: str, value: str) -> str | None:
    """SHA-256 over names and contents of the option's files; None where there is too much to read."""
    if name == "source":
        files = LocalFiles(Path(value), "").files
    else:
        suffixes = (".json", ".model", ".txt", ".jinja")
        files = [(p.name, p) for p in sorted(Path(value).iterdir()) if p.is_file() and p.suffix in suffixes]
    if sum(path.stat().st_size for _, path in files) > HASHED:
        return None
    names = "".join(f"{file}\0{path.stat().st_size}\n" for file, path in files)
    return hashlib.sha256(
        names.encode("utf-8", "surrogateescape") + sha256_of(*(p for _, p in files)).encode()
    ).hexdigest()


def check_same_options(out: Path, index: dict[str, Any], options: Any) -> None:
    """Whether the data at `out` are what the options ask for.

    Raises:
        UserError: they are not; names the fields.
    """
    found = resumption(index.get("options") or {}, options)
    if found.different:
        raise UserError(f"{out} holds data of other options ({'; '.join(found.different)}); give another folder")
    for change in found.changes:
        _check_place(out, index, change.name, change.old, change.new)
    for line in (*map(str, found.changes), *found.kept):
        tqdm.write(f"{out}: {line}")


def check_same_source(data: Path, source: str) -> None:
    """Whether the text at `source` is that of the prepared data. Raises UserError where it is not."""
    index = read_json(data / "index.json")
    new = str(Path(source).resolve()) if is_local("source", source) else source
    if (old := index["options"]["source"]) != new:
        _check_place(data, index, "source", old, new)


def _check_place(out: Path, index: dict[str, Any], name: str, old: str, new: str) -> None:
    recorded = (index.get("source") or {}).get(f"{name}_sha256")
    if not (is_local(name, old) and is_local(name, new)):
        raise UserError(f"{out} holds data of another {name} ({old}, not {new}); give another folder")
    if recorded is None:
        raise UserError(
            f"{out} holds data of the {name} {old}, and keeps no hash to tell whether {new} is the same; give another "
            "folder"
        )
    if _hash(name, new) != recorded:
        raise UserError(f"{out} holds data of another {name}: the files of {new} are not those of {old}")
