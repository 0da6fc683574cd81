"""The two norms of the family. Statistics and gain are in FP32 at least; the result has the input's dtype.

In FP16 a square overflows at |x| = 256, so no statistic is ever taken in half precision; and the gain is multiplied
before the result is rounded (OLMo 2), not after it (Llama). In FP32 both are the same.
"""

import torch
import torch.nn.functional as F
from torch import nn


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, in plain operations: the definition."""
    dtype = x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32))
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * x).to(dtype)


class FusedBackwardRMSNorm(torch.autograd.Function):
    """`rms_norm` to the last bit, with a backward pass of one kernel in place of a dozen.

    With r = 1 / sqrt(mean(x^2) + eps) and p = g * weight,

        dL/dx = r (p - x r^2 mean(p x)),    dL/dweight = sum over tokens of g x r.

    The backward kernel of LayerNorm, told that the mean of x is 0, gives r (p - mean(p) - x r^2 mean(p x)); what it
    subtracts is added again. On CPUs that is faster than what autograd makes of `rms_norm`; `scripts/bench.py`
    measures by how much. A backward pass that is itself differentiated evaluates the two formulas.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (wide * rstd).mul_(weight).to(x.dtype), rstd

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, ctx.eps = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, output[1])
        ctx.save_for_forward(x, weight, output[1])

    @staticmethod
    def jvp(ctx, dx: torch.Tensor | None, dweight: torch.Tensor | None, _) -> tuple[torch.Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        normed = x.to(rstd.dtype) * rstd
        dy = torch.zeros_like(normed) if dweight is None else dweight * normed
        if dx is not None:
            dx = dx.to(rstd.dtype) * rstd
            dy = dy + weight * (dx - normed * (normed * dx).mean(-1, keepdim=True))
        return dy.to(x.dtype), None

    @staticmethod
    def backward(ctx, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # this pass is differentiated too: every tensor as a function of x and weight
            wide, grad = x.to(rstd.dtype), grad.to(rstd.dtype)
            r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + ctx.eps)
            p, normed = grad * weight, wide * r
            dx = r * (p - normed * (p * normed).mean(-1, keepdim=True))
            dweight = (grad * normed).flatten(0, -2).sum(0) if x.ndim > 1 else grad * normed
            return dx.to(x.dtype), dweight.to(weight.dtype), None
        size = [x.shape[-1]]
        wide, grad, gain = (t.to(rstd.dtype).contiguous() for t in (x, grad, weight))
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, wide, size, torch.zeros_like(rstd), rstd, gain, None, [True, True, False]
        )
        with torch.autocast(x.device.type, enabled=False):  # in full precision, whatever surrounds backward
            mean = torch.matmul(grad, gain / size[0]).unsqueeze(-1)
        return dx.addcmul_(mean, rstd).to(x.dtype), dweight.to(weight.dtype), None


class PeriLlamaRMSNorm(nn.Module):
    """x / rms(x) * gamma over the last dimension (Zhang & Sennrich 2019).

    `learnable=False` keeps gamma at 1, as a buffer that no optimizer sees. `fused_backward = False`, on the class or
    on one norm, has autograd differentiate the plain operations; the result is the same to the last bit either way.
    So it is without gradients, where PyTorch's own norm does the same operations in one call.
    """

    fused_backward = True

    def __init__(self, hidden_size: int, eps: float = 1e-6, learnable: bool = True):
        super().__init__()
        weight = torch.ones(hidden_size)
        if learnable:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # Fast paths are for eager CPUs. Compilers, tracers and tensor subclasses get operations that they can see.
        x, weight = hidden_states, self.weight
        if type(x) is torch.Tensor and x.is_cpu and not torch.compiler.is_compiling():
            if not torch.is_grad_enabled():
                if x.dtype == weight.dtype:
                    return torch.rms_norm(x, weight.shape, weight, self.variance_epsilon)
            elif x.requires_grad and self.fused_backward:
                return FusedBackwardRMSNorm.apply(x, weight, self.variance_epsilon)[0]
        return rms_norm(x, weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class PeriLlamaLayerNorm(nn.LayerNorm):
    """LayerNorm with gamma and beta (Ba et al. 2016)."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, learnable: bool = True):
        super().__init__(hidden_size, eps=eps)
        if not learnable:
            # Made anew: an engine that keeps parameters without memory, and buffers with it, would get neither.
            for name, make in (("weight", torch.ones), ("bias", torch.zeros)):
                delattr(self, name)
                self.register_buffer(name, make(hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        x = F.layer_norm(hidden_states.to(dtype), self.normalized_shape, weight, bias, self.eps)
        return x.to(hidden_states.dtype)


NORMS = {"rmsnorm": PeriLlamaRMSNorm, "layernorm": PeriLlamaLayerNorm}
