"""Report on a fine-tuning, before and after: benchmark scores, loss, and five answers side by side, as Markdown.

    python -m sft.compare runs/NAME/sft --out report.md

A pure function of the run folders: scores are those that `eval.benchmarks` wrote of both checkpoints' very weights,
loss and answers those of `eval/before_after.json`. After is the checkpoint that `sft.select` chose, else the last.
"""

import sys

from periln.sft.arguments.compare import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("sft.compare", parse, check))  # parses before the imports below, which take seconds

import argparse
from pathlib import Path
from typing import Any

from periln.runkit.errors import UserError
from periln.runkit.folder import RunFolder, read_json, weights_hash, write_if_free
from periln.runkit.scores import protocol, that_count
from periln.sft.before_after import FILE
from periln.sft.select import BEST, find_run

MISSING = "not evaluated"
METRIC = "acc"


def scores_of(run: RunFolder, weights: str) -> dict[str, dict[str, Any]]:
    """task -> its row of `acc` for these weights; of several, the one that counts by `runkit.scores`."""
    rows = [
        {key: record.get(key) for key in ("num_fewshot", "limit", "file")} | row
        for record in run.evaluations()
        if (record.get("evaluated") or {}).get("weights_sha256") == weights and record.get("harness")
        for row in record.get("results") or []
        if row["metric"] == METRIC
    ]
    return {rows[at]["task"]: rows[at] for at in that_count(rows)}


def _before(run: RunFolder, weights: str) -> dict[str, dict[str, Any]]:
    """The scores of the model that was fine-tuned: in the run around it, or in the checkpoint's folder."""
    beside = run.path.resolve()
    beside = beside.with_name(beside.name.removesuffix("-lora").removesuffix("-sft"))
    return scores_of(RunFolder(run.path.parent), weights) or scores_of(RunFolder(beside), weights)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return MISSING
    return (
        f"{row['value']:.4f}"
        + ("" if row["stderr"] is None else f" ± {row['stderr']:.4f}")
        + f" ({protocol([row])}, n={row['n']})"
    )


def _quoted(text: str) -> str:
    """A model's text as one cell of a table."""
    text = " ".join(text.replace("|", "\\|").split())
    return text or "(nothing)"


def report(run: RunFolder) -> str:
    """The report of one fine-tuning.

    Raises:
        UserError: it has no before_after.json.
    """
    file = run.path / "eval" / FILE
    if not file.exists():
        raise UserError(f"{file} is missing: a fine-tuning writes it at its end")
    both, best = read_json(file), run.path / BEST
    chosen = read_json(best) if best.exists() else None
    last = both["evaluated"]["path"]
    after = chosen["weights_sha256"] if chosen else both["after"]["weights_sha256"]
    merged = run.path / "merged" / Path(chosen["checkpoint"] if chosen else last).name
    if merged.exists():  # an adapter is not scored itself
        after = weights_hash(merged)
    scores = {"before": _before(run, both["before"]["weights_sha256"]), "after": scores_of(run, after)}
    where = f"{chosen['checkpoint']}, chosen by {chosen['rule']}" if chosen else last
    lines = [f"# {run.path}: before and after", "", f"Scores after: {where}.", "", "| task | before | after |"]
    lines.append("|---|---|---|")
    tasks = dict.fromkeys([*scores["before"], *scores["after"]])
    lines += [f"| {t} | {_cell(scores['before'].get(t))} | {_cell(scores['after'].get(t))} |" for t in tasks]
    if not tasks:
        lines.append(f"| all | {MISSING} | {MISSING} |")
    losses = ["not finite" if both[name]["loss"] is None else f"{both[name]['loss']:.4f}" for name in scores]
    lines += [f"| loss, {both['loss_on']} | {losses[0]} | {losses[1]} |", "", f"Loss and answers after: {last}.", ""]
    lines += [f"| question | before ({both['answers']}) | after ({both['answers']}) |", "|---|---|---|"]
    for one, other in zip(both["before"]["samples"], both["after"]["samples"], strict=True):
        lines.append(f"| {_quoted(one['prompt'])} | {_quoted(one['text'])} | {_quoted(other['text'])} |")
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> None:
    check(args)
    text = "\n".join(report(find_run(path)) for path in args.runs)
    if args.out is None:
        print(text, end="")
        return
    write_if_free(args.out, text)
    print(args.out)
