"""Moments of a tensor over a stream of batches, in float64; memory does not grow with the number of batches."""

import math
from dataclasses import dataclass, field

import torch

from periln.runkit.number_format import FP16


@dataclass
class Peak:
    """The entry of the largest |x|: its value, and its sample, position and channel."""

    value: float = 0.0
    sample: int = -1
    token: int = -1
    channel: int = -1


def _nothing() -> torch.Tensor:
    return torch.empty(0, dtype=torch.float64)


@dataclass
class Moments:
    """Sums over all entries of the tensors (B, S, D) seen, and over each channel.

    `stats()` gives mean |x|; variance over all entries; the data-wise variance (of each channel over all tokens,
    averaged over channels); kurtosis m4 / m2^2 (3 for a normal distribution); max |x| and its place; and the bits
    between it and FP16's largest number, `NumberFormat.headroom`.
    """

    count: int = 0
    absolute: float = 0.0
    third: float = 0.0
    fourth: float = 0.0
    not_finite: int = 0
    channel_sum: torch.Tensor = field(default_factory=_nothing)  # (D,), from the first batch on
    channel_square: torch.Tensor = field(default_factory=_nothing)
    peak: Peak = field(default_factory=Peak)

    @torch.no_grad()
    def add(self, x: torch.Tensor, first_sample: int) -> torch.Tensor:
        """Add a batch (B, S, D) whose first row is sample number `first_sample`; returns tokens' lengths (B S,)."""
        _, length, width = x.shape
        x = x.detach().reshape(-1, width)
        low, high = (bound.item() for bound in x.aminmax())  # NaN where there is one
        value = max(-low, high) if not math.isnan(low) else math.nan
        if value > self.peak.value or math.isnan(value):
            index = int(x.abs().argmax())  # NaN counts as the largest
            row, channel = divmod(index, width)
            sample, token = divmod(row, length)
            self.peak = Peak(x[row, channel].abs().item(), first_sample + sample, token, channel)
        if not math.isfinite(value):
            self.not_finite += int((~x.isfinite()).sum())
        flat = x.double()
        square = flat * flat
        if self.channel_sum.numel() == 0:
            self.channel_sum, self.channel_square = flat.new_zeros(width), flat.new_zeros(width)
        ones = flat.new_ones(len(flat))
        self.channel_sum += ones @ flat
        self.channel_square += ones @ square
        self.absolute += flat.abs().sum().item()
        self.third += torch.dot(square.flatten(), flat.flatten()).item()
        self.fourth += torch.dot(square.flatten(), square.flatten()).item()
        self.count += flat.numel()
        return square.sum(1).sqrt()

    @property
    def typical(self) -> float:
        """The median over channels of their root mean square: a size that a few outlying channels do not affect."""
        width = len(self.channel_square)
        return (self.channel_square * width / self.count).sqrt().median().item()

    def stats(self) -> dict[str, float]:
        """All statistics by name."""
        n, width = self.count, len(self.channel_sum)
        mean = self.channel_sum.sum().item() / n
        square = self.channel_square.sum().item() / n
        variance = square - mean**2
        tokens = n / width
        data_wise = (self.channel_square / tokens - (self.channel_sum / tokens).square()).mean().item()
        fourth = self.fourth / n - 4 * mean * self.third / n + 6 * mean**2 * square - 3 * mean**4
        return {
            "mean_abs": self.absolute / n,
            "variance": max(variance, 0.0) if math.isfinite(variance) else variance,
            "variance_data": max(data_wise, 0.0) if math.isfinite(data_wise) else data_wise,
            "kurtosis": fourth / variance**2 if variance > 0 else math.nan,
            "max_abs": self.peak.value,
            "max_sample": float(self.peak.sample),
            "max_token": float(self.peak.token),
            "max_channel": float(self.peak.channel),
            "headroom_bits": FP16.headroom(self.peak.value),
        }
