"""Samples to measure on: windows of equally many tokens from WikiText, another data set, or text on disk."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from modeling_periln.convert_options import WIKITEXT, WIKITEXT_2
from periln.eval.arguments.shared import TOKENS, check_data
from periln.runkit.encoding import added_around, text_ids
from periln.runkit.errors import UsageError, UserError
from periln.runkit.texts import usable

_ENOUGH = 16  # characters of text read for each requested token


@dataclass(frozen=True)
class Samples:
    """Token ids (N, S), what they are, and whether windows overlap because the text is short."""

    ids: torch.Tensor
    described: dict[str, Any]

    def batches(
        self, size: int, device: torch.device | str = "cpu", limit: int | None = None
    ) -> Iterator[torch.Tensor]:
        """Consecutive batches (B, S)."""
        ids = self.ids[:limit]
        for start in range(0, len(ids), size):
            yield ids[start : start + size].to(device)


def _file_texts(path: Path) -> Iterator[str]:
    try:
        yield from usable(_named_texts(path), tqdm.write)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"cannot read texts from {path}: {error}") from error


def _named_texts(path: Path) -> Iterator[tuple[str, str]]:
    if path.suffix == ".parquet":
        import pandas as pd  # half a second

        for number, text in enumerate(pd.read_parquet(path, columns=["text"])["text"], start=1):
            yield f"{path}, row {number}", text
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, line {number}", json.loads(line)["text"] + "\n\n"
    else:
        yield str(path), path.read_text(encoding="utf-8-sig")


def _hub_texts(name: str, config: str | None, split: str) -> Iterator[str]:
    from datasets import load_dataset

    label = ":".join(filter(None, (name, config, split)))
    try:
        rows = load_dataset(name, config, split=split, streaming=True)
        yield from usable(_hub_rows(rows, label), tqdm.write)
    except UserError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"cannot read the data set {label}: {said} (--data takes text on disk as well)") from error


def _hub_rows(rows: Any, label: str) -> Iterator[tuple[str, str]]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("text"), str):
            raise UsageError(f"the data set {label} has no column text (it has: {', '.join(row)})")
        yield f"{label}, row {number}", row["text"]


def read_data(data: str) -> Iterator[str]:
    """Texts of `wikitext`, of `hf:NAME[:CONFIG[:SPLIT]]`, or of a file or folder (.txt; .jsonl and .parquet: `text`).

    Raises:
        UsageError: none of these.
        UserError: it cannot be read.
    """
    if data == WIKITEXT:
        return _hub_texts(*WIKITEXT_2)
    if data.startswith("hf:"):
        name, config, split = [*data.removeprefix("hf:").split(":"), "", ""][:3]
        return _hub_texts(name, config or None, split or "train")
    path = Path(data)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl", ".parquet"))
        if not files:
            raise UsageError(f"--data {data} holds no .txt, .jsonl or .parquet file")
        return (text for file in files for text in _file_texts(file))
    check_data(data)
    return _file_texts(path)


def random_samples(vocabulary: int, samples: int, tokens: int, seed: int) -> Samples:
    """Uniformly random ids, for a model that has no tokenizer."""
    ids = torch.randint(0, vocabulary, (samples, tokens), generator=torch.Generator().manual_seed(seed))
    return Samples(ids, _described("random", ids, seed, overlapping=False))


def _described(data: str, ids: torch.Tensor, seed: int, overlapping: bool) -> dict[str, Any]:
    digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    samples, tokens = ids.shape
    known = {"data": data, "samples": samples, "tokens": tokens, "seed": seed, "overlapping": overlapping}
    return known | {"ids_sha256": digest}


def _token_ids(tokenizer: Any, texts: Iterator[str], wanted: int) -> torch.Tensor:
    ids: list[int] = []
    encode = text_ids(tokenizer)
    read, held, piece = 0, 0, []
    for text in texts:
        piece.append(text)
        read, held = read + len(text), held + len(text)
        if held > 100_000:
            ids += encode("".join(piece))
            held, piece = 0, []
        if read > _ENOUGH * wanted:
            break
    ids += encode("".join(piece))
    return torch.tensor(ids, dtype=torch.long)


def text_samples(
    tokenizer: Any, texts: Iterator[str], data: str, samples: int, tokens: int, seed: int, vocabulary: int
) -> Samples:
    """`samples` windows of `tokens` ids, chosen by `seed`; each starts with what begins a document.

    Windows do not overlap where the text has enough of them; else their starts are drawn anywhere, and `overlapping`
    says so.

    Raises:
        UserError: the text is shorter than one window, or the tokenizer's ids are not the model's.
    """
    begins = added_around(tokenizer)[0]
    width = tokens - len(begins)
    if width < 1:
        raise UserError(f"a sample of {tokens} tokens has no room next to the {len(begins)} that begin a document")
    ids = _token_ids(tokenizer, texts, samples * width)
    if len(ids) < width:
        raise UsageError(f"{data} gives {len(ids)} tokens, fewer than one sample of {width}")
    if int(ids.max()) >= vocabulary:
        raise UserError(f"the tokenizer gives the id {int(ids.max())}, but the model has {vocabulary} embeddings")
    generator = torch.Generator().manual_seed(seed)
    whole = len(ids) // width
    overlapping = whole < samples
    if overlapping:
        starts = torch.randint(0, len(ids) - width + 1, (samples,), generator=generator).sort().values
    else:
        starts = torch.randperm(whole, generator=generator)[:samples].sort().values * width
    rows = torch.stack([ids[s : s + width] for s in starts.tolist()])
    if begins:
        rows = torch.cat([torch.tensor(begins).expand(samples, -1), rows], dim=1)
    return Samples(rows, _described(data, rows, seed, overlapping))


def sample_sizes(tokenizer: Any, samples: Samples) -> list[int]:
    """Bytes of the text that every sample predicts; its tokens where there is no tokenizer."""
    if tokenizer is None:
        return [samples.ids.shape[1] - 1] * len(samples.ids)
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return [max(1, len(tokenizer.decode(row[1:].tolist(), **options).encode())) for row in samples.ids]


def find_samples(
    config: Any, tokenizer: Any, data: str, samples: int, tokens: int | None, seed: int, usual: int = TOKENS
) -> Samples:
    """What a model is measured on: windows of the texts of `data`; without a tokenizer (None), random ids.

    Args:
        config: the model's; it has the number of ids and positions.
        tokens: a sample's length; None: `usual`, or the model's positions if they are fewer.

    Raises:
        UsageError: more tokens a sample than the model has positions.
        UserError: `data` cannot be read, or is too short.
    """
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    tokens = tokens or min(usual, positions or usual)
    if positions is not None and tokens > positions:
        raise UsageError(f"--tokens {tokens} is more than the {positions} positions of the model")
    if tokenizer is None:
        return random_samples(config.vocab_size, samples, tokens, seed)
    return text_samples(tokenizer, read_data(data), data, samples, tokens, seed, config.vocab_size)
