"""Bounds and what they bound, token by token: the paper's propositions, residual steps, and the certificate.

python -m eval.bounds RUN_OR_CHECKPOINT_OR_HUB_ID --out DIR
"""

import argparse
import math

import pandas as pd
import torch

from periln.eval.arguments.bounds import check
from periln.eval.bounds.certificate import certify
from periln.eval.bounds.residual_step import said, steps_of, token_steps
from periln.eval.bounds.residual_step import summary as step_summary
from periln.eval.bounds.token_bounds import SLACK, broken_assumptions, summary, token_bounds
from periln.eval.records.words import number
from periln.eval.structure.anatomy import find_anatomy
from periln.eval.targets import find_measured
from periln.eval.text_table import Table, to_markdown, to_terminal
from periln.eval.texts.samples import find_samples
from periln.runkit.environment import describe_environment
from periln.runkit.folder import json_number, write_folder, write_json, write_text
from periln.runkit.process import need_device, quiet_transformers, start_stage
from periln.runkit.progress import progress_bar

NOTES = (
    "measured: a token's share of |dL/dW2|_F, |dL/da| |h|; bound: from |dL/dx|, |h| and |a| (or |x + a|); the loss is "
    "the sum over tokens.",
    "tight: median of measured / bound over tokens; held: share of tokens with measured <= bound; paper held: the same "
    "of 4 gamma sqrt(D) |h| / |a|, which assumes that the stream is the logits.",
)

STEP_NOTES = (
    "step: |x' - alpha x|, the largest measured, and the largest that the weights allow for any input.",
    "length, std: the largest of a token after the add; by step: from the stream before it; so far: by all steps up to "
    "it, from the token's embedding. angle: median over tokens, in units of pi (1: no bound). Derivations: "
    "eval/bounds/residual_step.py.",
)


def shares(value: float | None) -> str:
    """A share as a percentage; empty where there is none."""
    return "" if value is None or pd.isna(value) else f"{100 * value:.1f} %"


def _bound(value: float) -> str:
    return "none" if math.isinf(value) else number(value)


def _step_table(name: str, rows: pd.DataFrame) -> Table:
    text = pd.DataFrame(
        {
            "model": name,
            "layer": [f"{r.layer} {r.sublayer}" for r in rows.itertuples()],
            "step": rows.largest_step.map(number),
            "at most": rows.step_bound.map(_bound),
            "length": rows.largest_length.map(number),
            "by step": rows.length_bound.map(_bound),
            "so far": rows.length_bound_so_far.map(_bound),
            "angle": rows.median_angle.map(lambda v: f"{v:.3f}"),
            "angle by step": rows.median_angle_bound.map(lambda v: f"{v:.3f}"),
            "std": rows.largest_std.map(number),
            "std so far": rows.std_bound_so_far.map(_bound),
            "held": rows.held.map(shares),
        }
    )
    return Table("Residual steps: what they did to tokens, and what they can do", text, rows, STEP_NOTES)


def _table(name: str, rows: pd.DataFrame) -> Table:
    text = pd.DataFrame(
        {
            "model": name,
            "layer": [f"{r.layer} {r.sublayer}" for r in rows.itertuples()],
            "mean |h|": rows.mean_h.map(number),
            "mean |a|": rows.mean_a.map(number),
            "mean |x+a|": rows.mean_sum.map(number),
            "largest measured": rows.largest_measured.map(number),
            "largest bound": rows.largest_bound.map(number),
            "tight": rows.tightness.map(lambda v: "" if v is None or pd.isna(v) else f"{v:.3f}"),
            "held": rows.held.map(shares),
            "paper held": rows.paper_held.map(shares),
        }
    )
    return Table("Gradient of each module's last matrix: bound and measurement", text, rows, NOTES)


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    check(args)
    need_device(args.device, "--device cuda")
    quiet_transformers()
    model = find_measured(args.model, args.revision)
    checkpoint = model.chosen
    network = checkpoint.load(torch.float32, args.device, args.trust_remote_code)
    tokenizer = None if args.data == "random" else model.tokenizer(args.tokenizer, args.trust_remote_code)
    samples = find_samples(network.config, tokenizer, args.data, args.samples, args.tokens, args.seed)
    anatomy = find_anatomy(network)
    certificate = certify(network, anatomy=anatomy)
    steps = steps_of(anatomy, certificate)
    with progress_bar(args, 2 * args.samples, model.name, "sample") as bar:
        taken = token_steps(anatomy, steps, samples.batches(args.batch_size, args.device), bar.update)
        rows = token_bounds(anatomy, samples.batches(args.batch_size, args.device), bar.update)
    table, broken = _table(model.name, summary(rows)), broken_assumptions(anatomy)
    step_table = _step_table(model.name, step_summary(taken, steps))
    told = said(steps, step_table.numbers)
    record = {
        "model": model.asked,
        "step": checkpoint.step,
        "weights_sha256": checkpoint.weights_sha256,
        "data": samples.described,
        "slack": SLACK,
        "sublayers": table.numbers.to_dict("records"),
        "residual_steps": step_table.numbers.to_dict("records"),
        "residual_steps_in_words": told,
        "assumptions_broken": broken,
        "environment": describe_environment(torch.device(args.device)),
    }
    page = (
        f"{to_markdown(table)}\nOf the propositions' assumptions it breaks:\n\n{_listed(broken)}\n\n"
        f"{to_markdown(step_table)}\n{_listed(told)}\n"
    )
    with write_folder(args.out) as folder:
        rows.to_parquet(folder / "tokens.parquet", index=False)
        taken.to_parquet(folder / "steps.parquet", index=False)
        write_json(folder / "bounds.json", json_number(record))
        write_json(folder / "certificate.json", json_number(certificate))
        write_text(folder / "bounds.md", page)
    print(f"{to_terminal(table)}\nOf the propositions' assumptions this model breaks:\n{_listed(broken)}\n")
    print(f"{to_terminal(step_table)}\n{_listed(told)}\nwritten: {args.out}")


def _listed(sentences: list[str]) -> str:
    return "\n".join(f"- {text}" for text in sentences)
