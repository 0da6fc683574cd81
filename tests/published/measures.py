"""What is measured of one model against another: logits in FP32, BF16 and FP16 on the same tokens."""

import copy
import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from periln.eval.stability.overflow import half_copy
from periln.runkit.fp16 import HalfMatmul

ROWS = 64  # positions whose logits are compared at once


@torch.no_grad()
def compare(reference: nn.Module, model: nn.Module, batches: list[torch.Tensor]) -> dict[str, Any]:
    """`model` against `reference` (both in FP32 or narrower) over ids (B, S): largest difference, KL, top-1, finite,
    and the perplexity of `model`."""
    sums = {"kl": 0.0, "top": 0, "nats": 0.0, "count": 0, "predicted": 0, "not_finite": 0}
    largest, logit = 0.0, 0.0
    narrow = next(model.parameters()).dtype == torch.float16
    for ids in batches:
        wanted = reference(input_ids=ids, use_cache=False).logits
        with HalfMatmul() if narrow else nullcontext():
            given = model(input_ids=ids, use_cache=False).logits
        for row, (a, b) in enumerate(zip(wanted, given, strict=True)):
            for start in range(0, len(a), ROWS):
                x, y = a[start : start + ROWS].float(), b[start : start + ROWS].float()
                finite = y.isfinite().all(-1)
                sums["count"] += len(x)
                sums["not_finite"] += int((~finite).sum())
                x, y = x[finite], y[finite]
                if not len(x):
                    continue
                p, q = x.log_softmax(-1), y.log_softmax(-1)
                sums["kl"] += (p.exp() * (p - q)).sum().double().item()
                sums["top"] += int((x.argmax(-1) == y.argmax(-1)).sum())
                largest, logit = max(largest, (x - y).abs().max().item()), max(logit, x.abs().max().item())
                targets = ids[row, start + 1 : start + 1 + ROWS]
                q = q[: len(targets)] if bool(finite.all()) else q[:0]
                sums["nats"] -= q.gather(-1, targets[: len(q), None]).sum().double().item()
                sums["predicted"] += len(q)
    seen = sums["count"] - sums["not_finite"]
    return {
        "tokens": sums["count"],
        "not_finite": sums["not_finite"],
        "largest_difference": largest if seen else None,
        "largest_logit": logit if seen else None,
        "kl": sums["kl"] / seen if seen else None,
        "top1": sums["top"] / seen if seen else None,
        "perplexity": math.exp(sums["nats"] / sums["predicted"]) if sums["predicted"] else None,
    }


def in_fp16(model: nn.Module) -> nn.Module:
    return half_copy(model)[0]


def in_bf16(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).bfloat16()


def every_precision(original: nn.Module, cured: nn.Module, batches: list[torch.Tensor]) -> dict[str, dict[str, Any]]:
    """The original and the cured model in each precision against the original in FP32."""
    return {
        "original FP32": compare(original, original, batches),
        "cured FP32": compare(original, cured, batches),
        "original BF16": compare(original, in_bf16(original), batches),
        "original FP16": compare(original, in_fp16(original), batches),
        "cured FP16": compare(original, in_fp16(cured), batches),
    }
