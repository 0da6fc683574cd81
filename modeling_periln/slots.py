"""What a row of the table of placements is made of: norms, factors and the rules that give their values.

A slot is empty or holds a norm, a factor is a number, a rule in the layer l = 1..L, or learned. All are data: rules are
names that are looked up, never evaluated.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, TypeVar

RULES: dict[str, Callable[[int, int], float]] = {
    # L counts decoder layers, so there are 2L sublayers.
    "1/sqrt(l)": lambda l, L: l**-0.5,  # noqa: E741
    "1/sqrt(L)": lambda l, L: L**-0.5,  # noqa: E741
    "1/sqrt(2L)": lambda l, L: (2 * L) ** -0.5,  # noqa: E741
    "1/L": lambda l, L: 1.0 / L,  # noqa: E741
    "2L": lambda l, L: 2.0 * L,  # noqa: E741
    "(2L)^(1/4)": lambda l, L: (2 * L) ** 0.25,  # noqa: E741
    "(8L)^(-1/4)": lambda l, L: (8 * L) ** -0.25,  # noqa: E741
    "sqrt(log(2L))": lambda l, L: math.log(2 * L) ** 0.5,  # noqa: E741
    "admin": lambda l, L: ((2 * L + 1) / math.log(2 * L + 1) - 1) ** 0.5,  # noqa: E741
}
# The functions that normalize, and what multiplies the result. `none` as a kind is a gain without a norm.
KINDS = ("rmsnorm", "layernorm", "dyt", "derf", "l2", "none")
NO_EPSILON = ("dyt", "derf", "none")
GAINS = ("channel", "centered", "scalar", "head", "none")
SPANS = ("full", "head")
LEARNED = ("scalar", "channel")


def nearest(name: Any, known: Sequence[str]) -> str:
    """`did you mean 'x'? `, or nothing."""
    close = get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""


@dataclass(frozen=True)
class Norm:
    """A norm in a slot. None means the configuration's: `norm_type`, `norm_gain`, `norm_eps`.

    kind: `rmsnorm`, `layernorm`, `dyt` (2503.10622), `derf` (2512.10938), `l2`, or `none` (a gain alone).
    gain: one number a `channel`, the same stored as its difference from 1 (`centered`, Gemma), one `scalar`, one a
        `head` (NormFormer's HeadScale), or `none`.
    """

    kind: str | None = None
    gain: str | None = None
    eps: float | None = None


@dataclass(frozen=True)
class ProjectionNorm(Norm):
    """A norm on queries, keys or values: over all heads before they are split (`full`), or over each (`head`)."""

    over: str = "head"


@dataclass(frozen=True)
class Learned:
    """A factor that is trained: one number or one a channel, initialized to a number or a rule's value."""

    learned: str
    init: float | str = 1.0


Factor = float | str | Learned
_Kind = TypeVar("_Kind", bound=Norm)


def evaluate_rule(rule: float | str, layer: int, num_layers: int, field: str = "rule") -> float:
    """The value of a number or a named rule at `layer` (1 to `num_layers`).

    Raises:
        ValueError: the rule has no such name, or the number is not finite.
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(
                f"{field}={rule!r} is not a known rule: {nearest(rule, list(RULES))}use one of {list(RULES)}"
            )
        return RULES[rule](layer, num_layers)
    if isinstance(rule, bool) or not isinstance(rule, (int, float)) or not math.isfinite(rule):
        raise ValueError(f"{field}={rule!r} must be a finite number or one of the rules {list(RULES)}")
    return float(rule)


def read_factor(value: Any, field: str) -> Factor:
    """A factor as the user writes it: a number, a rule's name, or `{learned: scalar | channel, init: ...}`.

    Raises:
        ValueError: names the field and the value.
    """
    if isinstance(value, Learned):
        return value
    if not isinstance(value, Mapping):
        evaluate_rule(value, 1, 1, field)
        factor: Factor = value
        return factor
    _known_keys(value, ("learned", "init"), field)
    if value.get("learned") not in LEARNED:
        raise ValueError(f"{field}['learned']={value.get('learned')!r} must be one of {list(LEARNED)}")
    evaluate_rule(value.get("init", 1.0), 1, 1, f"{field}['init']")
    return Learned(**value)


def read_slot(value: Any, field: str) -> Norm | None:
    """A slot as the user writes it: false, true (the configuration's norm), or `{kind, gain, eps}`.

    Raises:
        ValueError: names the field and the value.
    """
    if value is None or isinstance(value, Norm):
        return value
    if isinstance(value, bool):
        return Norm() if value else None
    return _read_norm(Norm, value, field, "true or false, or a mapping with kind, gain and eps")


def read_projection_norm(value: Any, field: str) -> ProjectionNorm | None:
    """A norm on queries, keys or values: null, `full`, `head`, or `{over, kind, gain, eps}`.

    Raises:
        ValueError: names the field and the value.
    """
    if value is None or isinstance(value, ProjectionNorm):
        return value
    if isinstance(value, str):
        if value not in SPANS:
            raise ValueError(f"{field}={value!r} must be one of {list(SPANS)} or a mapping")
        return ProjectionNorm(over=value)
    norm = _read_norm(ProjectionNorm, value, field, "null, 'full', 'head' or a mapping with over, kind, gain and eps")
    if norm.over not in SPANS:
        raise ValueError(f"{field}['over']={norm.over!r} must be one of {list(SPANS)}")
    return norm


def _known_keys(value: Mapping[str, Any], known: Sequence[str], field: str) -> None:
    for key in value:
        if key not in known:
            raise ValueError(f"{field} has an unknown key {key!r}: {nearest(key, known)}use {list(known)}")


def _read_norm(cls: type[_Kind], value: Any, field: str, wanted: str) -> _Kind:
    if not isinstance(value, Mapping):
        raise ValueError(f"{field}={value!r} must be {wanted}")
    _known_keys(value, [f.name for f in fields(cls)], field)
    for key, known in (("kind", KINDS), ("gain", GAINS)):
        if value.get(key) is not None and value[key] not in known:
            hint = nearest(value[key], known)
            raise ValueError(f"{field}[{key!r}]={value[key]!r} is not known: {hint}use one of {list(known)}")
    eps = value.get("eps")
    if eps is not None and (isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < math.inf):
        raise ValueError(f"{field}['eps']={eps!r} must be a number of at least 0")
    if eps is not None and value.get("kind") in NO_EPSILON:
        raise ValueError(f"{field}['eps']={eps!r}: {value['kind']} has no epsilon")
    if value.get("gain") == "head" and not field.endswith(("attn_inner_norm", "attn_inner_norm']")):
        raise ValueError(f"{field}['gain']='head': only attn_inner_norm sees the heads apart")
    return cls(**value)
