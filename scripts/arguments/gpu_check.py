"""Options of `python -m scripts.gpu_check`."""

import argparse
from pathlib import Path

from periln.runkit.errors import UsageError, UserError, did_you_mean, make_parser

RESULT = "gpu_check.json"
# The sections in their order, and how long each may take of the six minutes; 20 seconds are for starting.
SECTIONS = {"device": 20, "arithmetic": 60, "speed": 100, "kernels": 25, "decoding": 35, "resume": 60, "overflow": 40}
SECONDS = 360


def parse(argv: list[str] | None = None, prog: str = "python -m scripts.gpu_check") -> argparse.Namespace:
    parser = make_parser(
        prog,
        "Check the trainer on a GPU in one call of six minutes: arithmetic, speed, memory, resuming.",
        "--out check/",
    )
    parser.add_argument("--out", type=Path, required=True, help=f"folder of {RESULT}; must not hold one yet")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a GPU where there is one, when left out")
    parser.add_argument(
        "--sections", nargs="+", metavar="NAME", help=f"only these of {', '.join(SECTIONS)}; all when left out"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="S", help="for all sections; each has its share as a deadline"
    )
    parser.add_argument("--one-section", choices=SECTIONS, help=argparse.SUPPRESS)  # in this process, for the parent
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    for name in args.sections or ():
        if name not in SECTIONS:
            raise UsageError(f"--sections {name!r} is not a section{did_you_mean(name, list(SECTIONS))}")
    if not args.seconds > 0:
        raise UsageError(f"--seconds must be above 0, not {args.seconds:g}")
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out} is not a folder")
    if args.one_section is None and (args.out / RESULT).exists():
        raise UserError(f"{args.out / RESULT} exists: give another --out")
