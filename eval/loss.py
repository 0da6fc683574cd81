"""Measure the loss on random documents: by default 10,000 of C4's validation split, as the Peri-LN paper's C4 loss.

    python -m eval.loss runs/400m-peri runs/400m-pre
    python -m eval.loss ID --dataset wikitext-pages --packed --out results/

Mean loss over all tokens of the documents, in nats, with its standard error over documents, and bits a byte, which
can be compared between tokenizers. After a kill it resumes; an existing result is not computed again.
"""

import sys

from periln.eval.arguments.loss import CONTEXT, check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("eval.loss", parse, check))  # parses before the imports below, which take seconds

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from periln.eval.arguments.shared import batch_size
from periln.eval.options import device_of
from periln.eval.scoring.likelihood import fitting_batch_size
from periln.eval.targets import Target, find_target
from periln.eval.text_table import Table, to_terminal, values
from periln.eval.texts.documents import METHOD, Sample, draw, named, read_sample, write_sample
from periln.eval.texts.windows import Sums, make_windows, sum_losses, summarized
from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import called, read_json, write_json
from periln.runkit.process import quiet_transformers, start_stage
from periln.runkit.progress import progress_bar

SAVE_EVERY = 50  # batches


def head_of(target: Target, sample: Sample, args: argparse.Namespace) -> dict[str, Any]:
    """What the result is of: with equal heads, results are equal."""
    source = sample.source
    return {
        "evaluated": target.evaluated(),
        "harness": None,
        "suite": None,
        "limit": None,
        "kind": "c4" if source.is_c4 else "loss",
        "dataset": source.words,
        "dataset_revision": source.revision,
        "column": source.column,
        "documents": len(sample.texts),
        "of_documents": sample.of,
        "seed": sample.seed,
        "choice": METHOD,
        "text_sha256": sample.sha256,
        "packed": args.packed,
        "context_asked": args.context,
        "batch_size": batch_size(args.batch_size),
        "dtype_asked": args.dtype,
        "device": device_of(args.device),
    }


def file_of(target: Target, head: dict[str, Any], task: str) -> Path:
    """A file for these weights, documents and settings, so that no result replaces another's."""
    short = hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()[:8]
    name = "".join(c if c.isalnum() or c in "-." else "-" for c in task)
    return target.results / f"loss-{name}-{target.checkpoint.name}-{short}.json"


def context_of(target: Target, asked: int | None) -> int:
    """Tokens a window.

    Raises:
        UserError: more than the model has positions, or see `Target.positions`.
    """
    positions = target.positions()
    if asked is not None and positions is not None and asked > positions:
        raise UsageError(f"--context {asked} is more than the {positions} positions of {target.name}")
    return asked or min(CONTEXT, positions or CONTEXT)


def measure(target: Target, sample: Sample, head: dict[str, Any], file: Path, bar: tqdm) -> dict[str, Any]:
    """Compute and write the record; until it is whole, the sums so far are in a hidden file next to it."""
    model, tokenizer = target.load(head["device"], head["dtype_asked"])
    context = context_of(target, head["context_asked"])
    size = head["batch_size"]
    if size == "auto":
        size = fitting_batch_size(context, model.config.get_text_config().vocab_size, model.device)
    windows = make_windows(sample.texts, tokenizer, context, head["packed"])
    partial, key = file.with_name(f".{file.stem}.partial"), {"batch": size, "windows": len(windows.ids)}
    sums = Sums.zeros(len(sample.texts))
    if partial.exists() and (old := read_json(partial))["key"] == key:
        nats, tokens = (torch.tensor(old[name], dtype=torch.float64) for name in ("nats", "tokens"))
        sums = Sums(nats, tokens, old["batches"])
    bar.reset(total=-(-len(windows.ids) // size))
    bar.update(sums.batches)

    def after(done: int, batches: int) -> None:
        bar.update(1)
        if not sums.nats.isfinite().all():
            raise UserError(f"{target.name}: the loss is not finite in {model.dtype}; try --dtype float32")
        if done % SAVE_EVERY == 0 and done < batches:
            values = {"nats": sums.nats.tolist(), "tokens": sums.tokens.tolist(), "batches": done}
            write_json(partial, {"key": key} | values)

    sum_losses(model, windows, sums, size, after)
    found = {"context": context, "batch_size_used": size, "dtype": str(model.dtype).removeprefix("torch.")}
    record = head | found | summarized(sums, sample.texts, sample.source.task)
    write_json(file, record)
    partial.unlink(missing_ok=True)
    return record


def documents(args: argparse.Namespace) -> Sample:
    """The documents that the flags ask for; from the file that `--sample` names, if it exists."""
    source = named(args.dataset, args.config, args.split, args.column, args.dataset_revision)
    if args.sample is not None and args.sample.exists():
        return read_sample(args.sample, source, args.documents, args.seed)
    with progress_bar(args, None, source.words, "document") as bar:
        sample = draw(source, args.documents, args.seed, bar)
    if len(sample.texts) < args.documents:
        tqdm.write(f"{source.words} has {len(sample.texts)} documents, fewer than {args.documents}: all are taken")
    if args.sample is not None:
        write_sample(args.sample, sample, args.documents)
    return sample


def table(records: list[tuple[str, dict[str, Any]]]) -> Table:
    """A row a target."""
    lines = []
    for name, record in records:
        loss, bits = (
            f"{row['value']:.4f}" + (f" ± {row['stderr']:.4f}" if row["stderr"] is not None else "")
            for row in record["results"]
        )
        lines.append({"block": record["dataset"], "target": name, "loss": loss, "bits per byte": bits})
    one, of = records[0][1], [record for _, record in records]
    how = "packed over the documents' ends" if one["packed"] else "each document by itself"
    notes = (
        f"{one['documents']:,} of {one['of_documents']:,} documents (seed {one['seed']}), {values(of, 'tokens', ',')} "
        f"tokens, {how}, windows of {values(of, 'context')} tokens, {values(of, 'dtype')}; nats a token ± standard "
        "error over documents.",
    )
    return Table("Loss", pd.DataFrame(lines), pd.DataFrame(lines), notes)


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    check(args)
    device_of(args.device)
    quiet_transformers()
    found = [(name, find_target(name, args.revision, args.trust_remote_code, args.out)) for name in args.targets]
    for _, target in found:  # before the whole split is streamed
        if target is not None:
            context_of(target, args.context)
    sample, records = documents(args), []
    with progress_bar(args, 0, "loss", "batch") as bar:
        for name, target in found:
            if target is None:
                tqdm.write(f"{called(name)}: diverged, not evaluated")
                continue
            bar.set_postfix_str(target.name)
            head = head_of(target, sample, args)
            file = file_of(target, head, sample.source.task)
            there = file.exists() and not args.again
            record = read_json(file) if there else measure(target, sample, head, file, bar)
            records.append((target.name, record))
    if records:
        print(to_terminal(table(records), 100))
