"""Options of `python -m eval.figures`."""

import argparse
from pathlib import Path

from periln.eval.arguments.shared import check_folder
from periln.eval.figures.titles import TITLES
from periln.runkit.errors import UsageError, did_you_mean, make_parser

KINDS = ("png", "svg")
EXPLAINED = "\n".join(f"  {name:9} {title}" for name, title in TITLES.items())


def names_of(text: str) -> list[str]:
    """The figures asked for, in the order of the catalogue; `all` means all of them.

    Raises:
        UsageError: there is no such figure; names it, and the nearest.
    """
    asked = [name.strip().lower().removeprefix("figure").strip(" _") for name in text.split(",")]
    known = ["all", *TITLES]
    for name in asked:
        if name not in known:
            parts = [key for key in TITLES if key.rstrip("abcd") == name]
            hint = f" (it has parts: {', '.join(parts)})" if parts else did_you_mean(name, known)
            raise UsageError(f"FIG {name!r} is not a figure{hint}: {', '.join(known)}")
    return list(TITLES) if "all" in asked else [name for name in TITLES if name in asked]


def parse(argv: list[str] | None = None, prog: str = "python -m eval.figures") -> argparse.Namespace:
    about = "Redraw the Peri-LN paper's figures from run folders: PNG, SVG and a caption each."
    parser = make_parser(prog, about, "all runs/", "3a,4,headroom runs/NAME --out figures/")
    parser.epilog = f"figures:\n  all       every figure the runs have records for\n{EXPLAINED}"
    parser.add_argument("fig", metavar="FIG", help="a figure's number, several separated by commas, or all")
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=Path,
        help="run folder, folder of eval.stability --out, or one that holds them",
    )
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder to write to")
    parser.add_argument("--format", action="append", choices=KINDS, help="png or svg; both when left out")
    parser.add_argument(
        "--learning-rate", action="append", type=float, metavar="X", help="only runs with this rate; all when left out"
    )
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    names_of(args.fig)
    check_folder(args.out)
    for run in args.runs:
        if not run.exists():
            raise UsageError(f"{run} does not exist")
