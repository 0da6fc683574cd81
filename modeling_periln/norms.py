"""The norms of the family. Statistics and gain are in FP32 at least; the result has the input's dtype.

In FP16 a square overflows at |x| = 256, so no statistic is ever taken in half precision; and the gain multiplies
before the result is rounded (OLMo 2), not after (Llama). In FP32 both are the same.

RMSNorm and LayerNorm with one gain a channel have their own classes, fast and known to serving engines by
name. Every other combination of a kind and a gain is a `PeriLlamaNorm`, in plain operations.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .slots import Norm


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, in plain operations: the definition."""
    dtype = x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32))
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * x).to(dtype)


class FusedBackwardRMSNorm(torch.autograd.Function):
    """`rms_norm` to the last bit, with a backward pass of one kernel instead of a dozen.

    With r = 1 / sqrt(mean(x^2) + eps) and p = g * weight,

        dL/dx = r (p - x r^2 mean(p x)),    dL/dweight = sum over tokens of g x r.

    The backward kernel of LayerNorm, told that the mean of x is 0, gives r (p - mean(p) - x r^2 mean(p x)); what it
    subtracts is added again. On CPUs that is faster than autograd's backward of `rms_norm`; `scripts/bench`
    measures by how much. A backward pass that is itself differentiated evaluates the two formulas.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (wide * rstd).mul_(weight).to(x.dtype), rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        x, weight, ctx.eps = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, output[1])
        ctx.save_for_forward(x, weight, output[1])

    @staticmethod
    def jvp(ctx: Any, dx: torch.Tensor | None, dweight: torch.Tensor | None, _: Any) -> tuple[torch.Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        normed = x.to(rstd.dtype) * rstd
        dy = torch.zeros_like(normed) if dweight is None else dweight * normed
        if dx is not None:
            dx = dx.to(rstd.dtype) * rstd
            dy = dy + weight * (dx - normed * (normed * dx).mean(-1, keepdim=True))
        return dy.to(x.dtype), None

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
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
    Without gradients PyTorch's own norm does the same operations in one call, with the same result.
    """

    fused_backward = True
    weight: torch.Tensor

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
                normed: torch.Tensor = FusedBackwardRMSNorm.apply(x, weight, self.variance_epsilon)[0]
                return normed
        return rms_norm(x, weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class PeriLlamaLayerNorm(nn.LayerNorm):
    """LayerNorm with gamma and beta (Ba et al. 2016)."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, learnable: bool = True):
        super().__init__(hidden_size, eps=eps)
        if not learnable:
            # Made anew, for engines that give memory to buffers but not to parameters.
            for name, make in (("weight", torch.ones), ("bias", torch.zeros)):
                delattr(self, name)
                self.register_buffer(name, make(hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        x = F.layer_norm(hidden_states.to(dtype), self.normalized_shape, weight, bias, self.eps)
        return x.to(hidden_states.dtype)


class PeriLlamaCenteredRMSNorm(nn.Module):
    """x / rms(x) * (1 + w) (Gemma): the same function as RMSNorm, which weight decay pulls elsewhere.

    A separate class, since engines tell the two apart by the initial value of `weight`.
    """

    centered = True
    weight: torch.Tensor

    def __init__(self, hidden_size: int, eps: float = 1e-6, learnable: bool = True):
        super().__init__()
        self.variance_epsilon = eps
        _register(self, "weight", torch.zeros(hidden_size), learnable)

    def reset(self) -> None:
        init.zeros_(self.weight)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return rms_norm(hidden_states, 1.0 + self.weight.to(wide), self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def _register(module: nn.Module, name: str, value: torch.Tensor, learnable: bool) -> None:
    if learnable:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value)


class PeriLlamaNorm(nn.Module):
    """`gain * normalize(x) + bias` over the last dimension, for any kind and gain of `slots.py`.

    | kind | normalize(x) | bias | source |
    |---|---|---|---|
    | `rmsnorm` | x / sqrt(mean(x^2) + eps) | no | 1910.07467, equation 4 |
    | `layernorm` | (x - mean(x)) / sqrt(var(x) + eps) | yes | 1607.06450 |
    | `dyt` | tanh(alpha x), alpha a learned number, initially 0.5 | yes | 2503.10622, equation 1 |
    | `derf` | erf(alpha x + shift), alpha and shift learned, from 0.5 and 0 | yes | 2512.10938 |
    | `l2` | x / sqrt(sum(x^2) + eps) | no | |
    | `none` | x | no | the gain of NormFormer's HeadScale, 2110.09456 |

    Only a gain for each channel has a bias with it. `learnable=False` freezes gain and bias at the identity.

    Args:
        size: channels.
        heads: for the gain `head`: how many heads the channels are.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    BIASED = ("layernorm", "dyt", "derf")

    def __init__(
        self, kind: str, gain: str, size: int, eps: float = 1e-6, learnable: bool = True, heads: int | None = None
    ):
        super().__init__()
        self.kind, self.gain, self.size, self.variance_epsilon = kind, gain, size, eps
        self.centered = gain == "centered"
        count = {"channel": size, "centered": size, "scalar": 1, "head": heads, "none": 0}[gain]
        if count:
            _register(self, "weight", torch.zeros(count) if gain == "centered" else torch.ones(count), learnable)
        self.biased = kind in self.BIASED and gain in ("channel", "centered")
        if self.biased:
            _register(self, "bias", torch.zeros(size), learnable)
        if kind in ("dyt", "derf"):
            self.alpha = nn.Parameter(torch.full((1,), 0.5))
        if kind == "derf":
            self.shift = nn.Parameter(torch.zeros(1))

    def reset(self) -> None:
        """Initial values, through Transformers' functions, which leave loaded values alone."""
        if self.gain != "none":
            (init.zeros_ if self.gain == "centered" else init.ones_)(self.weight)
        if self.biased:
            init.zeros_(self.bias)
        if self.kind in ("dyt", "derf"):
            init.constant_(self.alpha, 0.5)
        if self.kind == "derf":
            init.zeros_(self.shift)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = self._normalized(hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32)))
        if self.gain == "head":
            x = x.unflatten(-1, (self.weight.shape[0], -1)).mul(self.weight.to(x.dtype).unsqueeze(-1)).flatten(-2)
        elif self.gain != "none":
            weight = self.weight.to(x.dtype)
            x = x * (1.0 + weight if self.gain == "centered" else weight)
        if self.biased:
            x = x + self.bias.to(x.dtype)
        return x.to(hidden_states.dtype)

    def _normalized(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "rmsnorm":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        if self.kind == "layernorm":
            return F.layer_norm(x, (self.size,), eps=self.variance_epsilon)
        if self.kind == "l2":
            return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + self.variance_epsilon)
        if self.kind == "dyt":
            return torch.tanh(self.alpha.to(x.dtype) * x)
        if self.kind == "derf":
            return torch.erf(self.alpha.to(x.dtype) * x + self.shift.to(x.dtype))
        return x

    def extra_repr(self) -> str:
        return f"{self.size}, kind={self.kind}, gain={self.gain}, eps={self.variance_epsilon}"


NORMS = {"rmsnorm": PeriLlamaRMSNorm, "layernorm": PeriLlamaLayerNorm}  # with one gain a channel
_OWN_CLASSES = {(kind, "channel"): norm for kind, norm in NORMS.items()}
_OWN_CLASSES["rmsnorm", "centered"] = PeriLlamaCenteredRMSNorm


def make_norm(
    kind: str, gain: str, size: int, eps: float, learnable: bool = True, heads: int | None = None
) -> nn.Module:
    """The norm of a kind and a gain over `size` channels: its own class where there is one."""
    own = _OWN_CLASSES.get((kind, gain))
    return PeriLlamaNorm(kind, gain, size, eps, learnable, heads) if own is None else own(size, eps, learnable)


def build_norm(
    config: Any,
    slot: str,
    norm: Norm | None,
    layer_idx: int | None = None,
    size: int | None = None,
    learnable: bool = True,
) -> nn.Module:
    """The norm of a slot, over `size` channels (the hidden size by default); an identity where there is none."""
    if norm is None:
        return nn.Identity()
    eps = config.eps_of(slot, layer_idx) if norm.eps is None else norm.eps
    kind, gain = norm.kind or config.norm_type, norm.gain or config.norm_gain
    return make_norm(kind, gain, size or config.hidden_size, eps, learnable, config.num_attention_heads)
