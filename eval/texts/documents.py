"""Random documents of a data set of the Hub, streamed: the same ones for the same seed.

Every document that is not blank gets a number drawn uniformly from [0, 1), in the order of the split, from NumPy's
PCG64 seeded with the seed; those with the smallest numbers are taken. That is a uniform choice without replacement; a
smaller one from the same seed is part of a larger one; and the whole split is read, once, while no more than the
chosen documents are kept.
"""

import hashlib
import heapq
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from periln.runkit.errors import UsageError, UserError, did_you_mean
from periln.runkit.folder import write_text
from periln.runkit.hub import hub_reason, quiet_hub
from periln.runkit.texts import described_problem

METHOD = "the smallest of uniform draws, one a document that is not blank, in the split's order (PCG64 of the seed)"


@dataclass(frozen=True)
class Source:
    """A split of a data set of the Hub, and the column that holds its texts."""

    dataset: str
    config: str | None
    split: str
    column: str
    revision: str | None = None

    @property
    def words(self) -> str:
        """`allenai/c4 en validation`."""
        return " ".join(part for part in (self.dataset, self.config, self.split) if part)

    @property
    def is_c4(self) -> bool:
        """Whether the paper's C4 loss is measured on it: the English validation split."""
        return (self.dataset, self.config, self.split) == ("allenai/c4", "en", "validation")

    @property
    def task(self) -> str:
        """The name of its results."""
        return "c4" if self.is_c4 else next((name for name, known in KNOWN.items() if known == self.bare), self.words)

    @property
    def bare(self) -> "Source":
        return replace(self, revision=None)


KNOWN = {
    "c4": Source("allenai/c4", "en", "validation", "text"),
    "wikitext-pages": Source("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test", "page"),
}


@dataclass(frozen=True)
class Sample:
    """Chosen documents, in the order of the split, and the number that they were chosen from."""

    source: Source
    seed: int
    texts: list[str]
    of: int

    @property
    def sha256(self) -> str:
        return hashlib.sha256("\0".join(self.texts).encode()).hexdigest()


def named(dataset: str, config: str | None, split: str | None, column: str | None, revision: str | None) -> Source:
    """The source that the flags name: one of `KNOWN` by name or id, with the given values replacing its own."""
    for name, known in KNOWN.items():
        if dataset in (name, known.dataset):
            given = {"config": config, "split": split, "column": column, "revision": revision}
            return replace(known, **{key: value for key, value in given.items() if value is not None})
    return Source(dataset, config, split or "validation", column or "text", revision)


def choose(
    texts: Iterable[str], count: int, seed: int, fits: Callable[[int, str], bool] = lambda number, text: True
) -> tuple[list[str], int]:
    """`count` of the texts (all, if there are no more), in their order, and the number of texts that are not blank.

    A text that does not fit (by its number, from 1) takes its draw but is left out.
    """
    generator, number = np.random.default_rng(seed), 0
    heap: list[Any] = []
    draws: list[float] = []
    for text in texts:
        if not text.strip():
            continue
        if not draws:
            draws = generator.random(4096).tolist()[::-1]
        entry = (-draws.pop(), number, text)
        if not fits(number + 1, text):
            pass
        elif len(heap) < count:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)
        number += 1
    return [text for _, _, text in sorted(heap, key=lambda entry: entry[1])], number


def stream(source: Source, bar: tqdm) -> tuple[Source, Iterable[str]]:
    """The source at the Hub's current commit, and its texts one by one.

    Raises:
        UserError: the Hub does not have it, or does not answer (now or midway); no such configuration, split or
            column.
    """
    try:
        from datasets import load_dataset
        from huggingface_hub import HfApi, constants

        quiet_hub()
        if source.revision is None and not constants.is_offline_mode():
            source = replace(source, revision=HfApi().dataset_info(source.dataset).sha)
        rows = load_dataset(source.dataset, source.config, split=source.split, streaming=True, revision=source.revision)
    except Exception as error:  # datasets and the Hub raise a dozen kinds; the user needs one sentence
        raise UserError(f"{source.words}: {hub_reason(error)}") from error

    def texts() -> Iterable[str]:
        try:
            for row in rows:
                bar.update(1)
                if source.column not in row:
                    near = did_you_mean(source.column, list(row))
                    raise UsageError(
                        f"{source.words} has no column {source.column!r}{near}: it has {', '.join(row)} (--column)"
                    )
                yield row[source.column]
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{source.words} broke off after {bar.n} documents: {hub_reason(error)}") from error

    return source, texts()


def draw(source: Source, count: int, seed: int, bar: tqdm) -> Sample:
    """Choose `count` documents of the source.

    Raises:
        UserError: see `stream`; or it has no text.
    """
    source, texts = stream(source, bar)

    def fits(number: int, text: str) -> bool:
        if problem := described_problem(text):
            tqdm.write(f"{source.words}, document {number}, is left out: its text {problem}")
        return problem is None

    chosen, of = choose(texts, count, seed, fits)
    if not chosen:
        raise UserError(f"{source.words} has no text in its column {source.column!r}")
    return Sample(source, seed, chosen, of)


# --- a sample on disk ----------------------------------------------------------------------------------------


def _head(source: Source, count: int, seed: int) -> dict[str, Any]:
    names = ("dataset", "config", "split", "column")
    return {name: getattr(source, name) for name in names} | {"asked": count, "seed": seed}


def write_sample(path: Path, sample: Sample, count: int) -> None:
    """A .jsonl whose first line records the choice; a `text` a line follows."""
    head = _head(sample.source, count, sample.seed) | {"revision": sample.source.revision, "of": sample.of}
    lines = [{"sample": head}, *({"text": text} for text in sample.texts)]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_sample(path: Path, source: Source, count: int, seed: int) -> Sample:
    """What `write_sample` wrote.

    Raises:
        UserError: it is of another choice, or not a sample.
    """
    try:
        head, *lines = (json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line)
        found, texts = head["sample"], [line["text"] for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a sample of documents ({error}); give --sample another name") from error
    asked = _head(source, count, seed)
    if other := [f"{key} {found.get(key)!r}, not {value!r}" for key, value in asked.items() if found.get(key) != value]:
        raise UserError(f"{path} holds another sample ({'; '.join(other)}); it is left alone: give another name")
    if source.revision not in (None, found["revision"]):
        raise UserError(f"{path} holds a sample of revision {found['revision']}, not {source.revision}")
    return Sample(replace(source, revision=found["revision"]), seed, texts, found["of"])
