"""Options of `python -m model_cards.paper`."""

import argparse
from pathlib import Path

from periln.runkit.errors import UsageError, make_parser


def parse(argv: list[str] | None = None, prog: str = "python -m model_cards.paper") -> argparse.Namespace:
    parser = make_parser(prog, "Write the cards of the paper's nine models, as recipes.", "--out model_cards/paper")
    parser.add_argument("--out", type=Path, default=Path("model_cards/paper"), help="folder to write to")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out} is not a folder")
