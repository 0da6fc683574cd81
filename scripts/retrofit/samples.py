"""Calibration text as token ids, and other windows of the same text to look at the loss on."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from periln.runkit.encoding import added_around, text_ids
from periln.runkit.errors import UsageError, UserError
from periln.runkit.texts import problem_of
from periln.scripts.data.sources import open_source

_ENOUGH = 16  # characters of text read for every token asked for


@dataclass(frozen=True)
class Samples:
    """Token ids to calibrate on (N, S), ids that are never calibrated on (M, S), and what they are."""

    calibration: torch.Tensor
    check: torch.Tensor
    described: dict[str, Any]


def find_tokenizer(checkpoint: Path, asked: str) -> Any:
    """The tokenizer of a model folder.

    Raises:
        UsageError: there is none.
    """
    if not any((checkpoint / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UsageError(f"{asked} has no tokenizer to read calibration text with")
    try:
        return AutoTokenizer.from_pretrained(checkpoint)
    except Exception as error:  # tokenizers of every kind, each with its own errors
        raise UserError(f"the tokenizer of {asked} cannot be loaded ({' '.join(str(error).split())[:200]})") from error


def find_samples(tokenizer: Any, data: str, count: int, check: int, tokens: int, seed: int, vocabulary: int) -> Samples:
    """`count` + `check` windows of `tokens` ids of a text, none in two; each starts with what begins a document.

    Args:
        data: a .txt, .jsonl or .parquet file, a folder of them, `installed-python`, or hf: and a data set's id.

    Raises:
        UsageError: no such text, or too little of it.
        UserError: it cannot be read, or its ids are not the model's.
    """
    begins = added_around(tokenizer)[0]
    width, windows = tokens - len(begins), count + check
    if width < 2:
        raise UsageError(f"--tokens {tokens} has no room beside the {len(begins)} tokens that begin a document")
    ids = _ids(tokenizer, data, windows * width)
    whole = len(ids) // width
    if whole < windows:
        raise UsageError(
            f"--data {data} has {len(ids)} tokens, fewer than {count} + {check} windows of {width}: give more text, or "
            "fewer or shorter windows (--samples, --check-samples, --tokens)"
        )
    if int(ids.max()) >= vocabulary:
        raise UserError(f"the tokenizer gives the id {int(ids.max())}, but the model has {vocabulary} embeddings")
    starts = torch.randperm(whole, generator=torch.Generator().manual_seed(seed))[:windows] * width
    rows = torch.stack([ids[s : s + width] for s in starts.tolist()])
    rows = torch.cat([torch.tensor(begins, dtype=torch.long).expand(windows, -1), rows], dim=1)
    described = {"data": data if data.startswith("hf:") else Path(data).name, "samples": count, "check_samples": check}
    digest = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
    described |= {"tokens": tokens, "seed": seed, "ids_sha256": digest}
    return Samples(rows[:count], rows[count:], described)


def _ids(tokenizer: Any, data: str, wanted: int) -> torch.Tensor:
    """The ids of the text's beginning, document after document."""
    texts, read = [], 0
    for document in open_source(data).read(None):
        if document.problem is not None or problem_of(document.text) is not None:
            continue
        texts.append(document.text if document.text.endswith("\n") else f"{document.text}\n\n")
        read += len(texts[-1])
        if read > _ENOUGH * wanted:
            break
    return torch.tensor(text_ids(tokenizer)("".join(texts)) if texts else [], dtype=torch.long)
