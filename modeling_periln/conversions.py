"""How the weights of a row of the table and of one of Transformers' architectures correspond.

With B( f( c * A(x) ) ) as in `placements.py`, what the other side has no place for is folded:

| of ours | into |
|---|---|
| c | A's gamma |
| s | B's gamma; where there is no B, o_proj and down_proj |
| an embedding norm, `embedding_multiplier` | every row of an untied table: both are functions of the token alone |
| `query_pre_attn_scalar` | q_norm's gamma; where there is none, q_proj |
| a gain 1 + w (`centered`) | a gain, and the other way round |

What a placement is made of decides, not its name: the user's own mapping with the same norms converts as well.
Which architectures there are is in `architectures.py`, what rules a conversion out in `admission.py`.

Nothing here reads or writes files: a recipe says of each tensor from which tensors it is made, and how; `convert.py`
follows it, in memory or on disk. Shapes: E head size, D hidden size, V vocabulary.
"""

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from .admission import PERI_LLAMA, admissible_exports, import_obstacles, model_norms, norm_epsilons, score_scale
from .architectures import ARCHITECTURES, Architecture, ConversionRefused, architecture
from .attention_fields import FULL, LAYER_TYPES, SLIDING, layer_types_of, rope_of, rotary_dims
from .configuration_periln import PeriLlamaConfig
from .norms import PeriLlamaRMSNorm
from .placements import LayerPlan

# Configurations

_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "initializer_range", "use_cache", "pad_token_id",
    "bos_token_id", "eos_token_id", "tie_word_embeddings",
)  # fmt: skip


def _shared_fields(config: PreTrainedConfig) -> dict[str, Any]:
    dropout = {"attention_dropout": config.attention_dropout or 0.0}
    return {name: copy.copy(getattr(config, name)) for name in _SHARED} | dropout


def native_config(config: PeriLlamaConfig, target: str) -> PreTrainedConfig:
    """The configuration of `target` for the weights that `export_recipe` makes.

    Raises:
        ConversionRefused: there is none; the message names field and reason.
    """
    other, reason = architecture(target), admissible_exports(config)[target]
    if reason:
        raise ConversionRefused(f"cannot convert to {target}: {reason}")
    fields = _shared_fields(config) | {"head_dim": config.head_dim, "rms_norm_eps": norm_epsilons(config)["final_norm"]}
    fields["initializer_range"] = float(config.initializer_range)
    fields[other.act_field] = config.hidden_act
    if other.attention_bias:
        fields["attention_bias"] = config.attention_bias
    if other.mlp_bias:
        fields["mlp_bias"] = config.mlp_bias
    if other.output_switch:
        fields["use_post_norm"] = bool(config.stream_plan().layers[0].attn.output_norm)
    if other.scaled_scores:
        fields["query_pre_attn_scalar"] = _their_score_scale(config, other)
    if other.table_scale == "embedding_multiplier":
        fields["embedding_multiplier"] = float(config.embedding_multiplier)
    fields |= _their_attention(config, other)
    try:
        native = other.config_class(**fields)
    except StrictDataclassError as error:  # Transformers 5.4 with a newer huggingface_hub refuses OLMo 2's booleans
        version, why = transformers.__version__, " ".join(str(error).split())
        raise ConversionRefused(f"transformers {version} cannot build the configuration of {target}: {why}") from error
    if other.partial_rotary:
        # Converters to other formats look for it here, and assume 0.5 (GLM-4's own) where it is missing.
        native.partial_rotary_factor = fields["rope_parameters"]["partial_rotary_factor"]
    native.dtype = config.dtype
    native.architectures = [other.model_class.__name__]
    return native


def _their_score_scale(config: PeriLlamaConfig, other: Architecture) -> int:
    """For a configuration that takes only whole numbers; any other is folded."""
    ours = score_scale(config)
    return int(ours) if other.scaled_scores and ours.is_integer() else _head_dim(config)


def _head_dim(config: PeriLlamaConfig) -> int:
    assert config.head_dim is not None  # filled in when the configuration is made
    return config.head_dim


def _their_attention(config: PeriLlamaConfig, other: Architecture) -> dict[str, Any]:
    """Layer types, window and ropes in the other configuration."""
    types, window = layer_types_of(config), config.sliding_window
    fields: dict[str, Any] = {}
    ropes = {kind: copy.deepcopy(rope_of(config, kind)) for kind in types}
    for rope in ropes.values():
        share = rope.pop("partial_rotary_factor", 1.0)
        if other.partial_rotary:
            rope["partial_rotary_factor"] = share
    fields["rope_parameters"] = next(iter(ropes.values()))
    if other.ropes_by_type:  # these want both, used or not
        default = fields["rope_parameters"]
        fields["rope_parameters"] = {kind: ropes.get(kind, copy.deepcopy(default)) for kind in LAYER_TYPES}
    if other.windows != "none":
        fields["sliding_window"] = window
    if other.windows == "by type":
        fields["layer_types"] = types
    if other.ropes_by_type and window is None:  # these make the mask of sliding layers even where there are none
        fields["sliding_window"] = config.max_position_embeddings
    if other.name == "Qwen3":
        fields["use_sliding_window"] = window is not None
    if other.name == "Exaone4":
        fields["sliding_window_pattern"] = None
    return fields


def periln_config(config: PreTrainedConfig) -> PeriLlamaConfig:
    """PeriLlama's configuration for a model of one of the architectures.

    Raises:
        ConversionRefused: the architecture has no row, or the model something that no row has (an odd head size).
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ConversionRefused(f"model_type={kind!r} is not a row of PeriLlama's: use one of {list(ARCHITECTURES)}")
    other = ARCHITECTURES[kind]
    reason = next(import_obstacles(config, other), None)
    if reason:
        raise ConversionRefused(f"cannot convert from {kind}: {reason}")
    fields = _shared_fields(config) | {
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "hidden_act": getattr(config, other.act_field),
        "attention_bias": getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "norm_eps": config.rms_norm_eps,
        "norm_gain": "centered" if other.centered else "channel",
        "norm_placement": other.row if getattr(config, "use_post_norm", True) else "pre",
        "embedding_norm": False,
        "qk_norm": other.qk_norm,
        "residual_scale": getattr(config, "residual_multiplier", 1.0),
        **_our_attention(config, other),
    }
    if other.scaled_scores:
        fields["query_pre_attn_scalar"] = config.query_pre_attn_scalar
    if other.table_scale == "sqrt(hidden_size)":
        fields["embedding_multiplier"] = config.hidden_size**0.5
    try:
        ours = PeriLlamaConfig(**fields)
    except ValueError as error:
        raise ConversionRefused(f"cannot convert from {kind}: {error}") from error
    ours.dtype = config.dtype
    ours.architectures = ["PeriLlamaForCausalLM"]
    return ours


def _our_attention(config: PreTrainedConfig, other: Architecture) -> dict[str, Any]:
    """Layer types, window and ropes in our configuration; what is the same in all layers is written once."""
    window = config.sliding_window if other.windows != "none" else None
    types = list(config.layer_types) if other.windows == "by type" else [FULL if window is None else SLIDING]
    ropes = {kind: config.rope_parameters[kind] if other.ropes_by_type else config.rope_parameters for kind in types}
    ropes = copy.deepcopy(ropes)
    if not other.partial_rotary:  # these rotate the whole head, whatever it says
        for rope in ropes.values():
            rope.pop("partial_rotary_factor", None)
    first = ropes[types[0]]
    fields: dict[str, Any] = {"sliding_window": window if SLIDING in types else None}
    fields["rope_parameters"] = first if all(rope == first for rope in ropes.values()) else ropes
    if len(set(types)) > 1:
        fields["layer_types"] = types
    if other.no_rope_beside_windows and window is not None and FULL in types:
        fields["no_rope_layers"] = [int(kind == SLIDING) for kind in types]
    return fields


# Weights


class Recipe(NamedTuple):
    """A tensor is `make(*sources)`, in the sources' dtype where numbers are only moved, else in FP32 at least."""

    sources: tuple[str, ...]
    make: Callable[..., torch.Tensor]


def tensor_names(config: PeriLlamaConfig) -> Iterator[str]:
    """The names in the state dict of a PeriLlama with RMSNorm, without a tied head."""
    yield "model.embed_tokens.weight"
    for i in range(config.num_hidden_layers):
        linear = [(f"self_attn.{p}_proj", config.attention_bias) for p in "qkvo"]
        linear += [(f"mlp.{p}_proj", config.mlp_bias) for p in ("gate", "up", "down")]
        for name, bias in linear:
            yield f"model.layers.{i}.{name}.weight"
            if bias:
                yield f"model.layers.{i}.{name}.bias"
    for name, _, _ in model_norms(config):
        yield f"{name}.weight"
    if not config.tie_word_embeddings:
        yield "lm_head.weight"


def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """`factor` times the tensor, rounded once, to FP32 at least; the tensor itself for a factor of 1."""
    if factor == 1.0:
        return tensor
    return (tensor.to(torch.float64) * factor).to(torch.promote_types(tensor.dtype, torch.float32))


def scaled_gain(weight: torch.Tensor, factor: float, is_centered: bool, to_centered: bool) -> torch.Tensor:
    """A norm's weight whose gain is `factor` times as large; a centered weight w has the gain 1 + w."""
    if factor == 1.0 and is_centered == to_centered:
        return weight
    gain = factor * (weight.to(torch.float64) + float(is_centered))
    return (gain - float(to_centered)).to(torch.promote_types(weight.dtype, torch.float32))


def normed_table(
    table: torch.Tensor,
    gamma: torch.Tensor,
    eps: float,
    before: float = 1.0,
    after: float = 1.0,
    is_centered: bool = False,
) -> torch.Tensor:
    """The embedding norm applied to each row of the table (V, D), with the model's own norm, in FP32 at least.

    before, after: factors of the norm's input and output.
    """
    dtype = torch.promote_types(table.dtype, torch.float32)
    norm = PeriLlamaRMSNorm(gamma.shape[0], eps, learnable=False).to(device=table.device, dtype=dtype)
    norm.weight.copy_(scaled_gain(gamma, after, is_centered, to_centered=False))
    return torch.cat([norm(scaled(rows, before).to(dtype)) for rows in table.split(8192)])


def interleaved(tensor: torch.Tensor, head_dim: int, dims: int | None = None) -> torch.Tensor:
    """Rows (heads * E, ...) reordered from rotary pairs (i, i + R/2) to pairs (2i, 2i + 1), head by head.

    dims: R, how many of a head are rotated; None: all.
    """
    heads = tensor.unflatten(0, (-1, head_dim))
    turned, rest = heads[:, : dims or head_dim], heads[:, dims or head_dim :]
    turned = turned.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat((turned, rest), dim=1).flatten(0, 1)


def halved(tensor: torch.Tensor, head_dim: int, dims: int | None = None) -> torch.Tensor:
    """The inverse of `interleaved`."""
    heads = tensor.unflatten(0, (-1, head_dim))
    turned, rest = heads[:, : dims or head_dim], heads[:, dims or head_dim :]
    turned = turned.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat((turned, rest), dim=1).flatten(0, 1)


def _half(tensor: torch.Tensor, index: int) -> torch.Tensor:
    return tensor.chunk(2)[index]


def _no_bias(weight: torch.Tensor) -> torch.Tensor:
    return weight.new_zeros(weight.shape[0])


def _layer_factor(slot: str, layer: LayerPlan) -> float:
    """What c and s of the layer do to the tensors of a module."""
    for name, last, sublayer in (("attn", "o_proj", layer.attn), ("mlp", "down_proj", layer.mlp)):
        if slot == f"{name}_input_norm":
            return sublayer.c
        if slot == (f"{name}_output_norm" if sublayer.output_norm else last):
            return cast(float, sublayer.s)  # a learned one is an obstacle
    return 1.0


def _their_name(name: str, other: Architecture) -> str:
    parts = name.split(".")
    pairs = (f"{before}.{part}" for before, part in zip(["", *parts], parts, strict=False))
    return ".".join(other.names.get(pair, other.names.get(part, part)) for pair, part in zip(pairs, parts, strict=True))


def _query_factor(config: PeriLlamaConfig, other: Architecture, slot: str) -> float:
    """What the queries are multiplied by, where the other side divides the scores by another number."""
    carrier = "q_proj" if other.qk_norm is None else "q_norm"
    return math.sqrt(_their_score_scale(config, other) / score_scale(config)) if slot == carrier else 1.0


def export_recipe(config: PeriLlamaConfig, target: str) -> dict[str, Recipe]:
    """For each tensor of `target` how it is made from ours; `config` must admit the export."""
    other, plan = ARCHITECTURES[target], config.stream_plan()
    recipe: dict[str, Recipe] = {}
    norms = {f"{name}.weight": (norm.gain or config.norm_gain) == "centered" for name, norm, _ in model_norms(config)}
    dims = rotary_dims(config.head_dim, rope_of(config, layer_types_of(config)[0]))
    ours = float(config.embedding_multiplier)
    theirs = other.table_factor(config.hidden_size, ours)
    for name in tensor_names(config):
        parts = name.split(".")
        slot, their_name = parts[-2], _their_name(name, other)
        factor = _layer_factor(slot, plan.layers[int(parts[2])]) if parts[1] == "layers" else 1.0
        factor *= _query_factor(config, other, slot)
        if slot == "embed_norm":
            continue
        if slot == "embed_tokens":
            recipe[their_name] = Recipe((name,), partial(scaled, factor=ours / theirs))
            if plan.embedding_norm:
                eps = next(eps for module, _, eps in model_norms(config) if module == "model.embed_norm")
                how: dict[str, Any] = {"eps": eps, "before": ours, "after": 1 / theirs}
                how["is_centered"] = norms["model.embed_norm.weight"]
                recipe[their_name] = Recipe((name, "model.embed_norm.weight"), partial(normed_table, **how))
        elif name in norms:
            if other.centered or norms[name]:
                make = partial(scaled_gain, factor=factor, is_centered=norms[name], to_centered=other.centered)
            else:
                make = partial(scaled, factor=factor)
            recipe[their_name] = Recipe((name,), make)
        elif other.fused_and_interleaved and slot in ("q_proj", "k_proj"):
            order = partial(interleaved, head_dim=_head_dim(config), dims=dims)
            recipe[their_name] = Recipe((name,), lambda tensor, f=factor, order=order: scaled(order(tensor), f))
        elif other.fused_and_interleaved and slot == "gate_proj":
            sources = (name, name.replace("gate_proj", "up_proj"))
            recipe[name.replace("gate_proj", "gate_up_proj")] = Recipe(sources, lambda *halves: torch.cat(halves))
        elif not (other.fused_and_interleaved and slot == "up_proj"):
            recipe[their_name] = Recipe((name,), partial(scaled, factor=factor))
    return recipe


def import_factors(config: PreTrainedConfig) -> dict[str, float]:
    """HyperCLOVA X's multipliers where they are not 1, by the module of ours whose weights take them.

    Logits are linear in the final norm's gamma; with a tied head it also undoes what the table was multiplied by.
    """
    if config.model_type != "hyperclovax":
        return {}
    table = config.embedding_multiplier
    factors = {
        "embed_tokens": table,
        "q_proj": config.attention_multiplier * math.sqrt(config.head_dim),
        "final_norm": config.logits_scaling / (table if config.tie_word_embeddings else 1.0),
    }
    return {module: factor for module, factor in factors.items() if not math.isclose(factor, 1.0, rel_tol=1e-12)}


def import_recipe(config: PreTrainedConfig) -> dict[str, Recipe]:
    """For each tensor of ours how it is made from those of a model of one of the architectures."""
    other, ours = ARCHITECTURES[config.model_type], periln_config(config)
    factors, recipe = import_factors(config), {}
    dims = rotary_dims(ours.head_dim, rope_of(ours, layer_types_of(ours)[0]))
    for name in tensor_names(ours):
        slot, kind = name.split(".")[-2:]
        source = _their_name(name, other)
        make: Callable[..., torch.Tensor] = partial(scaled, factor=factors.get(slot, 1.0))
        if other.fused_and_interleaved:
            if slot in ("q_proj", "k_proj"):
                make = partial(halved, head_dim=_head_dim(ours), dims=dims)
            elif slot in ("gate_proj", "up_proj"):
                source = source.replace(slot, "gate_up_proj")
                make = partial(_half, index=("gate_proj", "up_proj").index(slot))
            elif (slot, kind) == ("o_proj", "bias"):
                source, make = source.replace("bias", "weight"), _no_bias
        recipe[name] = Recipe((source,), make)
    return recipe


__all__ = [
    "ARCHITECTURES",
    "PERI_LLAMA",
    "ConversionRefused",
    "Recipe",
    "admissible_exports",
    "architecture",
    "export_recipe",
    "import_factors",
    "import_recipe",
    "native_config",
    "norm_epsilons",
    "periln_config",
]
