"""The gain of a norm that appears, or the factor in the place of one that goes, from what is measured.

Both are the same question: `have` (tokens, D) is what the new model has at a place, `want` what the old one has there,
and one number a channel times `have` shall be near `want`. With sums over tokens:

| rule | the number of channel i |
|---|---|
| `unit` | 1 |
| `scalar` | sqrt(sum want^2 / sum have^2), over all channels: the same for each |
| `channel` | sqrt(sum want_i^2 / sum have_i^2): the root mean square of the channel stays |
| `least-squares` | sum want_i have_i / sum have_i^2: least sum of squared differences |

A norm that appears has have = x / rms(x) and want = x; one that goes has have = x and want = gain x / rms(x).
"""

from dataclasses import dataclass
from typing import Any

import torch

from periln.scripts.arguments.retrofit import RULES


@dataclass(frozen=True)
class Fit:
    """Numbers (D,) in FP64, and the share of the squares of `want` that they leave unexplained."""

    gain: torch.Tensor
    error: float

    def summary(self) -> dict[str, Any]:
        low, middle, high = (float(x) for x in self.gain.quantile(self.gain.new_tensor([0.0, 0.5, 1.0])))
        return {"gain_min": low, "gain_median": middle, "gain_max": high, "error": self.error}


def fit(want: torch.Tensor, have: torch.Tensor, rule: str) -> Fit:
    """The numbers of a rule for two tensors (..., D); a channel in which `have` is 0 throughout gets 1.

    The error is sum (want - gain have)^2 / sum want^2: 0 is exact, 1 as bad as no branch at all.
    """
    squares = _sum(want, want), _sum(have, have)
    product = _sum(want, have)
    ones = torch.ones_like(product)
    if rule == "unit":
        gain = ones
    elif rule == "scalar":
        gain = ones * (squares[0].sum() / squares[1].sum()).sqrt()
    elif rule == "channel":
        gain = (squares[0] / squares[1]).sqrt()
    elif rule == "least-squares":
        gain = product / squares[1]
    else:
        raise ValueError(f"rule={rule!r} is none of {', '.join(RULES)}")
    gain = torch.where(gain.isfinite(), gain, ones)
    left = squares[0] - 2 * gain * product + gain.square() * squares[1]
    whole = float(squares[0].sum())
    return Fit(gain, max(0.0, float(left.sum()) / whole) if whole else 0.0)


def _sum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of a * b, a channel each, in FP64 piece by piece."""
    a, b = a.flatten(0, -2), b.flatten(0, -2)
    pieces = zip(a.split(4096), b.split(4096), strict=True)
    return torch.stack([(x.double() * y.double()).sum(0) for x, y in pieces]).sum(0)
