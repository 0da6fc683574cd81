"""What is measured of one model against another: logits in FP32, BF16 and FP16 on the same tokens.

Sums are kept in a file after every few windows: a stopped measurement resumes, and more tokens extend it.
"""

import copy
import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from periln.eval.stability.overflow import half_copy
from periln.runkit.fp16 import HalfMatmul
from periln.runkit.number_format import FP16

ROWS = 64  # positions whose logits are compared at once
EVERY, COMPARED = 8, 6  # the first of 8 windows is compared in every precision, 6 times; the others run in FP16 alone
ZERO = {"kl": 0.0, "top": 0, "nats": 0.0, "count": 0, "predicted": 0, "not_finite": 0, "largest": 0.0, "logit": 0.0}


def _numerics(model: nn.Module) -> Any:
    return HalfMatmul() if next(model.parameters()).dtype == torch.float16 else nullcontext()


@torch.no_grad()
def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with _numerics(model):
        return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def add_difference(sums: dict[str, Any], wanted: torch.Tensor, given: torch.Tensor, ids: torch.Tensor) -> None:
    """Add logits (B, S, V) `given` against those `wanted` over ids (B, S) to `sums`."""
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
            sums["largest"] = max(sums["largest"], (x - y).abs().max().item())
            sums["logit"] = max(sums["logit"], x.abs().max().item())
            targets = ids[row, start + 1 : start + 1 + ROWS]
            q = q[: len(targets)] if bool(finite.all()) else q[:0]
            sums["nats"] -= q.gather(-1, targets[: len(q), None]).sum().double().item()
            sums["predicted"] += len(q)


def summary(sums: dict[str, Any]) -> dict[str, Any]:
    """Largest difference, KL (nats a token), share of equal top tokens, and the model's own perplexity."""
    seen = sums["count"] - sums["not_finite"]
    return {
        "tokens": sums["count"],
        "not_finite": sums["not_finite"],
        "largest_difference": sums["largest"] if seen else None,
        "largest_logit": sums["logit"] if seen else None,
        "kl": sums["kl"] / seen if seen else None,
        "top1": sums["top"] / seen if seen else None,
        "perplexity": math.exp(sums["nats"] / sums["predicted"]) if sums["predicted"] else None,
    }


def compare(reference: nn.Module, model: nn.Module, batches: list[torch.Tensor]) -> dict[str, Any]:
    """`model` against `reference` (both in FP32 or narrower) over ids (B, S)."""
    sums = dict(ZERO)
    for ids in batches:
        add_difference(sums, _logits(reference, ids), _logits(model, ids), ids)
    return summary(sums)


@torch.no_grad()
def not_finite(half: nn.Module, ids: torch.Tensor, longest: float) -> int:
    """Of the positions of ids (B, S), how many have a logit that is not finite in FP16.

    A logit is at most the length of the last hidden state times `longest`, that of the head's longest row. Where that
    is below 65504 for all, logits are finite and the head, most of the work, is not run.
    """
    with _numerics(half):
        hidden = half.model(input_ids=ids, use_cache=False).last_hidden_state
        bound = hidden.float().norm(dim=-1) * longest * 1.01
        known = bound < FP16.largest  # False for NaN
        broken = ~hidden.isfinite().all(-1)
        if bool((known | broken).all()):
            return int(broken.sum())
        return int((~half.lm_head(hidden).isfinite().all(-1)).sum())


@torch.no_grad()
def longest_row(half: nn.Module) -> float:
    """The length of the head's longest row."""
    return max(rows.float().norm(dim=-1).max().item() for rows in half.lm_head.weight.split(8192))


def in_fp16(model: nn.Module) -> nn.Module:
    return half_copy(model)[0]


def in_bf16(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).bfloat16()


def every_precision(
    original: nn.Module, cured: nn.Module, windows: list[torch.Tensor], kept: Path, key: str
) -> dict[str, Any]:
    """The original and the cured model in each precision against the original in FP32, over `windows` of ids (1, S).

    Args:
        kept: the file with the sums so far; `key` says of what they are, and others are refused.

    Returns:
        tokens and not_finite of the cured model in FP16 over all windows, and `rows` of those that were compared.
    """
    models: dict[str, nn.Module] = {
        "cured FP32": cured,
        "original BF16": in_bf16(original),
        "cured FP16": in_fp16(cured),
    }
    broken, half = in_fp16(original), models["cured FP16"]
    lengths = longest_row(broken), longest_row(half)
    state = json.loads(kept.read_text()) if kept.exists() else _empty(key, [*models, "original FP32", "original FP16"])
    assert state["key"] == key, f"{kept} is of other models or windows: delete it"
    while rest := windows[state["windows"] : state["windows"] // EVERY * EVERY + EVERY]:
        first = state["windows"] % EVERY == 0 and state["windows"] < COMPARED * EVERY
        if first:
            ids, rows = rest.pop(0), state["rows"]
            wanted = _logits(original, ids)
            add_difference(rows["original FP32"], wanted, wanted, ids)
            before = rows["cured FP16"]["not_finite"]
            for name, model in models.items():
                add_difference(rows[name], wanted, _logits(model, ids), ids)
            state["not_finite"] += rows["cured FP16"]["not_finite"] - before
            nowhere = not_finite(broken, ids, lengths[0])  # its logits are looked at only where there are numbers
            if nowhere < ids.numel():
                add_difference(rows["original FP16"], wanted, _logits(broken, ids), ids)
            else:
                rows["original FP16"]["count"] += nowhere
                rows["original FP16"]["not_finite"] += nowhere
        if rest:
            state["not_finite"] += not_finite(half, torch.cat(rest), lengths[1])
        done = len(rest) + first
        state["windows"] += done
        state["tokens"] += done * windows[0].numel()
        part = kept.with_suffix(".part")
        part.write_text(json.dumps(state))
        part.replace(kept)
    rows = {name: summary(sums) for name, sums in state["rows"].items()}
    return {"tokens": state["tokens"], "not_finite": state["not_finite"], "rows": rows}


def _empty(key: str, names: list[str]) -> dict[str, Any]:
    return {"key": key, "windows": 0, "tokens": 0, "not_finite": 0, "rows": {name: dict(ZERO) for name in names}}
