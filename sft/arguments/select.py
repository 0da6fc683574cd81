"""Options of `python -m sft.select`."""

import argparse
from pathlib import Path

from periln.runkit.errors import UsageError, make_parser
from periln.runkit.tasks import SUITES

TASKS = {
    "hub": ("openbookqa", "commonsense_qa", "rte", "mnli"),
    "mini": SUITES["mini"],
}


def parse(argv: list[str] | None = None, prog: str = "python -m sft.select") -> argparse.Namespace:
    parser = make_parser(prog, "Choose a fine-tuning's epoch, and evaluate it.", "runs/NAME/sft")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="fine-tuning runs, or runs that hold one")
    parser.add_argument(
        "--suite", default="hub", choices=tuple(TASKS), help="the four real tasks, or our own small ones"
    )
    parser.add_argument("--limit", type=int, default=None, help="items a task; all of them when left out")
    parser.add_argument("--batch-size", type=int, default=16, help="requests a batch")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to evaluate")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    for name in ("batch_size", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    for run in args.runs:
        if not run.is_dir():
            raise UsageError(f"{run} is not a folder")
