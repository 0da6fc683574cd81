"""Which rows of the table are architectures that Transformers already has, and how their weights correspond.

With B( f( c * A(x) ) ) as in `placements.py`:

| row | architecture | folded |
|---|---|---|
| A (`pre`, `lns`) | Llama; HyperCLOVA X with `use_post_norm=False` | c into A's gamma, s into o_proj and down_proj |
| A and B (`peri`) | HyperCLOVA X, GLM-4 | c into A's gamma, s into B's gamma |
| B (`output`) with QK-norm over all heads | OLMo 2 | s into B's gamma |

An embedding norm is a function of the token alone: applied once to every row of an untied table, it is gone. What
a placement is made of decides, not its name: a mapping of the user's own with the same norms converts as well.

Nothing here reads or writes files: a recipe says of each tensor from which tensors it is made, and how; `convert.py`
follows it, in memory or on disk. Shapes: E head size, D hidden size, V vocabulary.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from .configuration_periln import PeriLlamaConfig
from .norms import PeriLlamaRMSNorm
from .placements import LayerPlan
from .slots import Learned, Norm

PERI_LLAMA = PeriLlamaConfig.model_type


class ConversionRefused(ValueError):
    """What was asked for cannot be done without changing the function; the message names the field and says why."""


@dataclass(frozen=True)
class Architecture:
    """One of Transformers' own architectures: where it has norms and biases, and what it calls the norms."""

    name: str
    input_norm: bool
    output_norm: bool | None  # None: it has a switch
    names: dict[str, str]
    qk_norm: str | None = None
    o_proj_bias: bool = True
    mlp_bias: bool = True
    heads_divide_hidden: bool = False
    fused_and_interleaved: bool = False  # gate and up in one matrix; rotary pairs (0, 1), (2, 3), ...

    @property
    def model_class(self) -> type:
        return _stock_class(f"{self.name}ForCausalLM")

    @property
    def config_class(self) -> type:
        return _stock_class(f"{self.name}Config")


def _stock_class(name: str) -> type:
    if getattr(transformers, name, None) is None:
        raise ConversionRefused(f"transformers {transformers.__version__} has no {name}: a newer version is needed")
    return getattr(transformers, name)


_INPUT_NORMS = {
    "final_norm": "norm",
    "attn_input_norm": "input_layernorm",
    "mlp_input_norm": "post_attention_layernorm",
}
_OLMO2_NORMS = {"attn_output_norm": "post_attention_layernorm", "mlp_output_norm": "post_feedforward_layernorm"}
_HYPERCLOVAX_NORMS = {"attn_output_norm": "post_norm1", "mlp_output_norm": "post_norm2"}
_GLM4_NORMS = {"attn_output_norm": "post_self_attn_layernorm", "mlp_output_norm": "post_mlp_layernorm"}
ARCHITECTURES: dict[str, Architecture] = {
    # name, A, B, names
    "llama": Architecture("Llama", True, False, _INPUT_NORMS, heads_divide_hidden=True),
    "olmo2": Architecture("Olmo2", False, True, {"final_norm": "norm"} | _OLMO2_NORMS, qk_norm="full", mlp_bias=False),
    "hyperclovax": Architecture("HyperCLOVAX", True, None, _INPUT_NORMS | _HYPERCLOVAX_NORMS, heads_divide_hidden=True),
    "glm4": Architecture(
        "Glm4", True, True, _INPUT_NORMS | _GLM4_NORMS, o_proj_bias=False, mlp_bias=False, fused_and_interleaved=True
    ),
}


def architecture(target: str) -> Architecture:
    """The row of `ARCHITECTURES` called `target`, or a ConversionRefused that names the nearest."""
    if target not in ARCHITECTURES:
        close = get_close_matches(str(target), ARCHITECTURES, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConversionRefused(f"{target!r} is no architecture to convert to: {hint}use one of {list(ARCHITECTURES)}")
    return ARCHITECTURES[target]


# What converts


def admissible_exports(config: PeriLlamaConfig) -> dict[str, str | None]:
    """For each architecture None, or the reason why a model of this configuration cannot become one.

    It looks at the configuration alone, so it can be asked before training. `residual_dtype` is no reason: it
    belongs to the run, and the stream of every architecture here has the dtype of its weights.

    Raises:
        ConversionRefused: the configuration is not PeriLlama's.
    """
    if config.model_type != PERI_LLAMA:
        raise ConversionRefused(f"model_type={config.model_type!r} is not {PERI_LLAMA!r}")
    return {target: next(_obstacles(config, target), None) for target in ARCHITECTURES}


def _presence(where: str, what: str, has: bool, target: str) -> str:
    return f"{where} has {what}, {target} has none" if has else f"{where} has no {what}, {target} always has them"


def _obstacles(config: PeriLlamaConfig, target: str) -> Iterator[str]:
    """What stands in the way, the placement first; each names the field."""
    other, plan = ARCHITECTURES[target], config.stream_plan()
    row = "layer_placements" if config.layer_placements is not None else "norm_placement"
    row = f"{row}={getattr(config, row)!r}"
    for i, layer in enumerate(plan.layers, start=1):
        yield from _layer_obstacles(layer, i, plan.layers[0], row, target)
    if not plan.final_norm:
        where = "final_norm=False" if config.final_norm is False else f"{row} has no final norm (final_norm)"
        yield f"{where}: {target} always has one"
    for slot in ("embedding_norm", "final_norm"):  # the first is folded away, as the RMSNorm that it has to be
        yield from _kind_obstacle(getattr(plan, slot), slot, row, target)
    if config.norm_type != "rmsnorm":
        yield f"norm_type={config.norm_type!r}: {target} has RMSNorm"
    if config.norm_gain != "channel":
        yield f"norm_gain={config.norm_gain!r}: {target} has one gain a channel"
    spans = {slot: norm.over for slot, norm in plan.layers[0].projections.items() if slot != "v_norm"}
    wanted = {} if other.qk_norm is None else dict.fromkeys(("q_norm", "k_norm"), other.qk_norm)
    if spans != wanted or any(layer.projections != plan.layers[0].projections for layer in plan.layers):
        yield f"qk_norm={config.qk_norm!r}: {target} has {other.qk_norm!r}"
    if plan.embedding_norm and config.tie_word_embeddings:
        yield "embedding_norm with tie_word_embeddings=True: folded into the table it would change the head as well"
    eps = norm_epsilons(config)
    first = next(iter(eps), None)
    for slot, value in eps.items():
        if value != eps[first]:
            yield f"norm_eps is {eps[first]!r} for {first} and {value!r} for {slot}: {target} has one for all norms"
    if config.attention_bias and not other.o_proj_bias:
        yield f"attention_bias=True: {target} has no bias in o_proj"
    if config.mlp_bias and not other.mlp_bias:
        yield f"mlp_bias=True: {target} has no biases in the MLP"
    if other.heads_divide_hidden and config.hidden_size % config.num_attention_heads:
        sizes = (
            f"hidden_size={config.hidden_size} is not a multiple of num_attention_heads={config.num_attention_heads}"
        )
        yield f"{sizes}: {target} insists on it, whatever head_dim is"
    if config.pad_token_id is not None and not -config.vocab_size <= config.pad_token_id < config.vocab_size:
        yield f"pad_token_id={config.pad_token_id} is outside of vocab_size={config.vocab_size}: {target} needs its row"
    if getattr(config, "quantization_config", None) is not None:
        yield "quantization_config: quantized weights cannot be folded"


def _kind_obstacle(norm: Norm | None, where: str, row: str, target: str) -> Iterator[str]:
    if norm and (norm.kind not in (None, "rmsnorm") or norm.gain not in (None, "channel")):
        kind = f"kind={norm.kind!r}, gain={norm.gain!r}"
        yield f"{row} has {kind} in {where}: {target} has RMSNorm with one gain a channel"


def _layer_obstacles(layer: LayerPlan, i: int, first: LayerPlan, row: str, target: str) -> Iterator[str]:
    """What of layer i the architecture does not have."""
    other, where = ARCHITECTURES[target], f"layer {i}"
    if layer.attn.inner_norm or layer.mlp.inner_norm:
        yield f"{row} has a norm before a sublayer's last projection ({where}), {target} has none"
    if layer.v_norm:
        yield f"{row} has a norm on values (v_norm, {where}), {target} has none"
    for slot, norm in layer.projections.items():
        yield from _kind_obstacle(norm, f"{slot} ({where})", row, target)
    for name, sublayer in (("attn", layer.attn), ("mlp", layer.mlp)):
        if sublayer.residual_norm:
            yield f"{row} has a norm on the stream after the add (residual_norm, {where}), {target} has none"
        if bool(sublayer.input_norm) != other.input_norm:
            yield _presence(row, f"input norms (input_norm, {where})", bool(sublayer.input_norm), target)
        if other.output_norm is not None and bool(sublayer.output_norm) != other.output_norm:
            yield _presence(row, f"output norms (output_norm, {where})", bool(sublayer.output_norm), target)
        if bool(sublayer.output_norm) != bool(first.attn.output_norm):
            yield f"{row} has output norms (output_norm) in some layers only, {target} in all or in none"
        for slot in ("input_norm", "output_norm"):
            yield from _kind_obstacle(getattr(sublayer, slot), f"{name}'s {slot} ({where})", row, target)
        if isinstance(sublayer.alpha, Learned) or isinstance(sublayer.s, Learned):
            yield f"{row} has a learned residual factor ({where}), {target} has none"
        elif sublayer.alpha != 1.0:
            yield f"alpha={sublayer.alpha!r} in {where} of {row}: {target} adds the stream unscaled"
        if sublayer.c != 1.0 and not sublayer.input_norm:
            yield f"c={sublayer.c!r} in {where} of {row}: there is no input norm whose gamma could take it"


def norm_epsilons(config: PeriLlamaConfig) -> dict[str, float]:
    """The epsilon of every norm there is, but for the embedding norm: that one is folded away with its own."""
    plan, eps = config.stream_plan(), {}
    for i, layer in enumerate(plan.layers):
        norms = {
            f"{name}_{slot}": norm
            for name, sublayer in (("attn", layer.attn), ("mlp", layer.mlp))
            for slot in ("input_norm", "output_norm")
            if (norm := getattr(sublayer, slot))
        } | layer.projections
        for slot, norm in norms.items():
            eps[f"{slot} of layer {i + 1}"] = _epsilon(config, norm, slot, i)
    return eps | ({"final_norm": _epsilon(config, plan.final_norm, "final_norm")} if plan.final_norm else {})


def _epsilon(config: PeriLlamaConfig, norm: Norm, slot: str, layer_idx: int | None = None) -> float:
    """The norm's own epsilon, or the configuration's for its slot."""
    return config.eps_of(slot, layer_idx) if norm.eps is None else norm.eps


def _import_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    """What keeps a model of one of the architectures from becoming a PeriLlama; each names the field."""
    if config.model_type == "glm4":
        share = config.rope_parameters.get("partial_rotary_factor", 1.0)
        if int(config.head_dim * share) != config.head_dim:
            yield f"partial_rotary_factor={share} in rope_parameters: PeriLlama rotates all dimensions of a head"
    if config.model_type == "hyperclovax" and config.tie_word_embeddings and config.embedding_multiplier == 0:
        yield "embedding_multiplier=0 with tie_word_embeddings=True: the head would lose its table"
    if getattr(config, "is_causal", True) is False:
        yield "is_causal=False: PeriLlama is causal"
    if getattr(config, "quantization_config", None) is not None:
        yield "quantization_config: quantized weights cannot be folded"


# Configurations

_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "use_cache", "pad_token_id",
    "bos_token_id", "eos_token_id", "tie_word_embeddings", "attention_bias",
)  # fmt: skip


def _shared_fields(config: PreTrainedConfig) -> dict[str, Any]:
    rope = copy.deepcopy(config.rope_parameters)
    rope.pop("partial_rotary_factor", None)  # all but GLM-4 rotate the whole head, whatever it says
    dropout = {"attention_dropout": config.attention_dropout or 0.0}
    return {name: copy.copy(getattr(config, name)) for name in _SHARED} | {"rope_parameters": rope} | dropout


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
    if other.mlp_bias:
        fields["mlp_bias"] = config.mlp_bias
    if other.output_norm is None:
        fields["use_post_norm"] = bool(config.stream_plan().layers[0].attn.output_norm)
    if other.fused_and_interleaved:
        fields["rope_parameters"]["partial_rotary_factor"] = 1.0
    try:
        native = other.config_class(**fields)
    except StrictDataclassError as error:  # Transformers 5.4 with a newer huggingface_hub refuses OLMo 2's booleans
        version, why = transformers.__version__, " ".join(str(error).split())
        raise ConversionRefused(f"transformers {version} cannot build the configuration of {target}: {why}") from error
    if other.fused_and_interleaved:
        # Converters to other formats look for it here, and assume 0.5 (GLM-4's own) where it is missing.
        native.partial_rotary_factor = 1.0
    native.dtype = config.dtype
    native.architectures = [other.model_class.__name__]
    return native


def periln_config(config: PreTrainedConfig) -> PeriLlamaConfig:
    """PeriLlama's configuration for a model of one of the architectures.

    Raises:
        ConversionRefused: the architecture has no row, or the model something that no row has (an odd head size).
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ConversionRefused(f"model_type={kind!r} is no row of PeriLlama's: use one of {list(ARCHITECTURES)}")
    reason = next(_import_obstacles(config), None)
    if reason:
        raise ConversionRefused(f"cannot convert from {kind}: {reason}")
    other = ARCHITECTURES[kind]
    output_norm = config.use_post_norm if other.output_norm is None else other.output_norm
    rows = {(True, False): "pre", (True, True): "peri", (False, True): "output"}
    fields = _shared_fields(config) | {
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "mlp_bias": getattr(config, "mlp_bias", False),
        "norm_eps": config.rms_norm_eps,
        "norm_placement": rows[other.input_norm, output_norm],
        "embedding_norm": False,
        "qk_norm": other.qk_norm,
        "residual_scale": getattr(config, "residual_multiplier", 1.0),
    }
    try:
        ours = PeriLlamaConfig(**fields)
    except ValueError as error:
        raise ConversionRefused(f"cannot convert from {kind}: {error}") from error
    ours.dtype = config.dtype
    ours.architectures = ["PeriLlamaForCausalLM"]
    return ours


# Weights


class Recipe(NamedTuple):
    """A tensor is `make(*sources)`, in the sources' dtype where numbers are only moved, else in FP32 at least."""

    sources: tuple[str, ...]
    make: Callable[..., torch.Tensor]


def tensor_names(config: PeriLlamaConfig) -> Iterator[str]:
    """The names in the state dict of a PeriLlama with RMSNorm, in the model's order, without a tied head."""
    plan = config.stream_plan()
    yield "model.embed_tokens.weight"
    if plan.embedding_norm:
        yield "model.embed_norm.weight"
    for i, layer in enumerate(plan.layers):
        linear = [(f"self_attn.{p}_proj", config.attention_bias) for p in "qkvo"]
        linear += [(f"mlp.{p}_proj", config.mlp_bias) for p in ("gate", "up", "down")]
        norms = [f"self_attn.{slot}" for slot in layer.projections]
        for slot in ("input_norm", "output_norm"):
            sublayers = (("attn", layer.attn), ("mlp", layer.mlp))
            norms += [f"{name}_{slot}" for name, sublayer in sublayers if getattr(sublayer, slot)]
        for name, bias in linear + [(norm, False) for norm in norms]:
            yield f"model.layers.{i}.{name}.weight"
            if bias:
                yield f"model.layers.{i}.{name}.bias"
    if plan.final_norm:
        yield "model.final_norm.weight"
    if not config.tie_word_embeddings:
        yield "lm_head.weight"


def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """`factor` times the tensor, rounded once, to FP32 at least; the tensor itself for a factor of 1."""
    if factor == 1.0:
        return tensor
    return (tensor.to(torch.float64) * factor).to(torch.promote_types(tensor.dtype, torch.float32))


def normed_table(table: torch.Tensor, gamma: torch.Tensor, eps: float) -> torch.Tensor:
    """The embedding norm applied to each row of the table (V, D), with the model's own norm, in FP32 at least."""
    dtype = torch.promote_types(table.dtype, torch.float32)
    norm = PeriLlamaRMSNorm(gamma.shape[0], eps, learnable=False).to(device=table.device, dtype=dtype)
    norm.weight.copy_(gamma)
    return torch.cat([norm(rows.to(dtype)) for rows in table.split(8192)])


def interleaved(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows (heads * E, ...) reordered from rotary pairs (i, i + E/2) to pairs (2i, 2i + 1), head by head."""
    return tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def halved(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of `interleaved`."""
    return tensor.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


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
            return float(sublayer.s)  # a learned one is an obstacle
    return 1.0


def _their_name(name: str, other: Architecture) -> str:
    return ".".join(other.names.get(part, part) for part in name.split("."))


def export_recipe(config: PeriLlamaConfig, target: str) -> dict[str, Recipe]:
    """For each tensor of `target` how it is made from ours; `config` must admit the export."""
    other, plan, recipe = ARCHITECTURES[target], config.stream_plan(), {}
    for name in tensor_names(config):
        parts = name.split(".")
        slot, their_name = parts[-2], _their_name(name, other)
        factor = _layer_factor(slot, plan.layers[int(parts[2])]) if parts[1] == "layers" else 1.0
        if slot == "embed_norm":
            continue
        if slot == "embed_tokens" and plan.embedding_norm:
            make = partial(normed_table, eps=_epsilon(config, plan.embedding_norm, "embed_norm"))
            recipe[their_name] = Recipe((name, "model.embed_norm.weight"), make)
        elif other.fused_and_interleaved and slot in ("q_proj", "k_proj"):
            recipe[their_name] = Recipe((name,), partial(interleaved, head_dim=config.head_dim))
        elif other.fused_and_interleaved and slot == "gate_proj":
            sources = (name, name.replace("gate_proj", "up_proj"))
            recipe[name.replace("gate_proj", "gate_up_proj")] = Recipe(sources, lambda *halves: torch.cat(halves))
        elif not (other.fused_and_interleaved and slot == "up_proj"):
            recipe[their_name] = Recipe((name,), partial(scaled, factor=factor))
    return recipe


def import_factors(config: PreTrainedConfig) -> dict[str, float]:
    """HyperCLOVA X's multipliers where they are not 1, by the module of ours whose weights take them.

    Logits are linear in the final norm's gamma; with a tied head it also takes back what the table was multiplied by.
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
    for name in tensor_names(ours):
        slot, kind = name.split(".")[-2:]
        source, make = _their_name(name, other), partial(scaled, factor=factors.get(slot, 1.0))
        if other.fused_and_interleaved:
            if slot in ("q_proj", "k_proj"):
                make = partial(halved, head_dim=ours.head_dim)
            elif slot in ("gate_proj", "up_proj"):
                source = source.replace(slot, "gate_up_proj")
                make = partial(_half, index=("gate_proj", "up_proj").index(slot))
            elif (slot, kind) == ("o_proj", "bias"):
                source, make = source.replace("bias", "weight"), _no_bias
        recipe[name] = Recipe((source,), make)
    return recipe
