"""The residual add, and what multiplies its two sides."""

import torch
from torch import nn
from transformers import initialization as init

from .slots import Learned

# How many numbers a learned factor has.
FACTORS = {"scalar": lambda hidden_size: 1, "channel": lambda hidden_size: hidden_size}


def times(factor: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """factor * x, in the dtype of x; x itself for a constant 1."""
    if isinstance(factor, float):
        return x if factor == 1.0 else factor * x
    return factor.to(x.dtype) * x


class PeriLlamaResidual(nn.Module):
    """The residual add, alpha * stream + s * branch; a module, so that hooks can see stream and branch.

    The sum has the stream's dtype, whatever the branch's is: the stream is cast once, after the embedding. A learned
    factor is a parameter, of one number or of one a channel.
    """

    alpha: float | torch.Tensor
    s: float | torch.Tensor

    def __init__(self, alpha: float | Learned, s: float | Learned, hidden_size: int):
        super().__init__()
        self.initial: dict[str, float] = {}
        value: float | torch.Tensor
        for name, factor in (("alpha", alpha), ("s", s)):
            if isinstance(factor, float):
                value = factor
            else:  # not isinstance of Learned: remote code has its own copy of the class
                self.initial[name] = float(factor.init)
                value = nn.Parameter(torch.full((FACTORS[factor.learned](hidden_size),), float(factor.init)))
            setattr(self, name, value)

    def reset(self) -> None:
        for name, value in self.initial.items():
            init.constant_(getattr(self, name), value)

    def forward(self, stream: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        if branch.dtype != stream.dtype:
            branch = branch.to(stream.dtype)
        return times(self.alpha, stream) + times(self.s, branch)

    def extra_repr(self) -> str:
        factors = (getattr(self, name) for name in ("alpha", "s"))
        return ", ".join(
            f"{name}={value if isinstance(value, float) else f'learned {tuple(value.shape)}'}"
            for name, value in zip(("alpha", "s"), factors, strict=True)
        )


def begin_stream(
    embedded: torch.Tensor, dtype: str | None, module_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.dtype | None]:
    """The one cast of the stream, to `dtype` (None: it has the module's).

    Where the stream's dtype differs from the weights' and no autocast corrects that, each sublayer's input is cast
    back: to the dtype that is returned with the stream, or not at all (None).
    """
    if dtype is None:
        return embedded, None
    device = embedded.device.type
    corrected = device != "meta" and torch.is_autocast_enabled(device)
    return embedded.to(getattr(torch, dtype)), None if corrected else module_dtype


def sublayer_input(c: float, x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """c * x, in `dtype` if the stream's dtype differs from the module's."""
    x = times(c, x)
    return x if dtype is None else x.to(dtype)
