"""The residual stream of a causal LM, found by structure.

No family is known by name. One forward pass on a few random tokens is watched, and which module reads which output
tells what every module is: in each decoder layer two modules f (attention, then MLP), and norms in the places A (on f's
input), B (on f's output, before the add) and C (on the stream, after the add) of

    x  <-  C( alpha * x  +  s * B( f( c * A(x) ) ) )

What was found is then checked on the same pass: each sum must be alpha * x + s * branch to rounding. A model that does
anything else to its stream is refused rather than guessed.

In most families an add is not a module, so tensors are seen at *points*: the input or output of a module.
The stream before attention is the layer's input; the sum after attention is what the MLP side reads; the sum after the
MLP is the layer's output. In a parallel layer (GPT-NeoX) x + attn + mlp is one add: the attention has none.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from periln.eval.structure.norms import NormFacts, is_norm, norm_facts
from periln.eval.structure.points import Call, Point, TensorCall, Trace, first_tensor, input_tensor
from periln.eval.structure.points import watched as watch_modules
from periln.eval.structure.sublayers import LayerReader, Norm, Projection, Sublayer, ratio, same
from periln.runkit.errors import UserError
from periln.runkit.placements import BY_NORMS


@dataclass(frozen=True)
class Anatomy:
    """The stream of a model from the embedding to the head.

    `embedding_stream` is the input of layer 1 (after embedding norm and scale); `end` the last layer's output, before
    the final norm. `embedding_scale`: the factor between the table's rows and the stream (None after a norm or where
    positions are added).
    """

    model: PreTrainedModel
    hidden_size: int
    embedding_name: str
    embedding: nn.Embedding
    embedding_norm: Norm | None
    embedding_scale: float | None
    embedding_stream: Point
    layers: tuple[tuple[str, nn.Module], ...]
    sublayers: tuple[Sublayer, ...]
    end: Point
    final_norm: Norm | None
    head_name: str
    lm_head: nn.Linear
    tied: bool

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def placement(self) -> str | None:
        """The placement that its configuration names, or whose norms A, B and C are where its norms are.

        None where its layers differ, or no placement matches.
        """
        config = self.model.config
        named = getattr(config, "norm_placement", None)
        if isinstance(named, str) and not getattr(config, "layer_placements", None):
            return named
        places = {s.letters for s in self.sublayers}
        # Rows of norms alone: what distinguishes the others (inner norms, factors) is not considered here.
        return BY_NORMS.get(places.pop()) if len(places) == 1 else None

    def gain(self, norm: Norm | nn.Module) -> torch.Tensor | None:
        """The effective gamma (D,) of a norm, 1 + w for Gemma's; None where it has none."""
        facts = norm.facts if isinstance(norm, Norm) else norm_facts(norm)
        return facts.gain


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        raise UserError(f"{type(model).__name__} has no config: not a Transformers model")
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _layer_list(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder layers: the one list of `num_hidden_layers` modules of one class."""
    count = getattr(_text_config(model), "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and len({type(m) for m in module}) == 1
        and sum(1 for _ in module[0].children()) > 1
    ]
    if not found:
        raise UserError(f"no list of {count} decoder layers was found in {type(model).__name__}")
    outermost = min(found, key=lambda item: item[0].count("."))
    return [(f"{outermost[0]}.{i}", layer) for i, layer in enumerate(outermost[1])]


def _random_ids(model: nn.Module, vocabulary: int) -> torch.Tensor:
    device = next(model.parameters()).device
    return torch.randint(0, vocabulary, (2, 8), generator=torch.Generator().manual_seed(0)).to(device)


def _find_embedding(model: PreTrainedModel, trace: Trace, start: torch.Tensor, names: dict[nn.Module, str]):
    """The embedding module and the norm between it and the stream."""
    module = model.get_input_embeddings()
    call = trace.of(names[module])
    if call is None or call.result is None or call.result.shape != start.shape:
        raise UserError(f"the embedding of {type(model).__name__} does not give what its first layer reads")
    norms = [c for c in trace.calls.get("", []) if is_norm(c.module) and c.result is not None]
    norm = next((n for n in norms if ratio(n.given, call.result) is not None and same(n.result, start)), None)
    return module, norm


@torch.no_grad()
def find_anatomy(model: PreTrainedModel) -> Anatomy:
    """Find the residual stream of a causal LM by one forward pass on 16 random tokens, and check it on that pass.

    The model is left as it is. Load it in FP32: in half precision small branches are lost in the rounding of the sums.

    Raises:
        UserError: no embedding, head or list of layers; a layer that does not write to a stream as above; or a pass
            that is not finite.
    """
    vocabulary = _text_config(model).vocab_size
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or model.get_input_embeddings() is None:
        raise UserError(f"{type(model).__name__} has no language-model head: it is not a causal LM")
    layers = _layer_list(model)
    inside = {module for _, layer in layers for module in layer.modules()}
    outside = [(name, module) for name, module in model.named_modules() if name and module not in inside]
    watched = {"": [(n, m) for n, m in outside if not any(layer is c for c in m.modules() for _, layer in layers)]}
    for name, layer in layers:
        watched[name] = [(f"{name}.{inner}", module) for inner, module in layer.named_modules() if inner]
        watched[f"{name}()"] = [(name, layer)]
    trace, training, ids = Trace(), model.training, _random_ids(model, vocabulary)
    model.eval()
    try:
        with watch_modules(watched, trace):
            model(input_ids=ids, use_cache=False)
    finally:
        model.train(training)
    return _assemble(model, ids, head, layers, trace)


def _check_chain(layers: list[tuple[str, nn.Module]], calls: list[Call | None]) -> list[TensorCall]:
    """The layers' calls: each turns a stream into a finite stream, and reads what the one before it gave.

    Raises:
        UserError: one does not.
    """
    wholes: list[TensorCall] = []
    for (name, layer), whole in zip(layers, calls, strict=True):
        wide = [x for x in (whole.given, whole.result) if x is not None and x.ndim > 3] if whole is not None else []
        if wide:
            streams = " x ".join(str(n) for n in wide[0].shape[2:-1])
            raise UserError(
                f"{name} ({type(layer).__name__}) carries {streams} residual streams at once, as hyper-connections do: "
                "one stream is followed here"
            )
        if whole is None or whole.given is None or whole.result is None or whole.given.shape != whole.result.shape:
            raise UserError(f"{name} ({type(layer).__name__}) does not turn a stream into a stream of the same shape")
        if not bool(whole.result.isfinite().all()):
            raise UserError(
                f"the output of {name} is not finite in {whole.result.dtype} on random tokens: "
                "load the model in float32 to find its stream"
            )
        wholes.append(TensorCall(whole.name, whole.module, whole.given, whole.result))
    for i in range(1, len(layers)):
        if not same(wholes[i - 1].result, wholes[i].given):
            raise UserError(f"{layers[i][0]} does not read what {layers[i - 1][0]} gives")
    return wholes


def _assemble(model: PreTrainedModel, ids: torch.Tensor, head: nn.Linear, layers: list, trace: Trace) -> Anatomy:
    names = {module: name for name, module in model.named_modules()}
    calls: list[Call | None] = [next(iter(trace.calls.get(f"{name}()", [])), None) for name, _ in layers]
    wholes = _check_chain(layers, calls)
    sublayers: list[Sublayer] = []
    for number, ((name, layer), whole) in enumerate(zip(layers, wholes, strict=True), start=1):
        sublayers += LayerReader(number, name, layer, trace.calls.get(name, []), whole).read()
    embedding, norm = _find_embedding(model, trace, wholes[0].given, names)
    rows = embedding.weight[ids] if hasattr(embedding, "weight") else None
    end = wholes[-1].result
    finals = [c for c in trace.calls.get("", []) if is_norm(c.module) and same(c.given, end)]
    return Anatomy(
        model=model,
        hidden_size=end.shape[-1],
        embedding_name=names[embedding],
        embedding=embedding,
        embedding_norm=None if norm is None else Norm(norm.name, norm.module),
        embedding_scale=None if norm is not None or rows is None else ratio(wholes[0].given, rows),
        embedding_stream=Point(layers[0][0], layers[0][1], "input"),
        layers=tuple(layers),
        sublayers=tuple(sublayers),
        end=Point(layers[-1][0], layers[-1][1], "output"),
        final_norm=Norm(finals[0].name, finals[0].module) if finals else None,
        head_name=names[head],
        lm_head=head,
        tied=getattr(head, "weight", None) is getattr(embedding, "weight", False),
    )


__all__ = [
    "Anatomy",
    "Norm",
    "NormFacts",
    "Point",
    "Projection",
    "Sublayer",
    "find_anatomy",
    "first_tensor",
    "input_tensor",
    "is_norm",
    "norm_facts",
]
