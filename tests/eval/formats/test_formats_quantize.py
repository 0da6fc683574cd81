"""Rounding: against every number of each format, torch's casts, and torchao where it is at hand."""

import itertools
import math

import pytest
import torch

from periln.eval.formats.quantize import clipped, quantize, rounded
from periln.eval.formats.recipes import BLOCK, CHANNEL, NONE, ROW, TENSOR, Scaled
from periln.runkit.number_format import ALL_FORMATS

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def numbers_of(name: str) -> list[float]:
    """Every finite number of a format from 0 up, in the order of its codes, so that even places have even mantissas."""
    row = ALL_FORMATS[name]
    if row.integer:
        return [float(i) for i in range(int(row.largest) + 1)]
    if row.dtype == "float4_e2m1fn_x2":
        return E2M1
    codes = torch.arange(128, dtype=torch.uint8).view(getattr(torch, row.dtype)).float()
    return [v for v in codes.tolist() if math.isfinite(v)]


def nearest(x: float, numbers: list[float]) -> float:
    """By search: the nearest number, of two the one at the even place; the largest beyond it."""
    best = min(range(len(numbers)), key=lambda i: (abs(numbers[i] - abs(x)), i % 2))
    return math.copysign(numbers[best], x)


@pytest.mark.parametrize("name", ["FP8 E4M3", "FP8 E5M2", "MXFP4", "INT8", "INT4"])
def test_every_number_and_every_tie_rounds_as_a_search_over_all_numbers_says(name):
    numbers = numbers_of(name)
    assert max(numbers) == ALL_FORMATS[name].largest
    ties = [(a + b) / 2 for a, b in itertools.pairwise(numbers)]
    around = [t * k for t in ties for k in (1 - 2**-20, 1 + 2**-20)]
    x = torch.tensor([*numbers, *ties, *around])
    x = torch.cat([x, -x])
    expected = torch.tensor([nearest(v, numbers) for v in x.tolist()])
    assert torch.equal(rounded(x, ALL_FORMATS[name]), expected)


@pytest.mark.parametrize(("name", "beyond"), [("FP16", 65520.0), ("FP8 E5M2", 61440.0), ("BF16", 3.4e38)])
def test_what_rounds_beyond_becomes_infinite_where_the_format_has_infinities(name, beyond):
    row = ALL_FORMATS[name]
    below = torch.tensor([beyond]).nextafter(torch.zeros(1))
    assert rounded(torch.tensor([-beyond]), row).item() == -math.inf and clipped(torch.tensor([beyond]), row) == 1
    if name != "BF16":
        assert rounded(below, row).item() == row.largest and clipped(below, row) == 0


@pytest.mark.parametrize(("name", "last"), [("FP8 E4M3", 464.0), ("INT8", 127.49), ("INT4", 7.49), ("NVFP4", 6.99)])
def test_the_others_saturate_and_what_was_beyond_is_counted(name, last):
    row = ALL_FORMATS[name]
    x = torch.tensor([last, last * 1.01 + 0.1, -1e9, 1.0])
    assert rounded(x, row).tolist() == [row.largest, row.largest, -row.largest, 1.0]
    assert clipped(x, row) == 2


def test_what_is_not_finite_stays_so():
    x = torch.tensor([math.inf, math.nan, 1.0])
    assert rounded(x, ALL_FORMATS["FP16"])[0] == math.inf and rounded(x, ALL_FORMATS["FP8 E5M2"])[0] == math.inf
    for name in ("FP8 E4M3", "MXFP4", "INT8"):
        assert rounded(x, ALL_FORMATS[name]).isnan().tolist() == [True, True, False]
        assert clipped(x, ALL_FORMATS[name]) == 0
    for scaling in (TENSOR, ROW, BLOCK):
        assert not quantize(x.view(1, 1, 3), Scaled("INT8", scaling), True).values.isfinite().all()


def test_scales_are_shared_as_their_names_say():
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)) * 3
    x[0, 2, 4] = 500.0

    def by_hand(dims):
        scale = x.abs().amax(dims, keepdim=True) / 127
        return torch.round(x / scale) * scale

    for scaling, dims in ((TENSOR, (1, 2)), (ROW, (2,)), (CHANNEL, (1,))):
        assert torch.equal(quantize(x, Scaled("INT8", scaling), True).values, by_hand(dims))
    whole = quantize(x, Scaled("INT8", TENSOR), False)
    assert torch.equal(whole.values, by_hand((0, 1, 2)))
    # A step is 500 / 127: what is below half of it is gone.
    assert whole.flushed == int((x.abs() < 500 / 127 / 2).sum()) > 30 and whole.clipped == 0
    alone = quantize(x[1:], Scaled("NVFP4", BLOCK), True).values
    assert torch.equal(quantize(x, Scaled("NVFP4", BLOCK), True).values[1:], alone)


def test_blocks_of_mx_have_the_power_of_two_of_the_specification_and_may_saturate():
    block = [7.9, 0.3, -5.0, 1.0] + [0.0] * 28  # floor(log2 7.9) - 2 = 0: the scale is 1, and 7.9 saturates at 6
    tail = [0.01, -0.02, 0.03]  # floor(log2 0.03) - 2 = -8: a block cut short by the row's end
    x = torch.tensor([block + tail])
    found = quantize(x, Scaled("MXFP4", BLOCK), False)
    expected = [nearest(v, E2M1) for v in block] + [nearest(v * 256, E2M1) / 256 for v in tail]
    assert found.values.tolist() == [expected]
    assert (found.clipped, found.flushed) == (2, 0)  # 7.9 of 6, and 0.03 * 256 = 7.68 of 6
    x = torch.tensor([[500.0, 3.1, 2.0**-9] + [0.0] * 29])
    found = quantize(x, Scaled("MXFP8", BLOCK), False)  # floor(log2 500) - 8 = 0
    assert found.values[0, :3].tolist() == [448.0, 3.0, 2.0**-9] and found.clipped == 1


def test_nvfp4_has_an_e4m3_scale_for_sixteen_and_one_of_the_tensor():
    x = torch.zeros(1, 32)
    x[0, :3] = torch.tensor([6.0 * 448, 448.0, -1000.0])  # the largest: the tensor's scale is 1, the block's 448
    x[0, 16:18] = torch.tensor([17.0, 5.0])  # 17 / 6 = 2.833 becomes 2.75 in E4M3
    values = quantize(x, Scaled("NVFP4", BLOCK), False).values[0]
    assert values[:3].tolist() == [6.0 * 448, 448.0, -2.0 * 448]
    assert values[16:18].tolist() == [6.0 * 2.75, 2.0 * 2.75]


@pytest.mark.parametrize("name", ["MXFP8", "MXFP4"])
def test_mx_equals_torchao(name):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao is not installed")
    x = torch.randn(16, 96, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 6, 16)[:, None]
    kind = torch.float8_e4m3fn if name == "MXFP8" else torch.float4_e2m1fn_x2
    theirs = mx.MXTensor.to_mx(x, kind, 32).dequantize(torch.float32)
    assert torch.equal(quantize(x, Scaled(name, BLOCK), False).values, theirs)


def test_nvfp4_equals_torchao():
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", reason="torchao is not installed")
    x = torch.randn(16, 96, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 2, 16)[:, None]
    scale = nvfp4.per_tensor_amax_to_scale(x.abs().max())
    theirs = nvfp4.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(torch.float32)
    ours = quantize(x, Scaled("NVFP4", BLOCK), False).values
    # It multiplies by a reciprocal: at a tie an entry may go the other way, and products round differently.
    close = (ours - theirs).abs() <= 1e-6 * theirs.abs()
    assert close.float().mean() > 0.995


def test_a_plain_cast_is_torch_s():
    x = torch.randn(4000, generator=torch.Generator().manual_seed(2)) * 100
    for name in ("FP16", "BF16", "FP8 E5M2"):
        assert torch.equal(
            quantize(x, Scaled(name, NONE), False).values, x.to(getattr(torch, ALL_FORMATS[name].dtype)).float()
        )
