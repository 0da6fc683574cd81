"""Options of `python -m eval.tables`."""

import argparse
from pathlib import Path

from periln.runkit.errors import UsageError, make_parser
from periln.runkit.tasks import METRICS, SUITES

TABLES = ("means", "seeds", "paired", "paper")
FORMATS = ("terminal", "markdown", "csv", "latex")


def parse(argv: list[str] | None = None, prog: str = "python -m eval.tables") -> argparse.Namespace:
    parser = make_parser(
        prog,
        "Draw the paper's Table 2 and Tables 6 to 11 from your own runs.",
        "runs/ --compare-paper",
        "runs/ --format latex",
    )
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="run folders, or folders of runs")
    parser.add_argument("--scores", type=Path, metavar="FILE", help="a CSV with a row a seed, instead of runs")
    parser.add_argument("--format", choices=FORMATS, default="terminal", help="CSV holds one table, see --table")
    parser.add_argument(
        "--table", choices=TABLES, action="append", help="only this one (repeatable); for CSV means when left out"
    )
    parser.add_argument("--compare-paper", action="store_true", help="show the paper's Table 2 next to ours")
    parser.add_argument("--metric", choices=METRICS, default="acc", help="where a task has it; acc elsewhere")
    parser.add_argument("--suite", choices=tuple(SUITES), help="only this suite; all that were evaluated when left out")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals of paired differences")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there instead of to the terminal")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    if bool(args.runs) == bool(args.scores):
        raise UsageError("give run folders or --scores FILE, " + ("not both" if args.runs else "one of the two"))
    if not 0 < args.confidence < 1:
        raise UsageError(f"--confidence must lie between 0 and 1, not {args.confidence:g}")
    if args.scores and (args.metric != "acc" or args.suite):
        raise UsageError(f"--{'suite' if args.suite else 'metric'} needs run folders: a scores file has one of each")
    if args.format == "csv" and len(args.table or []) > 1:
        raise UsageError(f"a CSV file holds one table, not {len(args.table)}: name one with --table")
