"""Options of `python -m scripts.plan`."""

import argparse
from pathlib import Path

from periln.runkit.errors import UsageError, make_parser
from periln.runkit.recipes import read_yaml
from periln.scripts.gpus import GPUS


def parse(argv: list[str] | None = None, prog: str = "python -m scripts.plan") -> argparse.Namespace:
    parser = make_parser(
        prog, "Plan a recipe's parameters, FLOPs, memory, time and exports.", "RECIPE.yaml --gpus 8 --gpu h100"
    )
    parser.add_argument("recipe", type=Path, help="recipe (YAML)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="change the recipe"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="processes, one a GPU; 8, or 1 on a CPU, when left out")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="kind of GPU: its FLOP/s and memory")
    parser.add_argument("--memory", type=float, metavar="GIB", help="memory a GPU; the GPU's own when left out")
    parser.add_argument("--flops-per-gpu", type=float, metavar="X", help="peak FLOP/s; the GPU's own when left out")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that the model's FLOPs reach")
    parser.add_argument("--engine", choices=("ddp", "fsdp2"), default="fsdp2", help="where there are several GPUs")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="the recipe's when left out, where `auto` is cuda")
    parser.add_argument("--measure", action="store_true", help="count the live tensors of a step on this CPU as well")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    if args.flops_per_gpu is not None and args.flops_per_gpu <= 0:
        raise UsageError(f"--flops-per-gpu must be above 0, not {args.flops_per_gpu}")
    if not 0 < args.mfu <= 1:
        raise UsageError(f"--mfu is a share, above 0 and at most 1, not {args.mfu}")
    if args.gpus is not None and args.gpus < 1:
        raise UsageError(f"--gpus must be at least 1, not {args.gpus}")
    if args.memory is not None and args.memory <= 0:
        raise UsageError(f"--memory must be above 0, not {args.memory}")
    read_yaml(args.recipe)
