"""Measure what a norm placement does to causal LMs, and report it in words.

python -m eval.stability RUN_OR_CHECKPOINT_OR_HUB_ID... --data wikitext --samples 1000
"""

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm
from transformers.modeling_utils import PreTrainedModel

from periln.eval.arguments.stability import check, left_out
from periln.eval.records.explain import explain
from periln.eval.records.words import number
from periln.eval.stability.bar import plan_bar
from periln.eval.stability.files import BenchFolder, wide_table
from periln.eval.stability.measure import Measured, Options, measure
from periln.eval.targets import Checkpoint, Model, find_measured
from periln.eval.text_table import Table, to_terminal
from periln.eval.texts.samples import Samples, find_samples
from periln.runkit.environment import describe_environment
from periln.runkit.errors import UsageError
from periln.runkit.folder import RunFolder
from periln.runkit.number_format import FP16
from periln.runkit.process import need_device, quiet_transformers, start_stage


def _options(args: argparse.Namespace) -> Options:
    return Options(
        batch_size=args.batch_size,
        angles=None if args.angles == "all" else int(args.angles),
        backward_samples=min(args.backward_samples, args.samples),
        skip_samples=min(args.skip_samples, args.samples),
        fp16_samples=min(args.fp16_samples, args.samples),
        skip_tokens=args.skip_tokens,
        loss_scale=args.loss_scale,
        certificate=not args.no_certificate,
    )


def _asked(args: argparse.Namespace, options: Options) -> dict[str, Any]:
    """What decides a result, as far as the command line goes."""
    names = ("data", "samples", "tokens", "seed", "dtype", "tokenizer", "device")
    return {n: getattr(args, n) for n in names} | options.asked()


class _Bench:
    """What the models of one command share: options, and samples keyed by what they depend on."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.options = args, _options(args)
        self.asked = _asked(args, self.options)
        self.environment = describe_environment(torch.device(args.device))
        self._tokenizers: dict[str, Any] = {}
        self._samples: dict[tuple, Samples] = {}

    def tokenizer(self, model: Model) -> Any:
        """The model's tokenizer; None for random ids. `UserError` where it has none."""
        if self.args.data == "random":
            return None
        if model.asked not in self._tokenizers:
            self._tokenizers[model.asked] = model.tokenizer(self.args.tokenizer, self.args.trust_remote_code)
        return self._tokenizers[model.asked]

    def samples(self, model: Model, network: PreTrainedModel) -> Samples:
        """The samples that a model is measured on, the same for all checkpoints of a run.

        Raises:
            UsageError: more tokens a sample than the model has positions.
            UserError: too little text.
        """
        a, config = self.args, network.config
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        key = (model.asked, limit)
        if key not in self._samples:
            tokenizer = self.tokenizer(model)
            self._samples[key] = find_samples(config, tokenizer, a.data, a.samples, a.tokens, a.seed)
        return self._samples[key]

    def checkpoint(self, model: Model, checkpoint: Checkpoint, records: BenchFolder, weights: str) -> None:
        """Measure one checkpoint and write its records."""
        a = self.args
        network = checkpoint.load(getattr(torch, a.dtype), a.device, a.trust_remote_code)
        samples, tokenizer = self.samples(model, network), self.tokenizer(model)

        def text_of(token: int) -> str | None:
            return None if tokenizer is None else tokenizer.decode([token])

        with plan_bar(a, f"{model.name} step {checkpoint.step}") as tell:
            measured = measure(network, samples, self.options, checkpoint.step, text_of, tell, in_place=True)
        certificate = measured.certificate
        entry = measured.record | {
            "path": str(checkpoint.path) if model.run is None else str(checkpoint.path.relative_to(model.run)),
            "revision": model.revision,
            "weights_sha256": weights,
            "asked": self.asked,
            "data": samples.described,
            "dtype": a.dtype,
            "model_type": network.config.model_type,
            "parameters": sum(p.numel() for p in network.parameters()),
            "versions": self.environment["versions"],
        }
        if samples.described["overlapping"]:
            entry["verdict"] = [*entry["verdict"], "The text is short: the samples overlap."]
        if certificate is not None:
            entry["verdict"] = [*entry["verdict"], _certified(certificate)]
        records.write(measured, entry, certificate)
        tqdm.write(to_terminal(_table(f"{model.name}, step {checkpoint.step}", measured)))
        tqdm.write(_said(entry["verdict"]))
        if measured.stopped is not None:
            tqdm.write(f"written so far: {records.folder}")
            raise KeyboardInterrupt


def _certified(certificate: dict[str, Any]) -> str:
    if certificate["certified"]:
        return (
            "By its weights alone, no input can take any tensor of the certificate beyond FP16's "
            f"{FP16.limit} (largest bound {number(certificate['largest_bound'])})."
        )
    free, above, rows = (len(certificate[key]) for key in ("unbounded", "above_limit", "rows"))
    said = "By its weights alone FP16 is not certified"
    return f"{said}: of {rows} tensors, {free} have no bound and {above} have one above {FP16.limit}."


def _said(verdict: list[str]) -> str:
    return "\n".join(f"  - {sentence}" for sentence in verdict) + "\n"


def _table(title: str, measured: Measured) -> Table:
    wide = wide_table(measured.rows)
    skips = wide[wide.sublayer == "layer"].set_index("layer")["skip loss"]
    wide = wide[wide.sublayer != "layer"].copy()
    wide = wide.drop(columns=["branch max", "kurtosis"])  # for the terminal's width; they are in layers_*.csv
    wide["skip loss"] = wide["skip loss"].where(wide.sublayer != "mlp", wide.layer.map(skips))
    wide = wide[[*wide.columns[:2], *(c for c in wide.columns[2:] if wide[c].notna().any())]]
    text = wide.copy().astype(object)
    for column in wide.columns[2:]:
        text[column] = [("" if pd.isna(v) else number(v)) for v in wide[column]]
    text["layer"] = wide["layer"].astype(str)
    text.insert(0, "model", title)
    notes = (
        f"bits: log2({FP16.limit} / max |x|). share: |branch| / |stream|. gradient: norm over parameters.",
        "skip loss: rise of the loss without the whole layer.",
    )
    return Table("What flows through the layers", text, wide, notes, keys=2)


def _records_of(args: argparse.Namespace, model: Model) -> BenchFolder:
    """Where a model's records are. Raises UserError if another model's are there."""
    folder = (args.out or Path("stability")) / model.name if model.run is None else model.run / "eval" / "stability"
    return BenchFolder(folder, model.name if model.run is not None else model.asked, single=model.run is None)


def _diverged(asked: str) -> bool:
    """Whether this is the folder of a run that has diverged, which is said."""
    lost = RunFolder(asked).status == "diverged"
    if lost:
        tqdm.write(f"{asked} has diverged: it is not measured")
    return lost


def _measure_model(bench: _Bench, model: Model, records: BenchFolder) -> None:
    args, folder = bench.args, records.folder
    for checkpoint in model.checkpoints:
        weights = checkpoint.weights_sha256
        if not args.again and records.has(checkpoint.step, bench.asked, weights):
            tqdm.write(f"{model.name} step {checkpoint.step}: measured already ({records.table(checkpoint.step)})")
            tqdm.write(_said(records.entry(checkpoint.step)["verdict"]))
            continue
        bench.checkpoint(model, checkpoint, records, weights)
    if records.old.get("growth"):
        tqdm.write(f"{model.name}, over its checkpoints\n{_said(records.old['verdict'][:2])}")
    if model.run is not None and args.out is not None:
        shutil.copytree(folder, args.out / model.name, dirs_exist_ok=True)
    tqdm.write(f"written to {folder}")


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    check(args)
    need_device(args.device, "--device cuda")
    if args.explain is not None:
        print(explain(args.explain))
        return
    quiet_transformers()
    models = [find_measured(asked, args.revision) for asked in args.models if not (args.last and _diverged(asked))]
    if args.last:
        models = [replace(model, checkpoints=model.checkpoints[-1:]) for model in models]
    names = [m.name for m in models if m.run is None or args.out is not None]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise UsageError(f"two of the models are called {twice[0]}: measure them into different --out folders")
    if said := left_out(args):
        print(said, file=sys.stderr)
    bench, records = _Bench(args), [_records_of(args, model) for model in models]
    for model in models:
        bench.tokenizer(model)
    for model, those in zip(models, records, strict=True):
        _measure_model(bench, model, those)
