"""Measure which number formats a causal LM survives: `python -m eval.formats MODEL`."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from periln.eval.arguments.formats import FULL, QUICK, check, check_records
from periln.eval.formats.cured import cure_in_place, rows_that_change
from periln.eval.formats.emulate import Emulation, seen_in_a_pass
from periln.eval.formats.files import FormatsFolder
from periln.eval.formats.locate import Located, locate
from periln.eval.formats.measure import LOGIT_BYTES, Reference, measure_recipe, measure_reference, usual_batch
from periln.eval.formats.publish import publish
from periln.eval.formats.recipes import BLOCK, GROUPS, TARGETS, WEIGHTS, Recipe, Scaled, chosen
from periln.eval.formats.words import AS_IT_IS, CURED, PLACES
from periln.eval.targets import Model, find_measured
from periln.eval.texts.samples import Samples, find_samples, sample_sizes
from periln.runkit.environment import describe_environment
from periln.runkit.process import need_device, peak_rss, quiet_transformers, start_stage
from periln.runkit.progress import progress_bar

Job = tuple[str, Recipe]  # variant and row


def _tokenizer(args: argparse.Namespace, model: Model) -> tuple[Any, str]:
    data = args.data or ("wikitext" if args.tokenizer or model.has_tokenizer else "random")
    if args.data is None and data == "random":
        print(f"{args.model} has no tokenizer: measured on random token ids, in bits a token", file=sys.stderr)
    return None if data == "random" else model.tokenizer(args.tokenizer, args.trust_remote_code), data


def usual_folder(model: Model) -> Path:
    """Where the results go by default: a run's into the run, one folder for each checkpoint."""
    if model.run is None:
        return Path("formats") / model.name
    return model.run / "eval" / "formats" / f"step_{model.chosen.step:08d}"


def _load(args: argparse.Namespace, model: Model) -> nn.Module:
    network: Any = model.chosen.load(torch.float32, args.device, args.trust_remote_code)
    if getattr(network.config, "residual_dtype", None) is not None:
        network.config.residual_dtype = None  # a stream's dtype belongs to a run
    return network


def _timed(work: Callable[[], object]) -> float:
    """Seconds of the second of two calls; the first includes one-time costs."""
    work()
    started = time.monotonic()
    work()
    return time.monotonic() - started


@torch.no_grad()
def _seconds(located: Located, samples: Samples, rows: Sequence[Recipe]) -> float:
    """How long the rows will take, from an unrounded sample, one with all but the weights rounded, and the weights."""
    model, ids = located.model, samples.ids[:1].to(next(located.model.parameters()).device)
    every = {t: Scaled("MXFP8", BLOCK) for t in TARGETS if t not in located.missing}
    flowing = {t: cell for t, cell in every.items() if t != WEIGHTS}
    plain = _timed(lambda: model(input_ids=ids, use_cache=False))
    with Emulation(located, flowing):
        full = _timed(lambda: model(input_ids=ids, use_cache=False))
    weights = 0.0
    if WEIGHTS in every:
        started = time.monotonic()
        with Emulation(located, {WEIGHTS: every[WEIGHTS]}):
            weights = time.monotonic() - started
    total = plain * len(samples.ids)
    for row in rows:
        total += len(samples.ids) * (plain if set(row.cells) == {WEIGHTS} else full)
        total += weights if WEIGHTS in row.cells else 0.0
    return total


def _memory(located: Located, samples: Samples, batch: int) -> float:
    """Bytes at most: what is in use now, a rounded copy of the products' weights, logits of a batch and of the
    reference, and a matrix in double precision twice.
    """
    logits = 4 * located.vocabulary * samples.ids.shape[1]
    kept = min(logits * len(samples.ids), LOGIT_BYTES)
    largest = max((p.weight.numel() for p in located.products), default=0)
    return peak_rss() + 4 * located.product_parameters + kept + 4 * batch * logits + 16 * largest


def _announce(located: Located, samples: Samples, batch: int, rows: Sequence[Recipe]) -> None:
    minutes = _seconds(located, samples, rows) / 60
    words = f"{minutes:.0f} minutes" if minutes >= 2 else f"{60 * minutes:.0f} seconds"
    size = _memory(located, samples, batch) / 2**30
    count, tokens = samples.ids.shape
    print(
        f"{len(rows)} rows on {count} samples of {tokens} tokens: about {words} at the pace of the first sample, "
        f"{size:.1f} GiB of memory at most; each row is kept as it is measured",
        file=sys.stderr,
    )


class _Formats:
    """One model and its records."""

    def __init__(
        self, args: argparse.Namespace, model: Model, records: FormatsFolder, samples: Samples, sizes: list[int]
    ):
        self.args, self.model, self.records, self.samples, self.sizes = args, model, records, samples, sizes

    def jobs(self) -> list[Job]:
        """The rows that were asked for and are missing."""
        a = self.args
        rows = chosen(a.full, a.targets or GROUPS, a.formats or ())
        found: list[Job] = [(AS_IT_IS, row) for row in rows]
        if a.cure and self.records.head.get("cure", {}).get("refused") is None:
            found += [(CURED, row) for row in rows_that_change(rows)]
        return [(variant, row) for variant, row in found if self.records.cell(variant, row.key) is None]

    def measure(self, jobs: list[Job]) -> None:
        """Measure them, each into its own file."""
        network = _load(self.args, self.model)
        located = seen_in_a_pass(locate(network))
        missing = {t: why for t, why in located.missing.items() if any(t in row.cells for _, row in jobs)}
        for target, why in missing.items():
            tqdm.write(f"not measured: {PLACES[target]}, because {why}", file=sys.stderr)
        self.records.write_head(missing=self.records.head.get("missing", {}) | missing)
        jobs = [job for job in jobs if not missing.keys() & job[1].cells.keys()]
        if not jobs:
            return
        batch = self.args.batch_size or usual_batch(self.samples, located.vocabulary)
        _announce(located, self.samples, batch, [row for _, row in jobs])
        with progress_bar(self.args, (len(jobs) + 1) * len(self.samples.ids), self.model.name, "sample") as bar:
            reference = measure_reference(network, self.samples, batch, bar.update)
            self.records.write_head(reference={"nats": reference.nats.tolist(), "positions": reference.positions})
            self._rows(AS_IT_IS, located, [row for variant, row in jobs if variant == AS_IT_IS], reference, batch, bar)
            if cured := [row for variant, row in jobs if variant == CURED]:
                self._after_the_cure(network, cured, reference, batch, bar)

    def _rows(
        self, variant: str, located: Located, rows: list[Recipe], reference: Reference, batch: int, bar: tqdm
    ) -> None:
        for row in rows:
            bar.set_postfix_str(row.key if variant == AS_IT_IS else f"{row.key}, {variant}", refresh=False)
            record = measure_recipe(located, row, self.samples, reference, batch, bar.update)
            self.records.write_cell(variant, record)

    def _after_the_cure(self, network: nn.Module, rows: list[Recipe], reference: Reference, batch: int, bar: tqdm):
        bar.set_postfix_str("cure", refresh=False)
        told = cure_in_place(network, self.samples, batch)
        self.records.write_head(cure=told)
        if told["refused"] is not None:
            tqdm.write(f"not measured after the cure: {told['refused']}", file=sys.stderr)
            bar.update(len(rows) * len(self.samples.ids))
            return
        self._rows(CURED, seen_in_a_pass(locate(network)), rows, reference, batch, bar)


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    check(args)
    need_device(args.device, "--device cuda")
    quiet_transformers()
    model = find_measured(args.model, args.revision)
    out = args.out or usual_folder(model)
    check_records(out)
    tokenizer, data = _tokenizer(args, model)
    config = model.chosen.config(args.trust_remote_code)
    count = args.samples or (FULL if args.full else QUICK)
    samples = find_samples(config, tokenizer, data, count, args.tokens, args.seed)
    asked = {"step": model.chosen.step, "weights_sha256": model.chosen.weights_sha256}
    records = FormatsFolder(out, asked | samples.described)
    sizes = sample_sizes(tokenizer, samples)
    unit = "token" if tokenizer is None else "byte"
    records.write_head(
        model=args.model,
        name=model.name,
        unit=unit,
        sizes=sizes,
        revision=model.revision,
        model_type=config.model_type,
        environment=describe_environment(torch.device(args.device)),
    )
    formats = _Formats(args, model, records, samples, sizes)
    if jobs := formats.jobs():
        formats.measure(jobs)
    print(publish(records))
    print(f"written to {out}")
