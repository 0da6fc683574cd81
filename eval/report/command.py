"""The report of a folder of runs: one HTML file that needs nothing else, and the figures beside it.

    python -m eval.report runs/demo

A pure function of the records: nothing is trained, measured, looked up or dated here, and the same records give
the same bytes.
"""

import argparse
import shutil
from pathlib import Path

from eval.records.frames import load
from eval.tables.report_tables import build, suites
from eval.tables.run_stability import stability
from eval.text_table import to_terminal
from runkit.errors import UsageError, make_parser

from .page import write


def main(args: argparse.Namespace) -> None:
    out = args.out or args.runs
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is not a folder")
    frames = load(args.runs)
    report = write(frames, out)
    width = shutil.get_terminal_size((144, 24)).columns
    for table in [*(build(frames, suite) for suite in suites(frames)), stability(frames)]:
        print(to_terminal(table, width), end="\n\n")
    print(report)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("python -m eval.report", "Tables, figures and a report of all runs in a folder.")
    parser.add_argument("runs", type=Path, help="folder of run folders, such as runs/demo")
    parser.add_argument("--out", type=Path, default=None, help="folder to write to; the folder of runs when left out")
    return parser.parse_args(argv)
