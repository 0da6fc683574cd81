"""Options of `python -m model_cards.render`."""

import argparse
from pathlib import Path

from periln.runkit.errors import UsageError, make_parser, more_options


def add_card_arguments(parser: argparse._ArgumentGroup) -> None:
    """What no record can say about a model, for the commands that render a card."""
    parser.add_argument("--license", default="apache-2.0", help="license of the weights, by its name on the Hub")
    parser.add_argument("--language", nargs="+", default=["en"], metavar="CODE", help="languages of the data")
    parser.add_argument("--datasets", nargs="+", default=[], metavar="ORG/NAME", help="data sets on the Hub")


def parse(argv: list[str] | None = None, prog: str = "python -m model_cards.render") -> argparse.Namespace:
    parser = make_parser(prog, "Write the model cards of runs or checkpoints.", "runs/NAME", "runs/NAME --out card.md")
    parser.add_argument("targets", type=Path, nargs="+", metavar="RUN_OR_CHECKPOINT", help="run or model folders")
    parser.add_argument("--repo", metavar="ORG/NAME", help="where the model will be on the Hub")
    parser.add_argument("--out", type=Path, help="file to write; README.md in the checkpoint when left out")
    parser.add_argument("--force", action="store_true", help="replace a README.md that this command did not write")
    add_card_arguments(more_options(parser))
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    if args.out is not None and len(args.targets) != 1:
        raise UsageError(f"--out is for one target, not for {len(args.targets)}")
    if args.out is not None and args.out.is_dir():
        raise UsageError(f"--out {args.out} is a folder; give the path of the file")
