"""The exact part of a retrofit: tensors of the source in the configuration in which its factors and norm are folded."""

import copy
import math
from typing import Any

import torch

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from modeling_periln.conversions import normed_table, scaled, scaled_gain
from periln.scripts.retrofit.plan import RetrofitPlan

FIRST = {"attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "mlp": ("mlp.gate_proj", "mlp.up_proj")}
LAST = {"attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def build(config: PeriLlamaConfig, weights: dict[str, torch.Tensor]) -> PeriLlamaForCausalLM:
    """A model of `config` in FP32, in evaluation mode, with copies of `weights`; norms without any have gain 1."""
    model = PeriLlamaForCausalLM(copy.deepcopy(config)).float()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {HEAD} if config.tie_word_embeddings else set()
    assert not unexpected and all("_norm." in name for name in set(missing) - tied), (missing, unexpected)
    return model.eval()


@torch.no_grad()
def fold(source: PeriLlamaForCausalLM, plan: RetrofitPlan) -> PeriLlamaForCausalLM:
    """The model of `plan.folded`, the same function as `source`, which is in FP32."""
    before, after = plan.source.stream_plan(), plan.folded.stream_plan()
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    if plan.unties:
        state[HEAD] = state[TABLE].clone()
    elif plan.source.tie_word_embeddings:
        state.pop(HEAD, None)
    if before.embedding_norm and not after.embedding_norm:
        norm: Any = source.model.embed_norm
        before_it, gain = float(plan.source.embedding_multiplier), state.pop("model.embed_norm.weight")
        eps, centered = float(norm.variance_epsilon), is_centered(norm)
        state[TABLE] = normed_table(state[TABLE], gain, eps, before=before_it, is_centered=centered)
    for i, (old, new) in enumerate(zip(before.layers, after.layers, strict=True)):
        for name, had, has in (("attn", old.attn, new.attn), ("mlp", old.mlp, new.mlp)):
            layer = f"model.layers.{i}."
            _scale(state, source, f"{layer}{name}_input_norm", [layer + p for p in FIRST[name]], had.c, has.c)
            # A learned factor is the same in both, and no number.
            if had.s != has.s:
                _scale(state, source, f"{layer}{name}_output_norm", [layer + LAST[name]], had.s, has.s, bias=True)
    return build(plan.folded, state)


def is_centered(norm: torch.nn.Module) -> bool:
    """Whether a norm's gain is 1 + its weight."""
    return bool(getattr(norm, "centered", False))


def _scale(
    state: dict[str, torch.Tensor],
    source: PeriLlamaForCausalLM,
    norm: str,
    linear: list[str],
    had: Any,
    has: Any,
    bias: bool = False,
) -> None:
    """Multiply a norm's gain, or where there is none the linear maps, by had / has."""
    factor = had / has
    if math.isclose(factor, 1.0, rel_tol=1e-12):
        return
    if f"{norm}.weight" in state:
        centered = is_centered(source.get_submodule(norm))
        state[f"{norm}.weight"] = scaled_gain(state[f"{norm}.weight"], factor, centered, centered)
        if f"{norm}.bias" in state:
            state[f"{norm}.bias"] = scaled(state[f"{norm}.bias"], factor)
        return
    for name in linear:
        for kind in ("weight", "bias") if bias else ("weight",):
            if f"{name}.{kind}" in state:
                state[f"{name}.{kind}"] = scaled(state[f"{name}.{kind}"], factor)
