"""Calibrate what does not fold: gains of new norms, factors in place of removed ones, in one forward pass.

All calibration text goes through the target as one batch. Where a norm has appeared or gone, a hook sees what arrives,
sets the gain or scales the projections by a rule of `fit`, and the pass continues with that: each layer is calibrated
on what the layers before it became.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from modeling_periln.admission import model_norms
from modeling_periln.norms import rms_norm
from periln.scripts.retrofit.fit import Fit, fit
from periln.scripts.retrofit.fold import FIRST, HEAD, LAST, build, is_centered
from periln.scripts.retrofit.plan import APPEARS, EMBEDDING, GOES, RetrofitPlan

LEAST_SHARE = 1e-3  # a new norm's epsilon is at most this share of the mean square that it sees
Hook = Callable[[Any, tuple[torch.Tensor, ...]], tuple[torch.Tensor] | None]  # of a norm, or what is in its place


@dataclass(frozen=True)
class Calibrated:
    """The target, and what was chosen at each place: layer (from 0), slot, fit, and a new norm's epsilon."""

    model: PeriLlamaForCausalLM
    rule: str
    places: list[dict[str, Any]]


@torch.no_grad()
def calibrate(
    folded: PeriLlamaForCausalLM, plan: RetrofitPlan, ids: torch.Tensor, rule: str, soften: float = 0.0
) -> Calibrated:
    """The target's model, calibrated by `rule` on `ids` (N, S).

    Args:
        folded: the model of `plan.folded`, in FP32; it stays as it is.
        soften: new output norms get the epsilon soften times the largest mean square that a token's branch has. At 0 it
            is the source's, or `LEAST_SHARE` of the mean square over all tokens where that is less. The larger, the
            nearer the norm is to a constant factor: it gives back the loss, and its bound.
    """
    state = {name: t for name, t in folded.state_dict().items() if not _is_gone(name, plan)}
    if plan.target.tie_word_embeddings:
        state.pop(HEAD, None)
    model = build(plan.target, state)
    places: list[dict[str, Any]] = []
    handles = []
    for change in plan.changes:
        for i in change.layers or (None,):
            if change.exact:
                continue
            place = EMBEDDING if i is None else f"layers.{i}.{change.slot}"
            note: dict[str, Any] = {"layer": i, "slot": change.slot, "what": change.what}
            places.append(note)
            if change.what == APPEARS:
                hook = _new_norm(note, rule, _epsilon_rule(plan, change.slot, i, soften))
            else:
                assert i is not None and change.what == GOES
                hook = _removed_norm(note, rule, folded.model.get_submodule(place), model.model.layers[i])
            handles.append(model.model.get_submodule(place).register_forward_pre_hook(hook))
    try:
        model.model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    _store_epsilons(model.config, plan, places)
    return Calibrated(model, rule, places)


def _is_gone(name: str, plan: RetrofitPlan) -> bool:
    """Whether a tensor belongs to a norm that goes."""
    parts = name.split(".")
    gone = {(i, change.slot) for change in plan.changes if change.what == GOES for i in change.layers}
    return parts[1] == "layers" and (int(parts[2]), parts[3]) in gone


Epsilon = Callable[[float, float, float], float]  # of the configuration's epsilon, the mean square, a token's largest


def _epsilon_rule(plan: RetrofitPlan, slot: str, layer: int | None, soften: float) -> Epsilon:
    """How a new norm's epsilon follows from what it sees; one that the placement itself names stays."""
    stream = plan.target.stream_plan()
    sublayer, _, place = slot.partition("_")
    norm: Any = stream.embedding_norm if layer is None else getattr(getattr(stream.layers[layer], sublayer), place)
    if norm.eps is not None:
        return lambda eps, square, largest: eps
    if soften and place == "output_norm":
        return lambda eps, square, largest: soften * largest or eps
    return lambda eps, square, largest: min(eps, LEAST_SHARE * square) if square else eps


def _new_norm(note: dict[str, Any], rule: str, epsilon: Epsilon) -> Hook:
    """Set gain and epsilon of the norm that is about to run."""

    def hook(norm: Any, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0]
        squares = x.double().square().mean(-1)
        square, largest = squares.mean().item(), squares.max().item()
        norm.variance_epsilon = epsilon(norm.variance_epsilon, square, largest)
        have = rms_norm(x, torch.ones(x.shape[-1]), norm.variance_epsilon)
        found = fit(x, have, rule)
        norm.weight.copy_(found.gain - float(is_centered(norm)))
        note.update(found.summary() | {"eps": norm.variance_epsilon, "rms": square**0.5, "largest_rms": largest**0.5})

    return hook


def _removed_norm(note: dict[str, Any], rule: str, norm: Any, layer: nn.Module) -> Hook:
    """Fold the norm's gain, times a factor for its scale, into the projections beside the place where it was."""
    sublayer, place = note["slot"].split("_", 1)

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor] | None:
        x, want = args[0], norm(args[0])
        if rule == "unit":  # the norm's own gain, and nothing for the scale
            gain = norm.weight.double() + float(is_centered(norm))
            found = Fit(gain, fit(want, x * gain.float(), rule).error)
        else:
            found = fit(want, x, rule)
        note.update(found.summary() | {"rms": x.double().square().mean().item() ** 0.5})
        factor = found.gain.to(x.dtype)
        if place == "input_norm":
            for name in FIRST[sublayer]:
                first: Any = layer.get_submodule(name)
                first.weight.mul_(factor)  # columns; a bias is added behind them
            return None
        last: Any = layer.get_submodule(LAST[sublayer])
        last.weight.mul_(factor[:, None])
        if last.bias is not None:
            last.bias.mul_(factor)
        return (x * factor,)  # what arrives was made before

    return hook


def _store_epsilons(config: PeriLlamaConfig, plan: RetrofitPlan, places: list[dict[str, Any]]) -> None:
    """Write the epsilons of new norms into the configuration: a number a slot, or one a layer."""
    new = {(note["slot"], note["layer"]): note["eps"] for note in places if "eps" in note}
    if not new:
        return
    eps: dict[str, Any] = {}
    for slot in sorted({_slot_of(name) for name, _, _ in model_norms(config)}):
        if slot in ("embed_norm", "final_norm"):
            eps[slot] = new.get((slot, None), config.eps_of(slot))
            continue
        values = [new.get((slot, i), config.eps_of(slot, i)) for i in range(config.num_hidden_layers)]
        eps[slot] = values[0] if len(set(values)) == 1 else values
    config.norm_eps = next(iter(eps.values())) if _is_one(eps) else eps
    config.validate_norms()


def _is_one(eps: dict[str, Any]) -> bool:
    values = list(eps.values())
    return not any(isinstance(v, list) for v in values) and len(set(values)) == 1


def _slot_of(name: str) -> str:
    parts = name.split(".")
    if parts[-1] == "inner_norm":
        return "attn_inner_norm" if parts[-2] == "self_attn" else "mlp_inner_norm"
    return parts[-1]
