"""What was found in a model, in terms of the table of placements: `peri, centered gains, QK-norm by head, ...`."""

import re
from collections.abc import Iterable, Iterator

from torch import nn

from periln.eval.structure.anatomy import Anatomy
from periln.eval.structure.norms import NormFacts, is_norm
from periln.eval.structure.sublayers import Norm, Sublayer
from periln.runkit.errors import UserError
from periln.runkit.placements import BY_NORMS

_QUERY_OR_KEY = re.compile(r"(qk|q|k|query|key)_?(layer)?_?norm\w*|norm_?(qk|q|k)|(q|k|query|key)_ln")
_KINDS = {"dyt": "DyT", "derf": "Derf", "l2": "L2 norms"}  # the family's kinds that are neither RMSNorm nor LayerNorm
_OTHER = "norms of another kind"
_VALUE = re.compile(r"(v|value)_?(layer)?_?norm\w*")


def describe(anatomy: Anatomy) -> str:
    """The placement, then what distinguishes the model within it; parts as in the row are omitted."""
    said = [*_places(anatomy), *_kinds(anatomy), *_inside(anatomy), *_ends(anatomy), *_factors(anatomy)]
    return ", ".join(said)


def _name(places: str) -> str:
    return BY_NORMS.get(places, f"norms {places}") if places else "no norms"


def _places(anatomy: Anatomy) -> Iterator[str]:
    """The row, or a row for attention and one for the MLP; then whether layers differ, or are parallel."""
    layers: dict[tuple[str, str], list[int]] = {}
    for attn, mlp in zip(anatomy.sublayers[::2], anatomy.sublayers[1::2], strict=True):
        layers.setdefault((attn.letters, mlp.letters), []).append(attn.layer)
    for (first, second), numbers in layers.items():
        row = _name(first) if first == second else f"attention {_name(first)} and MLP {_name(second)}"
        yield row if len(layers) == 1 else f"{row} in {len(numbers)} of {anatomy.num_layers} layers"
    if all(s.parallel for s in anatomy.sublayers):
        yield "parallel layers"


def _norms(anatomy: Anatomy) -> Iterator[Norm]:
    found = [anatomy.embedding_norm, anatomy.final_norm]
    for s in anatomy.sublayers:
        found += [s.input_norm, s.output_norm, s.residual_norm]
    yield from (norm for norm in found if norm is not None)


def _kinds(anatomy: Anatomy) -> Iterator[str]:
    """What the norms of the stream are, where they are not RMSNorms with a gain a channel."""
    facts: list[NormFacts] = []
    said: dict[str, None] = {}
    modules = [norm.module for norm in _norms(anatomy)]
    for norm in _norms(anatomy):
        try:
            facts.append(norm.facts)
        except UserError:
            said[_KINDS.get(getattr(norm.module, "kind", ""), _OTHER)] = None
    if any(f.kind == "layer" for f in facts):
        said["LayerNorm"] = None
    yield from said
    if any(f.offset for f in facts) or any(getattr(m, "centered", False) for m in modules):
        yield "centered gains"
    if any(getattr(m, "gain", None) == "scalar" for m in modules):
        yield "one gain for all channels"
    if modules and _OTHER not in said and all(getattr(m, "weight", None) is None for m in modules):
        yield "no gains"


def _inside(anatomy: Anatomy) -> Iterator[str]:
    """The norms within the sublayers of the first layer that has any."""
    found: dict[str, None] = {}
    for s in anatomy.sublayers:
        for name, module in s.module.named_modules():
            if name and is_norm(module) and not any(is_norm(m) for m in module.children()):
                found |= dict.fromkeys(_inner(anatomy, s, name, module))
    yield from found


def _inner(anatomy: Anatomy, s: Sublayer, name: str, norm: nn.Module) -> Iterator[str]:
    """A norm within a sublayer by its name and size."""
    words = name.split(".")
    size = sum(p.numel() for key, p in norm.named_parameters(recurse=False) if "bias" not in key)
    if s.kind == "attn" and any(_QUERY_OR_KEY.fullmatch(word) for word in words):
        yield f"QK-norm {_span(anatomy, size)}"
    elif s.kind == "attn" and any(_VALUE.fullmatch(word) for word in words):
        yield f"norm on values {_span(anatomy, size)}"
    elif s.kind == "attn" and "_a_" in name:
        yield "norms on latents"
    else:
        yield f"a norm inside {'attention' if s.kind == 'attn' else 'the MLP'} ({words[-1]})"


def _span(anatomy: Anatomy, size: int) -> str:
    config = anatomy.model.config.get_text_config()
    head = getattr(config, "head_dim", None) or anatomy.hidden_size // config.num_attention_heads
    return "by head" if size <= head else "over all heads"


def _ends(anatomy: Anatomy) -> Iterator[str]:
    """The ends of the stream, where they differ from the row's."""
    places = {s.letters for s in anatomy.sublayers}
    if anatomy.embedding_norm is not None and places != {"AB"}:
        yield "embedding norm"
    if anatomy.embedding_norm is None and places == {"AB"}:
        yield "no embedding norm"
    last = places in ({"C"}, {"AC"})  # these end with a norm on the stream
    if (anatomy.final_norm is None) != last:
        yield "no final norm" if anatomy.final_norm is None else "final norm"


def _factors(anatomy: Anatomy) -> Iterator[str]:
    """alpha, s and c where they are not 1, and the factor of the embedding."""
    for label, values in (
        ("alpha", [s.alpha for s in anatomy.sublayers]),
        ("s", [s.multiplier for s in anatomy.sublayers]),
        ("c", [s.input_scale for s in anatomy.sublayers]),
    ):
        if set(values) != {1.0}:
            yield f"{label} {_range(values)}"
    if anatomy.embedding_scale not in (None, 1.0):
        yield f"embedding times {anatomy.embedding_scale:.4g}"


def _range(values: Iterable[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
