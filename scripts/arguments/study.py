"""Options of `python -m scripts.study`."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from periln.runkit.errors import UsageError, make_parser, more_options

VERBS = ("plan", "run", "status", "report", "check", "export")
GROUPS = ("E1", "E2", "E3", "E4", "E5")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Budget:
    """`8h` or `8x100h`: wall-clock seconds, and on how many cores or GPUs (None: as many as work side by side)."""

    text: str
    seconds: float
    machines: int | None


def parse_budget(text: str) -> Budget:
    """A budget such as 20m, 8h or 8x100h.

    Raises:
        UsageError: it is something else, or nothing.
    """
    found = re.fullmatch(r"(?:(\d+)x)?(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not found or float(found[2]) <= 0 or found[1] == "0":
        raise UsageError(f"--budget {text!r} is not a time: use 20m, 8h or, for 8 GPUs, 8x100h")
    return Budget(text, float(found[2]) * _UNITS[found[3]], int(found[1]) if found[1] else None)


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of `i/n`, i from 1. Raises UsageError for anything else."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"--shard {text!r} is not a part of a whole: use 1/4 to 4/4")
    return int(found[1]), int(found[2])


def parse(argv: list[str] | None = None, prog: str = "python -m scripts.study") -> argparse.Namespace:
    parser = make_parser(
        prog,
        "Give every claim of the paper a verdict from runs of your own, within a budget.",
        "plan --budget 20m --out runs/study",
        "plan --budget 8x100h --tokens-per-second 40000 --at 400M --device cuda --out runs/study",
        "run --out runs/study",
        "report --out runs/study",
        "export --out runs/study --records docs/results/records/study",
        "check --out docs/results/records/study",
    )
    add = parser.add_argument
    add("verb", choices=VERBS, help="plan trains nothing; check recomputes the verdicts and compares")
    add("--out", type=Path, default=Path("runs/study"), metavar="STUDY", help="folder of the study, or its records")
    add("--budget", metavar="TIME", help="plan: 20m, 8h, or 8x100h (cores or GPUs x hours)")
    add("--tokens-per-second", type=float, metavar="N", help="plan: of one core or GPU; measured when left out")
    add("--records", type=Path, help="exported records: their cells count as done; export writes them here")
    add("--workers", type=int, help="cells side by side; one a core or GPU when left out")
    add("--shard", metavar="I/N", help="run: every Nth cell, from the Ith on (array jobs)")
    more = more_options(parser).add_argument
    more("--at", metavar="SIZE", help="plan: the size that --tokens-per-second was measured at (default: the smallest)")
    more("--size", help="plan: the size of the models; chosen by the budget when left out")
    more("--groups", default=",".join(GROUPS), help="plan: experiments to plan; run: those to run")
    more("--source", help="plan: the text; chosen by the tokens needed when left out")
    more("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    more("--memory", type=float, default=8.0, help="run: GiB that a cell may take of the machine's memory")
    more("--nice", type=int, default=10, help="run: niceness of the cells, 0 to 19")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    if args.verb == "plan":
        if args.budget is None:
            raise UsageError("plan needs --budget: 20m, 8h, or 8x100h")
        parse_budget(args.budget)
    elif args.budget is not None:
        raise UsageError(f"--budget belongs to plan, not to {args.verb}: the plan says what is run")
    if args.tokens_per_second is not None and not args.tokens_per_second > 0:
        raise UsageError(f"--tokens-per-second must be above 0, not {args.tokens_per_second:g}")
    if args.workers is not None and args.workers < 1:
        raise UsageError(f"--workers must be at least 1, not {args.workers}")
    if args.shard is not None:
        parse_shard(args.shard)
    if not args.memory > 0:
        raise UsageError(f"--memory must be above 0, not {args.memory:g}")
    if not 0 <= args.nice <= 19:
        raise UsageError(f"--nice must lie between 0 and 19, not {args.nice}")
    for name in groups_of(args):
        if name not in GROUPS:
            raise UsageError(f"--groups: {name!r} is unknown: use {', '.join(GROUPS)}")
    if args.verb == "export" and args.records is None:
        raise UsageError("export needs --records: the folder to write")
    if args.verb != "plan" and not args.out.is_dir():
        raise UsageError(f"--out {args.out} is not a folder: begin with periln study plan --out {args.out}")


def groups_of(args: argparse.Namespace) -> list[str]:
    return [name.strip() for name in args.groups.split(",") if name.strip()]
