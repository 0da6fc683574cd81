"""Where documents come from: files, installed Python text, datasets of the Hub. One at a time, in one fixed order.

A source is read lazily, and can go on where an earlier process stopped: `position()` says where, in a few numbers.
"""

import ast
import gzip
import hashlib
import io
import json
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from periln.runkit.errors import UsageError, UserError, did_you_mean
from periln.runkit.texts import UNDECODABLE

INSTALLED, HUB = "installed-python", "hf:"
DOCUMENTATION = {".md", ".rst", ".txt"}
LONGEST_FILE = 200_000  # bytes; longer installed files are data in the shape of text
SKIPPED_FOLDERS = {"__pycache__", "test", "tests", "site-packages", "dist-packages", "idlelib", "licenses"}
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
PIECE = 1 << 24  # bytes; a longer .txt is cut at line ends into documents of at most this, so that memory is bounded
LONGEST = 1 << 27  # bytes of a document, or of the line of a .jsonl that holds one; a longer one is never in memory
LARGE_CHUNK = 1 << 26  # bytes of a .parquet's column in one row group; of a larger one the rows are read one by one
NO_TEXT, TOO_LONG = "no text", "too long"
BOM = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """A document, or what stood in its place and why it cannot be one."""

    name: str
    text: str
    problem: str | None = None


class Source(Protocol):
    """Documents in a fixed order."""

    def pin(self, pinned: dict[str, Any] | None) -> dict[str, Any]:
        """What must stay the same while several processes read one after another: a hash of the listing, a commit.

        With None it is found out, else adopted or checked. Raises UserError where the source has changed.
        """
        ...

    def read(self, position: Any) -> Iterator[Document]:
        """The documents from `position` on (None: from the start)."""
        ...

    def position(self) -> Any:
        """Where to go on after the document that `read` gave last; JSON."""
        ...


def digest64(text: str) -> int:
    """The first 8 bytes of a string's SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


class _Files:
    """Files one after another; how one is read is the subclass's."""

    def __init__(self, files: list[tuple[str, Path]]):
        self.files = files
        self._position: dict[str, int] = {}

    def pin(self, pinned: dict[str, Any] | None) -> dict[str, Any]:
        listing = hashlib.sha256()
        for name, path in self.files:
            size = path.stat().st_size if path.exists() else None  # a link to nowhere
            listing.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
        found = {"listing": listing.hexdigest()}
        if pinned not in (None, found):
            raise UserError("the source's files have changed since its preparation began")
        return found

    def position(self) -> dict[str, int]:
        return dict(self._position)

    def read(self, position: dict[str, int] | None) -> Iterator[Document]:
        at = position or {"file": 0, "index": 0, "offset": 0}
        self._position = dict(at)
        for number in range(at["file"], len(self.files)):
            begin = (at["index"], at["offset"]) if number == at["file"] else (0, 0)
            for document, index, offset in self.documents(*self.files[number], *begin):
                self._position = {"file": number, "index": index, "offset": offset}
                yield document

    def documents(self, name: str, path: Path, index: int, offset: int) -> Iterator[tuple[Document, int, int]]:
        """(document, index of the next one, where it begins) from document `index`, which begins at `offset`."""
        raise NotImplementedError


# --- installed Python -------------------------------------------------------------------------------------
class InstalledPython(_Files):
    """The text that every machine with this project has: the standard library and the installed packages.

    Of every second source file only the docstrings are taken, of the others the whole source; documentation
    (.md, .rst, .txt, package descriptions) is taken whole. In the order of a hash of the name: a fixed shuffle.
    """

    def __init__(self) -> None:
        paths, files = sysconfig.get_paths(), []
        for label, root in (("stdlib", Path(paths["stdlib"])), ("packages", Path(paths["purelib"]))):
            for path in root.rglob("*"):
                parts = path.relative_to(root).parts
                wanted = path.suffix in {".py", *DOCUMENTATION} or path.name == "METADATA"
                if wanted and not SKIPPED_FOLDERS.intersection(parts[:-1]):
                    files.append(("/".join((label, *parts)), path))
        super().__init__(sorted(files, key=lambda item: (digest64(item[0]), item[0])))

    def documents(self, name: str, path: Path, index: int, offset: int) -> Iterator[tuple[Document, int, int]]:
        if index == 0:
            yield self._document(name, path), 1, 0

    def _document(self, name: str, path: Path) -> Document:
        try:
            if path.stat().st_size > LONGEST_FILE:
                return Document(name, "", TOO_LONG)
            text = path.read_bytes().decode("utf-8-sig")
            if path.suffix == ".py" and digest64(name) // 2 % 2:
                text = _docstrings(text)
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
            return Document(name, "", UNDECODABLE)
        return Document(name, text)


def _docstrings(source: str) -> str:
    """All docstrings of a Python file, module first."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bad escapes in somebody else's file
        tree = ast.parse(source)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(d for d in found if d)


# --- local files ------------------------------------------------------------------------------------------
class LocalFiles(_Files):
    """A .txt, .jsonl(.gz, .zst) or .parquet file, or all such files of a folder in the order of their names.

    A single file may have any name: what is in it decides then.

    Raises (on reading, too):
        UserError: nothing there, an unreadable file, a file without the column; names the path.
    """

    def __init__(self, root: Path, column: str):
        self.column = column
        if not root.exists():
            raise UsageError(f"no text found: {root} does not exist")
        known = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
        files = [p for p in known if p.name.endswith(SUFFIXES)]
        self._kinds: dict[Path, str] = {}
        if not files and root.is_file():
            files, self._kinds = [root], {root: kind_of(root)}
        if not files:
            raise UsageError(f"no text found: {root} has no {', '.join(SUFFIXES)} file")
        super().__init__([(p.name if p == root else p.relative_to(root).as_posix(), p) for p in files])

    def documents(self, name: str, path: Path, index: int, offset: int) -> Iterator[tuple[Document, int, int]]:
        kind = self._kinds.get(path, path.suffix)
        reader = {".txt": self._text, ".parquet": self._parquet}.get(kind, self._lines)
        try:
            yield from reader(name, path, index, offset)
        except UserError:
            raise
        except (OSError, ValueError, EOFError, zlib.error) as error:
            raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error

    def _text(self, name: str, path: Path, index: int, offset: int) -> Iterator[tuple[Document, int, int]]:
        whole = path.stat().st_size <= PIECE
        with open(path, "rb") as file:
            file.seek(offset)
            while data := file.read(PIECE):
                if len(data) == PIECE and (cut := data.rfind(b"\n") + 1):
                    data = data[:cut]
                elif len(data) == PIECE:  # one line without end: cut it between two characters
                    data = data[: len(data) - _unfinished(data)]
                begin, offset, index = offset, offset + len(data), index + 1
                file.seek(offset)
                data = data if begin else data.removeprefix(BOM)
                yield _decoded(name if whole else f"{name}:{index - 1}", data), index, offset

    def _lines(self, name: str, path: Path, index: int, offset: int) -> Iterator[tuple[Document, int, int]]:
        with _opened(path) as file:
            _skip_bytes(file, offset)
            for line, size in _bounded_lines(file):
                offset, index = offset + size, index + 1
                if line is None:
                    yield Document(f"{name}:{index - 1}", "", TOO_LONG), index, offset
                    continue
                text = line.removeprefix(BOM) if index == 1 else line
                if text.strip():
                    yield self._record(f"{name}:{index - 1}", text, f"{path}, line {index}", index == 1), index, offset
                del line, text  # not while the next one is read

    def _record(self, name: str, line: bytes, where: str, first: bool) -> Document:
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            return Document(name, "", UNDECODABLE)
        value = record.get(self.column) if isinstance(record, dict) else None
        if isinstance(value, str):
            return Document(name, value)
        if first and not (isinstance(record, dict) and self.column in record):
            keys = f" (it has {', '.join(map(str, record))})" if isinstance(record, dict) else ""
            raise UsageError(f"{where}: no field {self.column!r} with a string{keys}; --text-column names another")
        return Document(name, "", NO_TEXT)

    def _parquet(self, name: str, path: Path, index: int, offset: int) -> Iterator[tuple[Document, int, int]]:
        import pyarrow as pa
        import pyarrow.parquet as parquet

        with parquet.ParquetFile(path, buffer_size=1 << 20) as file:
            schema = file.schema_arrow
            if self.column not in schema.names:
                names = ", ".join(schema.names)
                raise UsageError(f"{path} has no column {self.column!r} (it has {names}); --text-column names another")
            kind = schema.field(self.column).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                raise UsageError(f"{path}: the column {self.column!r} holds {kind}, not text")
            row = 0
            for group in range(file.num_row_groups):
                about = file.metadata.row_group(group)
                if row + about.num_rows <= index:
                    row += about.num_rows
                    continue
                for value in _values(file, group, self.column, _is_large(about, self.column)):
                    if row >= index:
                        yield _scalar(f"{name}:{row}", value), row + 1, 0
                    row += 1


def _decoded(name: str, data: bytes) -> Document:
    try:
        return Document(name, data.decode("utf-8"))
    except UnicodeDecodeError:
        return Document(name, "", UNDECODABLE)


def kind_of(path: Path) -> str:
    """`.txt` or `.jsonl`, by what is in a file whose name does not say it.

    Raises:
        UserError: neither; says what it seems to be.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(1 << 16)
            file.seek(0)
            first = next(
                (line for line, _ in _bounded_lines(file) if line is None or line.strip(b"\r\n \t" + BOM)), b""
            )
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        text = data[: len(data) - (_unfinished(data) if len(data) == 1 << 16 else 0)].decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        endings = ", ".join(SUFFIXES)
        raise UserError(f"no text found: {path} is not plain text (UTF-8), and its name ends in none of {endings}")
    try:
        if isinstance(json.loads((first or b"").removeprefix(BOM)), dict):
            return ".jsonl"
    except (ValueError, RecursionError):
        pass
    if path.suffix == ".json":
        raise UserError(f"{path} is not a JSON record a line: write it so, or name it .txt if it is meant as text")
    return ".txt"


def _bounded_lines(file: BinaryIO) -> Iterator[tuple[bytes | None, int]]:
    """(line, bytes) of each line; None for one of more than `LONGEST` bytes, which is never in memory as a whole."""
    while line := file.readline(LONGEST + 1):
        size = len(line)
        if size <= LONGEST or line.endswith(b"\n"):
            yield line, size
            del line
            continue
        del line
        while more := file.readline(1 << 20):
            size += len(more)
            if more.endswith(b"\n"):
                break
        yield None, size


def _is_large(row_group: Any, column: str) -> bool:
    """Whether a row group's column is too large to have 256 of its rows in memory, whatever they are."""
    columns = (row_group.column(i) for i in range(row_group.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == column) > LARGE_CHUNK


def _values(file: Any, group: int, column: str, large: bool) -> Iterator[Any]:
    for batch in file.iter_batches(1 if large else 256, row_groups=[group], columns=[column]):
        yield from batch.column(0)


def _scalar(name: str, value: Any) -> Document:
    if value.is_valid and _bytes_of(value) > LONGEST:
        return Document(name, "", TOO_LONG)
    try:
        text = value.as_py()
    except UnicodeDecodeError:
        return Document(name, "", UNDECODABLE)
    return Document(name, "", NO_TEXT) if text is None else Document(name, text)


def _bytes_of(value: Any) -> int:
    value = value.value if hasattr(value, "dictionary") else value  # of a dictionary's index, its entry
    buffer = value.as_buffer()
    return buffer.size if buffer is not None else 0


def _unfinished(data: bytes) -> int:
    """How many bytes at the end begin a UTF-8 character without finishing it."""
    for back in range(1, 4):
        if data[-back] >= 0xC0:
            wanted = 2 if data[-back] < 0xE0 else 3 if data[-back] < 0xF0 else 4
            return back if wanted > back else 0
    return 0


def _opened(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"), 1 << 20)
    return open(path, "rb")


def _skip_bytes(file: BinaryIO, count: int) -> None:
    """Go `count` bytes on; a compressed file has to be read for that."""
    if isinstance(file, io.BufferedReader) and file.seekable():
        file.seek(count)
        return
    while count:
        count -= len(file.read(min(count, 1 << 20))) or count


# --- the Hub ----------------------------------------------------------------------------------------------
class HubDataset:
    """A dataset of the Hub (or a folder laid out as one), streamed through `datasets`.

    It goes on by the `state_dict` of `datasets`, which is exact for a stream without shuffling. The commit is
    pinned, so that a dataset that moves on meanwhile is not mixed with its newer self.

    Raises (on reading, too):
        UserError: the Hub does not answer, no such dataset, configuration, split or column.
    """

    def __init__(self, repository: str, config: str | None, split: str, revision: str | None, column: str):
        self.repository, self.config, self.split, self.column = repository, config, split, column
        self.revision = revision
        self._count, self._state, self._stream = 0, None, None

    def pin(self, pinned: dict[str, Any] | None) -> dict[str, Any]:
        if pinned is not None:
            self.revision = pinned["commit"]
        elif not Path(self.repository).exists():
            from huggingface_hub import HfApi

            try:
                self.revision = HfApi().dataset_info(self.repository, revision=self.revision, timeout=30).sha
            except Exception as error:  # httpx's and the Hub's own
                raise self._said(error) from error
        return {"commit": self.revision}

    def position(self) -> dict[str, Any]:
        # A stream from which nothing was taken since load_state_dict would give the state of its beginning.
        moved = self._stream is not None
        return {"count": self._count, "state": self._stream.state_dict() if moved else self._state}

    def read(self, position: dict[str, Any] | None) -> Iterator[Document]:
        try:
            stream = self._open()
            position = position or {"count": 0, "state": None}
            self._count, self._state, self._stream = position["count"], position["state"], None
            if self._state is not None:
                stream.load_state_dict(self._state)
            where = f"{self.repository}/{self.config or 'default'}/{self.split}"
            for row in stream:
                self._stream, number = stream, self._count
                self._count += 1
                if self.column not in row:
                    raise self._no_column(list(row))
                text = row[self.column]
                good = isinstance(text, str)
                yield Document(f"{where}:{number}", text if good else "", None if good else NO_TEXT)
                del row, text  # not while the next ones are read
        except (UserError, GeneratorExit):
            raise
        except Exception as error:  # of datasets, fsspec, the Hub's client, or a file's format
            raise self._said(error) from error

    def _open(self):
        from datasets import load_dataset

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stream = load_dataset(
                self.repository, self.config, split=self.split, revision=self.revision, streaming=True
            )
        if stream.column_names is not None:
            if self.column not in stream.column_names:
                raise self._no_column(stream.column_names)
            stream = stream.select_columns([self.column])
        return stream

    def _no_column(self, names: list[str]) -> UserError:
        return UserError(
            f"{self.repository} has no column {self.column!r} (it has {', '.join(names)}); --text-column names another"
        )

    def _said(self, error: Exception) -> UserError:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if "RepositoryNotFoundError" in kinds:
            reason = "the Hub has none of this name (or it is private: hf auth login)"
        elif "RevisionNotFoundError" in kinds:
            reason = f"it has no revision {self.revision!r}"
        elif "zstd not supported" in reason:
            reason = "its files are zstd-compressed, which needs the package zstandard (pip install zstandard)"
        return UserError(f"cannot read the dataset {self.repository}: {reason}")


def open_source(
    source: str,
    column: str = "text",
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
) -> Source:
    """`installed-python`, `hf:` and a dataset's id, or the path of a file or folder.

    Raises:
        UserError, UsageError: nothing of that name.
    """
    if not source.startswith(HUB) and (config is not None or revision is not None or split != "train"):
        raise UsageError(f"dataset_config, split and revision belong to a source {HUB}..., not to {source}")
    if source == INSTALLED:
        return InstalledPython()
    if source.startswith(HUB):
        if not source.removeprefix(HUB):
            raise UsageError(f"the source {source!r} names no dataset: {HUB}owner/name")
        return HubDataset(source.removeprefix(HUB), config, split, revision, column)
    if not Path(source).exists() and (hint := did_you_mean(source, [INSTALLED])):
        raise UsageError(f"unknown source {source!r}{hint}")
    return LocalFiles(Path(source), column)
