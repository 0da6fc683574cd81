"""What a model's placement is called, in tables, figures and cards."""

from itertools import groupby
from typing import Any


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
