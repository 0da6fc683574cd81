"""Tables of scores as the Peri-LN paper has them, drawn from run folders or from a file of scores.

    python -m eval.tables runs/400m-*                    # Table 2, Tables 6 to 11, paired differences
    python -m eval.tables runs --compare-paper --format markdown --out tables.md
    python -m eval.tables --scores scores.csv --format csv

A pure function of the records; what is missing is not filled in, and what is not alike is said under the table. The
two tables of the report (`eval.report`) are built here as well.
"""

import sys

from periln.start import start

from .arguments.tables import check, parse

if __name__ == "__main__":
    sys.exit(start("eval.tables", parse, check))  # parses before the imports below, which take seconds

import argparse
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from runkit.errors import UsageError, UserError
from runkit.folder import write_text
from runkit.headroom import headroom

from .paired import paired_table
from .paper_numbers import compare
from .records import Frames, differing, final_loss, largest, load_all, spikes
from .render import Table, to_csv, to_latex, to_markdown, to_terminal
from .score_files import read_scores
from .score_notes import limit_words, notes
from .scores import Scores, from_runs
from .suites import CHANCE, SUITES
from .table2 import means_table, seed_tables, seeds_csv, summarize

MISSING = "n/a"
SPIKES_NOTE = (
    "Final loss: mean of the finite training losses in the last tenth of the recorded steps. Gradient spike: a step "
    "whose gradient norm, before clipping, exceeds the mean of the 128 steps before it (all there are, at least 16) "
    "by 6 of their standard deviations."
)
SKIPS_NOTE = (
    "Skipped steps, by kind: forward: the loss itself was not finite; probe: the gradient overflowed at a loss "
    "scale not yet proven; backward: it overflowed at a scale that had worked before."
)
HEADROOM_NOTE = (
    "Headroom: log2(65504 / max |x|) over stream, residual sums and module outputs at the steps at which layer "
    "statistics were recorded; other steps were not looked at."
)
STREAM, MODULES = ("stream",), ("residual_add", "branch")


def plural(count: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


# --- Table 2 in the report -----------------------------------------------------------------------------------


def suites(frames: Frames) -> list[str]:
    """The task suites that were evaluated; the one the demo's recipe names where none was yet."""
    tasks = set(frames.scores.task)
    asked = (frames.recipe.get("evaluation") or {}).get("suite")
    return [s for s in SUITES if tasks & set(SUITES[s])] or [asked if asked in SUITES else "mini"]


def cell_numbers(frames: Frames, suite: str) -> pd.DataFrame:
    """size, learning_rate, placement, column, mean, std (sample, n-1), n; accuracies in percent."""
    return summarize(from_runs(frames, suite))


def build(frames: Frames, suite: str) -> Table:
    """The scores of one suite for the report: a block a learning rate (and size), a row a placement.

    `numbers` is that of `cell_numbers`.
    """
    scores = from_runs(frames, suite)
    title = f"Scores, suite {suite}{limit_words(scores)}"
    sizes = scores.rows["size"].nunique()
    losses = ("loss", "bits_per_byte")
    found = means_table(scores, title, ["size", "learning_rate"], 1, MISSING, losses, show_size=sizes > 1)
    chance = {task: f"{x:.1f}" for task, x in zip(SUITES[suite], CHANCE, strict=True)}
    rows_at_chance = {"block": "for comparison", "placement": "chance", "Avg.": f"{np.mean(CHANCE):.1f}", **chance}
    text = pd.concat([found.text, pd.DataFrame([rows_at_chance])], ignore_index=True).fillna("")
    return Table(title, text, found.numbers, notes(scores, _recipe_notes(frames)))


def _recipe_notes(frames: Frames) -> list[str]:
    other = differing(frames)
    return [f"These runs differ in more than placement, learning rate and seed: {', '.join(other)}."] if other else []


# --- stability -----------------------------------------------------------------------------------------------


def _place(row: pd.Series) -> str:
    where = "embedding" if row.layer == 0 else f"layer {int(row.layer)} {row.sublayer}"
    return f"{row.tensor}, {where}, step {int(row.step)}"


def status_text(run: pd.Series) -> str:
    """`completed`, or what else and at which step."""
    if run.status == "completed" or pd.isna(run.step):
        return str(run.status)
    return f"{run.status} at step {int(run.step)}"


def _skips(metrics: pd.DataFrame) -> dict[str, int]:
    return {str(kind): int(n) for kind, n in sorted(metrics.skip_kind.dropna().value_counts().items())}


def run_numbers(frames: Frames, run: pd.Series) -> dict:
    """The stability of one run as numbers; NaN or None for what it did not record."""
    metrics, layers = frames.metrics[frames.metrics.run == run.run], frames.layers[frames.layers.run == run.run]
    stream, overall = largest(layers, STREAM), largest(layers, STREAM + MODULES)
    return {
        "run": run.run,
        "learning_rate": run.learning_rate,
        "placement": run.placement,
        "seed": run.seed,
        "status": run.status,
        "measured_steps": len(metrics),
        "final_loss": final_loss(metrics),
        "spikes": spikes(metrics),
        "skips": _skips(metrics),
        "max_abs_stream": math.nan if stream is None else float(stream.value),
        "stream_recorded": stream is not None,
        "headroom_bits": math.nan if overall is None else headroom(float(overall.value)),
        "headroom_at": None if overall is None else _place(overall),
    }


def _first(steps: Sequence[int], shown: int = 3) -> str:
    more = ", ..." if len(steps) > shown else ""
    return f"{len(steps)} (step {', '.join(map(str, steps[:shown]))}{more})" if steps else "0"


def _stability_row(run: pd.Series, numbers: dict) -> dict[str, str]:
    measured, skips, peak = numbers["measured_steps"], numbers["skips"], numbers["max_abs_stream"]
    by_kind = f" ({', '.join(f'{n} {kind}' for kind, n in skips.items())})" if skips else ""
    bits, place = numbers["headroom_bits"], numbers["headroom_at"]
    left = f"{bits:.1f} ({place})" if math.isfinite(bits) else f"overflow ({place})"
    finite_peak = f"{peak:,.1f}" if math.isfinite(peak) else "not finite"
    loss = f"{numbers['final_loss']:.3f}" if math.isfinite(numbers["final_loss"]) else "not finite"
    return {
        "block": f"learning rate {run.learning_rate:g}",
        "placement": run.placement,
        "seed": MISSING if pd.isna(run.seed) else str(run.seed),
        "status": status_text(run),
        "final loss": loss if measured else MISSING,
        "gradient spikes": _first(numbers["spikes"]) if measured else MISSING,
        "skipped steps": f"{sum(skips.values())}{by_kind}" if measured else MISSING,
        "max |x|, stream": finite_peak if numbers["stream_recorded"] else MISSING,
        "least headroom, bits": MISSING if place is None else left,
    }


def stability(frames: Frames) -> Table:
    """A row a pretraining run: status, final loss, gradient spikes, skipped steps, and FP16 headroom."""
    runs = [run for _, run in frames.pretrained.iterrows()]
    numbers = [run_numbers(frames, run) for run in runs]
    text = pd.DataFrame([_stability_row(run, n) for run, n in zip(runs, numbers, strict=True)])
    return Table("Stability", text, pd.DataFrame(numbers), (SPIKES_NOTE, SKIPS_NOTE, HEADROOM_NOTE), keys=2)


# --- the command ---------------------------------------------------------------------------------------------


def _from_arguments(args: argparse.Namespace) -> list[tuple[Scores, list[str]]]:
    """The scores of every suite that is there, with further notes for each."""
    if args.scores:
        return [(read_scores(args.scores), [])]
    frames = load_all(args.runs, measurements=False)
    named = [args.suite] if args.suite else suites(frames)
    more = _recipe_notes(frames)
    if args.format == "csv" and len(named) > 1:  # one table a file: the benchmarks before our own sets
        more = [*more, f"The suite {named[0]} was evaluated too: --suite {named[0]}."]
        named = named[-1:]
    return [(from_runs(frames, suite, args.metric), more) for suite in named]


def drawn(scores: Scores, more: Sequence[str], args: argparse.Namespace) -> list[Table]:
    """The tables that were asked for: all when none was named, for CSV then Table 2, or the paper beside ours."""
    asked = args.table or (["means", "seeds", "paired"] + ["paper"] * args.compare_paper)
    if args.format == "csv" and not args.table:
        asked = ["paper"] if args.compare_paper else ["means"]
    tables = []
    if "means" in asked:
        tables.append(means_table(scores, f"Table 2: means over seeds, {scores.name}{limit_words(scores)}"))
    if "seeds" in asked and args.format == "csv":
        tables.append(Table("", pd.DataFrame(), seeds_csv(scores)))
    elif "seeds" in asked:
        tables += seed_tables(scores)
    if "paired" in asked:
        tables.append(paired_table(scores, args.confidence) or _no_pairs(scores))
    if "paper" in asked:
        tables.append(compare(scores))
    said = notes(scores, more)  # under the first table, whichever it is
    return [replace(table, notes=(*said, *table.notes) if i == 0 else table.notes) for i, table in enumerate(tables)]


def _no_pairs(scores: Scores) -> Table:
    note = "Only one placement: nothing to pair."
    text = pd.DataFrame([{"block": "no pairs", "pair": "-"}])
    return Table("Paired differences between placements", text, pd.DataFrame(columns=["placement", "minus"]), (note,))


def _write(text: str, out: Path, overwrite: bool) -> None:
    """Write the file; what stands there already and is something else is kept unless told otherwise."""
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder, not a file")
    if out.exists():
        if out.read_bytes() == text.encode():
            return
        if not overwrite:
            raise UserError(f"{out} exists and holds something else; it is left alone: --overwrite replaces it")
        print(f"{out} is overwritten", file=sys.stderr)
    write_text(out, text)


def main(args: argparse.Namespace) -> None:
    check(args)
    tables = [table for scores, more in _from_arguments(args) for table in drawn(scores, more, args)]
    if args.format == "csv":
        text = to_csv(tables[0])
        print(*tables[0].notes, sep="\n", file=sys.stderr)
    elif args.format == "terminal":
        width = 120 if args.out else shutil.get_terminal_size((120, 24)).columns
        text = "\n\n".join(to_terminal(table, width).rstrip() for table in tables) + "\n"
    else:
        text = "\n".join({"markdown": to_markdown, "latex": to_latex}[args.format](table) for table in tables)
    if args.out is None:
        print(text, end="")
    else:
        _write(text, args.out, args.overwrite)
        print(args.out)
