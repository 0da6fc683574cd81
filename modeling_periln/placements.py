"""Where the norms go, as data.

Every sublayer `f` (attention, then MLP) of layer `l` of `L` does

    x  <-  C( alpha * x  +  s * B( f( c * A(x) ) ) )

`A` (on the sublayer's input), `B` (on its output, before the add) and `C` (on the stream, after the add) are each a
norm or nothing; further slots are inside the sublayers. A placement says which, and gives alpha, s and c. That is all
a placement is: a new one is a new row of `PLACEMENTS`. What a slot or a factor may hold is in `slots.py`.

| row | source |
|---|---|
| `post`, `pre`, `peri`, `output` | Peri-LN, 2502.02732: equations 1 and 2, section 3.3, appendix G (OLMo 2) |
| `sandwich` | `peri` without the embedding norm: Gemma 2 (2408.00118), section 2 |
| `deepnorm` | 2203.00555: x <- C(alpha x + f(x)) |
| `lns` | LayerNorm Scaling, 2502.05795: A's output times 1/sqrt(l) |
| `sub_ln` | Magneto, 2210.06423: A, and a norm before the last projection of each sublayer |
| `normformer` | 2110.09456: A; attention with B and one gain a head before o_proj; a norm before down_proj |
| `hybrid` | HybridNorm, 2503.04598: norms on q, k and v; one norm on the stream between attention and MLP |
| `hybrid_star` | the same, its first layer Pre-LN in both sublayers, with the norms on q, k and v |
| `keel` | 2601.19895, equation 8: x <- C(alpha x + f(A(x))) with alpha = 2L, the number of sublayers |
| `keel_first` | the same with the first layer of its section 3.1: alpha = 1, and no C after attention |
| `learned_residual` | Post-LN whose skip connection has one learned factor a channel, as Admin's (2004.08249) |
| `mix` | Mix-LN, 2412.13795: the first quarter of the layers `post`, the rest `pre` |
| `none` | no norm at all |
| `pre_post` | A and C; sometimes called Peri-LN, which it is not |

What they were compared with:

- `keel`: the paper's text. L there is "the total number of sub-layers", two a layer here. Its models have `keel_first`;
  DepthBench's `KeelTransformerBlock` is that too.
- `hybrid`, `hybrid_star`: the paper's text, equations 5 to 7, and the authors' configurations (`use_query_norm` and so
  on, no `attn_norm`, `ffn_residual_after_norm`; github.com/BryceZhuo/HybridNorm). The norms are on Q, K and V of d_k
  channels, one head. Its models begin as `depth_scaled_init` has it (section 5.4).
- `sub_ln`: the paper's text, equations 1 to 5 and 11, and its start (section 3.2): v_proj, o_proj and the matrices of
  the MLP times sqrt(log(2L)). torchscale's decoder (`subln`) is the same.
- `normformer`: its equation HeadScaleMHA = Concat(gamma_1 h_1, ..., gamma_n h_n) W^O as others quote and implement it
  (L-GATr's `head_scale`), and fairseq's layer for the norms (`attn_ln`, `ffn_layernorm`). fairseq's gain for each head
  is after out_proj, where the channels are not the heads'. The optional ResScale is `mlp: {alpha: {learned: channel}}`.
- `learned_residual`: the authors' package (github.com/microsoft/admin-torch): Norm(omega x + f(x)), omega one number a
  channel that starts at sqrt((N + 1) / ln(N + 1) - 1) for N = 2L sublayers, the rule `admin`. The paper's own start,
  from the variances of a profiling pass, is not here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .slots import (
    Factor,
    Learned,
    Norm,
    ProjectionNorm,
    evaluate_rule,
    nearest,
    read_factor,
    read_projection_norm,
    read_slot,
)

Slot = bool | Mapping[str, Any] | Norm


@dataclass(frozen=True)
class Placement:
    """One row, as it is written: the norms A, B, C and the factors of both sublayers, and the rest.

    `attn` and `mlp` override the row for one sublayer. `init_gain` multiplies the initial standard deviation of v, o
    and the MLP's three matrices (DeepNorm, Magneto).
    """

    input_norm: Slot = False  # A
    output_norm: Slot = False  # B
    residual_norm: Slot = False  # C
    embedding_norm: Slot = False
    final_norm: Slot = True
    alpha: Any = 1.0
    s: Any = 1.0
    c: Any = 1.0
    attn: Mapping[str, Any] = field(default_factory=dict)
    mlp: Mapping[str, Any] = field(default_factory=dict)
    q_norm: Any = None
    k_norm: Any = None
    v_norm: Any = None
    attn_inner_norm: Slot = False  # before o_proj
    mlp_inner_norm: Slot = False  # before down_proj
    init_gain: float | str = 1.0


_QKV_BY_HEAD: dict[str, Any] = {"q_norm": "head", "k_norm": "head", "v_norm": "head"}
PLACEMENTS: dict[str, Placement] = {
    "post": Placement(residual_norm=True, final_norm=False),
    "pre": Placement(input_norm=True),
    "peri": Placement(input_norm=True, output_norm=True, embedding_norm=True),
    "output": Placement(output_norm=True),
    "pre_post": Placement(input_norm=True, residual_norm=True, final_norm=False),
    "deepnorm": Placement(residual_norm=True, final_norm=False, alpha="(2L)^(1/4)", init_gain="(8L)^(-1/4)"),
    "lns": Placement(input_norm=True, c="1/sqrt(l)"),
    "sandwich": Placement(input_norm=True, output_norm=True),
    "sub_ln": Placement(input_norm=True, attn_inner_norm=True, mlp_inner_norm=True, init_gain="sqrt(log(2L))"),
    "normformer": Placement(
        input_norm=True,
        attn={"output_norm": True},
        attn_inner_norm={"kind": "none", "gain": "head"},
        mlp_inner_norm=True,
    ),
    "hybrid": Placement(attn={"residual_norm": True}, **_QKV_BY_HEAD),
    "keel": Placement(input_norm=True, residual_norm=True, final_norm=False, alpha="2L"),
    "learned_residual": Placement(residual_norm=True, final_norm=False, alpha={"learned": "channel", "init": "admin"}),
    "none": Placement(final_norm=False),
}


@dataclass(frozen=True)
class Mixture:
    """A row that gives each of L layers its own placement; the stream's ends are normed as in the row `ends`."""

    layers: Callable[[int], list[Any]]
    ends: str = "pre"


# Mix-LN: the first quarter Post-LN, the rest Pre-LN (at least one layer of Post-LN, so that a very shallow `mix` is not
# a `pre` in disguise).
MIXTURES: dict[str, Mixture] = {
    "mix": Mixture(lambda L: ["post"] * max(1, L // 4) + ["pre"] * (L - max(1, L // 4))),
    "hybrid_star": Mixture(lambda L: [{"input_norm": True, **_QKV_BY_HEAD}] + ["hybrid"] * (L - 1)),
    "keel_first": Mixture(
        lambda L: [{"input_norm": True, "mlp": {"residual_norm": True}}] + ["keel"] * (L - 1), ends="keel"
    ),
}
PLACEMENT_NAMES = (*PLACEMENTS, *MIXTURES)
# What the one equation cannot say: each keeps more than one residual stream, or reads layers other than the last.
REFUSED: dict[str, str] = {
    "hyper_connections": "it carries several residual streams (2409.19606)",
    "attention_residuals": "each layer attends to the outputs of all layers before it",
    "residual": "ResiDual (2304.14802) carries a second, unnormalized stream",
    "siamese_norm": "it carries two streams that share their layers",
    "span_norm": "its skip connection spans both sublayers of a layer",
    "x0_lambdas": "it adds the embedding again in every layer, a second stream",
}

_FLAGS = ("input_norm", "output_norm", "residual_norm")
_ENDS = ("embedding_norm", "final_norm")
_PROJECTIONS = ("q_norm", "k_norm", "v_norm")
_INNER = ("attn_inner_norm", "mlp_inner_norm")
_FACTORS = ("alpha", "s", "c")
_USER_KEYS = (*_FLAGS, *_ENDS, *_FACTORS, "attn", "mlp", *_PROJECTIONS, *_INNER)


def get_placement(name: str | Mapping[str, Any], field: str = "norm_placement") -> Placement:
    """The row called `name`, or the row that the user's own mapping describes.

    A mapping has the keys `input_norm`, `output_norm`, `residual_norm`, `embedding_norm`, `final_norm`,
    `attn_inner_norm`, `mlp_inner_norm` (slots), `q_norm`, `k_norm`, `v_norm`, the factors `alpha`, `s`, `c`, and `attn`
    and `mlp`, mappings that override A, B, C and the factors for one sublayer. What it leaves out is off, or 1.

    Raises:
        ValueError: unknown name, key, rule, or a value of the wrong type; the message names the field.
    """
    if isinstance(name, str):
        return _named(name, field)
    if not isinstance(name, Mapping):
        raise ValueError(f"{field}={name!r} must be a placement's name or a mapping")
    _check(name, _USER_KEYS, field)
    for sublayer in ("attn", "mlp"):
        _check(name.get(sublayer, {}), (*_FLAGS, *_FACTORS), f"{field}[{sublayer!r}]")
    return Placement(**{"final_norm": False, **name})


def _named(name: str, field: str) -> Placement:
    if name in REFUSED:
        raise ValueError(f"{field}={name!r} is not a row of one stream's equation: {REFUSED[name]}")
    if name in MIXTURES:
        raise ValueError(f"{field}={name!r} is a placement of whole models: a layer takes one of {list(PLACEMENTS)}")
    if name not in PLACEMENTS:
        known = PLACEMENT_NAMES if field == "norm_placement" else tuple(PLACEMENTS)
        raise ValueError(
            f"{field}={name!r} is not a known placement: {nearest(name, known)}use one of {list(known)} or a mapping"
        )
    return PLACEMENTS[name]


def _check(row: Any, known: Sequence[str], field: str) -> None:
    """Every key is known, and every value is one that its key can have."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{field}={row!r} must be a mapping with keys of {list(known)}")
    for key, value in row.items():
        where = f"{field}[{key!r}]"
        if key not in known:
            if key in REFUSED:
                raise ValueError(f"{field} has {key!r}, which one stream cannot have: {REFUSED[key]}")
            raise ValueError(f"{field} has an unknown key {key!r}: {nearest(key, known)}use {list(known)}")
        if key in ("attn", "mlp"):
            continue
        if key in _FACTORS:
            if isinstance(read_factor(value, where), Learned) and key == "c":
                raise ValueError(f"{where}={value!r}: c is a constant; a learned one is the input norm's gain")
        elif key in _PROJECTIONS:
            read_projection_norm(value, where)
        else:
            read_slot(value, where)


# The plan: a row with its rules evaluated


@dataclass(frozen=True)
class SublayerPlan:
    """The norms and factors of one sublayer in one layer; alpha and s may be learned, from an initial number."""

    input_norm: Norm | None
    output_norm: Norm | None
    residual_norm: Norm | None
    inner_norm: Norm | None
    alpha: float | Learned
    s: float | Learned
    c: float


@dataclass(frozen=True)
class LayerPlan:
    """What a decoder layer is built from: the plans of its two sublayers, and the norms on q, k and v."""

    attn: SublayerPlan
    mlp: SublayerPlan
    q_norm: ProjectionNorm | None
    k_norm: ProjectionNorm | None
    v_norm: ProjectionNorm | None
    init_gain: float

    @property
    def sublayers(self) -> tuple[SublayerPlan, SublayerPlan]:
        return self.attn, self.mlp

    @property
    def projections(self) -> dict[str, ProjectionNorm]:
        """The norms on queries, keys and values, by slot."""
        return {name: norm for name in _PROJECTIONS if (norm := getattr(self, name)) is not None}


@dataclass(frozen=True)
class StreamPlan:
    """The whole stream: the norms at its two ends and one plan for each layer."""

    embedding_norm: Norm | None
    final_norm: Norm | None
    layers: tuple[LayerPlan, ...]

    def norms(self) -> Iterator[Norm]:
        """Every norm of the stream."""
        found = [self.embedding_norm, self.final_norm]
        for layer in self.layers:
            found += layer.projections.values()
            found += [n for s in layer.sublayers for n in (s.input_norm, s.output_norm, s.residual_norm, s.inner_norm)]
        return (norm for norm in found if norm is not None)


def _factor(value: Any, scale: float, l: int, L: int, field: str) -> float | Learned:  # noqa: E741
    """A factor in layer l, times `scale`."""
    factor: Factor = read_factor(value, field)
    if isinstance(factor, Learned):
        return replace(factor, init=scale * evaluate_rule(factor.init, l, L, field))
    return scale * evaluate_rule(factor, l, L, field)


def _sublayer_plan(row: Placement, name: str, l: int, L: int, residual_scale: float) -> SublayerPlan:  # noqa: E741
    given = {key: getattr(row, key) for key in (*_FLAGS, *_FACTORS)} | dict(getattr(row, name))
    c = _factor(given["c"], 1.0, l, L, "c")
    assert isinstance(c, float)
    return SublayerPlan(
        **{key: read_slot(given[key], key) for key in _FLAGS},
        inner_norm=read_slot(getattr(row, f"{name}_inner_norm"), f"{name}_inner_norm"),
        alpha=_factor(given["alpha"], 1.0, l, L, "alpha"),
        s=_factor(given["s"], residual_scale, l, L, "s"),
        c=c,
    )


def _layer_plan(
    row: Placement,
    l: int,  # noqa: E741
    L: int,
    residual_scale: float | str,
    qk_norm: str | None,
) -> LayerPlan:
    """The row in layer l of L (1 to L)."""
    scale = evaluate_rule(residual_scale, l, L, field="residual_scale")
    norms = {name: read_projection_norm(getattr(row, name), name) for name in _PROJECTIONS}
    if qk_norm is not None:
        if norms["q_norm"] or norms["k_norm"]:
            raise ValueError(f"qk_norm={qk_norm!r}: the placement has norms on queries or keys already")
        norms |= {name: ProjectionNorm(over=qk_norm) for name in ("q_norm", "k_norm")}
    return LayerPlan(
        attn=_sublayer_plan(row, "attn", l, L, scale),
        mlp=_sublayer_plan(row, "mlp", l, L, scale),
        **norms,
        init_gain=evaluate_rule(row.init_gain, l, L, "init_gain"),
    )


def plan_stream(
    norm_placement: str | Mapping[str, Any],
    num_layers: int,
    layer_placements: Sequence[str | Mapping[str, Any]] | None = None,
    residual_scale: float | str = 1.0,
    embedding_norm: bool | None = None,
    final_norm: bool | None = None,
    qk_norm: str | None = None,
) -> StreamPlan:
    """Evaluate a placement for `num_layers` layers.

    `layer_placements` (one name or mapping a layer) overrides `norm_placement`; then the two ends are those of the row
    `pre` unless given. `residual_scale` multiplies every layer's `s`, `qk_norm` puts a norm on
    queries and keys.

    Raises:
        ValueError: as `get_placement` and `evaluate_rule`, or a list of the wrong length.
    """
    mixture = MIXTURES.get(norm_placement) if isinstance(norm_placement, str) else None
    row = (
        PLACEMENTS[mixture.ends] if mixture else get_placement(norm_placement)
    )  # checked even where a list overrides it
    ends, names = row, layer_placements
    if names is not None:
        ends = PLACEMENTS["pre"]
    elif mixture:
        names = mixture.layers(num_layers)
    if names is None:
        rows = [row] * num_layers
    else:
        if len(names) != num_layers:
            raise ValueError(f"layer_placements has {len(names)} entries for num_hidden_layers={num_layers}")
        rows = [get_placement(n, field=f"layer_placements[{i}]") for i, n in enumerate(names)]
        for i, name in enumerate(names):
            extra = [key for key in _ENDS if isinstance(name, Mapping) and key in name]
            if extra:
                raise ValueError(f"layer_placements[{i}] has {extra[0]!r}, which belongs to the whole stream")
    return StreamPlan(
        embedding_norm=_end(ends.embedding_norm, embedding_norm, "embedding_norm"),
        final_norm=_end(ends.final_norm, final_norm, "final_norm"),
        layers=tuple(_layer_plan(row, l, num_layers, residual_scale, qk_norm) for l, row in enumerate(rows, start=1)),  # noqa: E741
    )


def _end(row: Slot, override: bool | None, field: str) -> Norm | None:
    """The norm at an end of the stream: the row's, unless the configuration switches it on or off."""
    norm = read_slot(row, field)
    if override is None:
        return norm
    return (norm or Norm()) if override else None
