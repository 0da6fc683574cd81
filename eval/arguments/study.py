"""Options of `python -m eval.study`."""

import argparse
from pathlib import Path

from periln.runkit.errors import UsageError, make_parser

VERBS = ("measure", "report", "check", "export")


def parse(argv: list[str] | None = None, prog: str = "python -m eval.study") -> argparse.Namespace:
    parser = make_parser(
        prog,
        "Judge the claims of a study from the records of its cells.",
        "report runs/study",
        "export runs/study --records docs/results/records/study",
        "check docs/results/records/study",
    )
    add = parser.add_argument
    add("verb", choices=VERBS, help="measure: one trained cell; check: recompute the verdicts and compare")
    add("study", type=Path, metavar="STUDY", help="folder of a study, or its exported records")
    add("--records", type=Path, help="exported records, whose cells count too; export writes them")
    add("--cell", help="measure: the cell's name")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    if not args.study.is_dir():
        raise UsageError(f"{args.study} is not a folder: give a study or its records")
    if (args.verb == "measure") != (args.cell is not None):
        raise UsageError("--cell belongs to measure, which needs it")
    if args.verb == "export" and args.records is None:
        raise UsageError("export needs --records: the folder to write")
