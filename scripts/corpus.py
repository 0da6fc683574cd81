"""Text: where the documents come from, in one fixed order, without duplicates, split into train and held-out.

A document is a (name, text) pair. `installed-python` is the text that every machine with this project has:
the Python standard library and the installed packages. Of every second source file only the docstrings are
taken, of the others the whole source; documentation (.md, .rst, .txt, package descriptions) is taken whole.
"""

import ast
import gzip
import hashlib
import json
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from runkit.errors import UserError

INSTALLED = "installed-python"
DOCUMENTATION = {".md", ".rst", ".txt"}
LONGEST_FILE = 200_000  # bytes; longer ones are data in the shape of text
SKIPPED_FOLDERS = {"__pycache__", "test", "tests", "site-packages", "dist-packages", "idlelib", "licenses"}


@dataclass
class Corpus:
    """Documents in their fixed order, and what was left out and why."""

    train: list[tuple[str, str]]
    heldout: list[tuple[str, str]]
    skipped: dict[str, list[str]] = field(default_factory=dict)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _docstrings(source: str) -> str:
    """All docstrings of a Python file, module first."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bad escapes in somebody else's file
        tree = ast.parse(source)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(d for d in found if d)


def _installed_files() -> list[tuple[str, Path]]:
    """(name, path) of every candidate, in the order of a hash of the name: a fixed shuffle."""
    paths = sysconfig.get_paths()
    roots = {"stdlib": Path(paths["stdlib"]), "packages": Path(paths["purelib"])}
    files = []
    for label, root in roots.items():
        for path in root.rglob("*"):
            parts = path.relative_to(root).parts
            wanted = path.suffix in {".py", *DOCUMENTATION} or path.name == "METADATA"
            if wanted and not SKIPPED_FOLDERS.intersection(parts[:-1]):
                files.append(("/".join((label, *parts)), path))
    return sorted(files, key=lambda item: (_digest(item[0]), item[0]))


def _read(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def _installed_documents(skip) -> Iterator[tuple[str, str]]:
    for name, path in _installed_files():
        try:
            if path.stat().st_size > LONGEST_FILE:
                skip("too long", name)
                continue
            text = _read(path)
            if path.suffix == ".py" and _digest(name) // 2 % 2:
                text = _docstrings(text)
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
            skip("unreadable", name)
            continue
        yield name, text


def _file_documents(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """The documents of one .txt, .jsonl(.gz) or .parquet file.

    Raises:
        UserError: unreadable, or a record without a `text`; names the path and the line.
    """
    try:
        if path.suffix == ".txt":
            yield name, _read(path)
        elif path.suffix == ".parquet":
            import pyarrow.parquet as parquet

            file = parquet.ParquetFile(path)
            if "text" not in file.schema_arrow.names:
                raise UserError(f"{path} has no column 'text' (it has {', '.join(file.schema_arrow.names)})")
            row = 0
            for batch in file.iter_batches(columns=["text"]):
                for value in batch.column(0).to_pylist():
                    if value is not None and not isinstance(value, str):
                        raise UserError(f"{path}: the column 'text' holds {type(value).__name__}, not text")
                    yield f"{name}:{row}", value or ""
                    row += 1
        else:
            for i, line in enumerate(_read(path).split("\n")):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                        raise UserError(f"{path}, line {i + 1}: no field 'text' with a string")
                    yield f"{name}:{i}", record["text"]
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: not UTF-8 text") from error
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _folder_documents(source: str) -> Iterator[tuple[str, str]]:
    root = Path(source)
    if not root.exists():
        raise UserError(f"no text found: {root} does not exist")
    suffixes = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    files = [p for p in files if p.name.endswith(suffixes)]
    if not files:
        raise UserError(f"no text found: {root} has no {', '.join(suffixes)} file")
    for path in files:
        yield from _file_documents(path, path.name if path == root else path.relative_to(root).as_posix())


def read_corpus(source: str, max_bytes: int, heldout_share: float) -> Corpus:
    """Read at most `max_bytes` of text from `source` (`installed-python`, a folder or a file).

    The split is by document (for .txt and Python files: by file), from a hash of the document's name, so that
    it does not change when documents are added. If chance leaves the held-out part empty, the last document
    is held out, or, of a single document, its end.

    Raises:
        UserError: no text found, or an unreadable file of the user's; names the path.
    """
    skipped: dict[str, list[str]] = {}

    def skip(reason: str, name: str) -> None:
        skipped.setdefault(reason, []).append(name)

    documents = _installed_documents(skip) if source == INSTALLED else _folder_documents(source)
    corpus, seen, size = Corpus([], [], skipped), set(), 0
    for name, text in documents:
        text = text.strip()
        try:
            encoded = text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, as JSON may hold
            skip("unreadable", name)
            continue
        key = hashlib.sha256(encoded).digest()
        if not text:
            skip("empty", name)
        elif key in seen:
            skip("duplicate", name)
        else:
            seen.add(key)
            part = corpus.heldout if _digest("split " + name) % 10_000 < heldout_share * 10_000 else corpus.train
            part.append((name, text))
            size += len(encoded)
            if size >= max_bytes:
                break
    if not corpus.train and not corpus.heldout:
        raise UserError(f"no text found: every document of {source} is empty")
    return _balance(corpus, heldout_share)


def _balance(corpus: Corpus, heldout_share: float) -> Corpus:
    if not corpus.train:
        corpus.train, corpus.heldout = corpus.heldout, []
    if not corpus.heldout and len(corpus.train) > 1:
        corpus.heldout.append(corpus.train.pop())
    elif not corpus.heldout:
        name, text = corpus.train[0]
        cut = text.rfind("\n", 0, int(len(text) * (1 - heldout_share)))
        cut = cut if cut > 0 else int(len(text) * (1 - heldout_share))
        corpus.train, corpus.heldout = [(name, text[:cut])], [(name + " (end)", text[cut:].strip() or text[-1:])]
    return corpus
