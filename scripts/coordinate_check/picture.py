"""The picture: the change of every tensor over the model's size, a column a rule, a row an axis."""

import io
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from periln.runkit.figure_style import STYLE
from periln.scripts.coordinate_check.measure import JUDGED, TENSORS

COLORS = dict(zip(TENSORS, ("#999999", "#0072B2", "#009E73", "#D55E00", "#CC79A7"), strict=True))
MARKERS = dict(zip(TENSORS, "osd^v", strict=True))


def draw(found: list[dict[str, Any]], steps: int) -> bytes:
    """A PNG; tensors that are judged have full lines."""
    rules, axes = (list(dict.fromkeys(one[key] for one in found)) for key in ("rule", "axis"))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.1 * len(rules) + 1.2, 2.7 * len(axes) + 0.6), layout="constrained")
        panels = figure.subplots(len(axes), len(rules), squeeze=False, sharey="row")
        for one in found:
            panel = panels[axes.index(one["axis"])][rules.index(one["rule"])]
            for tensor in TENSORS:
                style = "-" if tensor in JUDGED[one["axis"]] else ":"
                label = f"{tensor}, power {one['powers'][tensor]:+.2f}"
                panel.plot(one["sizes"], one["changes"][tensor], style, color=COLORS[tensor], marker=MARKERS[tensor],
                           label=label)  # fmt: skip
            panel.set(xscale="log", yscale="log", xlabel=one["axis"])
            panel.set_xticks(one["sizes"], [str(size) for size in one["sizes"]])
            panel.minorticks_off()
            panel.set_title(f"{one['rule']}: {'passes' if one['passes'] else 'fails'}")
            panel.legend(fontsize=6.5)
        for row in panels:
            row[0].set_ylabel(f"mean |change| after {steps} steps")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
