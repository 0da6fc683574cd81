"""Options of `python -m eval.live`."""

import argparse
from pathlib import Path

from periln.runkit.errors import UsageError, make_parser

PORT, EVERY = 8377, 5.0


def parse(argv: list[str] | None = None, prog: str = "python -m eval.live") -> argparse.Namespace:
    about = (
        "Show running pretrainings and sweeps on a page of this machine: curves, headroom, skipped steps, time left."
    )
    parser = make_parser(prog, about, "runs/", "runs/NAME --port 9000")
    parser.add_argument("runs", type=Path, metavar="RUNS", help="a run folder, or a folder that has some or will have")
    parser.add_argument("--port", type=int, default=PORT, help="port on 127.0.0.1; 0: any that is free")
    parser.add_argument(
        "--every", type=float, default=EVERY, metavar="SECONDS", help="how often the page asks for new records"
    )
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    if not args.runs.is_dir():
        raise UsageError(f"{args.runs} is {'not a folder' if args.runs.exists() else 'missing'}: give a folder of runs")
    if not 0 <= args.port <= 65535:
        raise UsageError(f"--port must be 0 to 65535, not {args.port}")
    if not args.every >= 0.2:
        raise UsageError(f"--every must be at least 0.2 seconds, not {args.every:g}")
