"""A tensor rounded to a number format and back, in FP32.

Rounding is to nearest, ties to even. FP16, BF16 and E5M2 become infinite beyond their largest number; E4M3, E2M1 and
the integers saturate (E4M3 has no infinity; torch's own cast gives NaN there before 2.13). What is not finite stays
so. A shared scale is max |x| / largest in FP32; in blocks of MX it is 2^(floor(log2 max |x|) - floor(log2
largest)), by which the largest numbers of a block may saturate (OCP MX 1.0, section 6.3); in NVFP4 it is the block's
max |x| / 6 as E4M3 within [2^-6, 448], of a scale max |x| / (6 * 448) of the tensor in FP32, as torchao rounds it.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from periln.eval.formats.recipes import BLOCK, CHANNEL, NONE, ROW, TENSOR, Scaled
from periln.runkit.number_format import ALL_FORMATS, FP4_E2M1, FP8_E4M3, NumberFormat


class Quantized(NamedTuple):
    """The rounded tensor; the numbers of finite entries beyond the largest number, and of those that became 0."""

    values: torch.Tensor
    clipped: int
    flushed: int


def rounded(x: torch.Tensor, to: NumberFormat) -> torch.Tensor:
    """x (FP32) as the nearest numbers of the element format, without any scale."""
    if to.integer:
        y = torch.round(x).clamp_(-to.largest, to.largest)
    elif to.dtype == FP4_E2M1.dtype:  # torch stores it in pairs and does not cast to it
        size = x.abs()
        step = to.smallest * (1 + (size >= 2).float() + 2 * (size >= 4).float())
        y = (torch.round(x / step) * step).clamp_(-to.largest, to.largest)
    elif to.infinities:
        y = x.to(getattr(torch, to.dtype)).float()
    else:
        y = x.clamp(-to.largest, to.largest).to(getattr(torch, to.dtype)).float()
    if bool(x.isfinite().all()):
        return y
    return torch.where(x.isfinite(), y, x if to.infinities else torch.nan)


def clipped(x: torch.Tensor, to: NumberFormat) -> int:
    """How many finite entries of x would round to more than the largest number if the format had more numbers."""
    size = x.abs()
    if not bool((size > to.largest).any()):
        return 0
    step = to.largest_step
    return int(((torch.round(size / step) * step > to.largest) & size.isfinite()).sum())


def _or_one(scale: torch.Tensor) -> torch.Tensor:
    """A scale of 0 (all entries are 0, or next to it) is 1."""
    return torch.where(scale == 0, 1.0, scale)


def _power_of_two(largest: torch.Tensor, to: NumberFormat) -> torch.Tensor:
    """The scale E8M0 of blocks whose largest entries are `largest`."""
    exponent = torch.frexp(largest).exponent - 1 - math.floor(math.log2(to.largest))
    scale = torch.ldexp(torch.ones_like(largest), exponent.clamp(-127, 127))
    return torch.where(largest.isfinite(), scale, torch.nan)


def _two_levels(largest: torch.Tensor, to: NumberFormat, batched: bool) -> torch.Tensor:
    """E4M3 scales of blocks, times the FP32 scale of their tensor."""
    dims = tuple(range(1 if batched else 0, largest.ndim))
    tensor = _or_one(largest.amax(dims, keepdim=True) / (to.largest * FP8_E4M3.largest))
    block = (largest / to.largest / tensor).clamp(min=FP8_E4M3.smallest_normal)
    return rounded(block, FP8_E4M3) * tensor


def _scale(x: torch.Tensor, scaled: Scaled, to: NumberFormat, batched: bool) -> torch.Tensor:
    if scaled.scaling == TENSOR:
        dims: tuple[int, ...] = tuple(range(1 if batched else 0, x.ndim))
    else:
        dims = {ROW: (-1,), CHANNEL: (-2,), BLOCK: (-1,)}[scaled.scaling]
    largest = x.abs().amax(dims, keepdim=True)
    if scaled.scaling == BLOCK and to.block_scale == "E8M0":
        return _power_of_two(largest, to)
    if scaled.scaling == BLOCK and to.block_scale == "E4M3":
        return _two_levels(largest, to, batched)
    return _or_one(largest / to.largest)


def quantize(x: torch.Tensor, scaled: Scaled, batched: bool) -> Quantized:
    """x rounded to the format and back.

    Args:
        x: (..., rows, channels); the last dimension is the one that a product sums over.
        batched: the first dimension numbers sequences, each with its own scales: a result does not depend on its
            batch.
    """
    to, wide = ALL_FORMATS[scaled.format], x.float()
    if scaled.scaling == NONE:
        y = rounded(wide, to)
        return Quantized(y, clipped(wide, to), _flushed(wide, y))
    given = wide
    if scaled.scaling == BLOCK:
        given = F.pad(wide, (0, -wide.shape[-1] % scaled.block)).unflatten(-1, (-1, scaled.block))
    scale = _scale(given, scaled, to, batched)
    inner = given / scale
    y = rounded(inner, to)
    lost = clipped(inner, to)
    y = y * scale
    if scaled.scaling == BLOCK:
        y = y.flatten(-2)[..., : wide.shape[-1]]
    return Quantized(y, lost, _flushed(wide, y))


def _flushed(x: torch.Tensor, y: torch.Tensor) -> int:
    return int(((y == 0) & (x != 0)).sum())
