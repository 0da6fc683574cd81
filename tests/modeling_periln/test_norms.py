"""The norms: the fused backward pass against its slow twin, and where which of the two runs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_ids, shaken_model

from modeling_periln.norms import FusedBackwardRMSNorm, PeriLlamaRMSNorm, rms_norm

HALF = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # one unit in the last place of the largest value


def norm_of(size: int, dtype: torch.dtype = torch.float32, eps: float = 1e-6, seed: int = 0) -> PeriLlamaRMSNorm:
    norm = PeriLlamaRMSNorm(size, eps).to(dtype)
    with torch.no_grad():
        norm.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return norm


def both(norm: PeriLlamaRMSNorm, x: torch.Tensor, grad: torch.Tensor):
    """(y, dx, dweight) of the fused norm and of its twin."""
    results = []
    for fused in (True, False):
        norm.fused_backward = fused
        y = norm(x)
        results.append((y.detach(), *torch.autograd.grad(y, (x, norm.weight), grad.to(y.dtype))))
        assert ("FusedBackward" in str(y.grad_fn)) is fused
    return results


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 5), max_size=3),
    size=st.integers(2, 70),
    scale=st.sampled_from([1e-6, 1e-2, 1.0, 3e4]),
    offset=st.sampled_from([0.0, 10.0]),
    eps=st.sampled_from([0.0, 1e-6, 0.1]),
    seed=st.integers(0, 1000),
)
def test_the_fused_norm_is_its_twin_forward_to_the_bit_and_backward_to_rounding(rows, size, scale, offset, eps, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (scale * (torch.randn(*rows, size, generator=generator) + offset)).requires_grad_()
    grad = torch.randn(*rows, size, generator=generator)
    (y, dx, dw), (y2, dx2, dw2) = both(norm_of(size, eps=eps, seed=seed), x, grad)
    assert torch.equal(y, y2)
    # dx is a difference of numbers as large as grad * weight / rms; so that is what rounding is measured against
    rms = x.detach().pow(2).mean(-1, keepdim=True).add(eps).sqrt()
    size_of_dx = (grad.abs().amax(-1, keepdim=True) * 3 / rms).max()
    assert (dx - dx2).abs().max() <= 3e-6 * size_of_dx
    assert (dw - dw2).abs().max() <= 3e-6 * max(dw2.abs().max().item(), grad.abs().max().item())


@pytest.mark.parametrize("weight_dtype", [torch.float32, None])
@pytest.mark.parametrize("dtype", HALF)
def test_the_fused_norm_is_its_twin_in_half_precision(dtype, weight_dtype):
    x = torch.randn(3, 7, 20, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    (y, dx, dw), (y2, dx2, dw2) = both(norm_of(20, weight_dtype or dtype), x, torch.ones(3, 7, 20))
    assert torch.equal(y, y2)
    assert y.dtype == dx.dtype == dtype and dw.dtype == dw2.dtype
    assert relative(dx, dx2) <= HALF[dtype]
    assert relative(dw, dw2) <= HALF[dtype]


@pytest.mark.parametrize("weight_dtype", [torch.float32, None])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 7, 20), (2, 5, 129), (9,)])
def test_without_gradients_the_norm_is_its_definition_to_the_bit(shape, dtype, weight_dtype):
    x = 300 * torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    for y in (x, x.transpose(0, -2) if x.ndim > 1 else x[::2]):  # strides of its own
        norm = norm_of(y.shape[-1], weight_dtype or dtype, eps=1e-3)
        expected = rms_norm(y, norm.weight, 1e-3)
        assert expected.isfinite().all() and expected.dtype == dtype
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                assert torch.equal(norm(y), expected)


def test_statistics_do_not_overflow_where_a_square_does():
    x = torch.full((1, 8), 300.0, dtype=torch.float16, requires_grad=True)
    for y, *gradients in both(norm_of(8), x, torch.ones(1, 8)):
        assert y.isfinite().all() and all(g.isfinite().all() for g in gradients)
        assert y.abs().max() > 0


def test_first_and_second_derivatives_are_the_formulas():
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def fused(x, weight):
        return FusedBackwardRMSNorm.apply(x, weight, 1e-3)[0]

    assert torch.autograd.gradcheck(fused, (x, weight), check_forward_ad=True, check_batched_forward_grad=True)
    assert torch.autograd.gradgradcheck(fused, (x, weight), check_fwd_over_rev=True)


def test_function_transforms_go_through():
    norm = norm_of(6, torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(norm))(x)
    norm.fused_backward = False
    torch.testing.assert_close(jacobian, torch.func.vmap(torch.func.jacrev(norm))(x))


def test_autocast_around_backward_does_not_lower_its_precision():
    norm, x = norm_of(64), torch.randn(5, 64, requires_grad=True)
    grad = torch.randn(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (_, dx, _), (_, dx2, _) = both(norm, x, grad)
    assert relative(dx, dx2) < 1e-6


def test_only_eager_training_on_a_cpu_takes_the_fused_pass(monkeypatch):
    calls = []
    apply = FusedBackwardRMSNorm.apply
    monkeypatch.setattr(FusedBackwardRMSNorm, "apply", lambda *a: calls.append(1) or apply(*a))
    norm, x = norm_of(6), torch.randn(2, 6)
    norm(x)
    with torch.no_grad():
        norm(x.clone().requires_grad_())
    torch.fx.symbolic_trace(norm)  # a serving engine reads the norm so
    torch.compile(norm, backend="eager", fullgraph=True)(x.clone().requires_grad_())
    torch.export.export(norm, (x.clone().requires_grad_(),))
    assert not calls
    norm(x.clone().requires_grad_())
    assert calls


def test_compilers_and_tracers_see_the_definition_without_gradients_too(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "rms_norm", lambda x, *_: calls.append(1) or x)
    norm, x = norm_of(6), torch.randn(2, 6)
    with torch.no_grad():
        torch.fx.symbolic_trace(norm)
        torch.compile(norm, backend="eager", fullgraph=True)(x)
        torch.export.export(norm, (x,))
        norm(x.bfloat16())  # a gain in FP32: mixed dtypes are not for PyTorch's norm
        assert not calls
        norm(x)
        assert calls


def test_a_traced_norm_is_plain_tensor_operations():
    graph = torch.fx.symbolic_trace(PeriLlamaRMSNorm(6)).graph
    names = {str(getattr(node.target, "__name__", node.target)) for node in graph.nodes}
    assert {"pow", "mean", "rsqrt"} <= names
    assert not any("Fused" in name for name in names)


@pytest.mark.parametrize("placement", ["post", "peri", "lns"])
def test_a_whole_model_has_the_gradients_of_its_twin(placement):
    model, ids = shaken_model(norm_placement=placement, qk_norm="head"), random_ids(2, 9)
    gradients = []
    for fused in (True, False):
        for module in model.modules():
            if isinstance(module, PeriLlamaRMSNorm):
                module.fused_backward = fused
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        gradients.append((loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    (loss, fused), (loss2, plain) = gradients
    assert loss == loss2
    for name in plain:
        assert relative(fused[name], plain[name]) < 1e-5, name
