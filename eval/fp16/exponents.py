"""Which power of two every group gets: the one nearest to 1 that its peaks allow, forward and backward.

A group scaled by 2^e has forward peaks P 2^e and gradients G 2^-e (at the loss scale S: S G 2^-e), and both must stay
below 65504 / 2^margin. So e is at most log2(limit / P) and at least log2(S G / limit); 0 where that is allowed.
"""

import math
from dataclasses import dataclass, field

from periln.eval.fp16.families import SLOTS
from periln.eval.fp16.layout import FIXED, Layout
from periln.eval.fp16.peaks import Peak
from periln.runkit.errors import UserError
from periln.runkit.number_format import FP16

TYPICAL_WEIGHT = 0.02  # the usual standard deviation of a fresh matrix
FAR = math.floor(FP16.bits_above_smallest(TYPICAL_WEIGHT)) - 4  # such a weight stays well above FP16's smallest normal


class NoExactRewrite(UserError):
    """No power of two that the function allows cures the overflow; the message says which tensor, and why."""


@dataclass
class _Range:
    """The exponents that the peaks of a class of groups allow, and which peak set each end."""

    low: int = -120
    high: int = 120
    low_by: Peak | None = None
    high_by: Peak | None = None

    def narrow(self, low: int, high: int, low_by: Peak | None, high_by: Peak | None) -> None:
        if low > self.low:
            self.low, self.low_by = low, low_by
        if high < self.high:
            self.high, self.high_by = high, high_by


@dataclass
class Plan:
    """An exponent for every group. `uniform`: all norms read tensors of one exponent, so one epsilon is exact."""

    exponents: dict[str, int]
    uniform: bool
    margin: float
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def moved(self) -> dict[str, int]:
        return {g: e for g, e in sorted(self.exponents.items()) if e}


def choose(
    layout: Layout, peaks: list[Peak], margin: float, loss_scale: float, keep_eps: bool, scale_sums: bool
) -> list[Plan]:
    """Exponents for all groups; two plans where measuring must tell which of them is better.

    With one epsilon for all norms (`layout.epsilon` is a field) the first plan gives all that norms read one exponent,
    so that the field times its square is exact; but weights are moved that need not be, and in FP16 tiny weights, or
    gains stored as gain - 1, are rounded. The second (the only one with `keep_eps`) moves each group by itself and
    leaves the epsilon, which then is not exact.

    Raises:
        NoExactRewrite: a tensor that no power of two can move, or two that want opposite ones.
    """

    def plan(uniform: bool) -> Plan:
        return _choose(layout, peaks, margin, loss_scale, uniform, scale_sums)

    if layout.epsilon == SLOTS or keep_eps:
        return [plan(False)]
    try:
        first = plan(True)
    except NoExactRewrite:
        return [plan(False)]
    second = plan(False)
    return [first] if second.exponents == first.exponents else [first, second]


def _classes(layout: Layout, uniform: bool) -> dict[str, tuple[str, int]]:
    """The class of every group, and the sign of its exponent in it."""
    classes = {g: (g, 1) for g in sorted(layout.groups)}
    if uniform:
        readers = {n.reads for n in layout.norms}
        if FIXED in readers:
            raise NoExactRewrite("a norm reads a tensor that cannot be scaled")
        classes |= dict.fromkeys(readers, ("the input of every norm", 1))
    for group, other in [*layout.opposites, *([layout.tied[::-1]] if layout.tied else [])]:
        name, sign = classes[group]
        classes[other] = (name, -sign)
    return classes


def _choose(
    layout: Layout, peaks: list[Peak], margin: float, loss_scale: float, uniform: bool, scale_sums: bool
) -> Plan:
    classes = _classes(layout, uniform)
    tight, loose = _ranges(classes, peaks, margin, loss_scale), _ranges(classes, peaks, 0.0, loss_scale)
    if layout.tied is not None and layout.tied[0] == layout.tied[1]:  # without a norm before a tied head
        for ranges in (tight, loose):
            ranges[classes[layout.tied[1]][0]].narrow(0, 0, None, None)
    chosen: dict[str, int] = {}
    for name, wide in loose.items():
        if name == FIXED:
            _refuse_fixed(wide, loss_scale)
            chosen[name] = 0
            continue
        if wide.low > wide.high:
            raise NoExactRewrite(_contradiction(wide, loss_scale))
        r = tight[name]
        low, high = (r.low, r.high) if r.low <= r.high else (wide.low, wide.high)
        chosen[name] = min(max(0, low), high)
    exponents = {group: sign * chosen.get(name, 0) for group, (name, sign) in classes.items()}
    _balance(layout, exponents, tight)
    _for_weights(exponents, classes, tight, [p for p in peaks if p.reads], margin, loss_scale)
    reasons = {name: _words(tight[name], e, loss_scale) for name, e in chosen.items() if e}
    stuck = [g for g in sorted(layout.behind_norms) if exponents[g]]
    if stuck and not scale_sums:
        why = reasons.get(classes[stuck[0]][0], "")
        raise NoExactRewrite(
            f"{why}; but a norm is on the stream after each add (Post-LN, pre_post), so there is no one factor for "
            "the stream: rewrite (1) does not exist (--scale-sums gives each sum its own power of two instead)"
        )
    return Plan(exponents, uniform, margin, reasons)


def _balance(layout: Layout, exponents: dict[str, int], ranges: dict[str, _Range]) -> None:
    """Between two matrices, share the factor where one would be scaled far, or grow out of what FP16 can hold.

    FP16 has few bits for tiny weights, and none for large ones.
    """
    for group in exponents:
        first = [m for m in layout.matrices if m.gives == group]
        second = [m for m in layout.matrices if m.reads == group]
        if (
            group == FIXED
            or len(first) != 1
            or len(second) != 1
            or any(group in (n.reads, n.gives) for n in layout.norms)
        ):
            continue
        before, after = exponents[first[0].reads], exponents[second[0].gives]
        low = max(ranges[group].low, math.ceil(after - _room(second[0].largest)))
        high = min(ranges[group].high, math.floor(before + _room(first[0].largest)))
        wanted = exponents[group]
        if max(abs(wanted - before), abs(after - wanted)) > FAR:
            wanted = (before + after) // 2
        if low <= high:
            exponents[group] = min(max(wanted, low), high)


def _for_weights(
    exponents: dict[str, int],
    classes: dict[str, tuple[str, int]],
    ranges: dict[str, _Range],
    weights: list[Peak],
    margin: float,
    loss_scale: float,
) -> None:
    """Move groups further where the gradient of a matrix between two of them is too large: what it gives up, else what
    it reads down. Each move stays in its range; what cannot be solved so is left for the pass in FP16 to find."""

    def move(group: str, wanted: int) -> int:
        name, sign = classes[group]
        if name == FIXED:
            return 0
        at, r = sign * exponents[group], ranges[name]
        to = min(max(at + sign * wanted, min(r.low, at)), max(r.high, at))
        for other, (same, its) in classes.items():
            if same == name:
                exponents[other] = its * to
        return sign * (to - at)

    limit = math.log2(FP16.largest) - margin
    for _ in range(len(classes)):  # a move can undo another; groups are few
        moved = False
        for peak in weights:
            if not 0 < peak.gradient < math.inf:
                continue
            more = math.ceil(math.log2(loss_scale * peak.gradient) - limit) - exponents[peak.group]
            more += exponents[peak.reads]
            if more > 0:
                more -= (first := move(peak.group, more))
                moved |= bool(first) | bool(more and move(peak.reads, -more))
        if not moved:
            return


def _room(largest: float) -> float:
    """Powers of two between a matrix's largest weight and FP16's largest number."""
    return FP16.headroom(largest) if largest > 0 else 120.0


def _ranges(
    classes: dict[str, tuple[str, int]], peaks: list[Peak], margin: float, loss_scale: float
) -> dict[str, _Range]:
    limit = math.log2(FP16.largest) - margin
    ranges = {name: _Range() for name, _ in classes.values()}
    for peak in peaks:
        if peak.reads:
            continue
        name, sign = classes[peak.group]
        high = math.floor(limit - math.log2(peak.forward)) if peak.forward > 0 else 120
        low = math.ceil(math.log2(loss_scale * peak.gradient) - limit) if 0 < peak.gradient < math.inf else -120
        low = 120 if peak.gradient == math.inf else low
        if sign > 0:
            ranges[name].narrow(low, high, peak, peak)
        else:
            ranges[name].narrow(-high, -low, peak, peak)
    return ranges


def _refuse_fixed(r: _Range, loss_scale: float) -> None:
    if r.high < 0:
        raise NoExactRewrite(
            f"the largest |x| in {r.high_by.words} is {r.high_by.forward:.4g}, and what follows is not linear: no "
            "factor can be moved"
        )
    if r.low > 0:
        raise NoExactRewrite(
            f"the gradient of {r.low_by.words} is {r.low_by.gradient * loss_scale:.4g} at loss scale {loss_scale:g}, "
            f"and no factor can be moved there: use a loss scale of at most {2.0 ** math.floor(-r.low) * loss_scale:g}"
        )


def _contradiction(r: _Range, loss_scale: float) -> str:
    high = "it must not be scaled" if r.high_by is None else f"{r.high_by.words} ({_peak(r.high_by)})"
    low = (
        "it must not be scaled" if r.low_by is None else f"the other end is set by {r.low_by.words} ({_peak(r.low_by)})"
    )
    return f"no power of two fits: {high}, and {low}, at loss scale {loss_scale:g}"


def _peak(peak: Peak) -> str:
    return f"{peak.forward:.4g} forward, {peak.gradient:.4g} in its gradient"


def _words(r: _Range, exponent: int, loss_scale: float) -> str:
    by = r.high_by if exponent < 0 else r.low_by
    if by is None:
        return ""
    if exponent < 0:
        return f"the largest |x| in {by.words} is {by.forward:.4g}"
    return f"the largest |gradient| in {by.words} is {by.gradient * loss_scale:.4g}"
