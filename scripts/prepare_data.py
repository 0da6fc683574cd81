"""Text to token shards: `python -m scripts.prepare_data --source installed-python --out data/`.

The work happens in a hidden folder next to the result (`.data.<hash of the options>.work`) and is committed every few
seconds; after a kill at any moment, the same command resumes there. The result appears by a rename and is the same to
the byte, whatever happened on the way and however many workers there were.

Memory is bounded whatever the documents are: a text of more than `sources.LONGEST` bytes is skipped, batches wait for
workers up to `encoders.AHEAD` characters, and a worker encodes `encoding.PIECE` characters at once. Beside these there
are 16 to 32 bytes a document for its hash, and what `pyarrow` holds of a row (of a Hub dataset that is neither JSON
lines nor Parquet, what `datasets` holds of one).
"""

import sys

from periln.scripts.arguments.prepare_data import SAVE_SECONDS, check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("scripts.prepare_data", parse, check))  # parses before the imports below, which take seconds

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from periln.runkit.encoding import PIECE, added_around, begin_documents_with
from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import read_json, room_for, sha256_of, write_folder, write_json
from periln.runkit.process import start_stage
from periln.runkit.progress import progress_bar
from periln.runkit.texts import without_long_runs
from periln.scripts.data.corpus import Batch, Corpus, Mark, SideFiles
from periln.scripts.data.documents import Source
from periln.scripts.data.encoders import Encoded, Encoders
from periln.scripts.data.local_files import InstalledPython
from periln.scripts.data.machine_text import InstalledText
from periln.scripts.data.options import Options
from periln.scripts.data.same_data import content_of, without_places
from periln.scripts.data.shards import ShardWriter, token_dtype
from periln.scripts.data.sources import BPE, HUB, INSTALLED, OF_THIS_MACHINE
from periln.scripts.data.token_data import TokenData
from periln.scripts.data.tokenization import SPECIAL_TOKENS as SPECIAL_TOKENS
from periln.scripts.data.tokenization import load_tokenizer, vocabulary_size
from periln.scripts.data.tokenization import train_tokenizer as train_tokenizer
from periln.scripts.data.work_folder import DOCUMENT, publish, standing, work_folder

SAMPLE_RUN = 1000  # characters of one kind in a row; a BPE is trained in time quadratic in them


def prepare(
    source: str,
    out: Path,
    vocab_size: int | None = None,
    max_bytes: int | None = None,
    heldout_share: float = 0.02,
    context: int | None = None,
    *,
    workers: int = 1,
    save_seconds: float = SAVE_SECONDS,
    tiktoken_file: str | None = None,
    bar: int | None = None,
    **more: Any,
) -> dict:
    """Prepare `out`, whole or not at all; data already there with the same options is kept.

    Args:
        workers: tokenizing processes.
        save_seconds: a kill costs at most this much work.
        tiktoken_file: a rank file, where tiktoken shall not fetch it.
        bar: line of the progress bar; None: no bar.
        more: other fields of `Options`.
    Returns:
        index.json's content.
    Raises:
        UsageError, UserError: options, source or tokenizer are impossible; or `out` holds something else.
    """
    if more.get("tokenizer", BPE) == BPE:
        vocab_size, context = vocab_size or 2048, context or 512
    elif vocab_size is not None:
        raise UsageError(f"vocab_size belongs to the tokenizer {BPE}; {more['tokenizer']} has its own")
    if workers < 1:
        raise UsageError(f"workers must be at least 1, not {workers}")
    if Path(more.get("tokenizer", BPE)).is_dir():
        more["tokenizer"] = str(Path(more["tokenizer"]).resolve())
    local = source not in OF_THIS_MACHINE and not source.startswith(HUB)
    options = Options(
        str(Path(source).resolve()) if local else source, vocab_size, max_bytes, heldout_share, context, **more
    )
    options.check()
    if (index := standing(out, options)) is not None:
        return index
    with room_for(out), work_folder(out, options) as work:
        if standing(out, options) is None:  # else another process was here while we waited for the folder
            if not (work / "index.json").exists():
                _fill(work, options, workers, save_seconds, tiktoken_file, bar)
            publish(work, out)
    return read_json(out / "index.json")


# --- the parts of the work -----------------------------------------------------------------------------------
def _pinned(work: Path, source: Source) -> dict[str, Any]:
    """What the source was when the work began."""
    if (work / "source.json").exists():
        try:
            return source.pin(read_json(work / "source.json"))
        except UserError as error:
            if not isinstance(source, (InstalledPython, InstalledText)):
                raise UserError(f"{error}: remove {work} to start over") from error
            tqdm.write("the installed packages have changed since this began: starting over")
            for path in work.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(work / "source.json", source.pin(None))
    return source.pin(read_json(work / "source.json"))


def _tokenizer(
    work: Path, source: Source, options: Options, tiktoken_file: str | None
) -> tuple[PreTrainedTokenizerFast, dict[str, list[int]]]:
    """The tokenizer of this work, made once, and what surrounds each document: its own special tokens.

    The kept tokenizer does the first half of that, so that a prompt begins like a document and does not end like one.
    """
    folder = work / "tokenizer"
    if not folder.exists():
        if options.tokenizer == BPE:
            made = train_tokenizer(_sample(source, options), options.vocab_size, options.context)
        else:
            made = load_tokenizer(options.tokenizer, options.tokenizer_revision, tiktoken_file, options.context)
        begin, end = added_around(made)
        end = end if end[-1:] == [made.eos_token_id] else [*end, made.eos_token_id]
        begin_documents_with(made, begin)
        if not (work / DOCUMENT).exists():
            write_json(work / DOCUMENT, {"begins_with": begin, "ends_with": end})
        with write_folder(folder) as temporary:
            made.save_pretrained(temporary)
    tokenizer = load_tokenizer(str(folder))
    if not (work / DOCUMENT).exists():  # begun by a version that put nothing before a document
        return tokenizer, {"begins_with": [], "ends_with": [tokenizer.eos_token_id]}
    document = read_json(work / DOCUMENT)
    if added_around(tokenizer) != (document["begins_with"], []):
        raise UserError(f"tokenizer: {options.tokenizer}, saved and loaded again, begins a text in another way")
    return tokenizer, document


def _sample(source: Source, options: Options) -> Iterator[str]:
    """The text that the BPE is trained on, in pieces that it can count in bounded time and memory."""
    size = 0
    for batch in Corpus(source, options.limits).batches():
        for text in batch.texts:
            for part in without_long_runs(text, SAMPLE_RUN):
                while len(part) > PIECE:
                    cut = part.rfind("\n", PIECE // 2, PIECE) + 1 or PIECE
                    yield part[:cut]
                    part = part[cut:]
                yield part
            size += len(text)
            if size >= options.sample_bytes:
                return


# --- the work ---------------------------------------------------------------------------------------------
def _fill(
    work: Path, options: Options, workers: int, save_seconds: float, tiktoken_file: str | None, bar: int | None
) -> None:
    """Everything that the finished folder holds, index.json last."""
    source = options.open_source()
    pinned = _pinned(work, source)
    tokenizer, document = _tokenizer(work, source, options, tiktoken_file)
    state = read_json(work / "state.json") if (work / "state.json").exists() else None
    mark = Mark(**state["mark"]) if state else Mark()
    records = SideFiles(work, mark.lengths)
    vocabulary = vocabulary_size(tokenizer)
    dtype, cut = token_dtype(vocabulary), state.get("cut", 0) if state else 0
    shards = ShardWriter(work, dtype, options.shard_tokens, state and state["shards"])
    line, more = argparse.Namespace(bar=bar or 0), {"unit_scale": True, "initial": shards.tokens}
    progress = progress_bar(line, options.max_tokens, "tokens", "tok", shown=bar is not None, **more)

    def save(mark: Mark) -> None:
        records.sync()
        shards.sync()
        write_json(work / "state.json", {"mark": vars(mark), "shards": shards.state(), "cut": cut})

    if not mark.done:
        hashes = memoryview(np.fromfile(work / "hashes.bin", dtype=np.uint64))
        corpus = Corpus(source, options.limits, records, mark, hashes)
        around = (document["begins_with"], document["ends_with"])
        encoders = Encoders(workers, work / "tokenizer" / "tokenizer.json", *around, dtype)
        try:
            last = time.monotonic()
            batches = ((batch.texts, batch) for batch in corpus.batches())
            for encoded, batch in encoders.map(batches):
                mark = batch.mark
                cut += _append(shards, encoded, batch, options.max_tokens)
                progress.update(shards.tokens - progress.n)
                if mark.done or time.monotonic() - last >= save_seconds:
                    save(mark)
                    last = time.monotonic()
                if mark.done:
                    break
        finally:
            encoders.close()
            progress.close()
    records.end(mark.lengths)
    _end(work, options, {"source": pinned, "vocab_size": vocabulary, **document, "documents_cut": cut}, mark, shards)


def _append(shards: ShardWriter, encoded: Encoded, batch: Batch, most: int | None) -> int:
    """Write a batch, which ends the work where it reaches `most` tokens; the number of documents that were cut."""
    sizes = [len(text.encode()) for text in batch.texts]
    ids, lengths, count = encoded.ids, encoded.lengths, len(encoded.lengths)
    if most is not None:
        totals = shards.tokens + np.cumsum(lengths)
        count = min(count, int(np.searchsorted(totals, most)) + 1)
    shards.append(ids[: int(lengths[:count].sum())], lengths[:count], sum(sizes[:count]))
    batch.mark.done |= most is not None and shards.tokens >= most
    return int(encoded.differ[:count].sum())


def _end(work: Path, options: Options, known: dict[str, Any], mark: Mark, shards: ShardWriter) -> None:
    """The index, and with it the end of the work."""
    if not mark.heldout_documents:  # max_tokens came before chance, or the end, held a document out
        _, name, text = mark.waiting[-1]
        mark.heldout_documents, mark.heldout_bytes = 1, len(text.encode())
        line = json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n"
        (work / "heldout.jsonl").write_text(line, encoding="utf-8")
    entries = shards.end()
    digest = hashlib.sha256(json.dumps([without_places(options), entries], sort_keys=True).encode())
    digest.update(sha256_of(work / "tokenizer" / "tokenizer.json", work / "heldout.jsonl").encode())
    index = {
        "dtype": shards.dtype.name,
        "tokens": shards.tokens,
        "documents": shards.documents,
        "bytes": shards.bytes,
        "heldout_documents": mark.heldout_documents,
        "heldout_bytes": mark.heldout_bytes,
        "skipped": {reason: {"count": count} for reason, count in sorted(mark.skipped.items())},
        "shard_tokens": options.shard_tokens,
        "shards": entries,
        **known,
        "source": known["source"] | content_of(options),
        "options": asdict(options),
        "fingerprint": digest.hexdigest(),
    }
    write_json(work / "index.json", index)


# --- the command ------------------------------------------------------------------------------------------
def main(args: argparse.Namespace) -> None:
    start_stage(args)
    check(args)
    if args.verify:
        TokenData(args.out).verify()
        print(f"{args.out}: every shard is what index.json says")
        return
    if args.max_bytes is None and args.max_tokens is None and args.source == INSTALLED:
        args.max_bytes = 8_000_000
    chosen = {
        name: getattr(args, name) for name in Options.__dataclass_fields__ if name not in ("source", "vocab_size")
    }
    print(f"reading text from {args.source}")
    index = prepare(
        args.source,
        args.out,
        args.vocab_size,
        workers=args.workers,
        save_seconds=args.save_seconds,
        tiktoken_file=args.tiktoken_file,
        bar=args.bar,
        **chosen,
    )
    skipped = ", ".join(f"{v['count']} {k}" for k, v in index["skipped"].items()) or "none"
    print(
        f"{args.out}: {index['documents']} documents, {index['bytes'] / 1e6:.1f} MB, {index['tokens']:,} tokens of "
        f"{index['vocab_size']}; held out {index['heldout_documents']} documents; skipped: {skipped}"
    )
    if index.get("documents_cut"):
        print(
            f"{index['documents_cut']} documents longer than {PIECE} characters were encoded in pieces whose ids may "
            "differ at the cuts: this tokenizer knows no words"
        )
