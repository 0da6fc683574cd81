"""Tokens on disk, and the one fixed order in which training reads them.

A data folder holds `train.bin` (flat token ids, little-endian), `index.json` (dtype, counts, document
boundaries, fingerprint), `heldout.jsonl` (the held-out text) and `tokenizer/`.
"""

import json
from pathlib import Path

import numpy as np

from runkit.errors import UserError
from runkit.folder import read_json


class TokenData:
    """A prepared data folder, memory-mapped.

    Raises:
        UserError: the folder is missing, unfinished, or its token file has not the size that the index says.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / "index.json").exists():
            raise UserError(f"data: {self.path} holds no prepared tokens (no index.json): run scripts.prepare_data")
        self.index = read_json(self.path / "index.json")
        file = self.path / "train.bin"
        dtype = np.dtype(self.index["dtype"]).newbyteorder("<")
        expected = self.index["tokens"] * dtype.itemsize
        if not file.exists() or file.stat().st_size != expected:
            raise UserError(f"data: {file} is missing or not {expected} bytes long: prepare the data again")
        self.tokens = np.memmap(file, dtype=dtype, mode="r")
        self.fingerprint: str = self.index["fingerprint"]
        self.vocab_size: int = self.index["vocab_size"]
        self.tokenizer_path = self.path / "tokenizer"

    def heldout_documents(self) -> list[str]:
        """The held-out texts, in order."""
        with open(self.path / "heldout.jsonl", encoding="utf-8") as file:
            return [json.loads(line)["text"] for line in file]


class FixedOrder:
    """Step k's batch as a function of (seed, k) alone.

    The token stream is cut into windows of `sequence_length` + 1 tokens (inputs, and targets one place on).
    Epoch e reads all windows in the permutation drawn from (seed, e); step k takes the windows k * B to
    k * B + B - 1 of the endless sequence of epochs. Nothing is remembered between steps, so that no restart and
    no number of processes can change the order.
    """

    def __init__(self, data: TokenData, sequence_length: int, batch_size: int, seed: int):
        self.data, self.sequence_length, self.batch_size, self.seed = data, sequence_length, batch_size, seed
        self.windows = (len(data.tokens) - 1) // sequence_length
        if self.windows < 1:
            raise UserError(
                f"data: {data.path} has {len(data.tokens)} tokens, fewer than one sequence of "
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

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of step `step`, each (B, S) int64."""
        length = self.sequence_length
        rows = [self.data.tokens[n * length : n * length + length + 1] for n in self.window_numbers(step)]
        block = np.stack(rows).astype(np.int64)
        return block[:, :-1], block[:, 1:]
