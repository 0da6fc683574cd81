"""FP16 on a CPU is FP16: the values, the overflow, the gradients, and what Accelerate does with it."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from periln.runkit import fp16
from periln.runkit.fp16 import PRODUCTS, HalfKernels, HalfMatmul, half_products, make_fp16_real


def half(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).half()


@pytest.fixture(autouse=True)
def _fresh():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.manual_seed(0)


@pytest.fixture(params=[HalfMatmul, HalfKernels])
def emulation(request):
    if request.param is HalfKernels and not HalfKernels.available:
        pytest.skip("this PyTorch does not hand out its kernels")
    return request.param


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
def test_a_product_is_the_fp32_product_of_the_fp16_operands_rounded_once(emulation, product, shapes):
    operands = [half(*s) for s in shapes]
    with emulation():
        result = product(*operands)
    assert result.dtype == torch.float16
    assert torch.equal(result, product(*(x.float() for x in operands)).half())


def test_a_product_written_into_a_given_tensor_is_the_same(emulation):
    a, b = half(5, 64), half(64, 3)
    out = torch.empty(5, 3, dtype=torch.float16)
    with emulation():
        torch.mm(a, b, out=out)
    assert torch.equal(out, (a.float() @ b.float()).half())


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
def test_a_product_written_into_a_given_tensor_is_not_rounded_by_autocast(emulation, autocast):
    a, b, c = half(5, 64), half(64, 3), half(5, 3)
    out = torch.empty(5, 3, dtype=torch.float16)
    with emulation(), torch.autocast("cpu", dtype=autocast):
        torch.mm(a, b, out=out)
        torch.addmm(c, a, b, out=c)  # into one of its operands
    assert torch.equal(out, (a.float() @ b.float()).half())
    assert not torch.equal(c, out)


def test_a_given_tensor_of_another_shape_or_dtype_is_refused_and_an_empty_one_filled(emulation):
    a, b = half(5, 64), half(64, 3)
    out = torch.empty(0, dtype=torch.float16)
    with emulation():
        torch.mm(a, b, out=out)
        with pytest.raises(RuntimeError, match=r"out= has shape \[2, 5, 3\], and the product has \[5, 3\]"):
            torch.mm(a, b, out=half(2, 5, 3))
        with pytest.raises(RuntimeError, match="out= has dtype torch.float32"):
            torch.mm(a, b, out=torch.empty(5, 3))
    assert torch.equal(out, (a.float() @ b.float()).half())


@pytest.mark.parametrize(
    ("product", "operands"),
    [
        (torch.mm, [half(5, 64), torch.randn(64, 3)]),
        (torch.bmm, [half(2, 5, 64), torch.randn(2, 64, 3)]),
        (torch.addmm, [half(3), torch.randn(5, 64), torch.randn(64, 3)]),
    ],
)
def test_operands_of_two_dtypes_are_refused_as_everywhere(emulation, product, operands):
    with emulation(), pytest.raises(RuntimeError, match="dtype|scalar type"):
        product(*operands)


def test_the_result_overflows_at_65504_as_on_a_gpu(emulation):
    a, b = torch.full((1, 4), 200.0).half(), torch.full((4, 1), 100.0).half()
    with emulation():
        assert (a @ b).isinf().all()  # 80,000
        assert (a[:, :3] @ b[:3]).item() == 60_000


def test_partial_sums_are_accumulated_in_fp32(emulation):
    a = torch.tensor([[60_000.0, 60_000.0, -60_000.0]]).half()
    with emulation():
        assert (a @ torch.ones(3, 1).half()).item() == 60_000  # an FP16 accumulator passes 65504 on the way


def test_gradients_are_fp16_results_of_fp32_accumulation(emulation):
    x, w = half(6, 64).requires_grad_(), half(3, 64).requires_grad_()
    gradient = half(6, 3)
    with emulation():
        F.linear(x, w).backward(gradient)
    assert torch.equal(x.grad, (gradient.float() @ w.detach().float()).half())
    assert torch.equal(w.grad, (gradient.float().T @ x.detach().float()).half())


def test_attention_keeps_fp16_values_and_gradients(emulation):
    q, k, v = (half(2, 3, 17, 8).requires_grad_() for _ in range(3))
    with emulation():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out.backward(torch.ones_like(out))
    exact = F.scaled_dot_product_attention(q.detach().float(), k.detach().float(), v.detach().float(), is_causal=True)
    assert out.dtype == q.grad.dtype == torch.float16
    assert torch.equal(out, exact.half())


def test_fp32_products_are_left_alone(emulation):
    a, b = torch.randn(5, 64), torch.randn(64, 3)
    expected = a @ b
    with emulation():
        assert torch.equal(a @ b, expected)


def test_recomputed_activations_in_backward_are_treated_alike(emulation):
    from torch.utils.checkpoint import checkpoint

    x, w = half(6, 64).requires_grad_(), half(64, 64).requires_grad_()
    with emulation():
        checkpoint(lambda y: torch.relu(y @ w) @ w, x, use_reentrant=False).sum().backward()
        recomputed, x.grad = x.grad, None
        (torch.relu(x @ w) @ w).sum().backward()
    assert torch.equal(recomputed, x.grad)


def loss_and_gradients(emulation, attention):
    torch.manual_seed(1)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = PeriLlamaConfig(**sizes, num_attention_heads=2, norm_placement="peri", attn_implementation=attention)
    model, ids = PeriLlamaForCausalLM(config), torch.randint(0, 64, (2, 16))
    with emulation(), torch.autocast("cpu", dtype=torch.float16):
        loss = model(input_ids=ids, labels=ids).loss
        (loss * 1024).backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.skipif(not HalfKernels.available, reason="this PyTorch does not hand out its kernels")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_forms_give_a_model_the_same_bits(attention):
    slow, fast = (loss_and_gradients(form, attention) for form in (HalfMatmul, HalfKernels))
    assert len(slow) > 20
    assert all(torch.equal(a, b) for a, b in zip(slow, fast, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(slow, loss_and_gradients(nullcontext, attention), strict=True))


@pytest.mark.parametrize("product", ["mm", "bmm", "addmm", "baddbmm"])
def test_every_product_with_scalars_and_a_given_output(emulation, product):
    lead = (2,) if "b" in product.replace("addmm", "") else ()
    operands = [half(*lead, 5, 64), half(*lead, 64, 3)]
    scalars = {}
    if "add" in product:
        operands, scalars = [half(*lead, 5, 3), *operands], {"beta": 0.5, "alpha": 2.0}
    call, out = getattr(torch, product), torch.empty(*lead, 5, 3, dtype=torch.float16)
    exact = call(*(x.float() for x in operands), **scalars).half()
    with emulation():
        assert torch.equal(call(*operands, **scalars), exact)
        if getattr(torch.ops.aten, product).out in PRODUCTS:
            assert call(*operands, **scalars, out=out) is out
            assert torch.equal(out, exact)


@pytest.mark.skipif(not HalfKernels.available, reason="this PyTorch does not hand out its kernels")
def test_kernels_end_with_the_last_context_and_hold_in_every_thread():
    a, b = torch.full((1, 4096), 0.0301).half(), torch.full((4096, 1), 0.0301).half()
    own, emulated = a @ b, (a.float() @ b.float()).half()
    with HalfKernels():
        with pytest.raises(RuntimeError, match="shapes"), HalfKernels():
            torch.mm(a, a)
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(torch.mm, a, b).result(), emulated)
    assert torch.equal(a @ b, own)
    assert HalfKernels._entered == 0


def test_an_old_pytorch_gets_the_mode_and_the_reason(monkeypatch):
    monkeypatch.setattr(HalfKernels, "available", False)
    monkeypatch.setattr(HalfKernels, "_library", None)
    assert isinstance(half_products(), HalfMatmul)
    with pytest.raises(RuntimeError, match="needs torch 2.9 or newer, and this is"), HalfKernels():
        pass
    assert fp16.HalfKernels._entered == 0


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
