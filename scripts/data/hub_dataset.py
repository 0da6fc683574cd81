"""A dataset of the Hub (or a folder laid out as one), read from its files, or through `datasets` where they are others.

`datasets` says which files a configuration and a split have. Files of JSON lines and Parquet are read here, because it
would hold several copies of a record, and of a Parquet file a whole group of rows: 640 MB for a record of 69 MB.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from periln.runkit.errors import UserError
from periln.scripts.data.documents import NO_TEXT, Document
from periln.scripts.data.readers import NoColumn, Read, decompressed, lines, rows

_JSON_LINES = re.compile(r"\.(?:jsonl|json|ndjson)(\.gz|\.zst)?$")


class HubDataset:
    """The rows of a split, one after another.

    The commit is pinned, so that a dataset that moves on meanwhile is not mixed with its newer self. A position is a
    file and a place in it; for files that `datasets` reads (CSV, Arrow, archives, a JSON array) it is the `state_dict`
    of its stream, which is exact without shuffling.

    Raises (on reading, too):
        UserError: the Hub does not answer, no such dataset, configuration, split or column.
    """

    def __init__(self, repository: str, config: str | None, split: str, revision: str | None, column: str):
        self.repository, self.config, self.split, self.column = repository, config, split, column
        self.revision = revision
        self._count = 0
        self._place: dict[str, int] | None = None  # in files that are read here
        self._state: dict[str, Any] | None = None  # of the stream of datasets
        self._stream: Any = None

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
        if self._place is not None:
            return {"count": self._count, **self._place}
        # A stream from which nothing was taken since load_state_dict would give the state of its beginning.
        moved = self._stream is not None
        return {"count": self._count, "state": self._stream.state_dict() if moved else self._state}

    def read(self, position: dict[str, Any] | None) -> Iterator[Document]:
        position = dict(position or {"count": 0})
        self._count, self._state = position.pop("count"), position.pop("state", None)
        self._place, self._stream = position or None, None
        where = f"{self.repository}/{self.config or 'default'}/{self.split}"
        try:
            files = self._files() if self._state is None else None
            for document in self._streamed() if files is None else self._from(files):
                self._count += 1
                yield document._replace(name=f"{where}:{self._count - 1}")
                del document  # not while the next one is read
        except NoColumn as error:
            raise self._no_column(error.names, error.reason) from error
        except (UserError, GeneratorExit):
            raise
        except Exception as error:  # of datasets, fsspec, the Hub's client, or a file's format
            raise self._said(error) from error

    # --- files that are read here ------------------------------------------------------------------------
    def _files(self) -> list[str] | None:
        """The split's files, where all are JSON lines or Parquet without special settings."""
        from datasets import load_dataset_builder

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            builder = load_dataset_builder(self.repository, self.config, revision=self.revision)
        asked = builder.config
        files = list(map(str, (asked.data_files or {}).get(self.split, [])))
        kind = type(builder).__module__.rpartition(".")[2]
        if kind == "parquet" and asked.filters is None and all(file.endswith(".parquet") for file in files):
            return files or None
        plain = kind == "json" and asked.field is None and asked.encoding == "utf-8"
        if plain and files and all(map(_JSON_LINES.search, files)):
            with self._opened(files[0]) as file:
                return files if file.read(1 << 16).lstrip().removeprefix(b"\xef\xbb\xbf")[:1] == b"{" else None
        return None

    @contextmanager
    def _opened(self, file: str) -> Iterator[Any]:
        from datasets.utils.file_utils import xopen  # asks again where a connection breaks

        named = _JSON_LINES.search(file)
        with closing(xopen(file, "rb")) as raw:
            if named is None:
                yield raw
                return
            with decompressed(raw, named[1] or "") as plain:
                yield plain

    def _from(self, files: list[str]) -> Iterator[Document]:
        at = self._place or {"file": 0, "index": 0, "offset": 0}
        self._place = dict(at)
        for number in range(at["file"], len(files)):
            begin = (at["index"], at["offset"]) if number == at["file"] else (0, 0)
            for document, index, offset in self._read(files[number], *begin):
                self._place = {"file": number, "index": index, "offset": offset}
                yield document
                del document

    def _read(self, file: str, index: int, offset: int) -> Iterator[Read]:
        with self._opened(file) as opened:
            if file.endswith(".parquet"):
                yield from rows(opened, file, self.column, index)
            else:
                yield from lines(opened, file, self.column, index, offset)

    # --- all others --------------------------------------------------------------------------------------
    def _streamed(self) -> Iterator[Document]:
        stream = self._open()
        if self._state is not None:
            stream.load_state_dict(self._state)
        for row in stream:
            self._stream = stream
            if self.column not in row:
                raise self._no_column(list(row))
            text = row[self.column]
            good = isinstance(text, str)
            yield Document("", text if good else "", None if good else NO_TEXT)
            del row, text  # not while the next ones are read

    def _open(self) -> Any:
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

    def _no_column(self, names: list[str] | None, reason: str | None = None) -> UserError:
        has = f" (it has {', '.join(names)})" if names else ""
        what = f": {reason}" if reason and names is None else f" has no column {self.column!r}{has}"
        return UserError(f"{self.repository}{what}; --text-column names another")

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
