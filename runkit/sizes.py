"""What a model's size is called: parameters outside the embeddings, by the paper's names where they fit."""

import math
import re

PAPER_SIZES = {"400M": 400e6, "1.5B": 1.5e9, "3.2B": 3.2e9}  # parameters outside the embeddings
SIZE_TOLERANCE = 0.05  # the paper's names are rounded, and it does not say how wide its FFN is
UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def size_value(name: str) -> float:
    """`1.5B` as a number, infinity for any other name."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([KMBT]?)\s*(?:\(.*\))?", str(name), re.IGNORECASE)
    return float(found[1]) * UNITS.get(found[2].upper(), 1.0) if found else float("inf")


def paper_size(parameters: float) -> str | None:
    """The paper's name for this many parameters outside the embeddings, within 5 %; None where it has none."""
    near = [name for name, n in PAPER_SIZES.items() if abs(parameters / n - 1) <= SIZE_TOLERANCE]
    return near[0] if near else None


def count_text(count: float | None) -> str:
    """Three digits and a unit: `888K`, `60.1M`, `30.2B`; `?` where it is not known."""
    if count is None or math.isnan(count):
        return "?"
    for unit, scale in reversed(UNITS.items()):
        if count >= 0.9995 * scale:
            return f"{count / scale:.3g}{unit}"
    return f"{count:g}"


def size_name(parameters: float) -> str:
    """The paper's name, else `count_text`."""
    return paper_size(parameters) or count_text(parameters)
