"""Learning rates as functions of the step alone: a skipped step delays nothing, and every placement gets the same.

All begin with a linear warm-up to the peak. What follows is a row of `SCHEDULES`; to add one, add a row.
"""

import math
from collections.abc import Callable

# Of the way from the peak to the final rate, what is left after a share t of a decay, 0 to 1.
SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "linear": lambda t: 1 - t,
    "1-sqrt": lambda t: 1 - math.sqrt(t),  # Hägele et al., 2405.18392: better than linear at the end of a WSD run
}
# Of each schedule, the shape of its decay and whether that begins right after the warm-up: else it takes the last
# `decay` of the steps. None: no decay; "": the recipe's `decay_shape`.
SCHEDULES: dict[str, tuple[str | None, bool]] = {
    "cosine": ("cosine", True),
    "linear": ("linear", True),
    "constant": (None, True),
    "wsd": ("", False),  # warm-up, stable, decay: Hu et al., 2404.06395
}


def decay_start(steps: int, schedule: str, warmup: float, decay: float) -> int:
    """The first step (from 0) of the decay; `steps` where there is none."""
    shape, at_once = SCHEDULES[schedule]
    if shape is None:
        return steps
    return round(warmup * steps) if at_once else steps - round(decay * steps)


def rate(
    step: int, steps: int, peak: float, final: float, schedule: str, warmup: float, decay: float, decay_shape: str
) -> float:
    """The learning rate of `step` (from 0) of `steps`: up to `peak`, and where there is a decay, down to `final`.

    `warmup` and `decay` are shares of the steps.
    """
    rising, start = round(warmup * steps), decay_start(steps, schedule, warmup, decay)
    if step < rising:
        return peak * (step + 1) / rising
    if step < start or SCHEDULES[schedule][0] is None:
        return peak
    shape = SHAPES[SCHEDULES[schedule][0] or decay_shape]
    return final + (peak - final) * shape(min(1.0, (step - start) / max(1, steps - start)))
