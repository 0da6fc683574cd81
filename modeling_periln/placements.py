"""Where the norms go, as data.

Every sublayer `f` (attention, then MLP) of layer `l` of `L` does

    x  <-  C( alpha * x  +  s * B( f( c * A(x) ) ) )

`A` (on the sublayer's input), `B` (on its output, before the add) and `C` (on the stream, after the
add) are each a norm or nothing. A placement says which, and gives alpha, s and c as a number or as a
rule in `l` and `L`. That is all a placement is: a new one is a new row of `PLACEMENTS`.

Sources: `post`, `pre`, `peri`: Peri-LN (arXiv 2502.02732), equations 1 and 2, section 3.3; `output`: the
same, appendix G (OLMo 2); `deepnorm`: arXiv 2203.00555; `lns`: LayerNorm Scaling (2502.05795); `mix`: Mix-LN
(2412.13795). `pre_post` (a norm before the sublayer and another after the add) is sometimes called
Peri-LN; it is not.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

# The only rules there are: names for functions of the layer l = 1..L and of the number of layers L
# (decoder layers, not sublayers). They are looked up, never evaluated.
RULES: dict[str, Callable[[int, int], float]] = {
    "1/sqrt(l)": lambda l, L: l**-0.5,  # noqa: E741
    "1/sqrt(L)": lambda l, L: L**-0.5,  # noqa: E741
    "1/sqrt(2L)": lambda l, L: (2 * L) ** -0.5,  # noqa: E741
    "1/L": lambda l, L: 1.0 / L,  # noqa: E741
    "(2L)^(1/4)": lambda l, L: (2 * L) ** 0.25,  # noqa: E741
    "(8L)^(-1/4)": lambda l, L: (8 * L) ** -0.25,  # noqa: E741
}


@dataclass(frozen=True)
class Placement:
    """One row: the norms A, B, C of a sublayer, the two norms at the ends of the stream, and the factors.

    `init_gain` multiplies the initial standard deviation of v, o and the MLP's three matrices (DeepNorm).
    """

    input_norm: bool = False  # A
    output_norm: bool = False  # B
    residual_norm: bool = False  # C
    embedding_norm: bool = False
    final_norm: bool = True
    alpha: float | str = 1.0
    s: float | str = 1.0
    c: float | str = 1.0
    init_gain: float | str = 1.0


PLACEMENTS: dict[str, Placement] = {
    "post": Placement(residual_norm=True, final_norm=False),
    "pre": Placement(input_norm=True),
    "peri": Placement(input_norm=True, output_norm=True, embedding_norm=True),
    "output": Placement(output_norm=True),
    "pre_post": Placement(input_norm=True, residual_norm=True, final_norm=False),
    "deepnorm": Placement(residual_norm=True, final_norm=False, alpha="(2L)^(1/4)", init_gain="(8L)^(-1/4)"),
    "lns": Placement(input_norm=True, c="1/sqrt(l)"),
}
# Rows that give each layer a placement of its own. Mix-LN: the first quarter Post-LN, the rest Pre-LN
# (at least one layer of Post-LN, so that a very shallow `mix` is not a `pre` in disguise).
MIXTURES: dict[str, Callable[[int], list[str]]] = {
    "mix": lambda L: ["post"] * max(1, L // 4) + ["pre"] * (L - max(1, L // 4)),
}
PLACEMENT_NAMES = (*PLACEMENTS, *MIXTURES)

_USER_FLAGS = ("input_norm", "output_norm", "residual_norm", "embedding_norm", "final_norm")
_USER_FACTORS = ("alpha", "s", "c")


def _nearest(name: Any, known: Sequence[str]) -> str:
    close = get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""


def evaluate_rule(rule: float | str, layer: int, num_layers: int, field: str = "rule") -> float:
    """The value of a number or a named rule at `layer` (1 to `num_layers`).

    Raises:
        ValueError: the rule has no such name, or is no finite number.
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(
                f"{field}={rule!r} is no known rule: {_nearest(rule, list(RULES))}use one of {list(RULES)}"
            )
        return RULES[rule](layer, num_layers)
    if isinstance(rule, bool) or not isinstance(rule, (int, float)) or not math.isfinite(rule):
        raise ValueError(f"{field}={rule!r} must be a finite number or one of the rules {list(RULES)}")
    return float(rule)


def get_placement(name: str | Mapping[str, Any], field: str = "norm_placement") -> Placement:
    """The row called `name`, or the row that a mapping of the user's own describes.

    A mapping has the keys `input_norm`, `output_norm`, `residual_norm`, `embedding_norm`, `final_norm`
    (bool) and `alpha`, `s`, `c` (a number or a rule's name); what it leaves out is off, or 1.

    Raises:
        ValueError: unknown name, key, rule, or a value of the wrong type; the message names the field.
    """
    if isinstance(name, str):
        if name in MIXTURES:
            raise ValueError(
                f"{field}={name!r} is a placement of whole models: a layer takes one of {list(PLACEMENTS)}"
            )
        if name not in PLACEMENTS:
            whole = field == "norm_placement"
            known = PLACEMENT_NAMES if whole else tuple(PLACEMENTS)
            raise ValueError(
                f"{field}={name!r} is no known placement: {_nearest(name, known)}use one of {list(known)}"
                + (" or a mapping" if whole else "")
            )
        return PLACEMENTS[name]
    if not isinstance(name, Mapping):
        raise ValueError(f"{field}={name!r} must be a placement's name or a mapping")
    for key, value in name.items():
        if key in _USER_FLAGS:
            if not isinstance(value, bool):
                raise ValueError(f"{field}[{key!r}]={value!r} must be true or false")
        elif key in _USER_FACTORS:
            evaluate_rule(value, 1, 1, field=f"{field}[{key!r}]")
        else:
            known = (*_USER_FLAGS, *_USER_FACTORS)
            raise ValueError(f"{field} has an unknown key {key!r}: {_nearest(key, known)}use {list(known)}")
    return Placement(**{"final_norm": False, **name})


@dataclass(frozen=True)
class LayerPlan:
    """A placement with its rules evaluated for one layer: what a decoder layer is built from."""

    input_norm: bool
    output_norm: bool
    residual_norm: bool
    alpha: float
    s: float
    c: float
    init_gain: float


@dataclass(frozen=True)
class StreamPlan:
    """The whole stream: the norms at its two ends and one plan for each layer."""

    embedding_norm: bool
    final_norm: bool
    layers: tuple[LayerPlan, ...]


def _layer_plan(row: Placement, l: int, L: int, residual_scale: float | str) -> LayerPlan:  # noqa: E741
    """The row in layer l of L (1 to L)."""

    def value(name: str) -> float:
        return evaluate_rule(getattr(row, name), l, L, name)

    return LayerPlan(
        input_norm=row.input_norm,
        output_norm=row.output_norm,
        residual_norm=row.residual_norm,
        alpha=value("alpha"),
        s=value("s") * evaluate_rule(residual_scale, l, L, field="residual_scale"),
        c=value("c"),
        init_gain=value("init_gain"),
    )


def plan_stream(
    norm_placement: str | Mapping[str, Any],
    num_layers: int,
    layer_placements: Sequence[str] | None = None,
    residual_scale: float | str = 1.0,
    embedding_norm: bool | None = None,
    final_norm: bool | None = None,
) -> StreamPlan:
    """Evaluate a placement for `num_layers` layers.

    `layer_placements` (one name a layer) overrides `norm_placement`; then, as with `mix`, the two ends are
    those of the row `pre` unless given. `residual_scale` multiplies every layer's `s`.

    Raises:
        ValueError: as `get_placement` and `evaluate_rule`, or a list of the wrong length.
    """
    names, mixture = layer_placements, isinstance(norm_placement, str) and norm_placement in MIXTURES
    row = PLACEMENTS["pre"] if mixture else get_placement(norm_placement)  # checked even where a list overrides it
    if names is None and mixture:
        names = MIXTURES[norm_placement](num_layers)
    if names is None:
        rows, ends = [row] * num_layers, row
    else:
        if len(names) != num_layers:
            raise ValueError(f"layer_placements has {len(names)} entries for num_hidden_layers={num_layers}")
        rows = [get_placement(n, field=f"layer_placements[{i}]") for i, n in enumerate(names)]
        ends = PLACEMENTS["pre"]
    layers = [_layer_plan(row, l, num_layers, residual_scale) for l, row in enumerate(rows, start=1)]  # noqa: E741
    return StreamPlan(
        embedding_norm=ends.embedding_norm if embedding_norm is None else embedding_norm,
        final_norm=ends.final_norm if final_norm is None else final_norm,
        layers=tuple(layers),
    )
