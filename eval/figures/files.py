"""Figures drawn from run folders.

Every placement has one colour and one marker everywhere (`runkit/placements.py`). The same records give the same bytes:
nothing is read from the user's Matplotlib settings, and the files carry no dates.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from periln.eval.figures.catalogue import CATALOGUE, Entry
from periln.eval.figures.pieces import NotRecorded, image_bytes, settings
from periln.eval.figures.plots import Plot
from periln.eval.figures.selection import View, of_size, plain_placements, sizes, view_of
from periln.eval.figures.titles import TITLES
from periln.eval.records.frames import Frames


@dataclass(frozen=True)
class FigureFiles:
    """One figure: its description and its images by kind; or, without images, what it needs.

    `plot` has its numbers, where a page can draw it itself (`plots.py`).
    """

    name: str
    title: str
    paper: str
    alt: str
    words: str
    images: dict[str, bytes]
    plot: Plot | None = None

    @property
    def numbered(self) -> bool:
        """Whether the paper has this figure."""
        return self.name[0].isdigit()

    @property
    def png(self) -> bytes | None:
        return self.images.get("png")


def draw_files(name: str, view: View, kinds: Sequence[str] = ("png",)) -> FigureFiles:
    """One figure of the catalogue; where its records are missing it has no images, and `words` say what it needs."""
    entry = CATALOGUE[name]
    plot = None
    with settings():
        try:
            chosen, note = _sized(entry, view)
            chosen, changed = plain_placements(chosen) if entry.plain else (chosen, "")
            chart = entry.draw(chosen)
            plot = chart.plot
            words, images = chart.caption + changed + note, {kind: image_bytes(chart.figure, kind) for kind in kinds}
        except NotRecorded as error:
            words, images = str(error), {}
    return FigureFiles(name, TITLES[name], entry.paper, entry.alt, words, images, plot)


def _sized(entry: Entry, view: View) -> tuple[View, str]:
    """The runs of the figure's sizes; where there are none, all runs, and a sentence that says so."""
    if not entry.sizes or view.runs["size"].isin(entry.sizes).any():
        return of_size(view, entry.sizes), ""
    return view, f" Size of the models here: {', '.join(sizes(view))} (the paper's: {' and '.join(entry.sizes)})."


def _wanted(name: str, view: View) -> str:
    """Why `all` leaves a figure out; empty where it is drawn."""
    entry = CATALOGUE[name]
    if entry.like and not view.runs["size"].isin(entry.sizes).any():
        recipes = " and ".join(f"scripts/recipes/{size.lower()}-*.yaml" for size in entry.sizes)
        return (
            f"Needs models of {' or '.join(entry.sizes)} (periln pretrain --config, {recipes}); "
            f"Figure {entry.like} is the same figure for the sizes at hand."
        )
    if name == "rates" and view.runs.learning_rate.nunique() == 1:
        return "Only one learning rate was run: Figures 3b and 3c show it."
    return ""


def all_figures(
    frames: Frames, kinds: Sequence[str] = ("png",), rates: Sequence[float] | None = None
) -> Iterator[FigureFiles]:
    """Every figure in order; those that only repeat another at missing sizes are left out, with the reason.

    `rates` keeps the runs with these learning rates.
    """
    view = view_of(frames, rates)
    for name, entry in CATALOGUE.items():
        if reason := _wanted(name, view):
            yield FigureFiles(name, TITLES[name], entry.paper, entry.alt, reason, {})
        else:
            yield draw_files(name, view, kinds)
