"""What one residual step can do to a token's stream, and what all steps together can, for any input.

A step is x' = alpha x + s b, where b = B(f(c A(x))) is the branch and s, the residual step, its factor. Let beta be the
largest |b| that any input can give. With an output norm B it is max|gamma| sqrt(D) (and the length of a LayerNorm's
bias), whatever f is. With a norm A alone it is what f's matrices make of a norm's output: a product of their operator
norms, which does not depend on x, but which nothing in the placement limits. Without either it grows with |x|.

From |b| <= beta alone, for every x in R^D (lengths are Euclidean; all of it is derived here):

    length      alpha |x| - s beta  <=  |x'|  <=  alpha |x| + s beta                      the triangle inequality
    direction   angle(x, x')  <=  arcsin(s beta / (alpha |x|))   if s beta < alpha |x|, else pi
                x' lies in a ball around alpha x, and that is the half-angle of the cone around the ball
    spread      alpha std(x) - s beta / sqrt(D)  <=  std(x')  <=  alpha std(x) + s beta / sqrt(D)
                a standard deviation is |P x| / sqrt(n) with a projection P that takes the mean away, so the triangle
                inequality holds for it too: over a token's entries, over all entries of many tokens, and data-wise
                (the root of the channels' mean variance over tokens)

Each of them is attained by some x and b. Over steps 1 to n with alpha = 1 and no norm on the stream they add up:

    |x_n|   <=  |x_0| + sum s_k beta_k                        at most linear in depth, if beta is the same in all layers
    std_n   <=  std_0 + sum s_k beta_k / sqrt(D)              so the variance is at most quadratic in depth

The variance grows linearly where branches are uncorrelated with the stream, var(x + s b) = var(x) + s^2 var(b); the
quadratic bound is attained where all branches point the same way. For given weights neither Peri-LN's stream nor
Pre-LN's can grow exponentially in depth: their branches do not know |x|. What can is beta_k from layer to layer: of
Pre-LN through its matrices, of Peri-LN through its gammas alone. It is exponential where a branch follows |x|, |b| <=
K |x|, since then |x_n| <= |x_0| prod (alpha + s_k K_k); a norm C on the stream ends that after every step, |x| <=
max|gamma_C| sqrt(D). A step of s = 1, L^(-1/2) or 1 / L makes of 2 L equal branches 2 L, 2 L^(1/2) or 2 times beta.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from periln.eval.structure.anatomy import Anatomy, Sublayer

SLACK = 1e-5  # relative: the model's own FP32 rounding, and that of the float64 lengths


@dataclass(frozen=True)
class Step:
    """One add x' = alpha x + d over vectors of `size` entries, where |d| <= `reach`; infinite where nothing bounds it.

    `after` bounds the length of what a norm on the stream makes of x', None where there is no such norm.
    """

    layer: int
    sublayer: str
    alpha: float
    reach: float
    size: int
    after: float | None = None

    def lengths(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The least and the largest |x'| for lengths |x|."""
        return (self.alpha * x - self.reach).clamp(min=0), self.alpha * x + self.reach

    def angle(self, x: torch.Tensor) -> torch.Tensor:
        """The largest angle between x and x', in units of pi, for lengths |x|."""
        ratio = self.reach / (self.alpha * x).clamp(min=1e-300)
        return torch.where(ratio < 1, ratio.clamp(max=1).arcsin() / math.pi, 1.0)

    def spread(self, std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The least and the largest standard deviation of x' for those of x."""
        more = self.reach / math.sqrt(self.size)
        return (self.alpha * std - more).clamp(min=0), self.alpha * std + more

    def onward(self, length: torch.Tensor, std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From bounds of the stream before the step those of the stream after it, a norm on the stream included."""
        length, std = self.lengths(length)[1], self.spread(std)[1]
        if self.after is None:
            return length, std
        limit = torch.full_like(length, self.after)
        return limit, limit / math.sqrt(self.size)  # a standard deviation is at most the root mean square


def steps_of(anatomy: Anatomy, certificate: Mapping[str, Any]) -> list[Step]:
    """The adds of a model in their order, each with the largest |s b| that the weights allow (`certify`)."""
    known = {(r["layer"], r["sublayer"], r["tensor"]): r["length"] for r in certificate["rows"]}

    def reach(s: Sublayer) -> float:
        beta = known[s.layer, s.kind, "branch" if s.output_norm is None else "branch_output"]
        return math.inf if beta is None else abs(s.multiplier) * beta

    found, waiting = [], 0.0
    for s in anatomy.sublayers:
        waiting += reach(s)
        if s.residual_add is not None:  # the first branch of a parallel layer waits for the one add
            after = None if s.residual_norm is None else known[s.layer, s.kind, "stream"]
            found.append(Step(s.layer, s.kind, s.alpha, waiting, anatomy.hidden_size, after))
            waiting = 0.0
    return found


def angle_between(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The angles between vectors (..., D) in units of pi, exact for small ones too."""
    u, v = (t / t.norm(dim=-1, keepdim=True).clamp(min=1e-300) for t in (x, y))
    return 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)) / math.pi


def _std(x: torch.Tensor) -> torch.Tensor:
    return x.std(dim=-1, correction=0)


class _Watch:
    """The stream before and after every add, in one pass."""

    def __init__(self, anatomy: Anatomy):
        self.adds = [s for s in anatomy.sublayers if s.residual_add is not None]
        self.seen: dict[tuple[int, str], torch.Tensor] = {}
        points = [(("x", i), s.reads) for i, s in enumerate(self.adds)]
        points += [(("sum", i), s.residual_add) for i, s in enumerate(self.adds) if s.residual_add is not None]
        self.handles = [
            point.watch(lambda x, key=(i, name): self.seen.__setitem__(key, x.detach().double().cpu()))
            for (name, i), point in points
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def token_steps(
    anatomy: Anatomy,
    steps: list[Step],
    batches: Iterable[torch.Tensor],
    tick: Callable[[int], None] = lambda n: None,
) -> pd.DataFrame:
    """A row for every add and every token of `batches` (ids (B, S)): what it did, and what it could have done.

    Columns: layer, sublayer, sample, position; |x|, |x'| (`sum`), |x' - alpha x| (`step`), `angle` in units of pi,
    `std` and `std_sum` over the token's entries; by the step `shortest`, `longest`, `widest`, `least_std`, `most_std`;
    by all steps up to it, from the token's embedding, `longest_so_far` and `most_std_so_far`; and whether all of
    these bounds `held`.
    """
    watch, frames, start = _Watch(anatomy), [], 0
    try:
        for ids in batches:
            anatomy.model(input_ids=ids, use_cache=False)
            frames += _rows(watch, steps, start)
            start += len(ids)
            tick(len(ids))
    finally:
        watch.remove()
    return pd.concat(frames, ignore_index=True)


def _held(c: Mapping[str, torch.Tensor], size: int) -> torch.Tensor:
    """For every token, whether all of its bounds hold, to the rounding of the model's own sum."""
    room = SLACK * (c["x"] + c["step"])
    each = room / math.sqrt(size)
    ok = (c["shortest"] - room <= c["sum"]) & (c["sum"] <= c["longest"] + room) & (c["angle"] <= c["widest"] + SLACK)
    ok &= (c["least_std"] - each <= c["std_sum"]) & (c["std_sum"] <= c["most_std"] + each)
    return ok & (c["sum"] <= c["longest_so_far"] + room) & (c["std_sum"] <= c["most_std_so_far"] + each)


def _rows(watch: _Watch, steps: list[Step], start: int) -> list[pd.DataFrame]:
    first = watch.seen[0, "x"]
    length, std = first.norm(dim=-1), _std(first)  # the bounds so far
    batch, tokens = length.shape
    sample = torch.arange(start, start + batch)[:, None].expand(batch, tokens)
    position = torch.arange(tokens).expand(batch, tokens)
    frames = []
    for i, step in enumerate(steps):
        x, y = watch.seen[i, "x"], watch.seen[i, "sum"]
        size, deviation = x.norm(dim=-1), _std(x)
        shortest, longest = step.lengths(size)
        least, most = step.spread(deviation)
        so_far, spread_so_far = step.lengths(length)[1], step.spread(std)[1]
        columns = {
            "sample": sample, "position": position, "x": size, "sum": y.norm(dim=-1), "angle": angle_between(x, y),
            "step": (y - step.alpha * x).norm(dim=-1), "std": deviation, "std_sum": _std(y),
            "shortest": shortest, "longest": longest, "widest": step.angle(size), "least_std": least, "most_std": most,
            "longest_so_far": so_far, "most_std_so_far": spread_so_far,
        }  # fmt: skip
        columns["held"] = _held(columns, step.size)
        frame = pd.DataFrame({name: value.flatten().numpy() for name, value in columns.items()})
        frames.append(frame.assign(layer=step.layer, sublayer=step.sublayer))
        length, std = step.onward(length, std)
    return frames


def summary(rows: pd.DataFrame, steps: list[Step]) -> pd.DataFrame:
    """A row for every add: the largest step taken and possible, and the extremes of what was measured and allowed."""
    found = []
    for step in steps:
        r = rows[(rows.layer == step.layer) & (rows.sublayer == step.sublayer)]
        found.append(
            {
                "layer": step.layer,
                "sublayer": step.sublayer,
                "alpha": step.alpha,
                "tokens": len(r),
                "largest_step": r.step.max(),
                "step_bound": step.reach,
                "largest_length": r["sum"].max(),
                "length_bound": r.longest.max(),
                "length_bound_so_far": r.longest_so_far.max(),
                "median_angle": r.angle.median(),
                "median_angle_bound": r.widest.median(),
                "largest_std": r.std_sum.max(),
                "std_bound": r.most_std.max(),
                "std_bound_so_far": r.most_std_so_far.max(),
                "held": float(r.held.mean()),
            }
        )
    return pd.DataFrame(found)


def said(steps: list[Step], summed: pd.DataFrame) -> list[str]:
    """What the steps' bounds say about a model, in sentences."""
    free = [s for s in steps if math.isinf(s.reach)]
    if free:
        return [f"{len(free)} of {len(steps)} adds have no bound: see the certificate for the reasons."]
    low, high = min(steps, key=lambda s: s.reach), max(steps, key=lambda s: s.reach)
    least = f"where the bound is least ({low.sublayer} of layer {low.layer}), than {low.reach:.4g}"
    text = [f"No input takes a step longer than {high.reach:.4g} ({high.sublayer} of layer {high.layer}) or, {least}."]
    if any(s.after is not None for s in steps):
        return [*text, "Norms on the stream end its growth after the adds that they follow."]
    total, last = sum(s.reach for s in steps), summed.iloc[-1]
    spread = total / math.sqrt(steps[0].size)
    return [
        *text,
        f"All {len(steps)} steps together add at most {total:.4g} to a token's length and {spread:.4g} to its standard "
        f"deviation; the longest of these tokens ends with {last.largest_length:.4g}.",
    ]
