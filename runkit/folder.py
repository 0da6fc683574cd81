"""The run folder: the interface between the stages.

    recipe.yaml, environment.json, metrics.jsonl, layers/step_*.parquet, checkpoints/step_*/, eval/*.json,
    summary.json, and changes.jsonl where a field was changed on a resume

Tables, figures and cards are pure functions of it. Every file is written whole or not at all: into a
temporary file (or folder) next to its place, synced, then renamed.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from periln.runkit.errors import UsageError, UserError
from periln.runkit.recipes import dump_yaml, read_yaml, to_mapping
from periln.runkit.resume import Resumption, resumption

T = TypeVar("T")
CLAIM = {"recipe.yaml", "summary.json", "data.json"}  # what a folder may hold before the first step
STATUSES = ("running", "completed", "diverged", "interrupted", "failed")


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Turn a full disk, in whichever library it shows itself, into one sentence that names the path."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise UserError(f"no space on the disk: {path} could not be written; what was there is kept") from error
        raise


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: the old one stays until the new one is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for text."""
    write_bytes(path, text.encode())


def write_if_free(path: Path, text: str) -> None:
    """`write_text`, unless something else is there.

    Raises:
        UserError: something else is there; it is left alone.
    """
    if path.exists():
        if path.is_dir() or path.read_bytes() != text.encode():
            raise UserError(f"{path} exists and holds something else; it is left alone")
        return
    write_text(path, text)


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` for JSON. NaN and infinity are not JSON: give None."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        UserError: missing or damaged; names the path.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name; it appears at `path` only when the block ends without an error.

    A folder already at `path` is replaced, and removed after the rename.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, not a folder; it is left alone")
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with room_for(path):
            temporary.mkdir(parents=True)
            yield temporary
            _move_into_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_room(path: Path, size: int, what: str) -> None:
    """Refuse what does not fit on the disk of `path`, which need not exist yet.

    Raises:
        UserError: how much is needed, and how much is free.
    """
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise UserError(f"{path}: {what} takes {size / 2**30:.1f} GiB, and the disk has {free / 2**30:.1f} GiB free")


def _move_into_place(temporary: Path, path: Path) -> None:
    """Sync every file of a finished folder, then rename it."""
    for file in temporary.rglob("*"):
        if file.is_file():
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        else:
            _sync_folder(file)
    _sync_folder(temporary)
    if path.exists():
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
        os.rename(temporary, path)
        shutil.rmtree(old)
    else:
        os.rename(temporary, path)
    _sync_folder(path.parent)


def sha256_of(*paths: Path) -> str:
    """SHA-256 over the bytes of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def weights_hash(checkpoint: Path) -> str:
    """SHA-256 over a checkpoint's safetensors files, in the order of their names."""
    return sha256_of(*sorted(checkpoint.glob("*.safetensors")))


def called(path: str | Path) -> str:
    """A folder as a message calls it: as it was given, with `.` and `..` resolved."""
    return str(Path(path).resolve() if Path(path).name in ("", "..") else path)


class RunFolder:
    """One run on disk. Reading needs nothing but the folder; writing wants the lock."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metrics_path = self.path / "metrics.jsonl"
        self.checkpoints_path = self.path / "checkpoints"

    # --- recipe and summary ------------------------------------------------------------------------------
    @property
    def recipe(self) -> dict[str, Any]:
        return read_yaml(self.path / "recipe.yaml")

    @property
    def summary(self) -> dict[str, Any]:
        path = self.path / "summary.json"
        return read_json(path) if path.exists() else {}

    @property
    def status(self) -> str | None:
        return self.summary.get("status")

    @property
    def finished(self) -> bool:
        return self.status in ("completed", "diverged")

    @property
    def began(self) -> bool:
        """Whether the folder holds anything worth keeping.

        A command that was refused, or killed before its first step, leaves a claim at most: the recipe as `claim`
        writes it, and what is recorded about a run before it begins. That blocks nothing.
        """
        names = {
            file.relative_to(self.path).as_posix()
            for file in self.path.rglob("*")
            if file.is_file() and not file.name.startswith(".") and file.stat().st_size
        }
        if not names:
            return False
        return self.finished or not names <= CLAIM or not self._claimed_by_us()

    def _claimed_by_us(self) -> bool:
        file = self.path / "recipe.yaml"
        return file.exists() and file.read_text(encoding="utf-8") == dump_yaml(self.recipe)

    def check_claim(self, recipe: T) -> Resumption[T]:
        """What `claim` does, without writing.

        Returns:
            the recipe to continue with (`.recipe`), and what differs from when the run began.

        Raises:
            UserError: the folder belongs to another recipe (the differing fields are named), or holds
                files but no recipe.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file, not a folder; it is left alone: give another folder")
        if not self.began:
            return Resumption(recipe)
        if not (self.path / "recipe.yaml").exists():
            raise UserError(f"{self.path} holds files but no recipe.yaml; it is left alone: give another folder")
        found = resumption(self.recipe, recipe)
        if found.different:
            raise UserError(
                f"{self.path} belongs to another recipe ({'; '.join(found.different)}); "
                "give another folder, or remove this one"
            )
        return found

    def claim(self, recipe: T, tell: Callable[[str], None] = print) -> T:
        """Write the recipe, or check that the folder belongs to this very recipe; call it with the lock held.

        What may change on a resume is reported, written to recipe.yaml, and kept in changes.jsonl.

        Returns:
            the recipe to continue with. Raises as `check_claim`.
        """
        found = self.check_claim(recipe)
        text, file = dump_yaml(to_mapping(found.recipe)), self.path / "recipe.yaml"
        if not self.began and file.exists() and file.read_text(encoding="utf-8") != text:
            tell(f"{self.path} held another recipe, of a run that never began: it is replaced")
            for name in CLAIM:
                (self.path / name).unlink(missing_ok=True)
        for line in (*map(str, found.changes), *found.kept):
            tell(f"{self.path}: {line}")
        if found.changes:
            step = len(self.metrics())
            with open(self.path / "changes.jsonl", "a") as changes:
                changes.writelines(
                    json.dumps({"step": step, "field": c.name, "old": c.old, "new": c.new}) + "\n"
                    for c in found.changes
                )
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            write_text(file, text)
        return found.recipe

    def set_status(self, status: str, **more: Any) -> None:
        """Write summary.json: the status, and whatever else should be visible at once."""
        if status not in STATUSES:
            raise ValueError(f"status={status!r} is not one of {STATUSES}")
        who = {"host": socket.gethostname(), "pid": os.getpid()} if status == "running" else {}
        write_json(self.path / "summary.json", {"status": status, **who, **more})

    @contextmanager
    def locked(self, wait_seconds: float = 0.0, tell: Callable[[str], None] = print) -> Iterator[None]:
        """Hold the folder for writing. The lock dies with the process that holds it, however it ends.

        Raises:
            UserError: another live process holds it (after waiting `wait_seconds` for it to go).
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".periln.lock", "a+") as file:
            deadline, told = time.monotonic() + wait_seconds, False
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    file.seek(0)
                    holder = file.read().strip() or "another process"
                    if time.monotonic() >= deadline:
                        raise UserError(f"{self.path} is in use by {holder}; wait for it or stop it") from None
                    if not told:
                        tell(f"waiting for {holder} to release {self.path}")
                        told = True
                    time.sleep(0.2)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    # --- metrics -----------------------------------------------------------------------------------------
    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl; a last line cut by a crash is left out."""
        if not self.metrics_path.exists():
            return []
        records = []
        for line in self.metrics_path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    def truncate_metrics(self, steps: int) -> None:
        """Drop the records from step `steps` on, so that after a resume no step appears twice."""
        kept = [r for r in self.metrics() if r["step"] < steps]
        write_text(self.metrics_path, "".join(json.dumps(r, allow_nan=False) + "\n" for r in kept))

    # --- checkpoints -------------------------------------------------------------------------------------
    def checkpoint_path(self, step: int) -> Path:
        return self.checkpoints_path / f"step_{step:08d}"

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first (a folder under its final name is whole)."""
        return sorted(p for p in self.checkpoints_path.glob("step_*") if p.name.removeprefix("step_").isdigit())

    def evaluations(self) -> list[dict[str, Any]]:
        """What the evaluators wrote to eval/*.json."""
        return [read_json(p) | {"file": p.name} for p in sorted((self.path / "eval").glob("*.json"))]


def json_number(x: Any) -> Any:
    """The value without NaN and infinity, which are not JSON: None instead."""
    if isinstance(x, dict):
        return {k: json_number(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [json_number(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
