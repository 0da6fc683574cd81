"""The report's figure: loss and divergence, the stream over depth, and what formats cost, a colour a model."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from periln.eval.figures.pieces import DPI, WIDTH, image_bytes, settings
from periln.runkit.number_format import FP16

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
CAPTION = (
    "Left: loss above the source's, and KL from the source. Middle: the largest |x| of the stream over depth, FP16's "
    "largest number dotted. Right: what a format adds to the model's own loss; a cross where it is not finite."
)
_LEAST = 1e-4  # of a share of the loss, the axis' lower end


def draw(records: list[dict[str, Any]], depths: list[list[float]]) -> bytes:
    """The figure as PNG; `records` and the streams' largest |x| (layers + 1), the source first."""
    names = [record["name"] for record in records]
    formats = [found["row"] for found in records[0]["formats"]]
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(records))]
    with settings():  # type: ignore[attr-defined]
        height = 2.6 + 0.22 * len(names)
        figure = Figure(figsize=(1.6 * WIDTH, height), dpi=DPI, layout="constrained")
        bars, stream, costs = figure.subplots(1, 3)
        places = np.arange(len(records) - 1)
        rises = [record["loss"] - records[0]["loss"] for record in records[1:]]
        bars.barh(places - 0.2, rises, 0.36, color=colours[1:])
        bars.barh(places + 0.2, [record["kl"] for record in records[1:]], 0.36, color=colours[1:], alpha=0.45)
        bars.set_yticks(places, labels=names[1:])
        bars.invert_yaxis()
        bars.set_xlabel("nats a token: loss above the source's; KL (pale)")
        for name, depth, colour in zip(names, depths, colours, strict=True):
            stream.semilogy(range(len(depth)), depth, color=colour, label=name, linewidth=1.6)
        stream.axhline(FP16.largest, color="#888888", linestyle=":", linewidth=1)
        stream.set_xlabel("layer")
        stream.set_ylabel("largest |x| of the stream")
        _costs(costs, records, formats, colours)
        figure.legend(*stream.get_legend_handles_labels(), loc="outside upper center", ncols=min(4, len(names)))
        return image_bytes(figure)


def _costs(ax: Any, records: list[dict[str, Any]], formats: list[str], colours: list[str]) -> None:
    """A group of bars a format, a bar a model, on a logarithmic axis."""
    width = 0.8 / len(records)
    for i, (record, colour) in enumerate(zip(records, colours, strict=True)):
        for j, found in enumerate(record["formats"]):
            place = j + (i - (len(records) - 1) / 2) * width
            share = found.get("rise_share")
            if share is None:
                ax.plot([_LEAST * 1.5], [place], marker="x", color=colour, markersize=5)
            else:
                ax.barh(place, max(share, _LEAST), width, color=colour)
    ax.set_xscale("log")
    ax.set_xlim(left=_LEAST)
    ax.set_yticks(range(len(formats)), labels=formats, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("rise of the loss, as a share of it")
