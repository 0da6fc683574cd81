"""Redraw the paper's figures from run folders: `python -m eval.figures FIG RUN...`."""

import argparse
import sys
from pathlib import Path

from runkit.errors import UsageError, UserError, did_you_mean, make_parser, run_command
from runkit.folder import write_bytes, write_text
from runkit.progress import progress_bar

from . import CATALOGUE, Drawing, draw, drawings
from .measured_models import load_measured
from .selection import view_of

KINDS = ("png", "svg")
EXPLAINED = "\n".join(f"  {name:9} {entry.title}" for name, entry in CATALOGUE.items())


def names_of(text: str) -> list[str]:
    """The figures that were asked for, in the order of the catalogue; `all` is all of them.

    Raises:
        UsageError: there is no such figure; names it, and the nearest.
    """
    asked = [name.strip().lower().removeprefix("figure").strip(" _") for name in text.split(",")]
    known = ["all", *CATALOGUE]
    for name in asked:
        if name not in known:
            parts = [key for key in CATALOGUE if key.rstrip("abcd") == name]
            hint = f" (it has parts: {', '.join(parts)})" if parts else did_you_mean(name, known)
            raise UsageError(f"FIG {name!r} is no figure that is drawn{hint}: {', '.join(known)}")
    return list(CATALOGUE) if "all" in asked else [name for name in CATALOGUE if name in asked]


def write_drawing(drawing: Drawing, out: Path) -> list[Path]:
    """Write the images and, beside them, title and caption; returns the images' paths."""
    files = [out / f"figure_{drawing.name}.{kind}" for kind in drawing.images]
    for file, data in zip(files, drawing.images.values(), strict=True):
        write_bytes(file, data)
    if files:
        text = f"{drawing.title}\n\n{drawing.paper}\n\nHere: {drawing.words}\n"
        write_text(out / f"figure_{drawing.name}.txt", text)
    return files


def main(args: argparse.Namespace) -> int:
    names = names_of(args.fig)
    kinds = args.format or list(KINDS)
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out} is not a folder")
    frames = load_measured(list(dict.fromkeys(args.runs)))
    rates = frames.learning_rates
    for rate in args.learning_rate or []:
        if rate not in rates:
            known = ", ".join(f"{r:g}" for r in rates) or "there is none"
            raise UsageError(f"--learning-rate {rate:g} is none of the runs': {known}")
    whole = "all" in args.fig.lower().split(",")
    view = view_of(frames, args.learning_rate)
    found = drawings(frames, kinds, args.learning_rate) if whole else (draw(name, view, kinds) for name in names)
    drawn = []
    with progress_bar(args, len(names), "figures", "figure", shown=len(names) > 1) as bar:
        for drawing in found:
            drawn.append((drawing, write_drawing(drawing, args.out)))
            bar.update()
    for drawing, files in drawn:
        where = ", ".join(map(str, files)) or f"not drawn. {drawing.words}"
        print(f"Figure {drawing.name}: {where}")
    if not any(files for _, files in drawn):
        what = drawn[0][0].words if len(drawn) == 1 else "none of these figures' records are there, see above"
        raise UserError(f"nothing was drawn: {what[0].lower()}{what[1:]}")
    return 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        "python -m eval.figures", "The Peri-LN paper's figures, redrawn from run folders: PNG, SVG and a caption each."
    )
    parser.formatter_class = type("Help", (argparse.RawDescriptionHelpFormatter, parser.formatter_class), {})
    parser.epilog = f"figures:\n  all       every figure the runs have records for\n{EXPLAINED}"
    parser.add_argument("fig", metavar="FIG", help="a figure's number, several with commas between, or all")
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


if __name__ == "__main__":
    arguments = parse()
    sys.exit(run_command(main, arguments))
