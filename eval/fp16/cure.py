"""The cure of one model: what overflows before, the rewrite, and what differs after it; nothing touches the disk."""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from periln.eval.fp16.exponents import NoExactRewrite, Plan, choose
from periln.eval.fp16.layout import Layout, find_layout
from periln.eval.fp16.peaks import Peak, measure_peaks
from periln.eval.fp16.rewrite import apply
from periln.eval.stability.overflow import first_non_finite, half_copy
from periln.eval.structure.anatomy import find_anatomy
from periln.runkit.errors import UserError
from periln.runkit.fp16 import HalfMatmul
from periln.runkit.number_format import FP16

COMPARED = 4  # samples whose logits are compared
FELT = 0.02  # of the largest logit: a difference in FP16 that is more than its usual rounding


@dataclass(frozen=True)
class Wish:
    """What is asked for: bits of headroom, the loss scale of the backward pass, and the choices of the command line."""

    margin: float = 2.0
    loss_scale: float = 1.0
    backward: bool = True
    keep_eps: bool = False
    scale_sums: bool = False
    tolerance: float = 1e-2


def cure(
    model: nn.Module, batches: list[torch.Tensor], wish: Wish, tick: Callable[[], None] = lambda: None
) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """Rewrite `model` (FP32) in place so that its FP16 pass over `batches` (ids (B, S)) stays finite.

    Returns:
        The record of `fp16_rewrite.json`; the ids (B, S) that were compared, and the source's logits (B, S, V) on them.
        The record's `needed` is False, and the model as it was, where nothing has to move.

    Raises:
        NoExactRewrite: no rewrite cures it; the message names the tensor. The model may be rewritten in part.
        UserError: the model's family or structure is not known.
    """
    anatomy = find_anatomy(model)
    layout = find_layout(anatomy)
    before = first_non_finite(anatomy, batches, wish.loss_scale)
    tick()
    peaks = measure_peaks(layout, model, batches, wish.backward, tick)
    plans, given_up = _plans(layout, peaks, wish, before)
    ids = batches[0][:COMPARED]
    reference = logits_of(model, ids)
    plan = _better(model, layout, plans, batches, reference, wish, wish.backward and given_up is None)
    record: dict[str, Any] = {
        "model_type": model.config.model_type,
        "wish": asdict(wish),
        "before": before,
        "backward_given_up": given_up,
        "exponents": plan.moved,
        "reasons": plan.reasons,
        "peaks": [_peak_row(p, plan.exponents, wish.loss_scale) for p in peaks],
        "needed": bool(plan.moved),
    }
    if not plan.moved:
        _nothing_to_move(before, wish)
        return record, ids, reference
    rounded = rounded_weights_logits(model, ids)
    epsilon = apply(model, layout, plan)
    tick()
    after = first_non_finite(anatomy, batches, wish.loss_scale)
    _check_after(after, wish.backward and given_up is None)
    largest = reference.abs().max().item()
    differences = {
        "largest_logit": largest,
        "fp32": _difference(logits_of(model, ids), reference),
        "weights_rounded_to_fp16_before": _difference(rounded, reference),
        "weights_rounded_to_fp16": _difference(rounded_weights_logits(model, ids), reference),
        "fp16_pass": _difference(_fp16_logits(model, ids), reference),
    }
    if not differences["fp32"] <= wish.tolerance * largest:
        raise NoExactRewrite(
            f"the rewrite would move the logits by {differences['fp32']:.3g} of {largest:.3g}, more than the tolerance "
            f"{wish.tolerance:g}: {'' if epsilon.exact else 'one epsilon for all norms does not fit it'}".rstrip(": ")
        )
    record |= {
        "after": after,
        "epsilon": asdict(epsilon),
        "uniform": plan.uniform,
        "differences": differences,
        "remains": _remains(layout, plan, epsilon.exact, differences),
    }
    return record, ids, reference


def _better(
    model: nn.Module,
    layout: Layout,
    plans: list[Plan],
    batches: list[torch.Tensor],
    reference: torch.Tensor,
    wish: Wish,
    backward: bool,
) -> Plan:
    """The plan that leaves nothing that is not finite; of two such, or none, the one whose FP16 pass is nearest to the
    FP32 logits: the first unless another halves its error.
    """
    if len(plans) == 1:
        return plans[0]
    finite, errors = [], []
    for plan in plans:
        trial = copy.deepcopy(model)
        apply(trial, layout, plan)
        after = first_non_finite(find_anatomy(trial), batches, wish.loss_scale)
        finite.append(after["forward"] is None and (after["backward"] is None or not backward))
        error = _difference(_fp16_logits(trial, batches[0][:COMPARED]), reference)
        errors.append(math.inf if error is None else error)
        del trial
    if finite[0] != finite[1]:
        return plans[finite.index(True)]
    return plans[0] if errors[0] <= 2 * errors[1] else plans[1]


def _plans(layout: Layout, peaks: list[Peak], wish: Wish, before: dict[str, Any]) -> tuple[list[Plan], str | None]:
    """The exponents; where the backward pass alone stands in the way of curing the forward pass, it is given up."""

    def chosen(which: list[Peak]) -> list[Plan]:
        return choose(layout, which, wish.margin, wish.loss_scale, wish.keep_eps, wish.scale_sums)

    try:
        return chosen(peaks), None
    except NoExactRewrite as why:
        if before["forward"] is None or not wish.backward:
            raise NoExactRewrite(f"{why}{_first(before)}") from why
        try:
            return chosen([replace(p, gradient=0.0) for p in peaks]), str(why)
        except NoExactRewrite as forward:
            raise NoExactRewrite(f"{forward}{_first(before)}") from forward


def _first(before: dict[str, Any]) -> str:
    """What was not finite in the FP16 pass, as the end of a sentence."""
    found = before["forward"] or before["backward"]
    return "" if found is None else f" (in FP16 the first that is not finite is {found['where']})"


def _nothing_to_move(before: dict[str, Any], wish: Wish) -> None:
    """Where the FP16 pass is finite all is well; else what overflows is not among the tensors that can be scaled."""
    found = before["forward"] or (before["backward"] if wish.backward else None)
    if found is not None:
        where = f"in FP16 {found['where']} is not finite"
        raise NoExactRewrite(f"{where}, and no factor can be moved there{_finite_up_to(before)}")


def _finite_up_to(found: dict[str, Any]) -> str:
    scale = found["largest_finite_loss_scale"]
    return f" (gradients are finite up to a loss scale of {scale:g})" if scale else ""


def _check_after(after: dict[str, Any], backward: bool) -> None:
    found = after["forward"] or (after["backward"] if backward else None)
    if after["weights"]:
        raise NoExactRewrite(f"FP16 cannot hold the weight {after['weights'][0]}, before or after the rewrite")
    if found is not None:
        at = "" if after["forward"] else f" at loss scale {after['loss_scale']:g}{_finite_up_to(after)}"
        raise NoExactRewrite(f"after the rewrite {found['where']} is still not finite in FP16{at}")


def _peak_row(peak: Peak, exponents: dict[str, int], loss_scale: float) -> dict[str, Any]:
    exponent = exponents[peak.group] - (exponents[peak.reads] if peak.reads else 0)

    def bits(value: float) -> float | None:
        return FP16.headroom(value) if value > 0 else None

    forward, gradient = peak.forward * 2.0**exponent, loss_scale * peak.gradient * 2.0**-exponent
    finite = math.isfinite(gradient)
    return {
        "tensor": peak.words,
        "group": peak.group,
        "exponent": exponent,
        "forward": peak.forward,
        "gradient": peak.gradient if finite else None,
        "headroom_bits": bits(forward),
        "gradient_headroom_bits": bits(gradient) if finite else None,
    }


def _remains(layout: Layout, plan: Plan, exact: bool, differences: dict[str, Any]) -> list[str]:
    """What differs after the rewrite, or was done to keep it from differing, in words."""
    felt, largest = differences["fp16_pass"], differences["largest_logit"]
    moved_gains = any(n.facts.offset and plan.exponents[n.gives] for n in layout.norms)
    tied = layout.tied is not None and plan.exponents[layout.tied[0]] != 0
    facts = (
        (not exact, "one epsilon stands for all norms and was left: norms of small vectors differ"),
        (
            exact and plan.uniform,
            "one epsilon stands for all norms: all norms read tensors of one scale, and it has its square",
        ),
        (
            moved_gains,
            "gains are stored as gain - 1, and that is rounded: written in FP32 where the dtype cannot hold it",
        ),
        (tied, "the head is the embedding table: the final norm's gain has the inverse"),
        (
            felt is None or felt > FELT * largest,
            "finite is not accurate: in FP16 the logits are off by more than "
            f"{FELT:.0%} of the largest, by the rounding of {_rounded(differences)}",
        ),
    )
    return [text for applies, text in facts if applies]


def _rounded(differences: dict[str, Any]) -> str:
    """What FP16's rounding comes from, as far as the differences tell."""
    by_weights, whole = differences["weights_rounded_to_fp16"], differences["fp16_pass"]
    weights = by_weights is None or (whole is not None and by_weights > whole / 2)
    return "weights alone" if weights else "what flows between them"


@torch.no_grad()
def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits (B, S, V) in FP32."""
    return model(input_ids=ids, use_cache=False).logits.float().cpu()


@torch.no_grad()
def rounded_weights_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The logits with the weights rounded to FP16, and everything else in FP32."""
    kept = [(p, p.detach().clone()) for p in model.parameters()]
    for parameter, value in kept:
        parameter.copy_(value.half())
    try:
        return logits_of(model, ids)
    finally:
        for parameter, value in kept:
            parameter.copy_(value)


@torch.no_grad()
def _fp16_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    half, _ = half_copy(model)
    with HalfMatmul() if half.device.type == "cpu" else nullcontext():
        return logits_of(half, ids)


def _difference(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """The largest difference; None where one of them is not finite."""
    value = (a - b).abs().max().item()
    return value if math.isfinite(value) else None


def announced(record: dict[str, Any]) -> float:
    """The largest difference in FP32 that the written model may show: what was measured, or FP32's own rounding."""
    measured = record["differences"]
    return max(1.01 * measured["fp32"], 1e-5 * measured["largest_logit"])


def check_announced(record: dict[str, Any], written: torch.Tensor, reference: torch.Tensor) -> float:
    """The written model's difference from the source.

    Raises:
        UserError: it is larger than announced.
    """
    difference = _difference(written, reference)
    if difference is None or difference > announced(record):
        raise UserError(
            f"the written model was removed: its logits differ from the source's by {difference}, "
            f"more than the announced {announced(record):.3g}"
        )
    return difference
