"""Compiled half precision has the numerics of the eager operators."""

import pytest
import torch
from torch import nn

from periln.runkit.compiled import compile_options
from periln.runkit.fp16 import HalfMatmul

pytestmark = pytest.mark.slow


class Sublayer(nn.Module):
    """Two products, attention and a sum; and a statistic of the sum, as a hook takes it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, z = self.first(x), self.second(x)
        q, k = (t.view(2, 16, 4, 16).transpose(1, 2) for t in (y, z))
        attention = nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True)
        total = y + attention.transpose(1, 2).reshape(2, 16, 64)
        return total, total.float().abs().amax()


def test_compiled_fp16_products_on_a_cpu_are_those_of_the_eager_mode():
    torch.manual_seed(0)
    module, x = Sublayer(), torch.randn(2, 16, 64)

    def run() -> list[torch.Tensor]:
        module.zero_grad()
        given = x.clone().requires_grad_()
        with HalfMatmul(), torch.autocast("cpu", dtype=torch.float16):
            total, _ = module(given)
            total.float().square().sum().backward()
        return [total.detach(), *(p.grad for p in module.parameters()), given.grad]

    expected = run()
    module.compile(dynamic=False, options=compile_options("fp16", "cpu"))
    *exact, gradient = run()
    assert exact[0].dtype == torch.float16
    for ours, theirs in zip(exact, expected[:-1], strict=True):
        assert torch.equal(ours, theirs)
    assert (gradient - expected[-1]).norm() <= 1e-3 * expected[-1].norm()  # FP16 parts, summed in another order


@pytest.mark.parametrize("mode", ["fp16", "bf16"])
def test_a_sum_is_rounded_before_it_is_read(mode):
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[mode]

    def add(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + y
        return total, total.float().amax()

    x, y = torch.full((4, 64), 60_000.0, dtype=dtype), torch.full((4, 64), 30_003.0, dtype=dtype)
    total, largest = torch.compile(add, dynamic=False, options=compile_options(mode, "cpu"))(x, y)
    assert largest == total.max().float()
    assert total.isinf().all() == (mode == "fp16")
    assert compile_options("fp32", "cpu") == {}
