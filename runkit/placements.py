"""A placement's name, order, colour and marker, the same in tables, figures and cards.

Colours: Okabe and Ito's palette, safe for colour-blind eyes.
"""

import importlib.util
import sys
from dataclasses import fields
from itertools import groupby
from types import ModuleType
from typing import Any

TABLE_NAME = "modeling_periln.placements"


def _table() -> ModuleType:
    """modeling_periln/placements.py, which needs only the standard library; its package would import torch."""
    if TABLE_NAME in sys.modules:
        return sys.modules[TABLE_NAME]
    found = importlib.util.find_spec("modeling_periln")
    if found is None or found.submodule_search_locations is None:
        raise ModuleNotFoundError("modeling_periln is not installed with periln", name="modeling_periln")
    package = ModuleType("_placement_table")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(f"{package.__name__}.placements")


_ROWS = _table().PLACEMENTS
PLACEMENTS: tuple[str, ...] = tuple(_table().PLACEMENT_NAMES)  # their order everywhere
# One a row of the table, in its order; a placement beyond them gets OTHER_COLOUR and OTHER_MARKER.
_PALETTE: tuple[str, ...] = ("#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
# Then Tol's muted palette, and the first one's yellow, darkened: it cannot be read on white.
_PALETTE += (
    "#332288",
    "#117733",
    "#882255",
    "#AA4499",
    "#44AA99",
    "#661100",
    "#6699CC",
    "#8C7A00",
    "#999933",
    "#CC6677",
)
_SHAPES = ("o", "s", "^", "D", "v", "P", "*", "<", ">", "p", "X", "H", "8", "1", "h", "2", "3")
OTHER_COLOUR, OTHER_MARKER = "#6E6E6E", "d"
COLOURS = dict(zip(PLACEMENTS, _PALETTE, strict=False))
MARKERS = dict(zip(PLACEMENTS, _SHAPES, strict=False))


# The norms of a sublayer, by their letters in x <- C(alpha x + s B(f(c A(x)))).
_LETTERS = {"A": "input_norm", "B": "output_norm", "C": "residual_norm"}
_ENDS = ("embedding_norm", "final_norm")


def _plain(row: Any) -> bool:
    """Whether a row says only where the norms A, B and C and those of the two ends are."""
    said = (f for f in fields(row) if f.name not in (*_LETTERS.values(), *_ENDS))
    return all(getattr(row, f.name) == getattr(type(row)(), f.name) for f in said)


# The first row with these norms alone: {"C": "post", "A": "pre", "AB": "peri", "B": "output", "AC": "pre_post", ...}.
BY_NORMS: dict[str, str] = {}
for _name, _row in _ROWS.items():
    if _plain(_row):
        BY_NORMS.setdefault("".join(letter for letter, norm in _LETTERS.items() if getattr(_row, norm)), _name)


def has_embedding_norm(model: dict[str, Any], placement: str | None = None) -> bool:
    """Whether a configuration, or a recipe's model section, has a norm on the embedding.

    Its own field decides, else the row of its placement; a mixture (`mix`, `layer_placements`) has the row `pre`.
    """
    if model.get("embedding_norm") is not None:
        return bool(model["embedding_norm"])
    return default_embedding_norm(model, placement)


def default_embedding_norm(model: dict[str, Any], placement: str | None = None) -> bool:
    """The same for the placement alone, whatever the field `embedding_norm` says."""
    own = model.get("norm_placement", placement)
    if isinstance(own, dict):
        return own.get("embedding_norm") not in (None, False)
    row = None if model.get("layer_placements") else _ROWS.get(own)
    return bool((row or _ROWS["pre"]).embedding_norm)


def placement_order(placement: str) -> tuple[int, str]:
    """A sort key: the known placements in their order, then the user's own by name."""
    return (PLACEMENTS.index(placement) if placement in PLACEMENTS else len(PLACEMENTS), placement)


def colour_of(placement: str) -> str:
    return COLOURS.get(placement, OTHER_COLOUR)


def marker_of(placement: str) -> str:
    return MARKERS.get(placement, OTHER_MARKER)


def placement_name(config: dict[str, Any], missing: str = "placement not recorded") -> str:
    """The placement of a configuration, or of a recipe's model section; for a list of layers or the user's
    own row, what it holds; `missing` where there is none.
    """
    if names := config.get("layer_placements"):
        return " + ".join(f"{len(list(same))} {name}" for name, same in groupby(names))
    placement = config.get("norm_placement")
    if isinstance(placement, dict):
        return "own: " + ", ".join(key if value is True else f"{key}={value}" for key, value in placement.items())
    return str(placement) if placement else missing
