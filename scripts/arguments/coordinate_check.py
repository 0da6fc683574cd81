"""Options of `python -m scripts.coordinate_check`."""

import argparse
from pathlib import Path

from periln.runkit.errors import UsageError, UserError, did_you_mean, make_parser, more_options
from periln.runkit.recipes import read_yaml

RESULT = "coordinate_check.json"
RULES = ("standard", "mup", "depth_mup", "completep")


def parse(argv: list[str] | None = None, prog: str = "python -m scripts.coordinate_check") -> argparse.Namespace:
    parser = make_parser(
        prog,
        "Check that activations move as much at any width and depth: a few steps of each size, a table and a picture.",
        "scripts/recipes/1m-peri.yaml --out check/",
        "scripts/recipes/1m-pre.yaml --rules standard mup --widths 64 128 256 --out check/",
    )
    parser.add_argument("recipe", type=Path, help="recipe (YAML); its model is made wider and deeper")
    parser.add_argument("--out", type=Path, required=True, help=f"folder of {RESULT}, .md and .png; must hold none yet")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="change the recipe"
    )
    parser.add_argument(
        "--rules", nargs="+", default=["standard", "mup", "completep"], metavar="RULE", help=f"of {', '.join(RULES)}"
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512], metavar="D", help="hidden sizes")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 16], metavar="L", help="numbers of layers")
    parser.add_argument("--steps", type=int, default=6, help="updates, all on one batch of random tokens")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="models of each size")
    more = more_options(parser)
    more.add_argument("--batch", type=int, nargs=2, default=[4, 64], metavar=("B", "S"), help="sequences, their length")
    more.add_argument("--vocabulary", type=int, default=1024, metavar="V", help="size of the vocabulary")
    more.add_argument("--tolerance", type=float, default=0.2, help="largest power of the size that counts as none")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    for rule in args.rules:
        if rule not in RULES:
            raise UsageError(f"--rules {rule!r} is none of {', '.join(RULES)}{did_you_mean(rule, RULES)}")
    for name in ("widths", "depths"):
        sizes = getattr(args, name)
        if min(sizes) < 1 or (len(set(sizes)) < 2 and len(sizes) > 1) or len(sizes) != len(set(sizes)):
            raise UsageError(f"--{name} {' '.join(map(str, sizes))}: give different sizes of at least 1")
    if len(args.widths) < 2 and len(args.depths) < 2:
        raise UsageError("--widths and --depths have one size each: give two of one of them at least")
    for name in ("steps", "seeds", "vocabulary"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if min(args.batch) < 1:
        raise UsageError(f"--batch {args.batch[0]} {args.batch[1]}: give at least 1 sequence of 1 token")
    if not args.tolerance > 0:
        raise UsageError(f"--tolerance must be above 0, not {args.tolerance:g}")
    if (args.out / RESULT).exists():
        raise UserError(f"{args.out / RESULT} exists: give another --out")
    read_yaml(args.recipe)
