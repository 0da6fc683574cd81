"""A placement's name, order, colour and marker, the same in tables, figures and cards.

Colours: Okabe and Ito's palette, safe for colour-blind eyes.
"""

from itertools import groupby
from typing import Any

# Their order everywhere: modeling_periln's PLACEMENT_NAMES (a test compares them), without loading torch for it.
PLACEMENTS = ("post", "pre", "peri", "output", "pre_post", "deepnorm", "lns", "mix")


def placement_order(placement: str) -> tuple[int, str]:
    """A sort key: the known placements in their order, then the user's own by name."""
    return (PLACEMENTS.index(placement) if placement in PLACEMENTS else len(PLACEMENTS), placement)


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


def colour_of(placement: str) -> str:
    return COLOURS.get(placement, OTHER_COLOUR)


def marker_of(placement: str) -> str:
    return MARKERS.get(placement, OTHER_MARKER)


def placement_name(config: dict[str, Any], missing: str = "placement not recorded") -> str:
    """The placement of a configuration, or of a recipe's model section; for a list of layers or a row of the user's
    own, what it holds; `missing` where there is none.
    """
    if names := config.get("layer_placements"):
        return " + ".join(f"{len(list(same))} {name}" for name, same in groupby(names))
    placement = config.get("norm_placement")
    if isinstance(placement, dict):
        return "own: " + ", ".join(key if value is True else f"{key}={value}" for key, value in placement.items())
    return str(placement) if placement else missing
