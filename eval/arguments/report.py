"""Options of `python -m eval.report`."""

import argparse
from pathlib import Path

from periln.eval.arguments.shared import check_folder
from periln.runkit.errors import make_parser


def parse(argv: list[str] | None = None, prog: str = "python -m eval.report") -> argparse.Namespace:
    parser = make_parser(prog, "Write tables, figures and a report of all runs in a folder.", "runs/demo")
    parser.add_argument("runs", type=Path, help="folder of run folders, such as runs/demo")
    parser.add_argument("--out", type=Path, default=None, help="folder to write to; the folder of runs when left out")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    check_folder(args.out or args.runs)
