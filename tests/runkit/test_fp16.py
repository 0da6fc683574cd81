"""FP16 on a CPU is FP16: the values, the overflow, the gradients, and what Accelerate does with it."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from periln.runkit.fp16 import HalfMatmul, make_fp16_real


def half(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).half()


@pytest.fixture(autouse=True)
def _fresh():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("product", "shapes"),
    [
        (torch.mm, [(5, 64), (64, 3)]),
        (torch.matmul, [(2, 5, 64), (64, 3)]),
        (torch.bmm, [(2, 5, 64), (2, 64, 3)]),
        (F.linear, [(2, 5, 64), (3, 64), (3,)]),
        (lambda a, b: torch.einsum("bsd,vd->bsv", a, b), [(2, 5, 64), (3, 64)]),
    ],
)
def test_a_product_is_the_fp32_product_of_the_fp16_operands_rounded_once(product, shapes):
    operands = [half(*s) for s in shapes]
    with HalfMatmul():
        result = product(*operands)
    assert result.dtype == torch.float16
    assert torch.equal(result, product(*(x.float() for x in operands)).half())


def test_a_product_written_into_a_given_tensor_is_the_same():
    a, b = half(5, 64), half(64, 3)
    out = torch.empty(5, 3, dtype=torch.float16)
    with HalfMatmul():
        torch.mm(a, b, out=out)
    assert torch.equal(out, (a.float() @ b.float()).half())


def test_the_result_overflows_at_65504_as_on_a_gpu():
    a, b = torch.full((1, 4), 200.0).half(), torch.full((4, 1), 100.0).half()
    with HalfMatmul():
        assert (a @ b).isinf().all()  # 80,000
        assert (a[:, :3] @ b[:3]).item() == 60_000


def test_partial_sums_are_accumulated_in_fp32():
    a = torch.tensor([[60_000.0, 60_000.0, -60_000.0]]).half()
    with HalfMatmul():
        assert (a @ torch.ones(3, 1).half()).item() == 60_000  # an FP16 accumulator passes 65504 on the way


def test_gradients_are_fp16_results_of_fp32_accumulation():
    x, w = half(6, 64).requires_grad_(), half(3, 64).requires_grad_()
    gradient = half(6, 3)
    with HalfMatmul():
        F.linear(x, w).backward(gradient)
    assert torch.equal(x.grad, (gradient.float() @ w.detach().float()).half())
    assert torch.equal(w.grad, (gradient.float().T @ x.detach().float()).half())


def test_attention_keeps_fp16_values_and_gradients():
    q, k, v = (half(2, 3, 17, 8).requires_grad_() for _ in range(3))
    with HalfMatmul():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out.backward(torch.ones_like(out))
    exact = F.scaled_dot_product_attention(q.detach().float(), k.detach().float(), v.detach().float(), is_causal=True)
    assert out.dtype == q.grad.dtype == torch.float16
    assert torch.equal(out, exact.half())


def test_fp32_products_are_left_alone():
    a, b = torch.randn(5, 64), torch.randn(64, 3)
    expected = a @ b
    with HalfMatmul():
        assert torch.equal(a @ b, expected)


def test_recomputed_activations_in_backward_are_treated_alike():
    from torch.utils.checkpoint import checkpoint

    x, w = half(6, 64).requires_grad_(), half(64, 64).requires_grad_()
    with HalfMatmul():
        checkpoint(lambda y: torch.relu(y @ w) @ w, x, use_reentrant=False).sum().backward()
        recomputed, x.grad = x.grad, None
        (torch.relu(x @ w) @ w).sum().backward()
    assert torch.equal(recomputed, x.grad)


def linear_under(accelerator: Accelerator):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))  # Accelerate casts the outermost module's output to FP32
    seen = []
    model[0].register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    prepared = accelerator.prepare(model)
    return prepared, seen


def test_accelerates_own_fp16_on_a_cpu_is_fp32():
    """The trap that this module exists for. If Accelerate mends it, this test says so."""
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    model, seen = linear_under(accelerator)
    model(torch.randn(2, 4))
    assert seen == [torch.float32]
    assert accelerator.scaler is None


def test_make_fp16_real_gives_fp16_outputs_a_scaler_and_fp32_master_weights():
    accelerator = Accelerator(mixed_precision="fp16", cpu=True)
    with make_fp16_real(accelerator, {"init_scale": 1024.0}):
        model, seen = linear_under(accelerator)
        optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), fused=True))
        accelerator.backward(model(torch.randn(2, 4)).sum())
        assert accelerator.scaler.get_scale() == 1024.0
        assert model[0].weight.grad.abs().max() > 100  # still scaled
        optimizer.step()
    assert seen == [torch.float16]
    assert model[0].weight.dtype == torch.float32


@pytest.mark.parametrize("mode", ["no", "bf16"])
def test_other_precisions_are_left_alone(mode):
    accelerator = Accelerator(mixed_precision=mode, cpu=True)
    with make_fp16_real(accelerator):
        assert accelerator.scaler is None


@pytest.mark.parametrize("mode", ["no", "fp16", "bf16"])
def test_on_a_gpu_both_half_precisions_sum_products_in_fp32(monkeypatch, mode):
    settings = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = {name: getattr(settings, name) for name in names}
    try:
        for name in names:
            setattr(settings, name, True)
        make_fp16_real(SimpleNamespace(device=torch.device("cuda"), mixed_precision=mode))
        assert not any(getattr(settings, name) for name in names)
    finally:
        for name, value in before.items():
            setattr(settings, name, value)
