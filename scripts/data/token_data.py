"""Tokens on disk, and the one fixed order in which training reads them.

A data folder holds token shards (see `shards`), `index.json` (dtype, counts, shards with their hashes, fingerprint),
`heldout.jsonl` (the held-out text), `skipped.jsonl` and `tokenizer/`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import read_json, sha256_of
from periln.scripts.data.shards import ENDS, token_dtype

KEYS = ("dtype", "tokens", "vocab_size", "documents", "shard_tokens", "shards", "fingerprint")


class TokenData:
    """A prepared data folder, memory-mapped: one stream of `len(data)` tokens.

    Raises:
        UsageError: the folder is missing or unfinished.
        UserError: a shard is missing or not as long as the index says, or the
            index contradicts itself. Sizes are checked here, in no time; contents by `verify`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / "index.json").exists():
            raise UsageError(f"data: {self.path} holds no prepared tokens (no index.json): run scripts.prepare_data")
        self.index: dict[str, Any] = read_json(self.path / "index.json")
        missing = [key for key in KEYS if not isinstance(self.index, dict) or key not in self.index]
        if missing:
            raise UserError(f"data: {self.path}/index.json has no {', '.join(missing)}: prepare the data again")
        self.fingerprint: str = self.index["fingerprint"]
        self.vocab_size: int = self.index["vocab_size"]
        self.shard_tokens: int = self.index["shard_tokens"]
        self.tokenizer_path = self.path / "tokenizer"
        # An index without these is from when nothing came before a document, and the end-of-text id after it.
        self.begins_with: list[int] = self.index.get("begins_with", [])
        self.ends_with: list[int] | None = self.index.get("ends_with")
        self.dtype = token_dtype(self.vocab_size)
        self._check_index()
        shards = self.index["shards"]
        self._tokens = [self._mapped(s["file"], self.dtype, s["tokens"]) for s in shards]
        self._ends = [self._mapped(s["ends"], ENDS, s["documents"]) for s in shards]
        if not shards or not len(self._ends[-1]) or self._ends[-1][-1] != shards[-1]["tokens"]:
            raise self._lies("the last document does not end where the tokens end")

    def _lies(self, what: str) -> UserError:
        return UserError(f"data: {self.path}/index.json contradicts its shards ({what}): prepare the data again")

    def _check_index(self) -> None:
        index, shards = self.index, self.index["shards"]
        if self.dtype.name != index["dtype"]:
            raise self._lies(f"{index['vocab_size']} ids are {self.dtype.name}, not {index['dtype']}")
        for key in ("tokens", "documents"):
            if sum(shard[key] for shard in shards) != index[key]:
                raise self._lies(f"the shards' {key} do not sum to {index[key]}")
        whole = [shard["tokens"] for shard in shards[:-1]]
        last = shards[-1]["tokens"] if shards else 0
        if any(tokens != self.shard_tokens for tokens in whole) or last > self.shard_tokens:
            raise self._lies(f"a shard other than the last has not {self.shard_tokens} tokens")

    def _mapped(self, name: str, dtype: np.dtype, count: int) -> np.ndarray:
        file, expected = self.path / name, count * dtype.itemsize
        if not file.exists() or file.stat().st_size != expected:
            raise UserError(f"data: {file} is missing or not {expected} bytes long: prepare the data again")
        return np.memmap(file, dtype=dtype, mode="r") if count else np.empty(0, dtype=dtype)

    def verify(self) -> None:
        """Read every shard and compare it with the index.

        Raises:
            UserError: a changed file, an id outside the vocabulary, or documents that do not follow on each other.
        """
        for number, shard in enumerate(self.index["shards"]):
            for name, key in ((shard["file"], "sha256"), (shard["ends"], "ends_sha256")):
                if sha256_of(self.path / name) != shard[key]:
                    raise UserError(
                        f"data: {self.path / name} has changed since it was prepared: prepare the data again"
                    )
            tokens, ends = self._tokens[number], self._ends[number]
            if len(tokens) and tokens.max() >= self.vocab_size:
                raise self._lies(f"{shard['file']} has an id that is not below vocab_size {self.vocab_size}")
            if len(ends) and (np.any(ends[1:] <= ends[:-1]) or ends[-1] > len(tokens)):
                raise self._lies(f"{shard['ends']} is not ascending")

    def __len__(self) -> int:
        return self.index["tokens"]

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens from `start` to before `stop`, whatever shards they lie in; int64, shape (stop - start,)."""
        parts = [self._tokens[n][a:b] for n, a, b in self._pieces(start, stop)]
        return np.concatenate(parts).astype(np.int64)

    def document_ends(self, start: int, stop: int) -> np.ndarray:
        """The places e, start < e <= stop, where a document begins at e (the one before it ends at e - 1); int64."""
        found = []
        for number, first, last in self._pieces(start, stop):
            ends = self._ends[number]
            low, high = np.searchsorted(ends, (first, last), side="right")
            found.append(ends[low:high].astype(np.int64) + number * self.shard_tokens)
        return np.concatenate(found)

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(shard, first, last) of the stretch, in places of each shard."""
        if not 0 <= start < stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of {len(self)}")
        size = self.shard_tokens
        shards = range(start // size, (stop - 1) // size + 1)
        return [(n, max(start - n * size, 0), min(stop - n * size, size)) for n in shards]

    def heldout_documents(self) -> list[str]:
        """The held-out texts, in order."""
        with open(self.path / "heldout.jsonl", encoding="utf-8") as file:
            return [json.loads(line)["text"] for line in file]


class FixedOrder:
    """Step k's batch as a function of (seed, k) alone.

    The token stream is cut into windows of `sequence_length` + 1 tokens (inputs, and targets one place on).
    Epoch e reads all windows in the permutation drawn from (seed, e); step k takes the windows k * B to
    k * B + B - 1 of the endless sequence of epochs. Nothing is remembered between steps, so that no restart and
    no number of processes can change the order. Held in memory: one epoch's permutation, 8 bytes a window (29 MB
    for 30 billion tokens at a sequence length of 8192).
    """

    def __init__(self, data: TokenData, sequence_length: int, batch_size: int, seed: int):
        self.data, self.sequence_length, self.batch_size, self.seed = data, sequence_length, batch_size, seed
        self.windows = (len(data) - 1) // sequence_length
        if self.windows < 1:
            raise UserError(
                f"data: {data.path} has {len(data)} tokens, fewer than one sequence of "
                f"sequence_length {sequence_length} + 1"
            )
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def window_numbers(self, step: int) -> np.ndarray:
        """The B window numbers of step `step`, shape (B,)."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        numbers = np.empty(self.batch_size, dtype=np.int64)
        for epoch in np.unique(positions // self.windows):
            here = positions // self.windows == epoch
            numbers[here] = self._order_of(int(epoch))[positions[here] % self.windows]
        return numbers

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.windows)
            self._epoch = epoch
        return self._permutation

    def batch(self, step: int, rows: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of step `step`, each (B, S) int64; of `rows` alone, no other token is read."""
        length = self.sequence_length
        numbers = self.window_numbers(step)[rows]
        block = np.empty((len(numbers), length + 1), dtype=np.int64)
        for row, number in zip(block, numbers, strict=True):
            row[:] = self.data.read(number * length, (number + 1) * length + 1)
        return block[:, :-1], block[:, 1:]

    def position_ids(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """Positions that restart at 0 with each document, (B, S) int64, for the inputs of `batch`.

        Given to a Transformers model without an attention mask and with use_cache=False, they keep each token from
        seeing another document. A document that began before its window counts from the window's start.
        """
        length = self.sequence_length
        numbers = self.window_numbers(step)[rows]
        starts = np.zeros((len(numbers), length), dtype=np.int64)
        for row, number in zip(starts, numbers, strict=True):
            places = self.data.document_ends(number * length, (number + 1) * length) - number * length
            row[places[places < length]] = places[places < length]
        return np.arange(length) - np.maximum.accumulate(starts, axis=1)
