"""Token shards: one endless stream of ids cut into files of equal size, and where its documents end.

`train-00000.bin` holds ids (little-endian uint16 or uint32), `train-00000.ends` the places behind each document
that ends in it (uint32, counted from the shard's start). A document may begin in one shard and end in the next.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from periln.runkit.folder import sha256_of

ENDS = np.dtype("<u4")
LARGEST_SHARD = (1 << 32) - 1  # tokens; a place must fit into ENDS


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of the two types that holds ids below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def shard_name(number: int, kind: str) -> str:
    return f"train-{number:05d}.{kind}"


class ShardWriter:
    """Appends tokens; `state()` after `sync()` is enough to resume after a kill, whatever was written after it.

    Args:
        state: of an earlier process; None: from the start. Files are cut back to it.
    """

    def __init__(self, folder: Path, dtype: np.dtype, shard_tokens: int, state: dict[str, Any] | None = None):
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens
        state = state or {"shards": [], "tokens": 0, "documents": 0, "bytes": 0}
        self.shards: list[dict[str, Any]] = list(state["shards"])
        self.tokens, self.documents, self.bytes = state["tokens"], state["documents"], state["bytes"]
        kept = {shard[kind] for shard in self.shards for kind in ("file", "ends")}
        here = self.tokens - sum(shard["tokens"] for shard in self.shards)
        ended = self.documents - sum(shard["documents"] for shard in self.shards)
        current = [shard_name(len(self.shards), kind) for kind in ("bin", "ends")]
        for path in folder.glob("train-*"):
            if path.name not in (*kept, *current):
                path.unlink()
        self._open(here, ended)

    def _open(self, tokens: int, documents: int) -> None:
        """The current shard's files, cut to these lengths."""
        number = len(self.shards)
        self._files = []
        for kind, size in (("bin", tokens * self.dtype.itemsize), ("ends", documents * ENDS.itemsize)):
            file = open(self.folder / shard_name(number, kind), "ab")  # noqa: SIM115
            file.truncate(size)
            self._files.append(file)
        self._here, self._ended = tokens, documents

    def append(self, ids: np.ndarray, lengths: np.ndarray, size: int) -> None:
        """Documents of `lengths` tokens each, one behind the other in `ids`; `size` bytes of text."""
        ends = np.cumsum(lengths, dtype=np.int64)
        begin = written = 0
        while begin < len(ids):
            room = self.shard_tokens - self._here
            stop = min(begin + room, len(ids))
            ended = int(np.searchsorted(ends, stop, side="right"))
            self._files[0].write(ids[begin:stop].astype(self.dtype, copy=False).tobytes())
            self._files[1].write((ends[written:ended] - begin + self._here).astype(ENDS).tobytes())
            self._here, self._ended = self._here + stop - begin, self._ended + ended - written
            begin, written = stop, ended
            if self._here == self.shard_tokens:
                self._finish()
                self._open(0, 0)
        self.tokens, self.documents, self.bytes = (
            self.tokens + len(ids),
            self.documents + len(lengths),
            self.bytes + size,
        )

    def sync(self) -> None:
        """Everything appended so far is on the disk."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())

    def _finish(self) -> None:
        self.sync()
        self.close()
        paths = [Path(file.name) for file in self._files]
        self.shards.append(
            {
                "file": paths[0].name,
                "tokens": self._here,
                "sha256": sha256_of(paths[0]),
                "ends": paths[1].name,
                "documents": self._ended,
                "ends_sha256": sha256_of(paths[1]),
            }
        )

    def state(self) -> dict[str, Any]:
        return {"shards": self.shards, "tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}

    def close(self) -> None:
        for file in self._files:
            file.close()

    def end(self) -> list[dict[str, Any]]:
        """Finish the last shard; the entries of all of them."""
        if self._here:
            self._finish()
        else:
            self.close()
            for file in self._files:
                os.unlink(file.name)
        return self.shards
