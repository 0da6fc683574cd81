"""Loss of a model on samples, and how far its predictions are from the source's."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

LOGIT_BYTES = 512 * 2**20  # of the source's logits, kept for the divergence
ROWS = 256  # positions compared at a time


@dataclass(frozen=True)
class Reference:
    """The source on the samples: its loss, and its logits at every `stride`-th position, a tensor a sample."""

    loss: float
    logits: list[torch.Tensor]
    stride: int


@torch.no_grad()
def measure_reference(model: PreTrainedModel, ids: torch.Tensor) -> Reference:
    """The source's mean next-token loss (nats a token) over ids (N, S), and logits to compare with."""
    stride = max(1, math.ceil(ids.numel() * model.config.vocab_size * 4 / LOGIT_BYTES))
    nats, kept = 0.0, []
    for row in ids:
        found = model(input_ids=row[None], use_cache=False).logits[0].float()
        nats += F.cross_entropy(found[:-1], row[1:], reduction="sum").item()
        kept.append(found[::stride].clone())
    return Reference(nats / _predicted(ids), kept, stride)


@torch.no_grad()
def measure(model: PreTrainedModel, ids: torch.Tensor, reference: Reference) -> dict[str, float]:
    """Mean loss in nats a token, and KL(source || model) in nats a position, over the same samples."""
    nats = divergence = 0.0
    positions = 0
    for row, kept in zip(ids, reference.logits, strict=True):
        logits = model(input_ids=row[None], use_cache=False).logits[0].float()
        nats += F.cross_entropy(logits[:-1], row[1:], reduction="sum").item()
        for p, q in zip(kept.split(ROWS), logits[:: reference.stride].split(ROWS), strict=True):
            p, q = p.log_softmax(-1), q.log_softmax(-1)
            divergence += (p.exp() * (p - q)).sum(-1).double().sum().item()
            positions += len(p)
    return {"loss": nats / _predicted(ids), "kl": max(0.0, divergence / positions)}


def _predicted(ids: torch.Tensor) -> int:
    return ids.shape[0] * (ids.shape[1] - 1)
