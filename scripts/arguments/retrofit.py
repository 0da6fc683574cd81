"""Options of `python -m scripts.retrofit`."""

import argparse
from pathlib import Path

from periln.runkit.errors import UsageError, did_you_mean, make_parser, more_options

RULES = ("unit", "scalar", "channel", "least-squares")


def _rules(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _layers(text: str) -> list[int]:
    """`2,29-30` as [1, 28, 29]: numbers from 1 on the command line, from 0 behind it."""
    found: list[int] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, _, last = part.partition("-")
        if not (first.isdigit() and (last or first).isdigit()):
            raise UsageError(f"--keep {text!r} lists no layers: write such as 2,3,29-30")
        found += range(int(first) - 1, int(last or first))
    return found


def parse(argv: list[str] | None = None, prog: str = "python -m scripts.retrofit") -> argparse.Namespace:
    parser = make_parser(
        prog,
        "Give a trained checkpoint another norm placement: what is exact is folded and proved, the rest calibrated.",
        "runs/NAME model-peri --to peri --data my_texts/",
        "org/name model-sandwich --to sandwich --data text.txt --heal data/ --heal-tokens 1000000",
        "runs/NAME model --to output --dry-run",
    )
    add = parser.add_argument
    add("src", metavar="SRC", help="model folder, run folder (its newest checkpoint) or Hub id")
    add("dst", metavar="DST", type=Path, help="new folder; nothing is overwritten")
    add("--to", required=True, metavar="PLACEMENT", help="peri, sandwich, output, pre, another row, or a mapping as in "
        "norm_placement: in YAML on one line, or a .yaml file")  # fmt: skip
    add("--data", metavar="TEXT", help="calibration text: a .txt, .jsonl or .parquet file, a folder of them, "
        "installed-python, or hf: and a data set's id")  # fmt: skip
    add("--dry-run", action="store_true", help="show the plan, and write nothing")
    add("--rules", type=_rules, default=list(RULES), metavar="A,B", help=f"of {', '.join(RULES)}: each is measured, "
        "and that of lowest loss on the calibration text is written")  # fmt: skip
    add("--samples", type=int, default=32, help="windows of text to calibrate on")
    add("--check-samples", type=int, default=16, help="other windows of the text, for the loss after each rule")
    add("--tokens", type=int, default=256, metavar="N", help="tokens a window, or what the model takes if that is less")
    add("--heal", metavar="DATA", help="prepared data (periln prepare-data): recipes for periln pretrain are written "
        "to DST/heal")  # fmt: skip
    add("--heal-tokens", type=int, default=1_000_000, metavar="N", help="tokens of both healing runs together")
    add = more_options(parser).add_argument
    add("--keep", type=_layers, default=[], metavar="LAYERS", help="layers that keep the norms of SRC, such as "
        "2,3,29-30 (from 1)")  # fmt: skip
    add("--soften", type=float, default=0.0, metavar="X", help="epsilon of new output norms, in mean squares of "
        "the largest token: gives back loss, and their bound")  # fmt: skip
    add("--heal-name", metavar="NAME", help="what the healing runs are called; DST's name when left out")
    add("--seed", type=int, default=0, help="which windows are drawn")
    add("--revision", help="branch, tag or commit of a model of the Hub")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    for name, least in (("samples", 1), ("check_samples", 1), ("tokens", 4), ("heal_tokens", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    if not 0 <= args.soften < float("inf"):
        raise UsageError(f"--soften must be at least 0, not {args.soften:g}")
    if not args.rules:
        raise UsageError("--rules names no rule")
    for name in args.rules:
        if name not in RULES:
            raise UsageError(f"--rules has no {name!r}{did_you_mean(name, RULES)}: it has {', '.join(RULES)}")
    if not args.dry_run and args.dst.exists() and (not args.dst.is_dir() or any(args.dst.iterdir())):
        raise UsageError(f"{args.dst} exists: nothing is overwritten, give another DST")
    if args.heal is not None and not (Path(args.heal) / "index.json").exists():
        raise UsageError(f"--heal {args.heal} holds no prepared tokens (no index.json): run periln prepare-data")
