"""Number formats as data: the largest value, the smallest normal one and the rounding error of each.

Sources: IEEE 754-2019 (binary16); Kalamkar et al. 2019, arXiv 1905.12322 (bfloat16); Micikevicius et al. 2022,
arXiv 2209.05433 (E4M3, which has no infinities, and E5M2); OCP Microscaling Formats (MX) 1.0 (E2M1, MXFP8, MXFP4);
NVIDIA's NVFP4 (E2M1 in blocks of 16). Tests compare the rows with `torch.finfo` and with every number of each format.
"""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class NumberFormat:
    """A number format. `dtype` is its name in torch; `unit_roundoff` is the largest relative error of rounding a
    normal number to nearest, 2^-(stored fraction bits + 1).

    `infinities`: what rounds beyond the largest number becomes infinite; elsewhere it saturates. `integer`: the numbers
    are the integers up to the largest, symmetric (unit roundoff 1/2, of the number 1). `block`: how many numbers along
    a product's inner dimension share a scale that is part of the format, stored as `block_scale`; 0 without one.
    """

    name: str
    dtype: str
    largest: float
    smallest_normal: float
    unit_roundoff: float
    bits: int
    infinities: bool = False
    integer: bool = False
    block: int = 0
    block_scale: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def limit(self) -> str:
        """The largest number in words: `65504`, `3.39e+38`."""
        return f"{self.largest:.0f}" if self.largest < 1e6 else f"{self.largest:.3g}"

    @property
    def smallest(self) -> float:
        """The smallest number above 0; what is at most half of it rounds to 0."""
        return 2 * self.unit_roundoff * self.smallest_normal

    @property
    def largest_step(self) -> float:
        """The distance between the largest number and the one below it."""
        return 1.0 if self.integer else 2 * self.unit_roundoff * 2.0 ** math.floor(math.log2(self.largest))

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


FP16 = NumberFormat("FP16", "float16", 65504.0, 2.0**-14, 2.0**-11, 16, infinities=True)
BF16 = NumberFormat("BF16", "bfloat16", (2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-8, 16, infinities=True)
FP8_E4M3 = NumberFormat("FP8 E4M3", "float8_e4m3fn", 448.0, 2.0**-6, 2.0**-4, 8)
FP8_E5M2 = NumberFormat("FP8 E5M2", "float8_e5m2", 57344.0, 2.0**-14, 2.0**-3, 8, infinities=True)
FP4_E2M1 = NumberFormat("FP4 E2M1", "float4_e2m1fn_x2", 6.0, 1.0, 2.0**-2, 4)
INT8 = NumberFormat("INT8", "int8", 127.0, 1.0, 2.0**-1, 8, integer=True)
INT4 = NumberFormat("INT4", "int4", 7.0, 1.0, 2.0**-1, 4, integer=True)
# An element format and a scale for each block: E8M0 is a power of two; E4M3 goes with an FP32 scale of the tensor.
MXFP8 = replace(FP8_E4M3, name="MXFP8", block=32, block_scale="E8M0")
MXFP4 = replace(FP4_E2M1, name="MXFP4", block=32, block_scale="E8M0")
NVFP4 = replace(FP4_E2M1, name="NVFP4", block=16, block_scale="E4M3")
# Those with a torch dtype that holds one number an element; all of them.
FORMATS = {row.name: row for row in (FP16, BF16, FP8_E4M3, FP8_E5M2)}
ALL_FORMATS = FORMATS | {row.name: row for row in (FP4_E2M1, MXFP8, MXFP4, NVFP4, INT8, INT4)}
