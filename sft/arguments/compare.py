"""Options of `python -m sft.compare`."""

import argparse
from pathlib import Path

from periln.runkit.errors import UsageError, make_parser


def parse(argv: list[str] | None = None, prog: str = "python -m sft.compare") -> argparse.Namespace:
    parser = make_parser(prog, "Report on fine-tunings, before and after.", "runs/NAME --out before_after.md")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="fine-tuning runs, or runs that hold one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the Markdown there instead of to the terminal")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    for run in args.runs:
        if not run.is_dir():
            raise UsageError(f"{run} is not a folder")
    if args.out is not None and args.out.is_dir():
        raise UsageError(f"--out {args.out} is a folder; give the path of the file")
