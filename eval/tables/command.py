"""Tables of scores in the Peri-LN paper's form, from run folders or from a file of scores.

    python -m eval.tables runs/400m-*                    # Table 2, Tables 6 to 11, paired differences
    python -m eval.tables runs --compare-paper --format markdown --out tables.md
    python -m eval.tables --scores scores.csv --format csv

A pure function of the records; what is missing is not filled in, and what differs is noted under the table. The
two tables of the report (`eval.report`) are built here too.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from periln.eval.arguments.tables import check
from periln.eval.records.frames import load_all
from periln.eval.tables.beside_paper import compare
from periln.eval.tables.footnotes import limit_words, notes
from periln.eval.tables.paired import paired_table
from periln.eval.tables.paper_tables import means_table, seed_tables, seeds_csv
from periln.eval.tables.report_tables import recipe_notes, suites
from periln.eval.tables.score_csv import read_scores
from periln.eval.tables.scores import Scores, from_runs
from periln.eval.text_table import Table, to_csv, to_latex, to_markdown, to_terminal
from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import write_text


def _from_arguments(args: argparse.Namespace) -> list[tuple[Scores, list[str]]]:
    """The scores of every suite found, with further notes for each."""
    if args.scores:
        return [(read_scores(args.scores), [])]
    frames = load_all(args.runs, measurements=False)
    named = [args.suite] if args.suite else suites(frames)
    more = recipe_notes(frames)
    if args.format == "csv" and len(named) > 1:  # one table a file: the benchmarks before our own sets
        more = [*more, f"The suite {named[0]} was evaluated too: --suite {named[0]}."]
        named = named[-1:]
    return [(from_runs(frames, suite, args.metric), more) for suite in named]


def tables_of(scores: Scores, more: Sequence[str], args: argparse.Namespace) -> list[Table]:
    """The tables that were asked for: all when none was named, for CSV then Table 2, or the paper's next to ours."""
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
    """Write the file; an existing, different file is kept unless told otherwise."""
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
    tables = [table for scores, more in _from_arguments(args) for table in tables_of(scores, more, args)]
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
