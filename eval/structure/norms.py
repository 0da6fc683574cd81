"""What a norm module computes, found by running it: RMSNorm or LayerNorm, gamma or 1 + w, its epsilon."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from periln.runkit.errors import UserError

_EPS_NAMES = ("eps", "variance_epsilon", "norm_eps", "epsilon", "layer_norm_epsilon")

_SCALED = ("dyt", "derf")  # tanh and erf of the stream itself


@dataclass(frozen=True)
class NormFacts:
    """y = gain * (x - mean) / sqrt(var + eps) + bias with `kind` "layer", gain * x / sqrt(mean x^2 + eps) with "rms".

    `gain` and `bias` are (D,), detached, or None where there is none; `offset` is added to the weight to give
    the gain: 1 for Gemma's norms, else 0.
    """

    kind: str
    eps: float
    gain: torch.Tensor | None
    bias: torch.Tensor | None
    offset: float


def is_norm(module: nn.Module) -> bool:
    """A norm over channels: named so, and without a weight matrix."""
    named = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or "norm" in type(module).__name__.lower()
    return named and all(p.ndim <= 1 for p in module.parameters())


def epsilon_of(module: nn.Module) -> float | None:
    """The epsilon that a norm module states, or None."""
    for name in _EPS_NAMES:
        value = getattr(module, name, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return None


@torch.no_grad()
def norm_facts(module: nn.Module, name: str = "") -> NormFacts:
    """What a norm computes, checked on random vectors.

    Raises:
        UserError: it is neither an RMSNorm nor a LayerNorm over the last dimension.
    """
    called, kind = type(module).__name__, getattr(module, "kind", None)
    label = f"the norm {name or called} ({f'{called}, {kind}' if isinstance(kind, str) else called})"
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = epsilon_of(module)
    if eps is None:
        raise UserError(f"{label} states no epsilon (none of {', '.join(_EPS_NAMES)})")
    # A frozen gain is a buffer.
    parameter = next(module.parameters(), weight if isinstance(weight, torch.Tensor) else None)
    sizes = getattr(module, "normalized_shape", None)
    stated: Any = getattr(module, "size", None)  # said by a norm whose gain may be one number, or one a head
    if not isinstance(stated, int):
        if parameter is not None and parameter.numel() > 1:
            stated = len(parameter)
        else:
            stated = sizes[-1] if sizes else getattr(module, "dim", None)
    # Without a gain a channel it takes any size; on one channel an L2 norm would be an RMSNorm.
    size = stated if isinstance(stated, int) else 64
    if weight is not None and weight.shape not in ((size,), (1,), ()):
        raise UserError(f"{label} has {weight.numel()} gains for {size} channels")
    device = "cpu" if parameter is None else parameter.device
    dtype = torch.float32 if parameter is None else parameter.dtype
    x = torch.randn(4, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    y = module(x).double()
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    unit = {
        "rms": x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps),
        "layer": centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps),
    }
    shift = 0.0 if bias is None else bias.double()
    for found, hat in unit.items():
        for offset in (0.0, 1.0) if weight is not None else (0.0,):
            gain = 1.0 if weight is None else offset + weight.double()
            expected = hat * gain + shift
            if bool((y - expected).abs().max() <= 16 * torch.finfo(dtype).eps * expected.abs().max()):
                exact = gain.detach() if isinstance(gain, torch.Tensor) else None
                if exact is not None:
                    exact = exact.expand(size) if size == stated else exact.reshape(1)
                return NormFacts(found, eps, exact, None if bias is None else bias.detach().double(), offset)
    scale = ", and its result depends on the scale of what it reads" if kind in _SCALED else ""
    raise UserError(f"{label} is neither an RMSNorm nor a LayerNorm of the last dimension{scale}")
