"""Where a model's products, stream and keys and values are: what can be rounded, and why the rest cannot.

Products are the linear maps inside the decoder layers; the embedding and the head stay in FP32, as deployed recipes
leave them. The products inside attention (queries with keys, probabilities with values) are seen through the keys and
values alone. The residual stream is found by `structure.anatomy`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from periln.eval.formats.recipes import ACTIVATIONS, STREAM, WEIGHTS
from periln.eval.structure.anatomy import Anatomy, find_anatomy
from periln.runkit.errors import UserError


@dataclass(frozen=True)
class Product:
    """A linear map: its qualified name, layer (from 1) and name within the layer."""

    name: str
    module: nn.Module
    layer: int
    slot: str

    @property
    def weight(self) -> nn.Parameter:
        return cast(nn.Parameter, self.module.weight)

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as (in, out)."""
        return isinstance(self.module, Conv1D)


@dataclass(frozen=True)
class Located:
    """`missing` says why a target (weights, activations, stream) cannot be rounded."""

    model: nn.Module
    anatomy: Anatomy | None
    products: tuple[Product, ...]
    layers: dict[nn.Module, int]
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def vocabulary(self) -> int:
        """How many embeddings the model has."""
        return vocabulary_of(self.model)

    @property
    def product_parameters(self) -> int:
        return sum(p.weight.numel() for p in self.products)


def vocabulary_of(model: nn.Module) -> int:
    """How many embeddings a Transformers model has."""
    config: Any = model.config
    return config.get_text_config().vocab_size


_LAYER = re.compile(r"\.(\d+)(?:\.|$)")


def _place(name: str) -> tuple[int, str] | None:
    """Layer (from 1) and name within it, by the first number in a module's name."""
    found = _LAYER.search(name)
    return None if found is None else (int(found.group(1)) + 1, name[found.end() :])


def _inside_layers(model: nn.Module, anatomy: Anatomy | None) -> Iterator[tuple[str, nn.Module, int, str]]:
    if anatomy is None:
        for name, module in model.named_modules():
            if (place := _place(name)) is not None:
                yield name, module, *place
        return
    for number, (outer, layer) in enumerate(anatomy.layers, start=1):
        for inner, module in layer.named_modules():
            yield f"{outer}.{inner}".rstrip("."), module, number, inner


def locate(model: nn.Module) -> Located:
    """What can be rounded in a causal LM (FP32).

    Raises:
        UserError: it has no linear map inside its layers.
    """
    missing: dict[str, str] = {}
    anatomy: Anatomy | None
    try:
        anatomy = find_anatomy(model)
    except UserError as error:
        anatomy, missing[STREAM] = None, str(error)
    products, layers, other = [], {}, []
    for name, module, number, slot in _inside_layers(model, anatomy):
        layers[module] = number
        if isinstance(module, (nn.Linear, Conv1D)):
            products.append(Product(name, module, number, slot))
        elif not isinstance(module, nn.Embedding) and any(p.ndim > 1 for p in module.parameters(recurse=False)):
            other.append(f"{name} ({type(module).__name__})")
    if other:
        more = f" and {len(other) - 1} more" if len(other) > 1 else ""
        hold = "hold" if more else "holds"
        why = f"{other[0]}{more} {hold} matrices that are not linear maps: the products cannot be located"
        missing |= {WEIGHTS: why, ACTIVATIONS: why}
    elif not products:
        raise UserError(f"{type(model).__name__} has no linear map inside its layers: nothing can be rounded")
    return Located(model, anatomy, tuple(products), layers, missing)


def replaced(value: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    """A module's arguments or output with one tensor replaced by another."""
    if value is old:
        return new
    if isinstance(value, (tuple, list)):
        items = [replaced(item, old, new) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        for key in list(value):
            if value[key] is old:
                value[key] = new
    return value
