"""The report of a folder of runs: one self-contained HTML file, and the figures next to it.

    python -m eval.report runs/demo

A pure function of the records: nothing is trained, measured, looked up or dated here, and the same records give
the same bytes.
"""

import argparse
import shutil

from periln.eval.arguments.report import check
from periln.eval.records.frames import load
from periln.eval.report.page import write
from periln.eval.tables.report_tables import build, suites
from periln.eval.tables.run_stability import stability
from periln.eval.text_table import to_terminal


def main(args: argparse.Namespace) -> None:
    check(args)
    out = args.out or args.runs
    frames = load(args.runs)
    report = write(frames, out)
    width = shutil.get_terminal_size((144, 24)).columns
    for table in [*(build(frames, suite) for suite in suites(frames)), stability(frames)]:
        print(to_terminal(table, width), end="\n\n")
    print(report)
