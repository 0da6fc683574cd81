"""The user's own tasks: folders of lm-evaluation-harness's YAML files, in addition to the harness's own.

A result of such a task says with which definition it was scored, since neither the name nor the harness's version does:
a hash of the task's configuration (with what it includes) and of the files next to it, code and data. The hash leaves
out what is on the Hub and what the task's code reads from elsewhere.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from periln.runkit.errors import UsageError
from periln.runkit.folder import sha256_of
from periln.runkit.tasks import SUITES

_YAML = (".yaml", ".yml")


class OwnTasks:
    """The tasks, groups and tags that the folders define; reads their YAML files, and runs none of their code.

    Raises:
        UsageError: a folder that does not exist or defines nothing; a name that two files define, or that is a
            benchmark's of this project; names it.
    """

    def __init__(self, folders: Sequence[Path], known: Sequence[str]):
        self.folders = tuple(Path(folder).resolve() for folder in folders)
        self.skipped: list[str] = []  # what the harness logs about files that it passes over
        self._entries: dict[str, Any] = {}
        for folder in self.folders:
            if not folder.is_dir():
                raise UsageError(f"--include-path {folder} is not a folder")
            found = self._read(folder)
            if not found:
                raise UsageError(f"--include-path {folder} defines no task{self.hint()}")
            for name in found:
                if name in self._entries:
                    raise UsageError(f"--include-path: two folders define a task {name!r}; rename one of them")
                if name in known or name in SUITES:
                    raise UsageError(f"--include-path {folder}: {name!r} is the name of a benchmark; rename your task")
            self._entries |= found

    def _read(self, folder: Path) -> dict[str, Any]:
        import lm_eval.tasks

        with _messages() as said:
            found = lm_eval.tasks.TaskManager(include_path=[str(folder)], include_defaults=False).task_index
        for level, text in said:
            if level >= logging.WARNING:  # the harness takes the first of two files with one name
                raise UsageError(f"--include-path {folder}: {text}")
            if text.startswith("Skip "):
                self.skipped.append(text.removeprefix("Skip "))
        return dict(found)

    def hint(self) -> str:
        """What to say after "unknown": the first file that was passed over."""
        return f"; {self.skipped[0]} was passed over" if self.skipped else ""

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def has_group(self, names: Sequence[str]) -> bool:
        """Whether one of the names is the user's own group, which may contain any of the harness's tasks."""
        return any(name in self and self._entries[name].kind.name in ("GROUP", "TAG") for name in names)

    def definition(self, name: str) -> dict[str, str] | None:
        """The file that defines a task, within its folder, and the hash of the definition; None for the harness's."""
        if name not in self._entries:
            return None
        path = self._entries[name].yaml_path
        folder = next((f for f in self.folders if path is not None and path.is_relative_to(f)), None)
        parts = [self._content(entry) for entry in self._reached(name)]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
        return {"file": "" if folder is None else path.relative_to(folder).as_posix(), "sha256": digest}

    def _reached(self, name: str, seen: set[str] | None = None) -> Iterator[Any]:
        """The entry, and of a group or tag the members that are the user's own."""
        seen = set() if seen is None else seen
        if name in seen or name not in self._entries:
            return
        seen.add(name)
        entry = self._entries[name]
        yield entry
        members = list((entry.cfg or {}).get("task") or []) if entry.kind.name == "GROUP" else []
        members = [member.get("task") if isinstance(member, dict) else member for member in members]
        if entry.kind.name == "TAG":
            members = sorted(entry.tags)
        for member in members:
            if isinstance(member, str):
                yield from self._reached(member, seen)

    def _content(self, entry: Any) -> list[Any]:
        if entry.yaml_path is None:
            return [entry.name, sorted(entry.tags)]
        here = Path(entry.yaml_path).parent
        config = json.dumps(entry.cfg, sort_keys=True, default=str).replace(f"{here}/", "")
        beside = [file for file in here.iterdir() if file.suffix not in _YAML and not file.name.startswith(".")]
        files = {file.name: file for file in beside} | _data_files(entry.cfg or {})
        return [config, {name: sha256_of(file) for name, file in files.items() if file.is_file()}]


def _data_files(config: dict[str, Any]) -> dict[str, Path]:
    """Files of this machine that a task names as its data."""
    named = (config.get("dataset_kwargs") or {}).get("data_files") or []
    groups = named.values() if isinstance(named, dict) else [named]
    texts = [text for group in groups for text in (group if isinstance(group, list) else [group])]
    return {text: Path(text) for text in texts if isinstance(text, str)}


@contextmanager
def _messages() -> Iterator[list[tuple[int, str]]]:
    """What the harness logs about the files that it reads; none of it reaches the terminal."""
    said: list[tuple[int, str]] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append((record.levelno, record.getMessage()))

    handler = Keeping()
    logger = logging.getLogger("lm_eval.tasks._index")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
