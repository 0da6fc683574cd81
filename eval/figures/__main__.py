"""Redraw the paper's figures from run folders: `python -m eval.figures FIG RUN...`."""

import sys

from periln.eval.arguments.figures import KINDS, check, names_of, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("eval.figures", parse, check))  # parses before the imports below, which take seconds

import argparse
import sys
from pathlib import Path

from periln.eval.figures.files import FigureFiles, all_figures, draw_files
from periln.eval.figures.measured_models import load_measured
from periln.eval.figures.selection import view_of
from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import write_bytes, write_text
from periln.runkit.progress import progress_bar


def write_drawing(drawing: FigureFiles, out: Path) -> list[Path]:
    """Write the images and, next to them, title and caption; returns the images' paths."""
    files = [out / f"figure_{drawing.name}.{kind}" for kind in drawing.images]
    for file, data in zip(files, drawing.images.values(), strict=True):
        write_bytes(file, data)
    if files:
        text = f"{drawing.title}\n\n{drawing.paper}\n\nHere: {drawing.words}\n"
        write_text(out / f"figure_{drawing.name}.txt", text)
    return files


def main(args: argparse.Namespace) -> int:
    check(args)
    names = names_of(args.fig)
    kinds = args.format or list(KINDS)
    frames = load_measured(list(dict.fromkeys(args.runs)))
    rates = frames.learning_rates
    for rate in args.learning_rate or []:
        if rate not in rates:
            known = ", ".join(f"{r:g}" for r in rates) or "there is none"
            raise UsageError(f"--learning-rate {rate:g} is not a rate of these runs: {known}")
    whole = "all" in args.fig.lower().split(",")
    view = view_of(frames, args.learning_rate)
    found = (
        all_figures(frames, kinds, args.learning_rate) if whole else (draw_files(name, view, kinds) for name in names)
    )
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
