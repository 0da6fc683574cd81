"""A preparation on disk: its result, whole or absent, and next to it the hidden folder of unfinished work."""

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from periln.runkit.errors import UserError
from periln.runkit.folder import read_json
from periln.scripts.data.options import Options
from periln.scripts.data.same_data import check_same_options

DOCUMENT = "document.json"  # what surrounds each document, in a folder of unfinished work


def standing(out: Path, options: Options) -> dict | None:
    """The index of the data that is at `out` already."""
    if (out / "index.json").exists():
        index = read_json(out / "index.json")
        check_same_options(out, index, options)
        return index
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty and holds no prepared data; give another folder")
    return None


@contextmanager
def work_folder(out: Path, options: Options) -> Iterator[Path]:
    """The hidden folder of this work, held for this process alone."""
    key = hashlib.sha256(json.dumps(asdict(options), sort_keys=True).encode()).hexdigest()[:8]
    work = out.with_name(f".{out.name}.{key}.work")
    try:
        work.mkdir(parents=True, exist_ok=True)
        if not os.access(work, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"cannot write {work}: {error.strerror}") from error
    with ExitStack() as stack:
        try:
            stack.enter_context(_held(work))
        except BlockingIOError as error:
            raise UserError(f"{out} is being prepared by another process; wait for it or stop it") from error
        try:
            yield work
        except UserError:
            if {path.name for path in work.iterdir()} <= {"source.json"}:  # refused before it began
                shutil.rmtree(work)
            raise


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Lock a folder; the lock dies with the process. Raises BlockingIOError where another holds it."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def publish(work: Path, out: Path) -> None:
    """The finished work takes its name; unfinished work of other options for the same name has no more use."""
    for name in ("state.json", "source.json", DOCUMENT, "hashes.bin"):
        (work / name).unlink(missing_ok=True)
    try:
        os.rename(work, out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise UserError(f"{out} has been filled by something else meanwhile; the data lies in {work}") from error
        raise
    for stale in out.parent.glob(f".{glob.escape(out.name)}.*.work"):
        try:
            with _held(stale):
                shutil.rmtree(stale, ignore_errors=True)
        except BlockingIOError:  # somebody is at it, and will be told at the end
            pass
