"""Where a power of two can go in a model without changing its function, as data.

Tensors fall into *groups* that can only be scaled together; a group's exponent e says that its tensors are 2^e times
what they were. Everything between groups is linear or a norm, and absorbs the difference:

    matrix   W <- 2^(gives - reads) W,  b <- 2^gives b
    norm     gamma <- 2^gives gamma,  beta <- 2^gives beta,  eps <- 4^reads eps
    sum      both terms and the sum are of one group

The group `FIXED` has the exponent 0: what a nonlinear function reads (gates, attention logits, the head's logits). Two
groups are *opposite* where only their product is read: queries and keys without their own norms, and what a head
reads with the embedding table that it shares; their exponents sum to 0. The stream is one group from the embedding to
the final norm ("stream scale"), and a module's output before its output norm is another, as is what lies between
its matrices ("branch scale"). A norm C on the stream after an add ends the stream's group there: no one factor goes
along a Post-LN stream, though each sum can have its own. A sublayer that reads the stream without a norm gets the
inverse in its first matrices by the rule above.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from periln.eval.fp16.families import EPSILON_OF
from periln.eval.structure.anatomy import Anatomy
from periln.eval.structure.inside import Unknown, linear_maps
from periln.eval.structure.norms import NormFacts, is_norm
from periln.eval.structure.points import Point
from periln.eval.structure.sublayers import Norm, Sublayer
from periln.runkit.errors import UserError, did_you_mean

FIXED = "fixed"


@dataclass(frozen=True)
class Table:
    """An embedding table, whose rows are of the group `gives`."""

    name: str
    gives: str


@dataclass(frozen=True)
class Matrix:
    """A linear map by its name and its largest |weight|; `rows` where it is only some rows of a fused one."""

    name: str
    reads: str
    gives: str
    largest: float
    rows: torch.Tensor | None = None


@dataclass(frozen=True)
class NormUse:
    name: str
    module: nn.Module
    facts: NormFacts
    reads: str
    gives: str


@dataclass(frozen=True)
class Watch:
    """A point where a tensor of a group is seen, and what it is in words."""

    group: str
    words: str
    point: Point


@dataclass
class Layout:
    epsilon: str
    tables: list[Table] = field(default_factory=list)
    matrices: list[Matrix] = field(default_factory=list)
    norms: list[NormUse] = field(default_factory=list)
    watches: list[Watch] = field(default_factory=list)
    # The head shares the table: the final norm's gain takes the inverse of the table's exponent.
    tied: tuple[str, str] | None = None
    # Pairs of groups whose product alone is read.
    opposites: list[tuple[str, str]] = field(default_factory=list)
    head: str = ""
    # What the final norm gives, "" without one.
    final: str = ""
    # Stream groups that end in a norm on the stream (place C).
    behind_norms: set[str] = field(default_factory=set)

    @property
    def groups(self) -> set[str]:
        uses: list[Matrix | NormUse] = [*self.matrices, *self.norms]
        return {t.gives for t in self.tables} | {g for u in uses for g in (u.reads, u.gives)} | {FIXED}

    def watch(self, group: str, words: str, module: nn.Module, name: str, side: str = "output") -> None:
        self.watches.append(Watch(group, words, Point(name, module, side)))

    def watch_rows(self, group: str, words: str, linear: nn.Linear, name: str, rows: torch.Tensor) -> None:
        """Some rows of a fused matrix: the channels of its output that they give."""
        self.watches.append(Watch(group, words, Channels(name, linear, "output", rows)))

    def matrix(self, name: str, linear: nn.Linear, reads: str, gives: str, rows: torch.Tensor | None = None) -> None:
        weight = linear.weight.detach() if rows is None else linear.weight.detach()[rows]
        self.matrices.append(Matrix(name, reads, gives, weight.abs().max().item(), rows))

    def norm(self, norm: Norm, reads: str, gives: str) -> None:
        self.norms.append(NormUse(norm.name, norm.module, norm.facts, reads, gives))


def find_layout(anatomy: Anatomy) -> Layout:
    """The groups of a model and what is between them.

    Raises:
        UserError: a family whose epsilon or inner matrices are not known here.
    """
    kind = anatomy.model.config.model_type
    if kind not in EPSILON_OF:
        known = list(EPSILON_OF)
        raise UserError(
            f"model_type {kind!r} has no known rewrite{did_you_mean(kind, known)}: known are {', '.join(known)}"
        )
    layout, stream = Layout(EPSILON_OF[kind]), "stream"
    table = stream if anatomy.embedding_norm is None else "embedding"
    layout.tables.append(Table(anatomy.embedding_name, table))
    if anatomy.embedding_norm is None:
        if anatomy.embedding_scale is None:
            raise UserError("something is added to the embedding before the stream (positions): no rewrite is known")
    else:
        layout.watch(table, "the embedding's rows", anatomy.embedding, anatomy.embedding_name)
        layout.norm(anatomy.embedding_norm, table, stream)
    start = anatomy.embedding_stream
    layout.watch(stream, "the embedding as the first layer reads it", start.module, start.name, start.side)
    for sublayer in anatomy.sublayers:
        stream = _sublayer(layout, sublayer, stream)
    _ends(layout, anatomy, stream, table)
    return layout


def _sublayer(layout: Layout, s: Sublayer, stream: str) -> str:
    """Add a sublayer; gives the group of the stream after it."""
    where = f"the {s.kind} of layer {s.layer}"
    reads = stream
    if s.input_norm is not None:
        reads = f"{s.name}.input"
        layout.norm(s.input_norm, stream, reads)
        layout.watch(reads, f"the normed input of {where}", s.input_norm.module, s.input_norm.name)
    gives = stream if s.output_norm is None else f"{s.name}.output"
    try:
        (_attention if s.kind == "attn" else _mlp)(layout, s, where, reads, gives)
    except Unknown as why:
        raise UserError(f"{s.name}: no rewrite is known, {why}") from why
    before = "" if s.output_norm is None else " before its output norm"
    layout.watch(gives, f"the output of {where}{before}", s.branch.module, s.branch.name, s.branch.side)
    if s.output_norm is not None:
        layout.norm(s.output_norm, gives, stream)
        layout.watch(stream, f"the normed output of {where}", s.output_norm.module, s.output_norm.name)
    if s.residual_add is not None:
        add = s.residual_add
        layout.watch(stream, f"the stream at the add after {where}", add.module, add.name, add.side)
    if s.residual_norm is not None:
        layout.behind_norms.add(stream)
        after = f"stream after {s.name}"
        layout.norm(s.residual_norm, stream, after)
        layout.watch(after, f"the stream after the norm behind {where}", s.residual_norm.module, s.residual_norm.name)
        return after
    return stream


def _no_other_norms(s: Sublayer, *known: str) -> None:
    """Norms inside a sublayer would end the groups that go through it: of values, or before the last projection."""
    other = next((n for n, m in s.module.named_children() if n not in known and is_norm(m)), None)
    if other is not None:
        raise Unknown(f"it has a norm inside ({other})")


def _attention(layout: Layout, s: Sublayer, where: str, reads: str, gives: str) -> None:
    _no_other_norms(s, "q_norm", "k_norm")
    linears, name = linear_maps(s.module), s.name
    values = f"{name}.values"
    parts = dict(s.module.named_children())
    queries, keys = f"{name}.queries", f"{name}.keys"
    if set(linears) == {"q_proj", "k_proj", "v_proj", "o_proj"}:
        normed = [_normed(parts.get(f"{x}_norm")) for x in "qk"]
        for x, group in (("q", queries), ("k", keys)):
            norm, called = parts.get(f"{x}_norm"), group.rpartition(".")[2]
            if norm is not None and _normed(norm):
                layout.norm(Norm(f"{name}.{x}_norm", norm), group, FIXED)
                layout.watch(FIXED, f"the normed {called} of {where}", norm, f"{name}.{x}_norm")
            elif any(normed):
                group = FIXED  # its product is with what a norm fixes
            layout.matrix(f"{name}.{x}_proj", linears[f"{x}_proj"], reads, group)
            layout.watch(group, f"the {called} of {where}", linears[f"{x}_proj"], f"{name}.{x}_proj")
        if not any(normed):
            layout.opposites.append((queries, keys))
        layout.matrix(f"{name}.v_proj", linears["v_proj"], reads, values)
        layout.watch(values, f"the values of {where}", linears["v_proj"], f"{name}.v_proj")
        last = "o_proj"
    elif set(linears) == {"query_key_value", "dense"}:
        size, last = s.module.head_size, "dense"
        fused = linears["query_key_value"]
        part = torch.arange(fused.out_features) // size % 3  # each head's rows are its query, key and value
        for i, (group, called) in enumerate(((queries, "queries"), (keys, "keys"), (values, "values"))):
            rows = (part == i).nonzero().flatten()
            layout.matrix(f"{name}.query_key_value", fused, reads, group, rows)
            layout.watch_rows(group, f"the {called} of {where}", fused, f"{name}.query_key_value", rows)
        layout.opposites.append((queries, keys))
    else:
        raise Unknown(f"the matrices of {type(s.module).__name__} are not known: {', '.join(sorted(linears))}")
    layout.matrix(f"{name}.{last}", linears[last], values, gives)
    layout.watch(values, f"what attention gives to {last} in {where}", linears[last], f"{name}.{last}", "input")


def _mlp(layout: Layout, s: Sublayer, where: str, reads: str, gives: str) -> None:
    _no_other_norms(s)
    linears, name = linear_maps(s.module), s.name
    hidden, down = f"{name}.hidden", "down_proj"
    if set(linears) == {"gate_proj", "up_proj", "down_proj"}:
        layout.matrix(f"{name}.gate_proj", linears["gate_proj"], reads, FIXED)
        layout.matrix(f"{name}.up_proj", linears["up_proj"], reads, hidden)
        layout.watch(FIXED, f"the gate of {where}", linears["gate_proj"], f"{name}.gate_proj")
        layout.watch(hidden, f"the up-projection of {where}", linears["up_proj"], f"{name}.up_proj")
    elif set(linears) == {"gate_up_proj", "down_proj"}:
        fused = linears["gate_up_proj"]
        half = torch.arange(fused.out_features // 2)
        layout.matrix(f"{name}.gate_up_proj", fused, reads, FIXED, half)
        layout.matrix(f"{name}.gate_up_proj", fused, reads, hidden, half + len(half))
        layout.watch_rows(FIXED, f"the gate of {where}", fused, f"{name}.gate_up_proj", half)
        layout.watch_rows(hidden, f"the up-projection of {where}", fused, f"{name}.gate_up_proj", half + len(half))
    elif set(linears) in ({"dense_h_to_4h", "dense_4h_to_h"}, {"fc1", "fc2"}):
        first, down = ("fc1", "fc2") if "fc1" in linears else ("dense_h_to_4h", "dense_4h_to_h")
        hidden = FIXED
        layout.matrix(f"{name}.{first}", linears[first], reads, FIXED)
        layout.watch(FIXED, f"the hidden units of {where} before the activation", linears[first], f"{name}.{first}")
    else:
        raise Unknown(f"the matrices of {type(s.module).__name__} are not known: {', '.join(sorted(linears))}")
    layout.matrix(f"{name}.{down}", linears[down], hidden, gives)
    layout.watch(hidden, f"the hidden units of {where}", linears[down], f"{name}.{down}", "input")


@dataclass(frozen=True)
class Channels(Point):
    """Some channels of a tensor."""

    channels: torch.Tensor | None = None

    def watch(self, see):
        return super().watch(lambda x: see(x[..., self.channels.to(x.device)]))


def _normed(norm: nn.Module | None) -> bool:
    return norm is not None and not isinstance(norm, nn.Identity)  # a norm may have no parameters


def _ends(layout: Layout, anatomy: Anatomy, stream: str, table: str) -> None:
    reads = stream
    if anatomy.final_norm is not None:
        reads = layout.final = "final"
        layout.norm(anatomy.final_norm, stream, reads)
        layout.watch(reads, "the final norm's output", anatomy.final_norm.module, anatomy.final_norm.name)
    layout.head = anatomy.head_name
    layout.watch(FIXED, "the head's logits", anatomy.lm_head, anatomy.head_name)
    if anatomy.tied:
        layout.tied = (reads, table)
    else:
        layout.matrix(anatomy.head_name, anatomy.lm_head, reads, FIXED)


def names_of(layout: Layout) -> Iterator[str]:
    """The modules with parameters that the layout accounts for."""
    parts: list[Table | Matrix | NormUse] = [*layout.tables, *layout.matrices, *layout.norms]
    yield from (part.name for part in parts)
    yield layout.head
