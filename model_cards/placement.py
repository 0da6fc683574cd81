"""A placement drawn as text, from the plan that the model itself is built from."""

from itertools import groupby
from typing import Any

from modeling_periln.placements import LayerPlan, StreamPlan, SublayerPlan, plan_stream
from modeling_periln.slots import Learned

EQUATION = "x <- C( alpha x + s B( f( c A(x) ) ) )"


def plan_of(config: dict[str, Any]) -> StreamPlan | None:
    """The plan of a config.json; None for another architecture, or one that does not say its layers."""
    layers, placement = config.get("num_hidden_layers"), config.get("norm_placement")
    if config.get("model_type") != "peri_llama" or not layers or not (placement or config.get("layer_placements")):
        return None
    return plan_stream(
        placement or "pre",
        layers,
        config.get("layer_placements"),
        config.get("residual_scale", 1.0),
        config.get("embedding_norm"),
        config.get("final_norm"),
        config.get("qk_norm"),
    )


def norms_in_words(plan: StreamPlan) -> str:
    """Where the norms are: `embedding, A, B, final`; what only one sublayer has is named with it."""
    found = []
    for letter, slot in (("A", "input_norm"), ("B", "output_norm"), ("C", "residual_norm"), ("inner", "inner_norm")):
        attn = any(getattr(layer.attn, slot) for layer in plan.layers)
        mlp = any(getattr(layer.mlp, slot) for layer in plan.layers)
        if attn or mlp:
            found.append(letter + ("" if attn and mlp else " of attention" if attn else " of the MLP"))
    found += sorted({slot[0] for layer in plan.layers for slot in layer.projections}, key="qkv".index)
    ends = ["embedding"] * bool(plan.embedding_norm), ["final"] * bool(plan.final_norm)
    return ", ".join([*ends[0], *found, *ends[1]]) or "none"


def _times(factor: float | Learned) -> str:
    """`x 0.5`, `x learned`, or nothing for 1."""
    if isinstance(factor, Learned):
        return f"x learned {factor.learned}"
    return f"x {factor:.4g}" if factor != 1 else ""


def _branch(sublayer: SublayerPlan, module: str) -> str:
    """The path through the module, box by box."""
    inner = ["norm inside"] * bool(sublayer.inner_norm)
    boxes = ["norm A"] * bool(sublayer.input_norm) + [_times(sublayer.c), module, *inner]
    boxes += ["norm B"] * bool(sublayer.output_norm) + [_times(sublayer.s)]
    return "--".join(f"[ {box} ]" for box in boxes if box)


def _block(sublayer: SublayerPlan, module: str) -> list[str]:
    """A sublayer: the stream straight on, the branch below it, and what happens at the add."""
    branch = _branch(sublayer, module)
    width = len(branch) + 4
    factor = _times(sublayer.alpha)
    skip = f"( {factor} )" if factor else ""
    after = "--[ norm C ]--> x" if sublayer.residual_norm else "--> x"
    return [
        f"  x --+{skip.center(width, '-')}(+){after}",
        f"      |{' ' * width} |",
        f"      +--{branch}---+",
    ]


def _blocks(layer: LayerPlan) -> list[str]:
    """One block where both sublayers are alike, else one each."""
    if layer.attn == layer.mlp:
        return _block(layer.attn, "attention | MLP")
    return [*_block(layer.attn, "attention"), "", *_block(layer.mlp, "MLP")]


def diagram(plan: StreamPlan) -> str:
    """The stream from the tokens to the head; layers of one kind are drawn once.

    Factors that depend on the layer are those of the first of its group.
    """

    def kind(numbered: tuple[int, LayerPlan]) -> tuple:
        slots = ("input_norm", "output_norm", "residual_norm", "inner_norm")
        return tuple(getattr(s, slot) for s in numbered[1].sublayers for slot in slots)

    lines = ["tokens --[ embedding ]" + ("--[ norm ]" if plan.embedding_norm else "") + "--> x"]
    for _, same in groupby(enumerate(plan.layers, 1), key=kind):
        group = list(same)
        first, last = group[0][0], group[-1][0]
        where = f"layer {first}" if first == last else f"layers {first} to {last}"
        varies = " (factors: the first's)" if len({layer for _, layer in group}) > 1 else ""
        lines += ["", f"{where}{varies}, attention, then MLP:", *_blocks(group[0][1])]
    return "\n".join([*lines, "", "x --" + ("[ norm ]--" if plan.final_norm else "") + "[ head ]--> logits"])
