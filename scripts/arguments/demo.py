"""Options of `python -m scripts.demo`."""

import argparse
from pathlib import Path

from periln.runkit.errors import UserError, make_parser
from periln.runkit.folder import RunFolder
from periln.runkit.recipes import read_yaml

HUB_LIMIT = 100  # items a task, where --hub is given without --limit


def parse(argv: list[str] | None = None, prog: str = "python -m scripts.demo") -> argparse.Namespace:
    parser = make_parser(
        prog,
        "Train Post-LN, Pre-LN and Peri-LN models side by side in FP16, evaluate them, and write a report.",
        "--out runs/demo",
        "--out runs/mine --text my_texts/ --placements pre,peri,output",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the demo")
    parser.add_argument("--recipe", type=Path, help="demo recipe; scripts/recipes/demo.yaml, or the folder's own")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="the recipe's when left out")
    parser.add_argument("--text", metavar="PATH", help="folder of .txt/.jsonl/.parquet instead of the recipe's text")
    parser.add_argument("--placements", metavar="A,B,...", help="placements to compare; the recipe's when left out")
    parser.add_argument("--hub", action="store_true", help="the real lm-eval tasks and the real GAIR/lima")
    parser.add_argument("--limit", type=int, metavar="N", help=f"items a task, 0 for all; {HUB_LIMIT} with --hub")
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)  # Unix time at which `make demo` began
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    kept = args.out / "recipe.yaml"
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out} is a file, not a folder; it is left alone: give another folder")
    if kept.exists() and read_yaml(kept).get("stage") != "demo" and RunFolder(args.out).began:
        raise UserError(f"{args.out} is not a demo's folder (its recipe.yaml has another stage): give another folder")
    if args.recipe is not None:
        read_yaml(args.recipe)
