"""What verdicts read of a cell's result: one number each, None where the cell does not have it."""

from collections.abc import Callable
from statistics import fmean
from typing import Any

from periln.eval.study.statistics import log_slope, log_spread

Cell = dict[str, Any]
Measure = Callable[[Cell], float | None]


def _at(cell: Cell, table: str, last: bool) -> list[float | None] | None:
    found = cell.get(table) or {}
    steps = sorted(found, key=int)
    return found[steps[-1 if last else 0]] if steps else None


def stream_variance(cell: Cell, last: bool) -> list[float | None] | None:
    """The stream's variance after layers 1 to L at the first, or last, recorded step."""
    values = _at(cell, "variance", last)
    return values[1:] if values else None


def _completed(measure: Measure) -> Measure:
    return lambda cell: measure(cell) if cell["status"] == "completed" else None


def _by_layer(
    table: str, of: Callable[[list[float | None]], float | None], last: bool
) -> Callable[[Cell], float | None]:
    def measure(cell: Cell) -> float | None:
        values = _at(cell, table, last)
        return of(values) if values else None

    return _completed(measure) if last else measure


def _growth(cell: Cell) -> float | None:
    """The natural logarithm of the variance after the last layer over that after the first."""
    values = stream_variance(cell, True)
    slope = log_slope(values) if values else None
    return None if slope is None or values is None else slope * (len(values) - 1)


def _headroom(cell: Cell) -> float | None:
    """Bits below 65504 of the largest entry of stream, sum and module output; 0 where one was not finite."""
    bits = [0.0 if value is None else value for value in (cell.get("headroom") or {}).values()]
    return min(bits) if bits else None


def _inside(*names: str) -> Callable[[Cell], Any]:
    def find(cell: Cell) -> Any:
        found: Any = cell.get("inside")
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        return found

    return find


def _mean(find: Callable[[Cell], Any]) -> Measure:
    return lambda cell: fmean(values) if (values := find(cell)) else None


def _broken(find: Callable[[Cell], Any]) -> Measure:
    return lambda cell: None if (held := find(cell)) is None else float(held < 1)


MEASURES: dict[str, tuple[Measure, str]] = {  # and the unit of a difference
    "loss": (lambda cell: cell.get("heldout_loss"), "nats a token"),
    "spikes": (lambda cell: 1000 * cell["spikes"] / cell["steps"], "spikes in 1,000 steps"),
    "headroom": (_headroom, "bits"),
    "overflow": (lambda cell: float(cell["overflow"]), "of runs"),
    "growth": (_completed(_growth), "log growth of the variance"),
    "gradient_spread_start": (_by_layer("gradient", log_spread, False), "sd of log gradient norm"),
    "gradient_spread_end": (_by_layer("gradient", log_spread, True), "sd of log gradient norm"),
    "gradient_slope_start": (_by_layer("gradient", log_slope, False), "log gradient norm a layer"),
    "gradient_slope_end": (_by_layer("gradient", log_slope, True), "log gradient norm a layer"),
    "gamma_slope_end": (_by_layer("gamma", log_slope, True), "log gamma a layer"),
    "angle": (_mean(_inside("angular")), "pi"),
    "skip_loss": (_mean(_inside("skip_loss")), "nats a token"),
    "step_bound_broken": (_broken(_inside("steps", "held")), "of models"),
    "proposition_broken": (_broken(_inside("proposition", "held")), "of models"),
    "gold_bits": (lambda cell: (cell.get("gold_bits_per_byte") or {}).get("mean"), "bits a byte"),
}
