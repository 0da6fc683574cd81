"""Report on a retrofit: `python -m eval.retrofit SRC MODEL... --out DIR`.

The source and what became of it, on the same held-out text: loss, KL from the source, the largest values and how far
FP16 is from them, massive activations, and what some formats cost each model; with `--tasks` scores of lm-eval's tasks.
`scripts.retrofit` makes the models; it is another stage, which this one does not import.
"""

import argparse
import sys
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from periln.eval.arguments.retrofit import check
from periln.eval.formats.recipes import ROWS
from periln.eval.retrofit.measure import Measured, Source, measure
from periln.eval.retrofit.picture import CAPTION, draw
from periln.eval.retrofit.table import report_table, said
from periln.eval.structure.anatomy import find_anatomy
from periln.eval.targets import Model, find_measured
from periln.eval.text_table import to_csv, to_markdown, to_terminal
from periln.eval.texts.samples import Samples, find_samples, sample_sizes
from periln.runkit.environment import describe_environment
from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import json_number, write_bytes, write_folder, write_json, write_text
from periln.runkit.process import start_stage


def _same_tokens(models: list[Model], configs: list[Any]) -> None:
    """Refuse a model whose ids are not the source's."""
    for model, config in zip(models[1:], configs[1:], strict=True):
        sizes = [one.get_text_config().vocab_size for one in (configs[0], config)]
        if sizes[0] != sizes[1]:
            raise UsageError(f"{model.asked} has {sizes[1]} tokens, and its source {models[0].asked} {sizes[0]}")


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    check(args)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    models = [find_measured(asked) for asked in (args.source, *args.models)]
    configs = [model.chosen.config(False) for model in models]
    _same_tokens(models, configs)
    tokenizer = None if args.data == "random" else models[0].tokenizer(args.tokenizer, False)
    samples = find_samples(configs[0], tokenizer, args.data, args.samples, args.tokens, args.seed)
    sizes = sample_sizes(tokenizer, samples)
    rows = [row for row in ROWS if row.key in args.rows]
    tasks = None
    if args.tasks is not None:
        from periln.eval.retrofit.tasks import Tasks  # lm-eval, which the rest does not need

        tasks = Tasks(args.tasks, args.limit, [args.source, *args.models], args.out)
    source: Source | None = None
    found: list[Measured] = []
    for model in models:
        network: Any = model.chosen.load(torch.float32, "cpu", False)
        if getattr(network.config, "residual_dtype", None) is not None:
            network.config.residual_dtype = None  # a stream's dtype belongs to a run
        measured, own = measure(network, samples, source, sizes, rows, args.batch_size)
        source = source or Source(own, sizes)
        measured.record = {
            "name": model.name,
            "asked": model.asked,
            "revision": model.revision,
            "step": model.chosen.step,
            "weights_sha256": model.chosen.weights_sha256,
            "placement": find_anatomy(network).placement,
        } | measured.record
        found.append(measured)
        print(f"{model.name}: loss {measured.record['loss']:.4f}", file=sys.stderr)
        del network
        if tasks is not None:
            try:
                measured.record["tasks"] = tasks.of(model.asked)
            except UserError as error:  # what was measured of it is kept, and the others are still to come
                measured.record["tasks_failed"] = str(error)
                print(f"{model.name} has no scores: {error}", file=sys.stderr)
    _write(args, samples, found)


def _write(args: argparse.Namespace, samples: Samples, found: list[Measured]) -> None:
    """report.json, .csv, .md and .png; the table and sentences on the terminal."""
    records = [measured.record for measured in found]
    described = samples.described
    text = f"{described['samples']} samples of {described['tokens']} tokens of {described['data']}, FP32 weights"
    table, sentences = report_table(records, [f"{text}; loss in nats a token."]), said(records)
    whole = {"samples": described, "models": [m.record | {"stream_max_abs": m.depth} for m in found], "said": sentences}
    whole["environment"] = describe_environment(torch.device("cpu"))
    with write_folder(args.out) as folder:
        write_json(folder / "report.json", json_number(whole))
        write_text(folder / "report.csv", to_csv(table))
        listed = "".join(f"- {sentence}\n" for sentence in sentences)
        write_text(folder / "report.md", f"{to_markdown(table)}\n{listed}\n![{CAPTION}](report.png)\n")
        write_bytes(folder / "report.png", draw(records, [m.depth for m in found]))
    print(f"{to_terminal(table)}\n\n{listed}")
    print(f"written to {args.out}")
