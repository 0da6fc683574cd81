"""Options of `python -m eval.evaluate`."""

import argparse
from pathlib import Path

from periln.eval.arguments.shared import check_settings
from periln.runkit.errors import UsageError, did_you_mean, make_parser
from periln.runkit.tasks import SUITES


def parse(argv: list[str] | None = None, prog: str = "python -m eval.evaluate") -> argparse.Namespace:
    parser = make_parser(
        prog,
        "Measure benchmarks, held-out loss and sample texts of checkpoints.",
        "runs/NAME --heldout data/heldout.jsonl",
    )
    parser.add_argument("targets", type=Path, nargs="*", metavar="RUN_OR_CHECKPOINT", help="run or checkpoint folders")
    parser.add_argument("--check-data", action="store_true", help="only load the tasks' data, and stop")
    parser.add_argument("--suite", default="mini", help="'mini' (our own items) or 'hub' (the real tasks)")
    parser.add_argument("--limit", type=int, default=None, help="items a task; all of them when left out")
    parser.add_argument("--num-fewshot", type=int, default=0, help="examples before each item")
    parser.add_argument("--batch-size", type=int, default=16, help="requests a batch")
    parser.add_argument("--heldout", type=Path, default=None, help="a .jsonl with texts for the held-out loss")
    parser.add_argument("--context", type=int, default=256, help="tokens a window of the held-out loss")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to evaluate")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    if args.batch_size < 1 or args.context < 1:
        raise UsageError(f"batch size and context must be at least 1, not {args.batch_size} and {args.context}")
    if not args.targets and not args.check_data:
        raise UsageError("name at least one run or checkpoint folder")
    if args.suite not in SUITES:
        near = did_you_mean(args.suite, list(SUITES))
        raise UsageError(f"suite {args.suite!r} is unknown{near}: use {', '.join(SUITES)}")
    check_settings(args)
