"""Carry exponents into the weights and the epsilons: the function stays, the intermediate numbers change.

Powers of two are exact in binary floating point, so in FP32 nothing is rounded (short of underflow) except Gemma's
gains, which are stored as w = gain - 1.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from modeling_periln.configuration_periln import LAYER_NORM_SLOTS, STREAM_NORM_SLOTS
from periln.eval.fp16.exponents import Plan
from periln.eval.fp16.families import SLOTS
from periln.eval.fp16.layout import Layout, NormUse, names_of
from periln.runkit.errors import UserError


@dataclass
class Epsilon:
    """What became of the norms' epsilons: the field's name, old and new values, and whether that is exact."""

    field: str
    before: Any
    after: Any
    exact: bool


@torch.no_grad()
def apply(model: nn.Module, layout: Layout, plan: Plan) -> Epsilon:
    """Rewrite a model in place: weights, epsilons and configuration.

    Raises:
        UserError: the model has weights that the layout does not account for.
    """
    _account_for_all(model, layout)
    if layout.epsilon == SLOTS:
        _refuse_own_epsilons(model.config)
    modules, e = dict(model.named_modules()), plan.exponents
    for table in layout.tables:
        modules[table.name].weight.mul_(2.0 ** e[table.gives])
    for matrix in layout.matrices:
        linear = modules[matrix.name]
        rows = slice(None) if matrix.rows is None else matrix.rows.to(linear.weight.device)
        linear.weight[rows] = linear.weight[rows] * 2.0 ** (e[matrix.gives] - e[matrix.reads])
        if getattr(linear, "bias", None) is not None:
            linear.bias[rows] = linear.bias[rows] * 2.0 ** e[matrix.gives]
    for norm in layout.norms:
        _scale_gain(norm, modules[norm.name], 2.0 ** e[norm.gives])
    return _set_epsilon(model, layout, plan)


def _account_for_all(model: nn.Module, layout: Layout) -> None:
    known = set(names_of(layout))
    for name, _ in model.named_parameters():
        if name.rpartition(".")[0] not in known:
            raise UserError(f"no rewrite is known for a model with the weight {name}")


def _refuse_own_epsilons(config: Any) -> None:
    """PeriLlama's `norm_eps`, where the new epsilons go, does not reach a norm whose slot has its own."""
    own = next((norm.eps for norm in config.stream_plan().norms() if norm.eps is not None), None)
    if own is not None:
        field = "norm_placement" if config.layer_placements is None else "layer_placements"
        raise UserError(f"{field} gives a slot its own eps {own!r}, which a rewrite cannot change: give it in norm_eps")


def _scale_gain(norm: NormUse, module: nn.Module, factor: float) -> None:
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if factor == 1.0:
        return
    if weight is None:
        raise UserError(f"{norm.name} has no gain that could carry a factor")
    weight.copy_((weight.double() + norm.facts.offset) * factor - norm.facts.offset)
    if bias is not None:
        bias.mul_(factor)


def _set_epsilon(model: PreTrainedModel, layout: Layout, plan: Plan) -> Epsilon:
    config, e, modules = model.config, plan.exponents, dict(model.named_modules())
    if layout.epsilon == SLOTS:
        before = config.norm_eps
        after = _eps_by_slot(config, layout, plan)
        changed = any(e[n.reads] for n in layout.norms)
        config.norm_eps = after if changed else before
        for norm in layout.norms:
            _set_on(modules[norm.name], norm.facts.eps * 4.0 ** e[norm.reads])
        return Epsilon("norm_eps", before, config.norm_eps, True)
    before = getattr(config, layout.epsilon)
    shared = {e[n.reads] for n in layout.norms}
    exact = len(shared) == 1
    if exact:
        setattr(config, layout.epsilon, before * 4.0 ** shared.pop())
    for norm in layout.norms:
        _set_on(modules[norm.name], getattr(config, layout.epsilon))
    return Epsilon(layout.epsilon, before, getattr(config, layout.epsilon), exact)


def _set_on(module: nn.Module, eps: float) -> None:
    setattr(module, "eps" if hasattr(module, "eps") else "variance_epsilon", eps)


def _eps_by_slot(config: Any, layout: Layout, plan: Plan) -> dict[str, Any]:
    """PeriLlama's mapping from slot to an epsilon, or to one for each layer; only slots that have a norm."""
    found: dict[str, Any] = {}
    for norm in layout.norms:
        *_, slot = norm.name.split(".")
        value = norm.facts.eps * 4.0 ** plan.exponents[norm.reads]
        if slot in STREAM_NORM_SLOTS:
            found[slot] = value
        else:
            assert slot in LAYER_NORM_SLOTS, norm.name
            layer = int(norm.name.split("layers.")[1].split(".")[0])
            every = [config.eps_of(slot, i) for i in range(config.num_hidden_layers)]
            found.setdefault(slot, every)[layer] = value
    return found
