"""Documents out of one open file, in bounded memory: the lines of a .jsonl, the rows of a .parquet, a text in pieces.

Every reader can begin behind any document, and gives with each one the index of the next and where that begins.
"""

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from periln.runkit.errors import UserError
from periln.runkit.texts import UNDECODABLE
from periln.scripts.data.documents import LONGEST, NO_TEXT, TOO_LONG, Document

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
PIECE = 1 << 24  # bytes; a longer .txt is cut at line ends into documents of at most this, so that memory is bounded
LARGE_CHUNK = 1 << 26  # bytes of a .parquet's column in one row group; of a larger one the rows are read one by one
BOM = b"\xef\xbb\xbf"
Read = tuple[Document, int, int]  # a document, the index of the next one, and where that begins


class NoColumn(Exception):
    """The first record, or the file, has no text of the name that was asked for: `reason`, and the `names` it has."""

    def __init__(self, reason: str, names: list[str] | None = None, at: str = ""):
        super().__init__(reason)
        self.reason, self.names, self.at = reason, names, at


def texts(file: IO[bytes], name: str, size: int, index: int, offset: int) -> Iterator[Read]:
    """A text of `size` bytes: whole, or in pieces of at most `PIECE` bytes."""
    file.seek(offset)
    while data := file.read(PIECE):
        if len(data) == PIECE and (cut := data.rfind(b"\n") + 1):
            data = data[:cut]
        elif len(data) == PIECE:  # one line without end: cut it between two characters
            data = data[: len(data) - _unfinished(data)]
        begin, offset, index = offset, offset + len(data), index + 1
        file.seek(offset)
        data = data if begin else data.removeprefix(BOM)
        yield _decoded(name if size <= PIECE else f"{name}:{index - 1}", data), index, offset


def lines(file: IO[bytes], name: str, column: str, index: int, offset: int) -> Iterator[Read]:
    """The records of a .jsonl.

    Raises:
        NoColumn: the first record has no text of that name.
    """
    _skip_bytes(file, offset)
    for line, size in _bounded_lines(file):
        offset, index = offset + size, index + 1
        if line is None:
            yield Document(f"{name}:{index - 1}", "", TOO_LONG), index, offset
            continue
        text = line.removeprefix(BOM) if index == 1 else line
        if text.strip():
            yield _record(f"{name}:{index - 1}", text, column, index == 1), index, offset
        del line, text  # not while the next one is read


def _record(name: str, line: bytes, column: str, first: bool) -> Document:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return Document(name, "", UNDECODABLE)
    value = record.get(column) if isinstance(record, dict) else None
    if isinstance(value, str):
        return Document(name, value)
    if first and not (isinstance(record, dict) and column in record):
        names = list(map(str, record)) if isinstance(record, dict) else None
        raise NoColumn(f"no field {column!r} with a string", names, ", line 1")
    return Document(name, "", NO_TEXT)


def rows(source: Path | IO[bytes], name: str, column: str, index: int) -> Iterator[Read]:
    """The rows of a .parquet.

    Raises:
        NoColumn: no column of that name, or not one of text.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(source, buffer_size=1 << 20) as file:
        schema = file.schema_arrow
        if column not in schema.names:
            raise NoColumn(f"no column {column!r}", list(schema.names))
        kind = schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise NoColumn(f"the column {column!r} holds {kind}, not text")
        row = 0
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            if row + about.num_rows <= index:
                row += about.num_rows
                continue
            for value in _values(file, group, column, _is_large(about, column)):
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


def _bounded_lines(file: IO[bytes]) -> Iterator[tuple[bytes | None, int]]:
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


def opened(path: Path) -> IO[bytes]:
    """A file's bytes, without the compression that its name tells of."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        import pyarrow as pa

        return _without_zstd(pa.OSFile(str(path)))
    return open(path, "rb")


def decompressed(file: Any, suffix: str) -> IO[bytes]:
    """`opened` for a file that is open already, and whose name ends in `suffix`."""
    if suffix == ".gz":
        return gzip.open(file, "rb")
    if suffix == ".zst":
        import pyarrow as pa

        return _without_zstd(pa.PythonFile(file, "r"))
    return io.BufferedReader(file, 1 << 20)  # its `readline` knows a limit


def _without_zstd(file: Any) -> IO[bytes]:
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(file, "zstd"), 1 << 20)


def _skip_bytes(file: IO[bytes], count: int) -> None:
    """Go `count` bytes on; a compressed file has to be read for that."""
    if isinstance(file, io.BufferedReader) and file.seekable():
        file.seek(count)
        return
    while count:
        count -= len(file.read(min(count, 1 << 20))) or count
