"""What a retrofit changes: the norms that appear and go, what folds exactly, and what is only calibrated.

With the equation of `modeling_periln.placements`, x <- C(alpha x + s B(f(c A(x)))):

| change | how | exact |
|---|---|---|
| the embedding norm goes | every row of the table is normed; a tied head keeps the old table (untied) | yes |
| another c, another s | into A's gain or the first projections, B's gain or the last one | yes |
| a norm appears (A, B, on the embedding) | its gain is calibrated | no |
| A or B goes | a factor a channel in its place, folded into the projections, is calibrated | no |

Other norms and factors (C, the final norm, those inside sublayers, alpha) have to be the source's own: a norm on the
stream rescales everything behind it, and no gain makes up for that.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modeling_periln import PeriLlamaConfig
from modeling_periln.placements import MIXTURES, LayerPlan, StreamPlan, SublayerPlan, get_placement
from modeling_periln.slots import Learned, Norm, evaluate_rule
from periln.runkit.errors import UsageError

SUBLAYERS = ("attn", "mlp")
EMBEDDING = "embed_norm"
APPEARS, GOES, SCALED = "appears", "goes", "changes"
_CHANNELS = ("channel", "centered")  # gains that a calibrated factor a channel can be written into


@dataclass(frozen=True)
class Change:
    """One slot or factor that is another in the target, in the layers (from 0; none for the embedding) where it is."""

    slot: str  # embed_norm, attn_input_norm, ..., or c or s of a sublayer: attn_c, mlp_s
    what: str
    layers: tuple[int, ...]
    exact: bool
    how: str

    def row(self, count: int) -> list[str]:
        """The change as a row of a table; `count` layers are all."""
        where = "" if self.slot == EMBEDDING else "all layers" if len(self.layers) == count else _spans(self.layers)
        return [self.slot, self.what, where, "exact" if self.exact else "calibrated", self.how]


HEAD = ("norm or factor", "it", "where", "part", "how")


@dataclass(frozen=True)
class RetrofitPlan:
    """The changes, and the configurations of the source, of the source after the exact ones, and of the target."""

    source: PeriLlamaConfig
    folded: PeriLlamaConfig
    target: PeriLlamaConfig
    changes: tuple[Change, ...]
    unties: bool

    @property
    def is_exact(self) -> bool:
        """Whether the target is the same function as the source."""
        return all(change.exact for change in self.changes)

    @property
    def new_slots(self) -> list[str]:
        """Slots whose gains are new, of all layers."""
        return [change.slot for change in self.changes if change.what == APPEARS]

    def rows(self) -> list[list[str]]:
        return [change.row(self.source.num_hidden_layers) for change in self.changes]

    def said(self) -> list[str]:
        """The plan in sentences."""
        exact = [change for change in self.changes if change.exact]
        other = [change for change in self.changes if not change.exact]
        lines = []
        if exact:
            lines.append(f"Exact, and proved on logits: {_listed(exact)}.")
        if other:
            lines.append(f"Another function, calibrated on text: {_listed(other)}.")
        if self.unties:
            lines.append("The head is untied: it keeps the table as it was.")
        return lines


def _listed(changes: list[Change]) -> str:
    return ", ".join(f"{change.slot} {change.what}" for change in changes)


def _spans(numbers: tuple[int, ...]) -> str:
    """Layers counted from 1: `1-3, 7`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number:
            spans[-1][1] += 1
        else:
            spans.append([number + 1, number + 1])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


# --- configurations --------------------------------------------------------------------------------------------


def make_plan(
    source: PeriLlamaConfig, to: str | Mapping[str, Any], name: str = "SRC", keep: Sequence[int] = ()
) -> RetrofitPlan:
    """The plan from a configuration to a placement: a name, or a mapping as `norm_placement` takes it.

    Args:
        keep: layers (from 0) that keep the norms and factors of the source.

    Raises:
        UsageError: no such placement or layer; the source's own; or a change that is neither exact nor a gain's to make
            up for.
    """
    target = _with_placement(source, to, keep)
    before, after = source.stream_plan(), target.stream_plan()
    _refuse_the_rest(source, target, name)
    changes = tuple(_changes(source, before, after))
    if not changes:
        inside = source.layer_placements is not None or source.norm_placement in MIXTURES
        every = "all layers of" if inside else "the norms of"
        raise UsageError(f"--to {spelt(to)}: {every} {name} are already as asked")
    if any(c.slot.endswith("_output_norm") and c.what == APPEARS for c in changes) and not source.output_norm_learnable:
        raise UsageError(f"output_norm_learnable=False of {name} freezes the gains that --to {spelt(to)} calibrates")
    unties = source.tie_word_embeddings and any(c.slot == EMBEDDING and c.what == GOES for c in changes)
    folded = _folded_config(source, before, after)
    for config in (folded, target):
        config.tie_word_embeddings = source.tie_word_embeddings and not unties
        if before.embedding_norm and not after.embedding_norm:
            config.embedding_multiplier = 1.0
    return RetrofitPlan(source, folded, target, changes, unties)


def spelt(to: str | Mapping[str, Any]) -> str:
    """A placement as it was asked for, on one line."""
    return to if isinstance(to, str) else str(dict(to))


def _with_placement(source: PeriLlamaConfig, to: str | Mapping[str, Any], keep: Sequence[int]) -> PeriLlamaConfig:
    config = copy.deepcopy(source)
    try:
        config.norm_placement = dict(to) if isinstance(to, Mapping) else to
        config.layer_placements = config.embedding_norm = config.final_norm = None
        if keep:
            _keep_layers(config, source, to, keep)
        plan = config.stream_plan()
        if not any(sublayer.output_norm for layer in plan.layers for sublayer in layer.sublayers):
            config.output_norm_learnable = True  # there is none to freeze any more
        config.validate_norms()
    except ValueError as error:
        raise UsageError(f"--to: {error}") from error
    return config


def _keep_layers(
    config: PeriLlamaConfig, source: PeriLlamaConfig, to: str | Mapping[str, Any], keep: Sequence[int]
) -> None:
    """Give each layer a placement of its own: `to`, or what the source has there."""
    count, ends = source.num_hidden_layers, get_placement(to)
    if wrong := [i + 1 for i in keep if not 0 <= i < count]:
        raise UsageError(f"--keep {wrong[0]}: the model has layers 1 to {count}")
    for slot in ("embedding_norm", "final_norm"):
        if not isinstance(getattr(ends, slot), bool):
            raise UsageError(f"--to: {slot}={getattr(ends, slot)!r}: with --keep it is true or false")
        setattr(config, slot, getattr(ends, slot))
    row = to if isinstance(to, str) else {k: v for k, v in to.items() if k not in ("embedding_norm", "final_norm")}
    kept = _own_layers(source, source.stream_plan(), source.stream_plan())
    config.layer_placements = [kept[i] if i in keep else row for i in range(count)]


def _own_layers(source: PeriLlamaConfig, norms: StreamPlan, factors: StreamPlan) -> list[dict[str, Any]]:
    """Every layer as a mapping of `layer_placements`: the norms of one plan, the factors of another."""
    count = source.num_hidden_layers
    scales = [evaluate_rule(source.residual_scale, i + 1, count) for i in range(count)]
    rows = zip(norms.layers, factors.layers, scales, strict=True)
    return [_layer_mapping(old, new, scale, source.qk_norm is None) for old, new, scale in rows]


def _folded_config(source: PeriLlamaConfig, before: StreamPlan, after: StreamPlan) -> PeriLlamaConfig:
    """The source after the exact changes alone: its own norms, without a norm that folds, and the target's factors."""
    config = copy.deepcopy(source)
    config.layer_placements = _own_layers(source, before, after)
    config.embedding_norm = before.embedding_norm is not None and after.embedding_norm is not None
    config.final_norm = before.final_norm is not None
    config.validate_norms()
    return config


def _layer_mapping(old: LayerPlan, new: LayerPlan, scale: float, with_qk: bool) -> dict[str, Any]:
    """A layer as a mapping of `layer_placements`: the norms of `old`, the factors of `new`."""
    row: dict[str, Any] = {}
    for name, had, has in zip(SUBLAYERS, old.sublayers, new.sublayers, strict=True):
        norms = {slot: _slot(getattr(had, slot)) for slot in ("input_norm", "output_norm", "residual_norm")}
        s = has.s if isinstance(has.s, Learned) else has.s / scale
        row[name] = norms | {"alpha": _factor(has.alpha, 1.0), "s": _factor(s, scale), "c": has.c}
        row[f"{name}_inner_norm"] = _slot(had.inner_norm)
    for slot, norm in old.projections.items():
        if with_qk or slot == "v_norm":
            row[slot] = {"over": norm.over, **_given(norm)}
    return row


def _factor(factor: float | Learned, scale: float) -> Any:
    if not isinstance(factor, Learned):
        return factor
    return {"learned": factor.learned, "init": float(factor.init) / scale}  # a plan has evaluated the rule


def _given(norm: Norm) -> dict[str, Any]:
    found = {"kind": norm.kind, "gain": norm.gain, "eps": norm.eps}
    return {key: value for key, value in found.items() if value is not None}


def _slot(norm: Norm | None) -> Any:
    return False if norm is None else _given(norm) or True


# --- changes ---------------------------------------------------------------------------------------------------


def _changes(source: PeriLlamaConfig, before: StreamPlan, after: StreamPlan) -> Iterator[Change]:
    if after.embedding_norm and not before.embedding_norm:
        yield Change(EMBEDDING, APPEARS, (), False, "its gain is calibrated")
    if before.embedding_norm and not after.embedding_norm:
        yield Change(EMBEDDING, GOES, (), True, "folds into the rows of the table")
    layers = list(zip(before.layers, after.layers, strict=True))
    for index, name in enumerate(SUBLAYERS):
        pairs = [(old.sublayers[index], new.sublayers[index]) for old, new in layers]
        first, last = ("q, k and v", "o_proj") if name == "attn" else ("gate and up", "down_proj")
        for factor, norm, into in (("c", "input_norm", first), ("s", "output_norm", last)):
            where = tuple(i for i, (a, b) in enumerate(pairs) if getattr(a, factor) != getattr(b, factor))
            if where:
                gain = all(getattr(pairs[i][0], norm) for i in where)
                how = f"folds into the gain of {name}_{norm}" if gain else f"folds into {into}"
                yield Change(f"{name}_{factor}", SCALED, where, True, how)
        for norm, into in (("input_norm", first), ("output_norm", last)):
            new = tuple(i for i, (a, b) in enumerate(pairs) if getattr(b, norm) and not getattr(a, norm))
            gone = tuple(i for i, (a, b) in enumerate(pairs) if getattr(a, norm) and not getattr(b, norm))
            if new:
                yield Change(f"{name}_{norm}", APPEARS, new, False, "its gain is calibrated")
            if gone:
                yield Change(f"{name}_{norm}", GOES, gone, False, f"a factor a channel is folded into {into}")


def _refuse_the_rest(source: PeriLlamaConfig, target: PeriLlamaConfig, name: str) -> None:
    """Raise UsageError for what differs and is not a change of `_changes`; the message names slot and layer."""
    before, after = source.stream_plan(), target.stream_plan()
    to = spelt(target.norm_placement)

    def refuse(slot: str, reason: str, layer: int | None = None) -> None:
        where = "" if layer is None else f" of layer {layer + 1}"
        raise UsageError(f"--to {to}: {slot}{where} {reason}")

    if bool(before.final_norm) != bool(after.final_norm):
        refuse("final_norm", f"is there in one of {name} and the target alone, and no gain makes up for it")
    ends = (("embed_norm", before.embedding_norm, after.embedding_norm),
            ("final_norm", before.final_norm, after.final_norm))  # fmt: skip
    for slot, end, other in ends:
        if reason := _unlike(source, end, other, slot):
            refuse(slot, reason)
    for i, (old, new) in enumerate(zip(before.layers, after.layers, strict=True)):
        for slot in ("q_norm", "k_norm", "v_norm"):
            if getattr(old, slot) != getattr(new, slot):
                refuse(slot, f"is another in {name}: norms on q, k and v are neither added nor removed", i)
        for sublayer, had, has in zip(SUBLAYERS, old.sublayers, new.sublayers, strict=True):
            _refuse_sublayer(source, sublayer, i, had, has, name, lambda slot, why, i=i: refuse(slot, why, i))


def _refuse_sublayer(
    source: PeriLlamaConfig, sublayer: str, layer: int, had: SublayerPlan, has: SublayerPlan, name: str, refuse: Any
) -> None:
    for slot in ("residual_norm", "inner_norm"):
        if bool(getattr(had, slot)) != bool(getattr(has, slot)):
            refuse(f"{sublayer}_{slot}", f"is there in one of {name} and the target alone, and no gain makes up for it")
    for slot in ("input_norm", "output_norm", "residual_norm", "inner_norm"):
        if reason := _unlike(source, getattr(had, slot), getattr(has, slot), f"{sublayer}_{slot}", layer):
            refuse(f"{sublayer}_{slot}", reason)
    if had.alpha != has.alpha:
        refuse(f"{sublayer}: alpha", f"is {_number(had.alpha)} in {name} and {_number(has.alpha)} in the target")
    for factor in ("c", "s"):
        values = getattr(had, factor), getattr(has, factor)
        if values[0] != values[1] and (any(isinstance(v, Learned) for v in values) or 0 in values):
            refuse(f"{sublayer}: {factor}", f"is {_number(values[0])} in {name} and {_number(values[1])} in the target")


def _number(factor: float | Learned) -> str:
    return f"learned ({factor.learned})" if isinstance(factor, Learned) else f"{factor:g}"


def _unlike(
    config: PeriLlamaConfig, old: Norm | None, new: Norm | None, slot: str, layer: int | None = None
) -> str | None:
    """Why a slot cannot be changed from one to the other; None where it can, or stays."""
    kinds = [None if norm is None else _kind(config, norm) for norm in (old, new)]
    if old is not None and new is not None and old.eps != new.eps:
        eps = [config.eps_of(slot, layer) if norm.eps is None else norm.eps for norm in (old, new)]
        kinds = [f"{kind} and epsilon {number:g}" for kind, number in zip(kinds, eps, strict=True)]
    if kinds[0] == kinds[1]:
        return None
    if None not in kinds:
        return f"is {kinds[0]} in the source and {kinds[1]} in the target: a norm that stays is not changed"
    kind, gain = (kinds[0] or kinds[1] or "").split(" with gain ")
    if kind != "rmsnorm" or gain not in _CHANNELS:
        return f"is {kind} with gain {gain}: only an rmsnorm with a gain a channel is added or removed"
    return None


def _kind(config: PeriLlamaConfig, norm: Norm) -> str:
    return f"{norm.kind or config.norm_type} with gain {norm.gain or config.norm_gain}"
