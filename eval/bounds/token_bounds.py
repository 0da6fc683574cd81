"""Proposition 3.1 on a real model, token by token: what bounds the gradient of each module's last matrix.

Token t adds the outer product of dL/da_t and h_t to dL/dW2 (a = W2 h + b, the module's output), whose Frobenius norm is
|dL/da_t| |h_t|. Between a and the sum x + s B(a) is the output norm B, if there is one, and after the sum the norm
C; a norm's Jacobian at n has a norm of at most max|gamma| / sqrt(mean n^2 + eps) <= max|gamma| sqrt(D) / |n| (for
LayerNorm n is the centred vector). With |dL/dx| measured, x the stream after the add and its norm C:

    no norm    |dL/dW2|_F,t  =   s |dL/dx_t| |h_t|                                            (pre; D.1: grows with |h|)
    B          |dL/dW2|_F,t  <=  s |dL/dx_t| max|gamma_B| sqrt(D) |h_t| / |a_t|               (peri, output; D.2)
    C          |dL/dW2|_F,t  <=  s |dL/dx_t| max|gamma_C| sqrt(D) |h_t| / |alpha x_t + s a_t| (post, pre_post; D.3)

with both factors where both norms exist. The loss is the sum over tokens, so that |dL/dx| of a token does not shrink
with the length of a text. The paper's form has 2 in place of |dL/dx|, and another 2 for the Jacobian: it is given
too, but nothing makes it hold on a real model (`broken_assumptions`).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd
import torch
from torch import nn

from periln.eval.structure.anatomy import Anatomy
from periln.eval.structure.norms import NormFacts
from periln.eval.structure.sublayers import Sublayer
from periln.eval.texts.windows import token_loss
from periln.runkit.errors import UserError

SLACK = 1e-4  # relative rounding of a chain of FP32 products
COLUMNS = ["layer", "sublayer", "sample", "position", "h", "a", "sum", "gradient_stream", "measured", "bound"]
COLUMNS += ["paper_bound", "gradient_error"]


def _lengths(x: torch.Tensor, facts: NormFacts | None = None) -> torch.Tensor:
    """|x| (B, S) in float64; of the centred vector where a LayerNorm reads it."""
    x = x.detach().double()
    if facts is not None and facts.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x.norm(dim=-1).cpu()


def _jacobian(facts: NormFacts, lengths: torch.Tensor, size: int) -> torch.Tensor:
    """The bound max|gamma| sqrt(D) / |n| of a norm's Jacobian, for |n| (B, S)."""
    gain = 1.0 if facts.gain is None else facts.gain.abs().max().item()
    return gain * math.sqrt(size) / lengths.clamp(min=1e-300)


class _Watch:
    """The tensors of one sublayer in one pass, and the gradients that reach two of them."""

    def __init__(self, s: Sublayer):
        self.s = s
        self.seen: dict[str, torch.Tensor] = {}
        self.handles: list[Any] = []
        # Before any hook exists: finding out what a norm computes runs it.
        self.output, self.residual = (None if n is None else n.facts for n in (s.output_norm, s.residual_norm))
        matrix = s.output_projection.module
        self.handles.append(matrix.register_forward_pre_hook(lambda m, args: self._keep("h", args[0], False)))
        self.handles.append(matrix.register_forward_hook(lambda m, args, out: self._keep("a", out, True)))
        if s.residual_add is not None and s.stream is not None:
            self.handles.append(s.residual_add.watch(lambda x: self._keep("sum", x, False)))
            self.handles.append(s.stream.watch(lambda x: self._keep("stream", x, True)))

    def _keep(self, name: str, x: torch.Tensor, gradient: bool) -> None:
        self.seen[name] = x.detach()
        if gradient:
            x.register_hook(lambda g: self.seen.__setitem__(f"gradient_{name}", g.detach()))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def token_bounds(
    anatomy: Anatomy, batches: Iterable[torch.Tensor], tick: Callable[[int], None] = lambda n: None
) -> pd.DataFrame:
    """A row for every sublayer with an output matrix and every token of `batches` (ids (B, S)).

    Columns: layer, sublayer, sample, position; |h|, |a|, |alpha x + s a| (`sum`), |dL/dx| (`gradient_stream`); the
    token's share of |dL/dW2|_F (`measured`), its `bound`, the paper's form (`paper_bound`, NaN without a norm), and
    `gradient_error`: the difference of the summed outer products from autograd's dL/dW2 of the batch, relative.

    Raises:
        UserError: no sublayer has an output matrix and its own add.
    """
    model, frames, start = anatomy.model, [], 0
    watched = [s for s in anatomy.sublayers if s.output_projection is not None and s.residual_add is not None]
    if not watched:
        raise UserError(f"{type(model).__name__} has no sublayer with an output matrix and its own add")
    was = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(True)
    watches: list[_Watch] = []
    try:
        watches += [_Watch(s) for s in watched]
        for ids in batches:
            model.zero_grad(set_to_none=True)
            token_loss(model(input_ids=ids, use_cache=False).logits, ids).backward()
            frames += [_rows(w, anatomy.hidden_size, start) for w in watches]
            start += len(ids)
            tick(len(ids))
    finally:
        model.zero_grad(set_to_none=True)
        for watch in watches:
            watch.remove()
        for parameter, needed in was.items():
            parameter.requires_grad_(needed)
    return pd.concat(frames, ignore_index=True)[COLUMNS]


def _rows(watch: _Watch, size: int, start: int) -> pd.DataFrame:
    s, seen = watch.s, watch.seen
    h, a, total = _lengths(seen["h"]), _lengths(seen["a"]), _lengths(seen["sum"])
    gradient = _lengths(seen["gradient_stream"])
    measured = _lengths(seen["gradient_a"]) * h
    bound, paper = abs(s.multiplier) * gradient * h, torch.full_like(h, math.nan)
    for facts, name in ((watch.output, "a"), (watch.residual, "sum")):
        if facts is not None:
            factor = _jacobian(facts, _lengths(seen[name], facts), size)
            bound = bound * factor
            paper = 4 * factor * h
    batch, length = h.shape
    sample = torch.arange(start, start + batch)[:, None].expand(batch, length)
    position = torch.arange(length).expand(batch, length)
    columns = {
        "sample": sample, "position": position, "h": h, "a": a, "sum": total, "gradient_stream": gradient,
        "measured": measured, "bound": bound, "paper_bound": paper,
    }  # fmt: skip
    head = {"layer": s.layer, "sublayer": s.kind, "gradient_error": _error(s.output_projection.module, seen)}
    return pd.DataFrame({k: v.flatten().numpy() for k, v in columns.items()}).assign(**head)


def _error(matrix: nn.Module, seen: dict[str, torch.Tensor]) -> float:
    """How far the sum of the tokens' outer products is from autograd's gradient of the matrix, relative."""
    summed = seen["gradient_a"].double().flatten(0, 1).T @ seen["h"].double().flatten(0, 1)
    grad = matrix.weight.grad.double()
    grad = grad.T if type(matrix).__name__ == "Conv1D" else grad  # GPT-2's matrices are (in, out)
    return ((summed - grad).norm() / grad.norm().clamp(min=1e-300)).item()


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for every sublayer: norms, the bound against what was measured, and how often the paper's form held.

    `held` is the share of tokens that the bound is not below (to `SLACK`), `tightness` the median of measured / bound.
    """
    found = []
    for (layer, kind), r in rows.groupby(["layer", "sublayer"], sort=False):
        real = r[r.bound > 0]
        ratio = real.measured / real.bound
        paper = real.paper_bound.dropna()
        found.append(
            {
                "layer": int(layer),
                "sublayer": kind,
                "tokens": len(r),
                "mean_h": r.h.mean(),
                "mean_a": r.a.mean(),
                "mean_sum": r["sum"].mean(),
                "largest_measured": r.measured.max(),
                "largest_bound": r.bound.max(),
                "tightness": ratio.median() if len(ratio) else None,
                "held": float((ratio <= 1 + SLACK).mean()) if len(ratio) else None,
                "paper_held": float((real.measured[paper.index] <= paper).mean()) if len(paper) else None,
                "gradient_error": r.gradient_error.max(),
            }
        )
    return pd.DataFrame(found)


def broken_assumptions(anatomy: Anatomy) -> list[str]:
    """The assumptions of D.1 to D.3 that this model breaks, each with what it does instead."""
    mlps = [s for s in anatomy.sublayers if s.kind == "mlp"]
    act = next((type(m).__name__ for m in mlps[0].module.modules() if "act" in type(m).__name__.lower()), None)
    relu = any(isinstance(m, nn.ReLU) for m in mlps[0].module.modules())
    gated = sum(isinstance(m, nn.Linear) for m in mlps[0].module.modules()) > 2 or any(
        "gate" in n for n, _ in mlps[0].module.named_children()
    )
    biases = all(getattr(s.output_projection and s.output_projection.module, "bias", None) is not None for s in mlps)
    gains = [n.facts.gain for s in mlps for n in (s.output_norm, s.residual_norm) if n is not None]
    vector = [g for g in gains if g is not None and g.min() != g.max()]
    facts = (
        (True, f"the logits are not the stream: a head ({anatomy.head_name}) is in between, so |dL/dx_L| is not <= 2"),
        (anatomy.final_norm is not None, "a final norm divides the gradient by the size of the stream"),
        (not relu, f"the MLP's activation is {act or 'not a ReLU'}, not a ReLU"),
        (gated, "the MLP is gated: h is a product"),
        (not biases, "the MLP's output matrix has no bias"),
        (bool(vector), "gamma is a vector: the bound has its largest |entry|"),
        (True, "there are many tokens: a token's stream also gets gradients from the losses of later tokens"),
        (len(anatomy.sublayers) > 1, "there are more sublayers: only the last one's stream is the last stream"),
    )
    return [text for applies, text in facts if applies]
