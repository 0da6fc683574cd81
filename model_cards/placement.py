"""A placement drawn as text, from the plan that the model itself is built from."""

from itertools import groupby
from typing import Any

from modeling_periln.placements import LayerPlan, StreamPlan, plan_stream

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
    )


def norms_in_words(plan: StreamPlan) -> str:
    """Where the norms are: `embedding, A, B, final`."""
    names = ("input_norm", "A"), ("output_norm", "B"), ("residual_norm", "C")
    within = [letter for field, letter in names if any(getattr(layer, field) for layer in plan.layers)]
    ends = ["embedding"] * plan.embedding_norm, ["final"] * plan.final_norm
    return ", ".join([*ends[0], *within, *ends[1]]) or "none"


def _branch(layer: LayerPlan) -> str:
    """The way through the module, box by box."""
    boxes = ["norm A"] * layer.input_norm + [f"x {layer.c:.4g}"] * (layer.c != 1) + ["attention | MLP"]
    boxes += ["norm B"] * layer.output_norm + [f"x {layer.s:.4g}"] * (layer.s != 1)
    return "--".join(f"[ {box} ]" for box in boxes)


def _block(layer: LayerPlan) -> list[str]:
    """A sublayer: the stream straight on, the branch below it, and what happens at the add."""
    branch = _branch(layer)
    width = len(branch) + 4
    skip = f"( x {layer.alpha:.4g} )" if layer.alpha != 1 else ""
    after = "--[ norm C ]--> x" if layer.residual_norm else "--> x"
    return [
        f"  x --+{skip.center(width, '-')}(+){after}",
        f"      |{' ' * width} |",
        f"      +--{branch}---+",
    ]


def diagram(plan: StreamPlan) -> str:
    """The stream from the tokens to the head; layers of one kind are drawn once.

    Factors that depend on the layer are those of the first of its group.
    """

    def kind(numbered: tuple[int, LayerPlan]) -> tuple[bool, bool, bool]:
        return numbered[1].input_norm, numbered[1].output_norm, numbered[1].residual_norm

    lines = ["tokens --[ embedding ]" + ("--[ norm ]" if plan.embedding_norm else "") + "--> x"]
    for _, same in groupby(enumerate(plan.layers, 1), key=kind):
        group = list(same)
        first, last = group[0][0], group[-1][0]
        where = f"layer {first}" if first == last else f"layers {first} to {last}"
        varies = " (factors: the first's)" if len({layer for _, layer in group}) > 1 else ""
        lines += ["", f"{where}{varies}, attention, then MLP:", *_block(group[0][1])]
    return "\n".join([*lines, "", "x --" + ("[ norm ]--" if plan.final_norm else "") + "[ head ]--> logits"])
