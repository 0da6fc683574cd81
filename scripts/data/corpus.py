"""Documents on their way to tokens: checked, without duplicates, split into train and held-out, in batches.

Each batch carries a mark: everything that another process needs to resume after it as if nothing had happened.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from periln.runkit.errors import UserError
from periln.runkit.texts import UNDECODABLE, problem_of
from periln.scripts.data.documents import LONGEST, TOO_LONG, Document, Source, digest64
from periln.scripts.data.sources import INSTALLED as INSTALLED

BATCH_DOCUMENTS, BATCH_BYTES = 256, 1 << 20
LISTED = 10_000  # names listed for each reason of skipping; all are counted


@dataclass(frozen=True)
class Limits:
    """What is taken of a source.

    Attributes:
        heldout_share: of the documents, by a hash of their names.
        max_bytes: reading ends with the document that reaches it; None: no limit.
        heldout_documents: the most that are held out; later ones go to training. None: no limit.
        max_document_bytes: longer documents are skipped; None: those of more than `sources.LONGEST`.
    """

    heldout_share: float
    max_bytes: int | None = None
    heldout_documents: int | None = None
    max_document_bytes: int | None = None


@dataclass
class Mark:
    """The state of a reading between two batches; JSON by `vars`.

    Attributes:
        position: of the source.
        documents, bytes: read and kept so far, for training and held out.
        waiting: [part, name, text] of documents whose part is not decided yet.
        settled: there is a training and a held-out document; from then on the hash of the name decides alone.
        lengths: bytes of the record files.
        done: the source has no more, or the limit is reached.
    """

    position: Any = None
    documents: int = 0
    bytes: int = 0
    heldout_documents: int = 0
    heldout_bytes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    waiting: list[list[str]] = field(default_factory=list)
    settled: bool = False
    lengths: dict[str, int] = field(default_factory=dict)
    done: bool = False


@dataclass
class Batch:
    """Training texts, and the mark behind them."""

    texts: list[str]
    mark: Mark


class HashSet:
    """64-bit numbers in one flat table, at most half full: 16 to 32 bytes a number where Python's set takes 70.

    Two different documents in 30 million share 8 bytes of hash with a probability of 2e-5.
    """

    def __init__(self) -> None:
        self._count = 0
        self._allot(1 << 12)

    def _allot(self, size: int) -> None:
        self._mask, self._table = size - 1, memoryview(np.zeros(size, dtype=np.uint64))

    def add(self, number: int) -> bool:
        """True where the number is new."""
        number = number or 1  # 0 marks a free place
        table, mask, place = self._table, self._mask, number & self._mask
        while table[place]:
            if table[place] == number:
                return False
            place = (place + 1) & mask
        table[place] = number
        self._count += 1
        if self._count * 2 > mask:
            self._allot(2 * (mask + 1))
            self._count = 0
            for old in table:
                if old:
                    self.add(old)
        return True


class SideFiles:
    """Held-out text, skipped names and hashes: files written while a corpus is read, each cut back to a mark."""

    NAMES = ("heldout.jsonl", "skipped.jsonl", "hashes.bin")

    def __init__(self, folder: Path, lengths: dict[str, int]):
        self.files = {}
        for name in self.NAMES:
            file = open(folder / name, "ab")  # noqa: SIM115
            file.truncate(lengths.get(name, 0))
            file.seek(0, 2)
            self.files[name] = file

    def write(self, name: str, data: bytes) -> None:
        self.files[name].write(data)

    def line(self, name: str, record: dict[str, str]) -> None:
        self.write(name, (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))

    def lengths(self) -> dict[str, int]:
        return {name: file.tell() for name, file in self.files.items()}

    def sync(self) -> None:
        """Everything written so far is on the disk."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

    def end(self, lengths: dict[str, int]) -> None:
        """Drop what was read ahead of the last mark, and close."""
        for name, file in self.files.items():
            file.truncate(lengths.get(name, 0))
            file.flush()
            os.fsync(file.fileno())
            file.close()


class Corpus:
    """The documents of a source, from a mark on.

    The split is by document, from a hash of its name, so that it does not change when documents are added. If
    chance leaves the held-out part empty, the last document is held out, or, of a single document, its end.

    Args:
        records: where the reading leaves its traces; None: nowhere (a look at the text, for a tokenizer).
        hashes: of the documents kept before `mark`.
    """

    def __init__(
        self, source: Source, limits: Limits, records: SideFiles | None = None, mark: Mark | None = None, hashes=()
    ):
        self.source, self.limits, self.records, self.mark = source, limits, records, mark or Mark()
        self._seen = HashSet()
        for number in hashes:
            self._seen.add(number)

    def batches(self) -> Iterator[Batch]:
        """The training text, in batches that depend on nothing but the source and the limits."""
        mark = self.mark
        texts, size = [], 0
        for document in self._kept(mark):
            texts += self._placed(document)
            size += len(document.text)
            full = self.limits.max_bytes is not None and mark.bytes >= self.limits.max_bytes
            # Of what is read, not of what is for training: else a mark would depend on where a process began.
            if size >= BATCH_BYTES or mark.documents % BATCH_DOCUMENTS == 0 or full:
                if full:
                    break
                yield Batch(texts, self._snapshot())
                texts, size = [], 0
        texts += self._last()
        mark.done = True
        yield Batch(texts, self._snapshot())

    def _snapshot(self) -> Mark:
        mark = self.mark
        mark.position = self.source.position()
        if self.records:
            mark.lengths = self.records.lengths()
        return Mark(**json.loads(json.dumps(vars(mark))))

    # --- which documents ---------------------------------------------------------------------------------
    def _kept(self, mark: Mark) -> Iterator[Document]:
        longest = min(self.limits.max_document_bytes or LONGEST, LONGEST)
        for name, text, problem in self.source.read(mark.position):
            text = text.strip()
            try:
                encoded = text.encode()
            except UnicodeEncodeError:  # half a surrogate pair, as JSON may hold
                encoded, problem = b"", UNDECODABLE
            key = int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")
            if problem is None and not text:
                problem = "empty"
            elif problem is None and len(encoded) > longest:
                problem = TOO_LONG
            elif problem is None and (unfit := problem_of(text)):
                problem = unfit
            elif problem is None and not self._seen.add(key):
                problem = "duplicate"
            if problem is not None:
                self._skip(problem, name)
                continue
            mark.documents += 1
            mark.bytes += len(encoded)
            if self.records:
                self.records.write("hashes.bin", key.to_bytes(8, "little"))
            yield Document(name, text)

    def _skip(self, reason: str, name: str) -> None:
        count = self.mark.skipped.get(reason, 0)
        self.mark.skipped[reason] = count + 1
        if self.records and count < LISTED:
            self.records.line("skipped.jsonl", {"reason": reason, "name": name})

    # --- which part --------------------------------------------------------------------------------------
    def _placed(self, document: Document) -> list[str]:
        """The texts that this document releases for training."""
        mark, most = self.mark, self.limits.heldout_documents
        taken = mark.heldout_documents + sum(part == "heldout" for part, _, _ in mark.waiting)
        chosen = digest64("split " + document.name) % 10_000 < self.limits.heldout_share * 10_000
        part = "heldout" if chosen and (most is None or taken < most) else "train"
        if mark.settled:
            return self._release([[part, document.name, document.text]])
        mark.waiting.append([part, document.name, document.text])
        parts = {part for part, _, _ in mark.waiting}
        mark.settled = len(parts) == 2
        if mark.settled:
            ready, mark.waiting = mark.waiting, []
        elif parts == {"train"}:  # the last one may have to be held out
            ready, mark.waiting = mark.waiting[:-1], mark.waiting[-1:]
        else:
            ready = []
        return self._release(ready)

    def _release(self, documents: list[list[str]]) -> list[str]:
        for part, name, text in documents:
            if part == "heldout":
                self.mark.heldout_documents += 1
                self.mark.heldout_bytes += len(text.encode())
                if self.records:
                    self.records.line("heldout.jsonl", {"name": name, "text": text})
        return [text for part, _, text in documents if part == "train"]

    def _last(self) -> list[str]:
        """What still waits at the end finds its place."""
        mark = self.mark
        if not mark.documents:
            reasons = ", ".join(f"{count} {reason}" for reason, count in mark.skipped.items()) or "there is none"
            raise UserError(f"no text found: every document of the source was skipped ({reasons})")
        waiting, mark.waiting = mark.waiting, []
        if not waiting:
            return []
        _, name, text = waiting[-1]
        if mark.documents == 1:
            share = 1 - self.limits.heldout_share
            cut = text.rfind("\n", 0, int(len(text) * share))
            cut = cut if cut > 0 else int(len(text) * share)
            self._release([["heldout", name + " (end)", text[cut:].strip() or text[-1:]]])
            return [text[:cut]]
        self._release([["heldout", name, text]])
        return [text for _, _, text in waiting[:-1]]
