"""Options of `python -m eval.watch`."""

import argparse
from pathlib import Path

from periln.eval.arguments.shared import add_settings, check_settings, task_names
from periln.runkit.errors import UsageError, make_parser
from periln.runkit.tasks import SUITES


def parse(argv: list[str] | None = None, prog: str = "python -m eval.watch") -> argparse.Namespace:
    parser = make_parser(
        prog, "Score a run's checkpoints while it trains.", "runs/NAME --every 4 --tasks arc_easy,piqa"
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a pretraining run, begun or about to begin")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every n-th checkpoint, and the last")
    parser.add_argument(
        "--tasks", default=",".join(SUITES["hub"]), metavar="A,B,...", help="any of lm-eval's, mini, or your own"
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=60,
        metavar="SECONDS",
        help="for a run that has stopped, or not begun, to continue",
    )
    add_settings(parser)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    if args.revision or args.out:
        raise UsageError("--revision and --out are not for a watch: a run's results are in its eval/")
    task_names(args.tasks)
    check_settings(args)
