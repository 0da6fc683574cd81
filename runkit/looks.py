"""How figures look: every placement has one colour and one marker everywhere.

Okabe and Ito's palette, safe for colour-blind eyes.
"""

COLOURS = {
    "post": "#D55E00",
    "pre": "#0072B2",
    "peri": "#009E73",
    "output": "#E69F00",
    "pre_post": "#CC79A7",
    "deepnorm": "#56B4E9",
    "lns": "#000000",
    "mix": "#8C7A00",  # the palette's yellow, darkened: on white it cannot be read
}
MARKERS = {
    "post": "o",
    "pre": "s",
    "peri": "^",
    "output": "D",
    "pre_post": "v",
    "deepnorm": "P",
    "lns": "*",
    "mix": "h",
}
OTHER_COLOUR, OTHER_MARKER = "#6E6E6E", "d"
STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.5,
    "legend.fontsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.markersize": 4.5,
}


def colour_of(placement: str) -> str:
    return COLOURS.get(placement, OTHER_COLOUR)


def marker_of(placement: str) -> str:
    return MARKERS.get(placement, OTHER_MARKER)
