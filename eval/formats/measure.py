"""One model on one set of samples: the FP32 reference, and what each row of the table changes relative to it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from periln.eval.formats.emulate import Emulation, slot_rows
from periln.eval.formats.locate import Located, vocabulary_of
from periln.eval.formats.recipes import Recipe
from periln.eval.texts.samples import Samples
from periln.runkit.errors import UserError

LOGIT_BYTES = 512 * 2**20  # bytes of the reference's logits, kept for KL and top-1
PASS_BYTES = 256 * 2**20  # of one batch's logits
KL_ENTRIES = 2**21  # of logits that are in double precision at a time


def usual_batch(samples: Samples, vocabulary: int) -> int:
    """The samples a batch whose logits stay below `PASS_BYTES`: at most 4, at least 1."""
    return min(4, max(1, PASS_BYTES // (4 * vocabulary * samples.ids.shape[1])))


def _losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Nats (B,) of every sample, a sample at a time: FP32 copies of logits are large."""
    rows = [F.cross_entropy(z[:-1].float(), i[1:], reduction="sum") for z, i in zip(logits, ids, strict=True)]
    return torch.stack(rows).double().cpu()


@dataclass
class Reference:
    """FP32: nats (N,) of every sample, and the logits at every `stride`-th position, a tensor a batch."""

    nats: torch.Tensor
    logits: list[torch.Tensor]
    stride: int

    @property
    def positions(self) -> int:
        """Positions at which KL and top-1 are measured."""
        return sum(z.shape[0] * z.shape[1] for z in self.logits)


@torch.no_grad()
def measure_reference(
    model: nn.Module, samples: Samples, batch_size: int, tick: Callable[[int], None] = lambda n: None
) -> Reference:
    """The model as it is, in FP32.

    Raises:
        UserError: its logits are not finite.
    """
    stride = max(1, math.ceil(samples.ids.numel() * vocabulary_of(model) * 4 / LOGIT_BYTES))
    nats, kept = [], []
    for ids in samples.batches(batch_size, next(model.parameters()).device):
        logits = model(input_ids=ids, use_cache=False).logits
        if not bool(logits.isfinite().all()):
            raise UserError("the model's logits are not finite in FP32: there is nothing to compare a format with")
        nats.append(_losses(logits, ids))
        kept.append(logits[:, ::stride].float().clone())
        tick(len(ids))
    return Reference(torch.cat(nats), kept, stride)


def _kl(reference: torch.Tensor, logits: torch.Tensor) -> tuple[float, int]:
    """Sum over positions of KL(reference || rounded) in nats, and the number of positions with the same token."""
    total, same = 0.0, 0
    rows = max(1, KL_ENTRIES // reference.shape[-1])
    for p, q in zip(reference.flatten(0, 1).split(rows), logits.flatten(0, 1).split(rows), strict=True):
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        total += (p.exp() * (p - q)).sum().item()
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    return total, same


def divergence(reference: Reference, other: Reference) -> tuple[float, float]:
    """KL(reference || other) in nats a position, and the share of positions at which both name the same token.

    Both are of the same samples, and of vocabularies of one size.
    """
    pairs = [_kl(p, q) for p, q in zip(reference.logits, other.logits, strict=True)]
    kl, same = (sum(part) for part in zip(*pairs, strict=True))
    return max(kl, 0.0) / reference.positions, same / reference.positions


@torch.no_grad()
def measure_recipe(
    located: Located,
    recipe: Recipe,
    samples: Samples,
    reference: Reference,
    batch_size: int,
    tick: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """The record of a row: nats of every sample, KL, top-1, and the slots.

    It ends with the first batch whose logits are not finite: `finite` is False then, and only the slots up to there
    are known.
    """
    device = next(located.model.parameters()).device
    nats: list[torch.Tensor] = []
    kl, same, left = 0.0, 0, len(samples.ids)
    with Emulation(located, recipe.cells) as emulation:
        for ids, kept in zip(samples.batches(batch_size, device), reference.logits, strict=True):
            logits = located.model(input_ids=ids, use_cache=False).logits
            if not bool(logits.isfinite().all()):
                break
            nats.append(_losses(logits, ids))
            more = _kl(kept, logits[:, :: reference.stride].float())
            kl, same, left = kl + more[0], same + more[1], left - len(ids)
            tick(len(ids))
    tick(left)
    finite = left == 0
    return {
        "key": recipe.key,
        "finite": finite,
        "nats": torch.cat(nats).tolist() if finite else None,
        "kl": max(kl, 0.0) / reference.positions if finite else None,
        "top1": same / reference.positions if finite else None,
        "slots": slot_rows(emulation.slots.values(), emulation.readers),
    }


def paired_rise(nats: Iterable[float], before: Iterable[float], sizes: Iterable[int], confidence: float = 0.95):
    """The rise of the loss in bits a byte (or token), with the interval of a ratio of sums over paired samples.

    Args:
        nats, before: of every sample, rounded and in FP32.
        sizes: its bytes (or tokens).

    Returns:
        (rise, low, high); low and high are None for fewer than two samples.
    """
    d = torch.tensor(list(nats), dtype=torch.float64) - torch.tensor(list(before), dtype=torch.float64)
    b = torch.tensor(list(sizes), dtype=torch.float64)
    n, total = len(d), b.sum().item()
    rise = d.sum().item() / total
    if n < 2:
        return rise / math.log(2), None, None
    from scipy.special import stdtrit

    residuals = (d - rise * b).square().sum().item()
    half = float(stdtrit(n - 1, 0.5 + confidence / 2)) * math.sqrt(n / (n - 1) * residuals) / total
    return rise / math.log(2), (rise - half) / math.log(2), (rise + half) / math.log(2)
