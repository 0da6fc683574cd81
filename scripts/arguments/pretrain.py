"""Options of `python -m scripts.pretrain`."""

import argparse
from pathlib import Path

from periln.runkit.errors import UsageError, make_parser
from periln.runkit.recipes import read_yaml


def parse(argv: list[str] | None = None, prog: str = "python -m scripts.pretrain") -> argparse.Namespace:
    parser = make_parser(
        prog,
        "Pretrain the runs that recipes describe, one after another; a run that was stopped resumes.",
        "--config RECIPE.yaml",
        "--config RECIPE.yaml --set optimizer.learning_rate=1e-3 seed=2",
    )
    parser.add_argument("--config", type=Path, nargs="+", action="extend", required=True, help="recipes (YAML)")
    more = "recipe fields of all of them, such as seed=2 optimizer.learning_rate=1e-3"
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help=more)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder in which the run folders stand")
    go_on = "auto: from the newest whole checkpoint, or the start; must: refuse without a checkpoint; never: with a run"
    parser.add_argument("--resume", choices=("auto", "must", "never"), default="auto", help=go_on)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    for path in args.config:
        read_yaml(path)
    if args.runs.exists() and not args.runs.is_dir():
        raise UsageError(f"--runs {args.runs} is not a folder")
