"""An FP16 certificate from weights alone: the largest value that any input can produce in a tensor.

What makes it possible: whatever goes in, a norm's output is bounded by its gain (`reach.py`). So with norms in place B
(Peri-LN, OLMo 2) every residual add is bounded,

    |x_c|  <=  |embedding_c|  +  sum over sublayers of s sqrt(D) |gamma_c|,

however large the modules' own outputs are; with norms in place A (Pre-LN, Peri-LN) every module's output is, attention
being a convex combination of values,

    |a_j|  <=  sum over heads of sqrt(D) |(W_o W_v)_j * gamma|  +  |W_o (W_v beta + b_v) + b_o|_j,

and an MLP's is by its rows (|act(g) u| <= |g u|). With a norm in place C (Post-LN) the stream is bounded anew after
each add. A sublayer that reads the stream without a norm (OLMo 2, Post-LN) is bounded by the stream's own bound, which
is finite but loose.

The bounds are of exact arithmetic and hold for token ids (not for embeddings given instead). A pass in FP16
rounds: each row's `fp16_factor`, (1 + 2^-11)^n for the n roundings since the last norm, is the room that needs (a sum
in FP32 counts as a part of one, see `reach.py`); norms' statistics must be in FP32, sums of products accumulated in
FP32, and the weights be those that the pass uses. What is left out is underflow.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from periln.eval.bounds.reach import SUMMED, Reach, linear_rows, norm_reach, product_rows, rows_reach, spectral_norm
from periln.eval.structure.anatomy import Anatomy, find_anatomy
from periln.eval.structure.inside import Attention, Gated, Inside, Unknown, look_inside
from periln.eval.structure.sublayers import Sublayer
from periln.runkit.number_format import FP16

Key = tuple[int, str, str]


class _Rows:
    """The certificate's rows as they are found."""

    def __init__(self, measured: Mapping[Key, float]):
        self.measured = measured
        self.rows: list[dict[str, Any]] = []

    def add(self, key: Key, reach: Reach | torch.Tensor | None, why: str, roundings: float = 0) -> None:
        row = dict(zip(("layer", "sublayer", "tensor"), key, strict=True))
        if reach is None:
            row |= {"bound": None, "channel": None, "length": None, "fp16_factor": None}
        else:
            if isinstance(reach, Reach):
                (value, channel), length, roundings = reach.largest, reach.length, reach.roundings
            else:
                (value, channel), length = (reach.max().item(), int(reach.argmax())), None
            row |= {
                "bound": value,
                "channel": channel,
                "length": length,
                "fp16_factor": (1 + FP16.unit_roundoff) ** roundings,
            }
        self.rows.append(row | {"why": why, "measured": self.measured.get(key)})


@torch.no_grad()
def certify(
    model: nn.Module,
    measured: Mapping[Key, float] | None = None,
    anatomy: Anatomy | None = None,
    tell: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The certificate of a causal LM whose stream `find_anatomy` can follow.

    Args:
        model: in FP32 (or the FP16 weights widened to it); it is run twice on a few tokens to learn its structure.
        measured: the largest |value| seen, by (layer, sublayer, tensor), for the column next to the bound.
        anatomy: the model's, if already known.
        tell: called after the embedding, each sublayer, and the head.

    Returns:
        `limit`; `rows` (layer, sublayer, tensor, bound or None, channel, length (the largest Euclidean one of a token's
        vector, None for what is bounded row by row), fp16_factor, why, measured); `largest_bound`
        over the rows that have one; `unbounded`: what has none, and why; `above_limit`: the rows whose bound times
        factor exceeds the limit; `certified`: no row is unbounded or above the limit.

    Raises:
        UserError: the model's stream cannot be followed.
    """
    anatomy = find_anatomy(model) if anatomy is None else anatomy
    inside = look_inside(model, anatomy.sublayers, anatomy.hidden_size)
    rows = _Rows(measured or {})
    stream = _embedding(anatomy, rows)
    tell()
    waiting: Reach | None = None  # the first branch of a parallel layer, until the common add
    for sublayer in anatomy.sublayers:
        branch = _branch(sublayer, anatomy.hidden_size, inside[sublayer.name], stream, rows)
        branch = None if branch is None else branch.scaled(sublayer.multiplier)
        tell()
        if sublayer.residual_add is None:
            waiting = branch
            continue
        if sublayer.parallel:
            branch = None if waiting is None or branch is None else branch.plus(waiting)
        stream = _add(sublayer, anatomy.hidden_size, stream, branch, rows)
    _ends(anatomy, stream, rows)
    tell()
    return _summary(rows.rows)


def _embedding(anatomy: Anatomy, rows: _Rows) -> Reach | None:
    norm = anatomy.embedding_norm
    if norm is None and anatomy.embedding_scale is None:
        rows.add((0, "embedding", "stream"), None, "something is added to the embedding's rows (positions)")
        return None
    facts = None if norm is None else norm.facts
    reach = rows_reach(anatomy.embedding.weight, facts, anatomy.embedding_scale)
    why = "the largest entry of the embedding's rows" + (", behind their norm" if norm else "") + " (attained)"
    rows.add((0, "embedding", "stream"), reach, why)
    return reach


def _branch(s: Sublayer, size: int, inside: Inside | Unknown, stream: Reach | None, rows: _Rows) -> Reach | None:
    """What the sublayer adds to the stream, before the factor s."""
    given = stream if s.input_norm is None else norm_reach(s.input_norm.facts, size, stream)
    reads = "a norm's output" if s.input_norm is not None else "the stream itself, without a norm"
    if s.input_norm is not None:
        rows.add((s.layer, s.kind, "normed_input"), given, "sqrt(D) |gamma| of the norm before the module")
    given = None if given is None else given.scaled(s.input_scale)
    reach = None
    if given is None:
        why = "it reads the stream without a norm, and the stream has no bound"
        rows.add((s.layer, s.kind, "branch"), None, why)
    elif isinstance(inside, Unknown):
        rows.add((s.layer, s.kind, "branch"), None, str(inside))
    else:
        matrices = inside()
        if isinstance(matrices, Attention):
            reach = _attention(s, matrices, given, reads, rows)
        else:
            reach = _mlp(s, matrices, given, reads, rows)
    if s.output_norm is None:
        return reach
    reach = norm_reach(s.output_norm.facts, size, reach)
    rows.add((s.layer, s.kind, "branch_output"), reach, "sqrt(D) |gamma| of the output norm, whatever the module gives")
    return reach


def _attention(s: Sublayer, m: Attention, given: Reach, reads: str, rows: _Rows) -> Reach:
    """Values, and W_o applied to a convex combination of them in every head."""
    heads, size = len(m.of_head), m.values.shape[1]
    flat, bias = m.values.flatten(0, 1), None if m.value_bias is None else m.value_bias.flatten()
    roundings = given.roundings_of(m.values.shape[-1])
    why = f"rows of W_v on {reads}; attention's convex combination of values stays below"
    rows.add((s.layer, s.kind, "values"), linear_rows(given, flat, bias), why, roundings)
    box = torch.zeros(len(m.output), dtype=torch.float64)
    length = 0.0
    for h, output in enumerate(m.output.split(size, dim=1)):
        value = m.values[m.of_head[h]] * given.gain  # (E, D), on the ball of `given`
        gram = value @ value.T
        box += given.radius * ((output @ gram) * output).sum(1).clamp(min=0).sqrt()
        length += given.radius * (
            spectral_norm(output @ torch.linalg.cholesky_ex(gram)[0])
            if _definite(gram)
            else spectral_norm(output) * spectral_norm(value)
        )
    shift = m.gives_on_one_token(given.centre) @ m.output.T
    shift = shift if m.output_bias is None else shift + m.output_bias
    # Rounded: probabilities, what the heads give (a sum over positions), W_o's product; and what cancels in the centre.
    cancelled = roundings * FP16.unit_roundoff * m.gives_on_one_token_at_most(given.centre) @ m.output.abs().T
    box, length = box + shift.abs() + cancelled, length + shift.norm().item() + cancelled.norm().item()
    reach = Reach.of_box(box, length, roundings + 3 + 1 + m.output.shape[1] / SUMMED)
    rows.add((s.layer, s.kind, "branch"), reach, f"rows of W_o W_v in {heads} heads on {reads}")
    return reach


def _definite(gram: torch.Tensor) -> bool:
    return int(torch.linalg.cholesky_ex(gram)[1]) == 0


def _mlp(s: Sublayer, m: Gated, given: Reach, reads: str, rows: _Rows) -> Reach:
    """The hidden units, and W_down applied to them."""
    # An activation in plain operations is rounded three times; both factors of a product read the rounded input.
    once = given.roundings_of(m.gate.shape[1])
    roundings = once + 3 if m.up is None else 2 * once + 4
    gate = linear_rows(given, m.gate, m.gate_bias)
    radius, shift = given.radius, (m.gate @ given.centre).norm().item()
    shift += once * FP16.unit_roundoff * (m.gate.abs() @ given.centre.abs()).norm().item()
    length = (
        radius * spectral_norm(m.gate * given.gain)
        + shift
        + (m.gate_bias.norm().item() if m.gate_bias is not None else 0.0)
    )
    if m.up is None:
        hidden = gate
    else:
        hidden = product_rows(given, m.gate, m.up, m.gate_bias, m.up_bias)
        length *= linear_rows(given, m.up, m.up_bias).max().item()
        rows.add((s.layer, s.kind, "gate"), gate, f"rows of W_gate on {reads}", once)
    rows.add((s.layer, s.kind, "hidden"), hidden, f"products of rows of the MLP's first matrices on {reads}", roundings)
    between = Reach.of_box(hidden, length, roundings)
    box = linear_rows(between, m.down, m.down_bias)
    shift = 0.0 if m.down_bias is None else m.down_bias.norm().item()
    reach = Reach.of_box(box, spectral_norm(m.down) * between.length + shift, between.roundings_of(m.down.shape[1]))
    rows.add(
        (s.layer, s.kind, "branch"), reach, f"rows of W_down on the bounds of the hidden units, which read {reads}"
    )
    return reach


def _add(s: Sublayer, size: int, stream: Reach | None, branch: Reach | None, rows: _Rows) -> Reach | None:
    """The sum, and the stream after the norm that may follow it."""
    total = None if stream is None or branch is None else stream.scaled(s.alpha).plus(branch)
    missing = "the embedding" if stream is None else "the module's output, which no norm follows,"
    why = f"{missing} has no bound" if total is None else "the stream's bound plus the branch's, channel by channel"
    rows.add((s.layer, s.kind, "residual_add"), total, why)
    if s.residual_norm is None:
        rows.add((s.layer, s.kind, "stream"), total, why)
        return total
    reach = norm_reach(s.residual_norm.facts, size, total)
    rows.add((s.layer, s.kind, "stream"), reach, "sqrt(D) |gamma| of the norm after the add")
    return reach


def _ends(anatomy: Anatomy, stream: Reach | None, rows: _Rows) -> None:
    """The final norm's output and the logits."""
    last, head = anatomy.num_layers, anatomy.lm_head
    if anatomy.final_norm is not None:
        stream = norm_reach(anatomy.final_norm.facts, anatomy.hidden_size, stream)
        rows.add((last, "final", "stream"), stream, "sqrt(D) |gamma| of the final norm")
    if stream is None:
        rows.add((last, "final", "logits"), None, "the head reads a stream that has no bound")
    else:
        logits = linear_rows(stream, head.weight, getattr(head, "bias", None))
        why = "rows of the head on what it reads, before any scaling or soft cap of the logits"
        rows.add((last, "final", "logits"), logits, why, stream.roundings_of(head.weight.shape[1]))


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    bounded = [r for r in rows if r["bound"] is not None]
    above = [r for r in bounded if r["bound"] * r["fp16_factor"] > FP16.largest]
    unbounded = [{k: r[k] for k in ("layer", "sublayer", "tensor", "why")} for r in rows if r["bound"] is None]
    return {
        "limit": int(FP16.largest),
        "rows": rows,
        "largest_bound": max((r["bound"] for r in bounded), default=None),
        "unbounded": unbounded,
        "above_limit": [{k: r[k] for k in ("layer", "sublayer", "tensor", "bound")} for r in above],
        "certified": not unbounded and not above,
        "not_bounded_here": "queries, keys and attention logits; gradients; embeddings given instead of token ids",
        "rounding": "bounds are of exact arithmetic; times fp16_factor they hold for a pass in FP16 with norm "
        "statistics and accumulation in FP32",
    }
