"""Options of `python -m eval.benchmarks`."""

import argparse

from periln.eval.arguments.shared import add_settings, check_settings, task_names
from periln.runkit.errors import UsageError, make_parser
from periln.runkit.tasks import SUITES


def parse(argv: list[str] | None = None, prog: str = "python -m eval.benchmarks") -> argparse.Namespace:
    parser = make_parser(
        prog,
        "Score checkpoints on tasks of lm-evaluation-harness.",
        "runs/NAME",
        "runs/NAME --tasks arc_easy --limit 200",
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="run folders, checkpoints or ids of the Hub")
    parser.add_argument(
        "--tasks", default=",".join(SUITES["hub"]), metavar="A,B,...", help="any of lm-eval's, mini, or your own"
    )
    parser.add_argument("--check-data", action="store_true", help="only load the tasks' data, and stop")
    add_settings(parser)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    if not args.targets and not args.check_data:
        raise UsageError("name at least one run folder, checkpoint or Hub id")
    task_names(args.tasks)
    check_settings(args)
    if is_one_file(args) and len(args.targets) != 1:
        raise UsageError(f"--out {args.out} holds the results of one target, not of {len(args.targets)}")


def is_one_file(args: argparse.Namespace) -> bool:
    """Whether --out is the file of one target's results, and not a folder."""
    return args.out is not None and args.out.suffix == ".json"
