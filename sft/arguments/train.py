"""Options of `python -m sft.train`."""

import argparse
from pathlib import Path

from periln.runkit.errors import UsageError, make_parser
from periln.runkit.recipes import read_yaml

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def parse(argv: list[str] | None = None, prog: str = "python -m sft.train") -> argparse.Namespace:
    parser = make_parser(
        prog,
        "Fine-tune on LIMA-format conversations.",
        "--model runs/NAME",
        "--model runs/NAME --peft --merge",
        "--show-labels 2 --model runs/NAME",
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=RECIPES / "lima.yaml",
        help="recipe (YAML); the paper's protocol, lima.yaml, when left out",
    )
    parser.add_argument("--model", type=Path, nargs="+", action="extend", default=[], help="run or checkpoint folders")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="change the recipe"
    )
    parser.add_argument("--name", help="folder of the result inside each run; sft, or sft-lora with --peft")
    parser.add_argument("--peft", action="store_true", help="train LoRA adapters (the recipe's section peft)")
    parser.add_argument(
        "--merge", action="store_true", help="with --peft: write merged/, a model without adapters, too"
    )
    parser.add_argument("--check-data", action="store_true", help="only load the conversations, and stop")
    parser.add_argument(
        "--export-data", type=Path, metavar="FILE", help="write them as .jsonl (messages) for `trl sft`"
    )
    parser.add_argument(
        "--show-labels", type=int, metavar="N", help="print N conversations, >>>what is trained<<<; stop"
    )
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    read_yaml(args.config)
    if not args.model and not args.check_data and args.export_data is None:
        raise UsageError("--model: name at least one run or checkpoint folder")
    if args.name is not None and (args.name in (".", "..") or Path(args.name).name != args.name):
        raise UsageError(f"--name {args.name}: the name of a folder in each run, not a path")
    if args.show_labels is not None and args.show_labels < 1:
        raise UsageError(f"--show-labels must be at least 1, not {args.show_labels}")
