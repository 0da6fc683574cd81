"""Options of `python -m eval.bench`."""

import argparse

from periln.eval.arguments.shared import add_settings, check_least, check_settings, task_names
from periln.runkit.errors import UsageError, make_parser


def parse(argv: list[str] | None = None, prog: str = "python -m eval.bench") -> argparse.Namespace:
    parser = make_parser(
        prog,
        "Compare the speed of evaluation with lm-eval's own HFLM. The speed of training and decoding is scripts.bench; "
        "`periln bench` is the stability bench, eval.stability.",
        "runs/demo/NAME --tasks mini",
    )
    parser.add_argument("target", metavar="TARGET", help="a run folder, a checkpoint or an id of the Hub")
    parser.add_argument("--tasks", default="mini", metavar="A,B,...", help="any of lm-eval's that are log-likelihoods")
    parser.add_argument("--pairs", type=int, default=15, help="measurements of each")
    add_settings(parser)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    check_least(args, pairs=1)
    task_names(args.tasks)
    check_settings(args)
    if args.batch_size == "auto" or (args.limit or 1) < 1:
        raise UsageError("the bench wants a --batch-size and a --limit in whole numbers")
