"""The cure of one model: what overflows before, the rewrite, and what differs after it; nothing is written to disk."""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from periln.eval.fp16.exponents import NoExactRewrite, choose
from periln.eval.fp16.exponents import Plan as Exponents
from periln.eval.fp16.layout import Layout, find_layout
from periln.eval.fp16.peaks import Peak, measure_peaks
from periln.eval.fp16.rewrite import apply
from periln.eval.stability.non_finite import largest_in
from periln.eval.stability.overflow import HalfPasses, first_non_finite, found_words, moved
from periln.eval.stability.plan import PROCESS, Part, Plan
from periln.eval.structure.anatomy import Anatomy, find_anatomy
from periln.runkit.errors import UserError
from periln.runkit.number_format import FP16

FELT = 0.02  # of the largest logit: a difference in FP16 beyond its usual rounding


@dataclass(frozen=True)
class Wish:
    """What the user asked for: bits of headroom, the loss scale of the backward pass, and the choices of the command
    line.

    Of the batches, the first `gradients` are run backward, and `fp16` samples in FP16, those with the largest peaks
    first; None: all.
    """

    margin: float = 2.0
    loss_scale: float = 1.0
    backward: bool = True
    keep_eps: bool = False
    scale_sums: bool = False
    tolerance: float = 1e-2
    gradients: int | None = None
    fp16: int | None = None


def planned(tokens: list[int], gradients: int, half: int, tell: Callable[[Plan], None]) -> Plan:
    """The parts of a cure, in passes of one sample; `tokens` has the samples of each batch."""
    plan = Plan()

    def tick() -> None:
        tell(plan)

    plan.parts = [
        Part("peaks", "", 0.9 * sum(tokens[gradients:]) + 3.5 * sum(tokens[:gradients]), tick),
        Part("FP16 before", "", 3.0 * half, tick),
        Part("rewrite", "", 5.0 * half, tick),
        Part("FP16 after", "", 7.0 * half, tick),
        Part("compare", "", 3.0 * half, tick),
    ]
    return plan


def cure(
    model: PreTrainedModel,
    batches: list[torch.Tensor],
    wish: Wish,
    tell: Callable[[Plan], None] = lambda plan: None,
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
    gradients = 0 if not wish.backward else len(batches) if wish.gradients is None else wish.gradients
    samples = [len(ids) for ids in batches]
    plan_of_work = planned(samples, gradients, min(sum(samples), wish.fp16 or sum(samples)), tell)
    plan_of_work.time(anatomy, batches[0][:1])
    plan_of_work.memory = _memory(anatomy, batches[0].numel(), gradients > 0)
    measuring, trying, rewriting, checking, comparing = plan_of_work.parts
    tell(plan_of_work)
    limit = FP16.largest / 2**wish.margin
    measured = measure_peaks(layout, model, batches, gradients, limit, lambda: measuring.done(1 / len(batches)))
    peaks = measured.peaks
    measuring.finish()
    batches = _hardest(peaks, batches, wish.fp16)
    before = first_non_finite(anatomy, batches, wish.loss_scale, scales=False)
    trying.finish()
    plans, given_up = _plans(layout, peaks, wish, before)
    ids = batches[0]
    reference = logits_of(model, ids)
    backward = wish.backward and given_up is None
    plan, passes = _better(anatomy, layout, plans, batches, reference, wish, backward)
    rewriting.finish()
    record: dict[str, Any] = {
        "model_type": model.config.model_type,
        "wish": asdict(wish),
        "before": before,
        "backward_given_up": given_up,
        "exponents": plan.moved,
        "reasons": plan.reasons,
        "peaks": [_peak_row(p, plan.exponents, wish.loss_scale) for p in peaks],
        "logits_left_out": measured.left_out,
        "needed": bool(plan.moved),
    }
    if not plan.moved:
        _nothing_to_move(before, wish, anatomy, batches)
        return record, ids, reference
    rounded = _difference(rounded_weights_logits(model, ids), reference)
    epsilon = apply(model, layout, plan)
    passes = passes or HalfPasses(anatomy, batches)
    passes.tell = lambda: checking.done(1 / 4)
    after, logits = _run(passes, wish.loss_scale), passes.logits
    _add_scale(passes, after)
    passes.close()
    del passes
    checking.finish()
    _check_after(after, backward)
    largest = largest_in(reference)
    differences = {
        "largest_logit": largest,
        "fp32": _difference(logits_of(model, ids), reference),
        "weights_rounded_to_fp16_before": rounded,
        "weights_rounded_to_fp16": _difference(rounded_weights_logits(model, ids), reference),
        "fp16_pass": _difference(logits, reference),
    }
    comparing.finish()
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
    anatomy: Anatomy,
    layout: Layout,
    plans: list[Exponents],
    batches: list[torch.Tensor],
    reference: torch.Tensor,
    wish: Wish,
    backward: bool,
) -> tuple[Exponents, HalfPasses | None]:
    """The plan that leaves nothing that is not finite; of two such, or none, the one whose FP16 pass is nearest to the
    FP32 logits: the first unless another halves its error. What cannot change that is not run.

    Its passes in FP16 are returned too, where plans were compared: they need not be run again.
    """
    if len(plans) == 1:
        return plans[0], None
    trials = [_Trial(anatomy, layout, plan, batches, reference) for plan in plans]
    first, second = trials
    near, other = (second, first) if first.error > 2 * second.error else (first, second)
    other.passes.close()  # its graph takes memory, and is seldom needed
    if near.finite(wish, backward) or not other.finite(wish, backward):
        other.passes.close()
        return near.plan, near.passes
    near.passes.close()
    return other.plan, other.passes


class _Trial:
    """A plan tried on a copy of the model: its error in FP16, and whether all is finite."""

    def __init__(
        self, anatomy: Anatomy, layout: Layout, plan: Exponents, batches: list[torch.Tensor], reference: torch.Tensor
    ):
        trial = copy.deepcopy(anatomy.model)
        apply(trial, layout, plan)
        self.plan, self.passes = plan, HalfPasses(moved(anatomy, trial), batches, in_place=True)
        self.forward = self.passes.forward()
        error = None if self.forward is not None else _difference(self.passes.logits, reference)
        self.error = math.inf if error is None else error

    def finite(self, wish: Wish, backward: bool) -> bool:
        if self.forward is not None or not backward:
            return self.forward is None
        return self.passes.backward(wish.loss_scale)[0] is None


def _memory(anatomy: Anatomy, tokens: int, gradients: bool) -> int:
    """Bytes at the peak: the process, the weights, and their gradients or a copy in FP32 and two in FP16 of them."""
    weights = sum(p.numel() * 4 for p in anatomy.model.parameters())
    logits = 4 * tokens * anatomy.lm_head.weight.shape[0]
    return PROCESS + max(2 if gradients else 1, 3) * weights + 5 * logits


def _hardest(peaks: list[Peak], batches: list[torch.Tensor], count: int | None) -> list[torch.Tensor]:
    """`count` samples as one batch, those that hold the largest peaks first; None: the batches as they are."""
    if count is None:
        return batches
    held = [(p.batch, p.row) for p in sorted(peaks, key=lambda p: -p.forward) if p.reads is None]
    rows = [(b, r) for b, ids in enumerate(batches) for r in range(len(ids))]
    chosen = list(dict.fromkeys([*held, *rows]))[:count]
    return [torch.stack([batches[b][r] for b, r in chosen])]


def _run(passes: HalfPasses, loss_scale: float) -> dict[str, Any]:
    """What is not finite first in FP16, forward, and backward at one loss scale."""
    forward = passes.forward()
    backward = None if forward is not None else passes.backward(loss_scale)[0]
    return found_words(forward, backward, loss_scale, passes.weights)


def _add_scale(passes: HalfPasses, found: dict[str, Any]) -> None:
    """Add the largest loss scale at which all gradients are finite, and what overflows beyond it."""
    if found["backward_run"]:
        scale, beyond = passes.largest_scale()
        more = None if beyond is None else asdict(beyond)
        found |= {"largest_finite_loss_scale": scale, "backward_beyond": more}


def _plans(layout: Layout, peaks: list[Peak], wish: Wish, before: dict[str, Any]) -> tuple[list[Exponents], str | None]:
    """The exponents; where only the backward pass prevents a cure of the forward pass, it is given up."""

    def chosen(which: list[Peak]) -> list[Exponents]:
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


def _nothing_to_move(before: dict[str, Any], wish: Wish, anatomy: Anatomy, batches: list[torch.Tensor]) -> None:
    """Where the FP16 pass is finite all is well; else what overflows is not among the tensors that can be scaled."""
    found = before["forward"] or (before["backward"] if wish.backward else None)
    if found is not None:
        if before["backward_run"]:
            before |= first_non_finite(anatomy, batches, wish.loss_scale)
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


def _remains(layout: Layout, plan: Exponents, exact: bool, differences: dict[str, Any]) -> list[str]:
    """What differs after the rewrite, or was done to keep it from differing, in words."""
    felt, largest = differences["fp16_pass"], differences["largest_logit"]
    moved_gains = any(n.facts.offset and plan.exponents[n.gives] for n in layout.norms)
    tied = layout.tied is not None and plan.exponents[layout.tied[0]] != 0
    facts = (
        (not exact, "there is one epsilon for all norms, which was left: norms of small vectors differ"),
        (
            exact and plan.uniform,
            "there is one epsilon for all norms: they all read tensors of one scale, and it has its square",
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
    kept = [(p, p.data) for p in model.parameters()]
    try:
        for parameter, value in kept:
            parameter.data = value.half().to(value.dtype)
        return logits_of(model, ids)
    finally:
        for parameter, value in kept:
            parameter.data = value


def _difference(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """The largest difference of logits (B, S, V); None where one of them is not finite."""
    rows = [largest_in(x - y) for x, y in zip(a.flatten(0, -2), b.flatten(0, -2), strict=True)]  # fit into a cache
    return max(rows) if all(map(math.isfinite, rows)) else None


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
