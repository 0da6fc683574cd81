"""Which models convert: what rules out an export or an import, each reason with its field and value."""

from collections.abc import Iterator

from transformers import PreTrainedConfig

from .architectures import ARCHITECTURES, Architecture, ConversionRefused
from .attention_fields import FULL, SLIDING, has_rope, layer_types_of, rope_of, rotary_dims
from .configuration_periln import PeriLlamaConfig
from .placements import LayerPlan
from .slots import Learned, Norm

PERI_LLAMA = PeriLlamaConfig.model_type
_GAINS = (None, "channel", "centered")  # each of the last two folds into the other


def admissible_exports(config: PeriLlamaConfig) -> dict[str, str | None]:
    """For each architecture None, or the reason why a model of this configuration cannot become one.

    It looks at the configuration alone, so it can be asked before training. `residual_dtype` is not a reason: it
    belongs to the run, and the stream of every architecture here has the dtype of its weights.

    Raises:
        ConversionRefused: the configuration is not PeriLlama's.
    """
    if config.model_type != PERI_LLAMA:
        raise ConversionRefused(f"model_type={config.model_type!r} is not {PERI_LLAMA!r}")
    return {target: next(_obstacles(config, target), None) for target in ARCHITECTURES}


def model_norms(config: PeriLlamaConfig) -> Iterator[tuple[str, Norm, float]]:
    """Every norm: its module's name in the state dict, what it is, and its epsilon."""
    plan = config.stream_plan()

    def found(
        name: str, norm: Norm | None, slot: str, layer_idx: int | None = None
    ) -> Iterator[tuple[str, Norm, float]]:
        if norm is not None:
            yield f"model.{name}", norm, config.eps_of(slot, layer_idx) if norm.eps is None else norm.eps

    yield from found("embed_norm", plan.embedding_norm, "embed_norm")
    for i, layer in enumerate(plan.layers):
        for slot, norm in layer.projections.items():
            yield from found(f"layers.{i}.self_attn.{slot}", norm, slot, i)
        for name, module, sublayer in (("attn", "self_attn", layer.attn), ("mlp", "mlp", layer.mlp)):
            for place in ("input_norm", "output_norm", "residual_norm"):
                slot = f"{name}_{place}"
                yield from found(f"layers.{i}.{slot}", getattr(sublayer, place), slot, i)
            yield from found(f"layers.{i}.{module}.inner_norm", sublayer.inner_norm, f"{name}_inner_norm", i)
    yield from found("final_norm", plan.final_norm, "final_norm")


def norm_epsilons(config: PeriLlamaConfig) -> dict[str, float]:
    """The epsilon of every norm, except the embedding norm, which is folded away with its epsilon."""
    return {_in_words(name): eps for name, _, eps in model_norms(config) if name != "model.embed_norm"}


def _in_words(name: str) -> str:
    parts = name.split(".")
    if parts[1] != "layers":
        return parts[-1]
    inner = {"self_attn": "attn_inner_norm", "mlp": "mlp_inner_norm"}
    slot = inner[parts[3]] if parts[-1] == "inner_norm" else parts[-1]
    return f"{slot} of layer {int(parts[2]) + 1}"


def score_scale(config: PeriLlamaConfig) -> float:
    """What the scores are divided by, squared."""
    assert config.head_dim is not None  # filled in when the configuration is made
    return float(config.query_pre_attn_scalar or config.head_dim)


def _odd_heads(config: PeriLlamaConfig) -> bool:
    return (config.head_dim or 0) * config.num_attention_heads != config.hidden_size


# Exports


def _presence(where: str, what: str, has: bool, target: str) -> str:
    return f"{where} has {what}, {target} has none" if has else f"{where} has no {what}, {target} always has them"


def _obstacles(config: PeriLlamaConfig, target: str) -> Iterator[str]:
    """The obstacles, the placement first; each names the field."""
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
    if config.norm_gain not in _GAINS:
        yield f"norm_gain={config.norm_gain!r}: {target} has one gain a channel"
    spans = {slot: norm.over for slot, norm in plan.layers[0].projections.items() if slot != "v_norm"}
    wanted = {} if other.qk_norm is None else dict.fromkeys(("q_norm", "k_norm"), other.qk_norm)
    if spans != wanted or any(layer.projections != plan.layers[0].projections for layer in plan.layers):
        yield f"qk_norm={config.qk_norm!r}: {target} has {other.qk_norm!r}"
    eps = norm_epsilons(config)
    first = next(iter(eps), "")
    for slot, value in eps.items():
        if value != eps[first]:
            yield f"norm_eps is {eps[first]!r} for {first} and {value!r} for {slot}: {target} has one for all norms"
    yield from _attention_obstacles(config, target)
    yield from _size_obstacles(config, target)
    if getattr(config, "quantization_config", None) is not None:
        yield "quantization_config: quantized weights cannot be folded"


def _layer_obstacles(layer: LayerPlan, i: int, first: LayerPlan, row: str, target: str) -> Iterator[str]:
    """What of layer i the architecture does not have."""
    other, where = ARCHITECTURES[target], f"layer {i}"
    if layer.v_norm:
        yield f"{row} has a norm on values (v_norm, {where}), {target} has none"
    for slot, norm in layer.projections.items():
        yield from _kind_obstacle(norm, f"{slot} ({where})", row, target)
    for name, sublayer in (("attn", layer.attn), ("mlp", layer.mlp)):
        inner = bool(getattr(other.placement, f"{name}_inner_norm"))
        if bool(sublayer.inner_norm) != inner:
            what = f"norms before a sublayer's last projection ({name}_inner_norm, {where})"
            yield _presence(row, what, bool(sublayer.inner_norm), target)
        if sublayer.residual_norm:
            yield f"{row} has a norm on the stream after the add (residual_norm, {where}), {target} has none"
        if bool(sublayer.input_norm) != bool(other.placement.input_norm):
            yield _presence(row, f"input norms (input_norm, {where})", bool(sublayer.input_norm), target)
        if not other.output_switch and bool(sublayer.output_norm) != bool(other.placement.output_norm):
            yield _presence(row, f"output norms (output_norm, {where})", bool(sublayer.output_norm), target)
        if bool(sublayer.output_norm) != bool(first.attn.output_norm):
            yield f"{row} has output norms (output_norm) in some layers only, {target} in all or in none"
        for slot in ("input_norm", "output_norm", "inner_norm"):
            yield from _kind_obstacle(getattr(sublayer, slot), f"{name}'s {slot} ({where})", row, target)
        if isinstance(sublayer.alpha, Learned) or isinstance(sublayer.s, Learned):
            yield f"{row} has a learned residual factor ({where}), {target} has none"
        elif sublayer.alpha != 1.0:
            yield f"alpha={sublayer.alpha!r} in {where} of {row}: {target} adds the stream unscaled"
        if sublayer.c != 1.0 and not sublayer.input_norm:
            yield f"c={sublayer.c!r} in {where} of {row}: there is no input norm whose gamma could take it"


def _kind_obstacle(norm: Norm | None, where: str, row: str, target: str) -> Iterator[str]:
    if norm and (norm.kind not in (None, "rmsnorm") or norm.gain not in _GAINS):
        kind = f"kind={norm.kind!r}, gain={norm.gain!r}"
        yield f"{row} has {kind} in {where}: {target} has RMSNorm with one gain a channel"


def _attention_obstacles(config: PeriLlamaConfig, target: str) -> Iterator[str]:
    """Layer types, windows and ropes that the architecture does not have."""
    other, types, window = ARCHITECTURES[target], layer_types_of(config), config.sliding_window
    if window is not None and other.windows == "none":
        yield f"sliding_window={window}: {target} attends to all tokens in every layer"
    if other.windows == "all" and len(set(types)) > 1:
        yield f"layer_types has {FULL!r} and {SLIDING!r}: {target} has one window for all layers"
    ropes = [rope_of(config, kind) for kind in sorted(set(types))]
    if not other.ropes_by_type and any(rope != ropes[0] for rope in ropes):
        yield f"rope_parameters has another rope for each of {sorted(set(types))}: {target} has one for all layers"
    for rope in ropes:
        dims = rotary_dims(config.head_dim, rope)
        if dims != config.head_dim and not other.partial_rotary:
            share = f"partial_rotary_factor={rope['partial_rotary_factor']!r} in rope_parameters"
            yield f"{share}: {target} rotates all dimensions of a head"
    rotated = [has_rope(config, i) for i in range(config.num_hidden_layers)]
    beside = other.no_rope_beside_windows and window is not None
    wanted = [kind == SLIDING for kind in types] if beside else [True] * len(types)
    if rotated != wanted:
        rule = "rotates in sliding layers alone" if beside else "rotates in every layer"
        yield f"no_rope_layers={config.no_rope_layers!r}: {target} {rule}"


def _size_obstacles(config: PeriLlamaConfig, target: str) -> Iterator[str]:
    """Biases, sizes and tied tables that the architecture does not have."""
    other = ARCHITECTURES[target]
    if config.stream_plan().embedding_norm and config.tie_word_embeddings:
        yield "embedding_norm with tie_word_embeddings=True: folded into the table it would change the head as well"
    factor = float(config.embedding_multiplier)
    theirs = other.table_factor(config.hidden_size, factor)
    if factor != theirs and config.tie_word_embeddings:
        yield (
            f"embedding_multiplier={factor!r} with tie_word_embeddings=True: {target} multiplies embeddings by "
            f"{theirs:g}, and folded into the table the difference would change the head as well"
        )
    if config.attention_bias and other.attention_bias != "qkvo":
        where = "in o_proj" if other.attention_bias else "in attention"
        yield f"attention_bias=True: {target} has no bias {where}"
    if config.mlp_bias and not other.mlp_bias:
        yield f"mlp_bias=True: {target} has no biases in the MLP"
    if other.heads_divide_hidden and config.hidden_size % config.num_attention_heads:
        sizes = (
            f"hidden_size={config.hidden_size} is not a multiple of num_attention_heads={config.num_attention_heads}"
        )
        yield f"{sizes}: {target} insists on it, whatever head_dim is"
    if other.full_heads and _odd_heads(config):
        yield f"head_dim={config.head_dim}: {target} needs heads that fill hidden_size={config.hidden_size}"
    if config.pad_token_id is not None and not -config.vocab_size <= config.pad_token_id < config.vocab_size:
        yield f"pad_token_id={config.pad_token_id} is outside of vocab_size={config.vocab_size}: {target} needs its row"


def export_remarks(config: PeriLlamaConfig, target: str) -> list[str]:
    """What an export folds, and what the other configuration has no field for."""
    other, plan = ARCHITECTURES[target], config.stream_plan()
    into = "the output norms' gamma" if plan.layers[0].attn.output_norm else "o_proj and down_proj"
    sublayers = [sublayer for layer in plan.layers for sublayer in layer.sublayers]
    gain = "its difference from 1" if other.centered else "a plain number"
    scale, table = score_scale(config), float(config.embedding_multiplier)
    centered = {(norm.gain or config.norm_gain) == "centered" for _, norm, _ in model_norms(config)}
    has_scale = other.scaled_scores and scale.is_integer()
    found = (
        (plan.embedding_norm is not None, "the embedding norm is folded into the embedding table"),
        (table != other.table_factor(config.hidden_size, table), "embedding_multiplier is folded into the table"),
        (scale != config.head_dim and not has_scale, "query_pre_attn_scalar is folded into the queries"),
        ((not other.centered) in centered, f"each norm's gain is stored as {gain}"),
        (any(sublayer.c != 1.0 for sublayer in sublayers), "c is folded into the input norms' gamma"),
        (any(sublayer.s != 1.0 for sublayer in sublayers), f"s (with residual_scale) is folded into {into}"),
        (not config.output_norm_learnable, "output_norm_learnable=False is lost: gamma is a parameter like any other"),
        (config.residual_dtype is not None, "residual_dtype is lost: the stream has the weights' dtype"),
        (
            _odd_heads(config) and not other.head_dim_field,
            f"head_dim is read by Transformers; serving engines' {other.name} may not read it",
        ),
        (target == "olmo2" and config.attention_bias, "attention biases: serving engines' OLMo 2 may leave them out"),
        (
            target == "glm4" and config.eos_token_id is None,
            "eos_token_id=None: Glm4Config puts GLM-4's own in its place",
        ),
    )
    return [text for applies, text in found if applies]


# Imports


def import_obstacles(config: PreTrainedConfig, other: Architecture) -> Iterator[str]:
    """What keeps a model of one of the architectures from becoming a PeriLlama; each names the field."""
    if config.model_type == "hyperclovax" and config.tie_word_embeddings and config.embedding_multiplier == 0:
        yield "embedding_multiplier=0 with tie_word_embeddings=True: the head would lose its table"
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        if getattr(config, name, None) is not None:
            yield f"{name}={getattr(config, name)!r}: PeriLlama caps no logits"
    if getattr(config, "use_bidirectional_attention", False):
        yield "use_bidirectional_attention=True: PeriLlama is causal"
    if getattr(config, "is_causal", True) is False:
        yield "is_causal=False: PeriLlama is causal"
    if getattr(config, "quantization_config", None) is not None:
        yield "quantization_config: quantized weights cannot be folded"
