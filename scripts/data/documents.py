"""A document, and what a source of documents can do: read on where an earlier process stopped."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from periln.runkit.errors import UserError

LONGEST = 1 << 27  # bytes of a document, or of the line of a .jsonl that holds one; a longer one is never in memory
NO_TEXT, TOO_LONG = "no text", "too long"


class Document(NamedTuple):
    """A document, or what was in its place and why it cannot be one."""

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
        """Where to resume after the last document that `read` gave; JSON."""
        ...


def digest64(text: str) -> int:
    """The first 8 bytes of a string's SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


class Files:
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
                del document  # not while the next one is read

    def documents(self, name: str, path: Path, index: int, offset: int) -> Iterator[tuple[Document, int, int]]:
        """(document, index of the next one, where it begins) from document `index`, which begins at `offset`."""
        raise NotImplementedError
