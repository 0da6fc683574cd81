"""Attention logits: their maximum and the entropy of their softmax, seen where every Transformers model passes them.

Models in Transformers' style look up an attention function by the name in their config. While the probe is on, that
name is the probe's: it computes the logits' statistics from query and key, head by head, and the original function
gives the output.
"""

import sys
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from periln.eval.structure.anatomy import Anatomy
from periln.runkit.number_format import FP16

NAME = "periln_stability_probe"
HIDDEN = -1e30  # a logit that no query sees: finite, so that 0 times it is 0


class AttentionProbe:
    """A context manager around forward passes. `rows()` is empty for a model that calls no attention function.

    Logits are q k^T * scaling, soft-capped where the model does that, at the positions that the mask shows. `entropy`
    is in nats, the mean over batch, heads and queries.
    """

    def __init__(self, anatomy: Anatomy):
        self.layer_of = {m: s.layer for s in anatomy.sublayers if s.kind == "attn" for m in s.module.modules()}
        configs = [m.config for m in anatomy.model.modules() if hasattr(m, "config")]
        self.configs = list({id(c): c for c in configs}.values())
        self.sums: dict[int, dict[str, float]] = {}
        self._before: list[tuple[Any, Any]] = []

    def __enter__(self) -> "AttentionProbe":
        ALL_ATTENTION_FUNCTIONS.register(NAME, self._attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, eager_mask)
        self._before = [(c, getattr(c, "_attn_implementation_internal", None)) for c in self.configs]
        self._original = {c for _, c in self._before if c} - {NAME}
        for config in self.configs:
            config._attn_implementation_internal = NAME
        return self

    def __exit__(self, *exc: object) -> None:
        for config, before in self._before:
            config._attn_implementation_internal = before
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            registry._global_mapping.pop(NAME, None)

    def _attend(self, module: nn.Module, query, key, value, attention_mask, **kwargs: Any):
        odd = any(isinstance(kwargs.get(name), torch.Tensor) for name in ("s_aux", "position_bias"))
        if module in self.layer_of and not odd:
            self._see(self.layer_of[module], module, query, key, attention_mask, kwargs)
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if "sdpa" in self._original or eager is None:
            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
        return eager(module, query, key, value, attention_mask, **kwargs)

    @torch.no_grad()
    def _see(self, layer: int, module: nn.Module, query, key, mask, kwargs: dict[str, Any]) -> None:
        """query (B, H, S, E), key (B, K, S, E), mask (B|1, 1, S, S) or None."""
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        group = query.shape[1] // key.shape[1]
        causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        sums = self.sums.setdefault(layer, {"max": -torch.inf, "max_abs": 0.0, "entropy": 0.0, "count": 0})
        for b in range(query.shape[0]):
            logits = query[b].float() @ key[b].float().repeat_interleave(group, 0).transpose(1, 2) * scaling
            if kwargs.get("softcap") is not None:
                logits = torch.tanh(logits / kwargs["softcap"]) * kwargs["softcap"]
            hidden = ~causal
            if mask is not None:
                seen = mask[min(b, len(mask) - 1)]
                hidden = ~seen if seen.dtype == torch.bool else seen <= torch.finfo(seen.dtype).min / 2
            # One exponential: with e = exp(l - m) and Z = sum e, the entropy is log Z - sum e (l - m) / Z.
            low, high = (bound.item() for bound in logits.masked_fill(hidden, 0.0).aminmax())
            logits = logits.masked_fill_(hidden, HIDDEN)
            top = logits.amax(-1, keepdim=True)
            logits -= top
            e = logits.exp()
            z = e.sum(-1)
            entropy = z.log() - (e * logits).sum(-1) / z
            sums["max"] = max(sums["max"], top.max().item())
            sums["max_abs"] = max(sums["max_abs"], -low, high)
            sums["entropy"] += entropy.double().sum().item()
            sums["count"] += entropy.numel()

    def rows(self, step: int) -> list[tuple]:
        """Rows of tensor `attention_logits`, for the layers that were seen."""
        found = []
        for layer, sums in sorted(self.sums.items()):
            stats = {"max": sums["max"], "entropy": sums["entropy"] / sums["count"], "max_abs": sums["max_abs"]}
            stats["headroom_bits"] = FP16.headroom(sums["max_abs"])
            found += [(step, layer, "attn", "attention_logits", stat, value) for stat, value in stats.items()]
        return found
