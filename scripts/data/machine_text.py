"""The text of a whole machine: Python's sources and documentation, and what its packages brought to /usr/share/doc.

Enough for a study whose tokens do not repeat, where there is no Hub. Near duplicates are left out before anything is
tokenized (`SeenLines`), and the mixture is recorded in the data's index.
"""

import gzip
import html
import re
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from periln.runkit.texts import UNDECODABLE
from periln.scripts.data.documents import TOO_LONG, Document, Files, digest64

DOCUMENTATION, SYSTEM_PYTHON = Path("/usr/share/doc"), Path("/usr/lib")
SOURCE_SUFFIXES = (".py", ".rst", ".md", ".txt")
DOC_SUFFIXES = (*SOURCE_SUFFIXES, ".rst.gz", ".txt.gz", ".md.gz", ".html")
LONGEST_FILE = 400_000  # bytes, uncompressed; longer installed files are data in the shape of text
SKIPPED_FOLDERS = {"__pycache__", "licenses", "node_modules"}
LEAST_LINE, LEAST_LINES, MOST_SEEN = 20, 8, 0.7
BITS = 29  # of a line's hash: 2**29 bits are 64 MB, and 6 million lines fill one in ninety
RULE = (
    f"near duplicate: a document of at least {LEAST_LINES} distinct lines of {LEAST_LINE} characters or more, of which "
    f"at least {MOST_SEEN:.0%} stand in documents before it; exact duplicates by hash"
)
_TAGS = re.compile(r"<(script|style|head|nav)\b.*?</\1>|<[^>]+>", re.DOTALL | re.IGNORECASE)


class SeenLines:
    """Which lines the documents so far had, as one bit for each hash of `BITS` bits."""

    def __init__(self) -> None:
        self._bits = np.zeros(1 << (BITS - 3), dtype=np.uint8)

    def add(self, text: str) -> bool:
        """Whether a document is new by `RULE`. The lines of one that is not new are not entered."""
        lines = {line.strip() for line in text.splitlines()}
        codes = (zlib.crc32(line.encode("utf-8", "replace")) for line in lines if len(line) >= LEAST_LINE)
        hashes = np.fromiter(codes, np.uint32) & np.uint32((1 << BITS) - 1)
        bytes_, bit = hashes >> np.uint32(3), np.left_shift(1, hashes & np.uint32(7)).astype(np.uint8)
        if len(hashes) >= LEAST_LINES and ((self._bits[bytes_] & bit) > 0).mean() >= MOST_SEEN:
            return False
        np.bitwise_or.at(self._bits, bytes_, bit)
        return True


def _roots() -> list[tuple[str, Path]]:
    paths = sysconfig.get_paths()
    packages = [Path(p) for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    found = [("python-library", Path(paths["stdlib"])), ("python-packages", Path(paths["purelib"]))]
    found += [("python-packages", path) for path in packages]
    found += [("python-library", path) for path in sorted(SYSTEM_PYTHON.glob("python3*"))]
    return [*found, ("documentation", DOCUMENTATION)]


def _wanted(label: str, parts: tuple[str, ...]) -> bool:
    name = parts[-1].lower()
    if SKIPPED_FOLDERS.intersection(parts[:-1]) or name.startswith(("copyright", "license", "changelog")):
        return False
    if name.endswith(".html"):  # of a book in many languages the English one; of generated pages their sources
        return "en-US" in parts
    return name.endswith(DOC_SUFFIXES if label == "documentation" else SOURCE_SUFFIXES)


def list_files() -> list[tuple[str, Path]]:
    """(name, path) of every file that may be a document, in the order of a hash of the name: a fixed shuffle.

    A name begins with its source: `python-library`, `python-packages`, or `documentation` and the Debian package.
    """
    files: dict[Path, str] = {}
    for label, root in _roots():
        for path in root.rglob("*"):
            parts = path.relative_to(root).parts
            nested = label == "python-library" and {"site-packages", "dist-packages"}.intersection(parts)
            if not nested and _wanted(label, parts) and path.is_file() and not path.is_symlink():
                files.setdefault(path.resolve(), "/".join((label, *parts)))
    by_name: dict[str, Path] = {}
    for path, name in sorted(files.items()):
        by_name.setdefault(name, path)  # one package in two environments
    return sorted(by_name.items(), key=lambda item: (digest64(item[0]), item[0]))


def read_file(name: str, path: Path) -> Document:
    """A file's text; HTML without its tags."""
    try:
        if path.stat().st_size > LONGEST_FILE:
            return Document(name, "", TOO_LONG)
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        if len(data) > LONGEST_FILE:
            return Document(name, "", TOO_LONG)
        text = data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return Document(name, "", UNDECODABLE)
    if path.suffix == ".html":
        text = html.unescape(_TAGS.sub("", text))
        text = re.sub(r"[ \t]+", " ", re.sub(r"\n\s*\n+", "\n\n", text))
    return Document(name, text)


def source_of(name: str) -> str:
    """The named source that a document counts for in the mixture."""
    label, _, rest = name.partition("/")
    return f"{label}/{rest.partition('/')[0]}" if label == "documentation" else label


class InstalledText(Files):
    """Sources and documentation that are installed on this machine, without near duplicates.

    The files are read once to find these, and once more by `read`.
    """

    SMALL = 0.001  # share of the bytes below which a documentation package is counted with the others

    def __init__(self, files: list[tuple[str, Path]] | None = None) -> None:
        super().__init__([])
        self._all = list_files() if files is None else files
        self._found: dict[str, Any] | None = None

    def _choose(self) -> dict[str, Any]:
        if self._found is None:
            seen, near = SeenLines(), 0
            counts: dict[str, list[int]] = {}
            for name, path in self._all:
                document = read_file(name, path)
                if document.problem is None and not seen.add(document.text):
                    near += 1
                    continue
                self.files.append((name, path))
                if document.problem is None:
                    entry = counts.setdefault(source_of(name), [0, 0])
                    entry[0], entry[1] = entry[0] + 1, entry[1] + len(document.text.encode("utf-8", "replace"))
            self._found = {"rule": RULE, "near_duplicates": near, "mixture": self._mixture(counts)}
        return self._found

    def _mixture(self, counts: dict[str, list[int]]) -> dict[str, dict[str, int]]:
        total = sum(size for _, size in counts.values())
        mixed: dict[str, dict[str, int]] = {}
        for name, (documents, size) in sorted(counts.items(), key=lambda item: -item[1][1]):
            small = size < self.SMALL * total and name.startswith("documentation/")
            entry = mixed.setdefault("documentation/others" if small else name, {"documents": 0, "bytes": 0})
            entry["documents"] += documents
            entry["bytes"] += size
        return mixed

    def pin(self, pinned: dict[str, Any] | None) -> dict[str, Any]:
        found = self._choose()
        listing = None if pinned is None else {"listing": pinned.get("listing")}
        return super().pin(listing) | found

    def read(self, position: dict[str, int] | None) -> Iterator[Document]:
        self._choose()
        return super().read(position)

    def documents(self, name: str, path: Path, index: int, offset: int) -> Iterator[tuple[Document, int, int]]:
        if index == 0:
            yield read_file(name, path), 1, 0
