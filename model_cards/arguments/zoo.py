"""Options of `python -m model_cards.zoo`."""

import argparse
from pathlib import Path

from periln.runkit.errors import UsageError, make_parser


def parse(argv: list[str] | None = None, prog: str = "python -m model_cards.zoo") -> argparse.Namespace:
    parser = make_parser(prog, "Write an index page of local checkpoints (HTML and Markdown).", "runs/ --out zoo/")
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folders with runs or models")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for zoo.html and zoo.md")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out} is not a folder")
