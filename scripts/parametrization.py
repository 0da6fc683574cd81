"""How a recipe's numbers change with the model's width and depth, so that a learning rate found at a small size holds.

    standard     nothing changes
    mup          Tensor Programs V, 2203.03466 (tables 3 and 8, Adam), in width
    depth_mup    and in depth: Tensor Programs VI, 2310.02244, residual multiplier 1/sqrt(L)
    completep    and in depth: 2505.01618 (table 1), residual multiplier 1/L

With m = width / base_width, r = depth / base_depth, and the rule's a (1/2 or 1; in `mup` r is taken as 1):

| | initial deviation | learning rate | weight decay | epsilon |
|---|---|---|---|---|
| embedding | 1 | 1 | 1 | 1/m |
| matrix in a layer | 1/sqrt(m) | r^(a-1)/m | m | r^(-a)/m |
| vector in a layer | 1 | r^(a-1) | 1 | r^(-a)/m |
| norm at an end of the stream | 1 | 1 | 1 | 1/m |
| head | 1/m | 1/m | m | 1 |

The branches are multiplied by r^(-a) (`residual_scale`), and scores are divided by the head's size where that grows:
`query_pre_attn_scalar` = head_dim^2 / base_head_dim. The papers' output multiplier 1/m is folded into the head, whose
row says the same for Adam; so a checkpoint is a plain one of the family. A decoupled decay is multiplied by the rate,
hence m.

Muon's steps do not shrink with the gradient, but a matrix is to move by sqrt(out/in) in its spectral norm (2310.17813):
its rows say how their rate depends on width (`hidden_width_power`).
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from periln.runkit.errors import UsageError

ALPHAS: dict[str, float | None] = {"standard": None, "mup": None, "depth_mup": 0.5, "completep": 1.0}
DEPTH_RULES = tuple(name for name, alpha in ALPHAS.items() if alpha is not None)


@dataclass
class Parametrization:
    """The rule, and the size at which the recipe's numbers were found."""

    rule: Literal["standard", "mup", "depth_mup", "completep"] = "standard"
    base_width: int | None = None  # hidden_size of the model whose numbers the recipe has; for every rule but standard
    base_depth: int | None = None  # its num_hidden_layers; for depth_mup and completep
    base_head_dim: int | None = None  # its head_dim; null: that of this model

    def check(self, config: Any, model: dict[str, Any], init_from: str | None) -> None:
        """Raise UsageError for what does not fit the rule; `model` is what the recipe says of `config`."""
        name = f"parametrization.rule {self.rule}"
        deep = self.rule in DEPTH_RULES
        wanted = {"base_width": self.rule != "standard", "base_depth": deep}
        for field, needed in wanted.items():
            if needed and getattr(self, field) is None:
                raise UsageError(f"parametrization.{field} is missing: {name} needs it")
        for field in ("base_width", "base_depth", "base_head_dim"):
            if not wanted.get(field, self.rule != "standard") and getattr(self, field) is not None:
                raise UsageError(f"parametrization.{field} is {getattr(self, field)}, which {name} does not use")
        if self.rule == "standard":
            return
        if config.tie_word_embeddings:
            raise UsageError(f"{name}: model.tie_word_embeddings gives embedding and head one weight, and they differ")
        if init_from is not None:
            raise UsageError(f"{name}: init_from {init_from} has weights that did not begin by it")
        if self.base_head_dim is not None and "query_pre_attn_scalar" in model:
            raise UsageError("parametrization.base_head_dim and model.query_pre_attn_scalar say the same: give one")
        if deep and model.get("residual_scale", 1.0) != 1.0:
            raise UsageError(f"{name} sets model.residual_scale, which is {model['residual_scale']!r}: leave it out")
        if deep and config.depth_scaled_init:
            raise UsageError(f"{name}: model.depth_scaled_init would scale the branches with depth once more")
        if deep and any(s.residual_norm for layer in config.stream_plan().layers for s in layer.sublayers):
            raise UsageError(
                f"{name}: its residual multiplier is of a stream that nothing norms after the add, and "
                f"norm_placement {config.norm_placement!r} does"
            )

    def model_fields(self, config: Any) -> dict[str, Any]:
        """What the rule sets in a configuration."""
        if self.rule == "standard":
            return {}
        found: dict[str, Any] = {}
        if (alpha := ALPHAS[self.rule]) is not None and self.base_depth:
            found["residual_scale"] = (config.num_hidden_layers / self.base_depth) ** -alpha
        if self.base_head_dim not in (None, config.head_dim):
            found["query_pre_attn_scalar"] = config.head_dim**2 / self.base_head_dim
        return found


@dataclass(frozen=True)
class Factors:
    """What multiplies a parameter's initial standard deviation, learning rate, weight decay and Adam's epsilon."""

    init: float = 1.0
    rate: float = 1.0
    decay: float = 1.0
    eps: float = 1.0


def kind_of(name: str, parameter: torch.Tensor) -> str:
    """`embedding`, `head`, `matrix` or `vector` (in a layer), or `end`, by a parameter's name in the model."""
    words = name.split(".")
    if "embed_tokens" in words:
        return "embedding"
    if "lm_head" in words:
        return "head"
    if "layers" in words:
        return "matrix" if parameter.ndim >= 2 else "vector"
    return "end"


def factors_by_kind(rules: Parametrization, config: Any, width_power: float = -1.0) -> dict[str, Factors]:
    """The factors of every kind of parameter; `width_power`: of the width in the rate of the layers' matrices."""
    kinds = dict.fromkeys(("embedding", "matrix", "vector", "end", "head"), Factors())
    if rules.rule == "standard":
        return kinds
    assert rules.base_width
    m, r, alpha = config.hidden_size / rules.base_width, 1.0, ALPHAS[rules.rule] or 1.0
    if rules.rule in DEPTH_RULES and rules.base_depth:
        r = config.num_hidden_layers / rules.base_depth
    ends = Factors(eps=1 / m)
    inside = replace(ends, rate=r ** (alpha - 1), eps=r**-alpha / m)
    matrix = replace(inside, init=m**-0.5, rate=inside.rate * m**width_power, decay=m**-width_power)
    head = Factors(init=1 / m, rate=1 / m, decay=m)
    return {"embedding": ends, "matrix": matrix, "vector": inside, "end": ends, "head": head}


@torch.no_grad()
def scale_initial_weights(model: nn.Module, kinds: dict[str, Factors]) -> None:
    """Multiply freshly drawn weights, in place, so that a seed draws the same numbers under every rule."""
    for name, parameter in model.named_parameters():
        factor = kinds[kind_of(name, parameter)].init
        if factor != 1.0 and parameter.ndim >= 2:
            parameter.mul_(factor)
