"""Number formats as data: the largest value, the smallest normal one and the rounding error of each.

Sources: IEEE 754-2019 (binary16); Kalamkar et al. 2019, arXiv 1905.12322 (bfloat16); Micikevicius et al. 2022,
arXiv 2209.05433 (E4M3, which has no infinities, and E5M2). A test compares every row with `torch.finfo`.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class NumberFormat:
    """A binary floating-point format. `dtype` is its name in torch; `unit_roundoff` is the largest relative error of a
    rounding to nearest, 2^-(stored fraction bits + 1)."""

    name: str
    dtype: str
    largest: float
    smallest_normal: float
    unit_roundoff: float

    def __str__(self) -> str:
        return self.name

    @property
    def limit(self) -> str:
        """The largest number in words: `65504`, `3.39e+38`."""
        return f"{self.largest:.0f}" if self.largest < 1e6 else f"{self.largest:.3g}"

    def headroom(self, value: float) -> float:
        """Bits between |value| and the largest number, log2(largest / |value|).

        Negative for what the format cannot hold, infinite for zero, minus infinity for what is not finite.
        """
        if not math.isfinite(value):
            return -math.inf
        return math.log2(self.largest / abs(value)) if value else math.inf

    def bits_above_smallest(self, value: float) -> float:
        """Bits between |value| and the smallest normal number; negative below it."""
        return math.log2(abs(value) / self.smallest_normal) if value else -math.inf


FP16 = NumberFormat("FP16", "float16", 65504.0, 2.0**-14, 2.0**-11)
BF16 = NumberFormat("BF16", "bfloat16", (2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-8)
FP8_E4M3 = NumberFormat("FP8 E4M3", "float8_e4m3fn", 448.0, 2.0**-6, 2.0**-4)
FP8_E5M2 = NumberFormat("FP8 E5M2", "float8_e5m2", 57344.0, 2.0**-14, 2.0**-3)
FORMATS = {row.name: row for row in (FP16, BF16, FP8_E4M3, FP8_E5M2)}
