"""The files of a machine: a user's text, and the text that every machine with this project has."""

import ast
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

from periln.runkit.errors import UsageError, UserError
from periln.runkit.texts import UNDECODABLE
from periln.scripts.data.documents import TOO_LONG, Document, Files, digest64
from periln.scripts.data.readers import SUFFIXES, NoColumn, Read, kind_of, lines, opened, rows, texts

DOCUMENTATION = {".md", ".rst", ".txt"}
LONGEST_FILE = 200_000  # bytes; longer installed files are data in the shape of text
SKIPPED_FOLDERS = {"__pycache__", "test", "tests", "site-packages", "dist-packages", "idlelib", "licenses"}


class InstalledPython(Files):
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


class LocalFiles(Files):
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

    def documents(self, name: str, path: Path, index: int, offset: int) -> Iterator[Read]:
        try:
            yield from self._read(name, path, index, offset)
        except NoColumn as error:
            has = f" (it has {', '.join(error.names)})" if error.names else ""
            raise UsageError(f"{path}{error.at}: {error.reason}{has}; --text-column names another") from error
        except UserError:
            raise
        except (OSError, ValueError, EOFError, zlib.error) as error:
            raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error

    def _read(self, name: str, path: Path, index: int, offset: int) -> Iterator[Read]:
        kind = self._kinds.get(path, path.suffix)
        if kind == ".parquet":
            yield from rows(path, name, self.column, index)
            return
        with opened(path) as file:
            if kind == ".txt":
                yield from texts(file, name, path.stat().st_size, index, offset)
            else:
                yield from lines(file, name, self.column, index, offset)
