"""Which values a tensor can take, whatever the input: sets of vectors, carried through norms, products and sums.

A `Reach` holds every vector x (D,) that satisfies all of

    |x_c| <= box_c,    |x| <= length,    x = centre + gain * u  with  |u| <= radius.

All three come from one fact: x / rms(x) has length sqrt(D) for any x, so an RMSNorm's output is gamma * u with
|u| <= sqrt(D), an ellipsoid; LayerNorm's is that moved by beta. Linear maps of an ellipsoid are bounded row by row,
sqrt(D) |W_j * gamma| + |W_j beta + b_j|, which some x attains; so are products of two such rows. Everything is in
float64 and in exact arithmetic; `roundings` counts how many results rounded to FP16 lie between a bounded value and
the last norm, so that a value computed in FP16 is at most bound * (1 + 2^-11)^roundings (underflow apart). An FP32 sum
of n terms is off by n 2^-24 of the sum of their sizes, which the same bounds hold for: n / `SUMMED` of a rounding. A
rounded centre c is off by as much of |W| |c|, however much of W c cancels, so that much is added to its rows' bounds.
"""

import math
from dataclasses import dataclass

import torch

from periln.eval.structure.norms import NormFacts
from periln.runkit.number_format import FP16

SUMMED = 8000.0  # terms whose sum in FP32 is off by less than one rounding to FP16
ROWS = 4096  # rows of a large matrix that are in FP64 at once
EXACT_SPECTRUM = 1024  # largest side whose spectral norm is taken from eigenvalues


@dataclass(frozen=True)
class Reach:
    """See the module. `centre` and `gain` are (D,) in float64."""

    box: torch.Tensor
    length: float
    centre: torch.Tensor
    gain: torch.Tensor
    radius: float
    roundings: float

    @classmethod
    def of_box(cls, box: torch.Tensor, length: float, roundings: float) -> "Reach":
        """A box, with a length if one better than the box's own is known."""
        length = min(length, box.norm().item())
        return cls(box.clamp(max=length), length, torch.zeros_like(box), torch.ones_like(box), length, roundings)

    def roundings_of(self, terms: int) -> float:
        """The roundings of a product with a matrix row of `terms` terms."""
        return self.roundings + 1 + terms / SUMMED

    @property
    def largest(self) -> tuple[float, int]:
        """The largest |x_c| and its channel."""
        value, channel = self.box.max(0)
        return value.item(), int(channel)

    def scaled(self, factor: float) -> "Reach":
        if factor == 1.0:
            return self
        k = abs(factor)
        centre, gain = factor * self.centre, factor * self.gain
        return Reach(k * self.box, k * self.length, centre, gain, self.radius, self.roundings + 1)

    def plus(self, other: "Reach") -> "Reach":
        """The set of sums of a vector of each."""
        roundings = max(self.roundings, other.roundings) + 1
        return Reach.of_box(self.box + other.box, self.length + other.length, roundings)


def rows_reach(rows: torch.Tensor, norm: NormFacts | None, scale: float | None) -> Reach:
    """The rows (V, D) of an embedding table, behind a norm or times a scale: finitely many vectors, so exact."""
    box, length = torch.zeros(rows.shape[-1], dtype=torch.float64), 0.0
    for block in rows.detach().split(ROWS):
        x = block.double().cpu()
        x = apply_norm(norm, x) if norm is not None else x * (1.0 if scale is None else scale)
        box = torch.maximum(box, x.abs().amax(0))
        length = max(length, x.norm(dim=-1).max().item())
    return Reach.of_box(box, length, 2 + rows.shape[-1] / SUMMED)


def apply_norm(norm: NormFacts, x: torch.Tensor) -> torch.Tensor:
    """The norm of x (..., D) in float64."""
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    gain, bias = _gain(norm, x.shape[-1]), _bias(norm, x.shape[-1])
    return x * gain + bias


def _gain(norm: NormFacts, size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.float64) if norm.gain is None else norm.gain.double().cpu()


def _bias(norm: NormFacts, size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.float64) if norm.bias is None else norm.bias.double().cpu()


def norm_reach(norm: NormFacts, size: int, given: Reach | None) -> Reach:
    """What a norm over `size` channels can give, for any input; closer where the input's own reach is known.

    RMSNorm: |x_c| / sqrt(mean x^2 + eps) <= b / sqrt(b^2 / D + eps) for |x_c| <= b, which is below sqrt(D) by the
    epsilon. LayerNorm: one centred channel of D is at most sqrt(D - 1) standard deviations from their mean.
    """
    gain, bias = _gain(norm, size), _bias(norm, size)
    if norm.kind == "layer":
        unit, radius = torch.full_like(gain, math.sqrt(size - 1)), math.sqrt(size)
    elif given is None:
        unit, radius = torch.full_like(gain, math.sqrt(size)), math.sqrt(size)
    else:
        rounded = (1 + FP16.unit_roundoff) ** given.roundings  # what the norm reads in FP16 may be so much larger
        box, length = given.box * rounded, given.length * rounded
        unit = box / (box.square() / size + norm.eps).sqrt().clamp(min=1e-300)
        radius = length / math.sqrt(max(length**2 / size + norm.eps, 1e-300))
    box = gain.abs() * unit + bias.abs()
    length = gain.abs().max().item() * radius + bias.norm().item()
    return Reach(box, min(length, box.norm().item()), bias, gain, radius, 2 + size / SUMMED)


def linear_rows(given: Reach, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The largest |W_j x + b_j| of every row (out,), for any x of `given`; `ROWS` rows at a time are in FP64."""
    shifts = torch.zeros(len(weight)) if bias is None else bias.detach()
    blocks = zip(weight.detach().split(ROWS), shifts.split(ROWS), strict=True)
    return torch.cat([_linear_rows(given, w.double().cpu(), b.double().cpu()) for w, b in blocks])


def _linear_rows(given: Reach, weight: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    size = weight.abs()
    ellipsoid = given.radius * (weight * given.gain).norm(dim=1) + (weight @ given.centre + shift).abs()
    ellipsoid += given.roundings_of(weight.shape[1]) * FP16.unit_roundoff * (size @ given.centre.abs())
    box = size @ given.box + shift.abs()
    return torch.minimum(ellipsoid, torch.minimum(box, weight.norm(dim=1) * given.length + shift.abs()))


def product_rows(given: Reach, gate: torch.Tensor, up: torch.Tensor, gate_bias, up_bias) -> torch.Tensor:
    """The largest |(G_i x + g_i)(U_i x + u_i)| of every row (F,), for any x of `given`.

    Without centre and biases the two are linear forms a and b on a ball, and the largest |(a u)(b u)| over |u| <= r is
    r^2 (|a||b| + |a b|) / 2; with them it is the product of the two rows' own bounds.
    """
    rows = linear_rows(given, gate, gate_bias) * linear_rows(given, up, up_bias)
    if gate_bias is None and up_bias is None and not given.centre.any():
        a, b = (w.detach().double().cpu() * given.gain for w in (gate, up))
        both = (a.norm(dim=1) * b.norm(dim=1) + (a * b).sum(1).abs()) / 2
        rows = torch.minimum(rows, given.radius**2 * both)
    return rows


def spectral_norm(matrix: torch.Tensor) -> float:
    """An upper bound of the spectral norm, equal to it up to `EXACT_SPECTRUM` rows or columns.

    Beyond, |A| <= |(A^T A)^4|_F^(1/8): never below, and at most side^(1/16) above.
    """
    matrix = matrix.detach().double().cpu()
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    if len(gram) <= EXACT_SPECTRUM:
        return math.sqrt(max(torch.linalg.eigvalsh(gram)[-1].item(), 0.0)) * (1 + 1e-12)
    scale = gram.norm().clamp(min=1e-300)
    power = gram / scale
    power = power @ power
    return math.sqrt(scale.item() * (power @ power).norm().item() ** 0.25)
