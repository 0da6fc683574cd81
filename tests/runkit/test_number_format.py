"""Number formats: every row equals what torch says, and headroom has one meaning."""

import math

import pytest
import torch

from periln.eval.stability.moments import Moments
from periln.runkit.number_format import ALL_FORMATS, BF16, FORMATS, FP8_E4M3, FP16


@pytest.mark.parametrize("row", FORMATS.values(), ids=str)
def test_a_row_is_what_torch_says(row):
    info = torch.finfo(getattr(torch, row.dtype))
    assert (row.largest, row.smallest_normal) == (info.max, info.smallest_normal)
    assert row.unit_roundoff == info.eps / 2


@pytest.mark.parametrize(
    ("name", "smallest", "below_largest"),
    [
        ("FP16", 2.0**-24, 65472.0),
        ("FP8 E4M3", 2.0**-9, 416.0),
        ("FP8 E5M2", 2.0**-16, 49152.0),
        ("FP4 E2M1", 0.5, 4.0),
        ("MXFP8", 2.0**-9, 416.0),
        ("MXFP4", 0.5, 4.0),
        ("NVFP4", 0.5, 4.0),
        ("INT8", 1.0, 126.0),
        ("INT4", 1.0, 6.0),
    ],
)
def test_the_ends_of_a_format(name, smallest, below_largest):
    row = ALL_FORMATS[name]
    assert (row.smallest, row.largest - row.largest_step) == (smallest, below_largest)


def test_headroom_counts_bits_and_is_minus_infinity_for_what_overflowed():
    assert FP16.headroom(65504.0) == 0 and FP16.headroom(-16376.0) == 2 and FP16.headroom(2 * 65504.0) == -1
    assert FP8_E4M3.headroom(56.0) == 3 and BF16.headroom(1.0) > 127.99
    assert FP16.headroom(0.0) == math.inf
    assert FP16.headroom(math.inf) == FP16.headroom(-math.inf) == FP16.headroom(math.nan) == -math.inf


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_the_bench_means_the_same_by_headroom(bad):
    moments = Moments()
    x = torch.ones(1, 2, 4)
    x[0, 1, 2] = bad
    moments.add(x, 0)
    assert moments.stats()["headroom_bits"] == -math.inf
