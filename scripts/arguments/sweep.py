"""Options of `python -m scripts.sweep`."""

import argparse
from pathlib import Path

from periln.runkit.errors import UsageError, make_parser
from periln.runkit.recipes import read_yaml


def parse(argv: list[str] | None = None, prog: str = "python -m scripts.sweep") -> argparse.Namespace:
    parser = make_parser(
        prog,
        "Run placements x learning rates x seeds from one YAML, and compare them.",
        "plan SWEEP.yaml",
        "run SWEEP.yaml --jobs 2",
        "table SWEEP.yaml --best",
    )
    parser.add_argument("verb", choices=("plan", "run", "status", "table"), help="what to do; plan trains nothing")
    parser.add_argument("sweep", type=Path, help="sweep (YAML): a recipe with a grid")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder that holds the sweep's folder")
    parser.add_argument("--jobs", type=int, default=1, help="run: cells at a time")
    parser.add_argument("--retries", type=int, default=1, help="run: further attempts for a cell that failed")
    parser.add_argument(
        "--launch", metavar="WORDS", help="run: instead of python, for example 'torchrun --nproc-per-node 8'"
    )
    parser.add_argument("--best", action="store_true", help="table: the rates of lowest final loss at one seed")
    parser.add_argument("--seed", type=int, help="table --best: the seed; the smallest of the grid when left out")
    parser.add_argument("--json", action="store_true", help="table --best: as JSON")
    parser.add_argument("--no-figure", action="store_true", help="table: no PNG")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    for name, least in (("jobs", 1), ("retries", 0)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    read_yaml(args.sweep)
