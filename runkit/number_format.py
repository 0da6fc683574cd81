"""FP16's largest number, and how far a value stays below it."""

import math

FP16_MAX = 65504.0


def headroom(value: float) -> float:
    """Bits between `value` and FP16's largest number: log2(65504 / value); -inf where it is not finite."""
    if not math.isfinite(value):
        return -math.inf
    return math.log2(FP16_MAX / value) if value > 0 else math.inf
