"""Data that need no text: for measurements of the trainer, whose tokens may be any."""

from pathlib import Path

import numpy as np

from periln.scripts.data.token_data import TokenData
from periln.scripts.prepare_data import prepare

VOCABULARY = 300


def synthetic_folder(place: Path) -> Path:
    """`place`/data: prepared data with a tokenizer of `VOCABULARY` entries, made where it is not there yet."""
    folder = place / "data"
    if not (folder / "index.json").exists():
        text = place / "text"
        text.mkdir(parents=True, exist_ok=True)
        for i in range(200):
            (text / f"{i}.txt").write_text(" ".join(f"the {n} of {n * i % 89}" for n in range(300)))
        prepare(str(text), folder, vocab_size=VOCABULARY, heldout_share=0.05, context=128)
    return folder


class RandomTokens(TokenData):
    """Ids of a vocabulary of any size, drawn by their place: a folder's own touch few rows of a large table."""

    def __init__(self, path: Path, size: int):
        super().__init__(path)
        self.size = size

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids at `start` to before `stop`; int64, shape (stop - start,)."""
        return np.random.default_rng(start).integers(0, self.size, stop - start)
