"""Configuration of PeriLlama: a Llama-3-style decoder whose norm placement is one field.

No `from __future__ import annotations` here: string annotations switch the strict type checks off.
"""

from dataclasses import fields
from difflib import get_close_matches
from functools import wraps
from typing import Any, Literal, cast

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging

from .attention_fields import LAYER_TYPES, is_rope_by_type, validate_layers, validate_ropes
from .placements import StreamPlan, plan_stream
from .slots import NO_EPSILON

logger = logging.get_logger(__name__)

AUTO_MAP = {
    "AutoConfig": "configuration_periln.PeriLlamaConfig",
    "AutoModel": "modeling_periln.PeriLlamaModel",
    "AutoModelForCausalLM": "modeling_periln.PeriLlamaForCausalLM",
    "AutoModelForSequenceClassification": "modeling_periln.PeriLlamaForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_periln.PeriLlamaForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_periln.PeriLlamaForQuestionAnswering",
}
LAYER_NORM_SLOTS = (
    "attn_input_norm",
    "attn_output_norm",
    "attn_residual_norm",
    "mlp_input_norm",
    "mlp_output_norm",
    "mlp_residual_norm",
    "q_norm",
    "k_norm",
    "v_norm",
    "attn_inner_norm",
    "mlp_inner_norm",
)
STREAM_NORM_SLOTS = ("embed_norm", "final_norm")
TP_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
# Keyword arguments of older or generic configurations that Transformers itself understands.
_PASSED_THROUGH = {
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "partial_rotary_factor",
    "quantization_config",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
}
# Fields that Transformers' caches and masks read from any configuration, and that this family does not have.
_REFUSED = ("attention_chunk_size", "is_causal")


def _raising_value_errors(config_class: Any) -> Any:
    """A mistake in a field is a ValueError; `@strict` raises another kind, and a missing rotary key a KeyError."""
    set_field, validate = config_class.__setattr__, config_class.validate

    @wraps(set_field)
    def set_or_refuse(self: Any, name: str, value: Any) -> None:
        try:
            set_field(self, name, value)
        except StrictDataclassFieldValidationError as error:
            raise ValueError(f"{name}={value!r}: {error.__cause__}") from error

    @wraps(validate)
    def validate_or_refuse(self: Any) -> None:
        try:
            validate(self)
        except (StrictDataclassClassValidationError, KeyError) as error:
            raise ValueError(error.args[0] if isinstance(error, KeyError) else str(error.__cause__)) from error

    config_class.__setattr__, config_class.validate = set_or_refuse, validate_or_refuse
    return config_class


@_raising_value_errors
@strict
class PeriLlamaConfig(PreTrainedConfig):
    r"""
    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
        num_key_value_heads (None: as many as heads), head_dim (None: hidden_size / heads), hidden_act,
        max_position_embeddings, initializer_range, use_cache, tie_word_embeddings, rope_parameters,
        attention_bias, attention_dropout, mlp_bias: as in Llama. The default RoPE theta is 500,000 (Llama 3).
        classifier_dropout: before the head of token classification.
        layer_types, sliding_window, no_rope_layers, and a rope for each layer type or for a share of a head's
            dimensions in rope_parameters: see `attention_fields.py`.
        query_pre_attn_scalar: scores are divided by its square root (Gemma); None: by that of head_dim.
        embedding_multiplier: multiplies the rows of the embedding table when they are read (Gemma: sqrt(hidden_size)).
        norm_placement: a row of `placements.PLACEMENTS`, `mix`, or a mapping that describes your own row.
        layer_placements: a list with one placement (name or mapping) a layer; overrides `norm_placement`.
        embedding_norm, final_norm: override the placement's two norms at the ends of the stream.
        norm_type: what every norm is whose row does not say its kind: `rmsnorm`, `layernorm`, `dyt`, `derf` or `l2`.
        norm_gain: what multiplies the normalized values: one number a `channel`, the same stored as its difference
            from 1 (`centered`, Gemma), one `scalar`, or `none`.
        norm_eps: a number, or a mapping from slot (`attn_input_norm`, ..., `embed_norm`, `final_norm`, `q_norm`,
            `k_norm`) to a number or a list of one number a layer; slots left out have 1e-6.
        qk_norm: None, `full` (over all heads, OLMo 2) or `head` (over one head, Qwen 3).
        output_norm_learnable: False freezes the output norms at the identity gain, gamma = 1 and with LayerNorm
            beta = 0 (Peri-LN, section 4.4.1).
        residual_scale: multiplies each branch before it is added; a number or a rule such as `1/sqrt(L)`.
        residual_dtype: dtype of the residual stream: None (the module's dtype), `float32`, `float16`, `bfloat16`.
            It belongs to a run: our trainers set it while they train and write None into the checkpoint.
        depth_scaled_init: initialize o_proj and down_proj with a standard deviation smaller by sqrt(2 L).

    Raises:
        ValueError: a field, its type, or two that do not fit each other; the message names field and value.
    """

    model_type = "peri_llama"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {"rms_norm_eps": "norm_eps"}
    default_theta = 500_000.0
    ignore_keys_at_rope_validation = {"partial_rotary_factor"}  # Transformers would warn of it

    vocab_size: int = 100_352
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float | int = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    mlp_bias: bool = False
    classifier_dropout: float | int = 0.0
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    no_rope_layers: list[int] | None = None
    query_pre_attn_scalar: float | int | None = None
    embedding_multiplier: float | int = 1.0

    norm_placement: str | dict = "peri"
    layer_placements: list[str | dict] | None = None
    embedding_norm: bool | None = None
    final_norm: bool | None = None
    norm_type: Literal["rmsnorm", "layernorm", "dyt", "derf", "l2"] = "rmsnorm"
    norm_gain: Literal["channel", "centered", "scalar", "none"] = "channel"
    norm_eps: float | int | dict = 1e-6
    qk_norm: Literal["full", "head"] | None = None
    output_norm_learnable: bool = True
    residual_scale: float | int | str = 1.0
    residual_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    depth_scaled_init: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        unknown = self._unknown(kwargs)
        if "rms_norm_eps" in kwargs:  # the alias, before the checks below
            alias = kwargs.pop("rms_norm_eps")
            if self.norm_eps not in (alias, type(self).norm_eps):
                raise ValueError(f"norm_eps={self.norm_eps!r} and its alias rms_norm_eps={alias!r} are both given")
            self.norm_eps = alias
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.validate_sizes()
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads="
                    f"{self.num_attention_heads}; give head_dim or sizes that divide"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        # The auto classes by their place next to config.json: a prefix (`org/name--`) left by an earlier load
        # would tie a re-saved checkpoint to the repository that it came from.
        given = kwargs.pop("auto_map", None) or {}
        self.auto_map = AUTO_MAP | {k: v.split("--")[-1] for k, v in given.items() if isinstance(v, str)}
        self.validate_norms()
        self.validate_attention()
        if self.rope_parameters is not None and is_rope_by_type(self.rope_parameters):
            defaults = {"rope_theta": self.default_theta}
            defaults |= {key: kwargs.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in kwargs}
            self.rope_parameters = {
                kind: {"rope_type": rope.get("type", "default")} | defaults | rope
                for kind, rope in self.rope_parameters.items()
            }
        super().__post_init__(**kwargs)
        ropes, types = self.rope_parameters or {}, self.layer_types or []
        if is_rope_by_type(ropes):  # Transformers 5.4 takes them for one rope, and adds to it
            self.rope_parameters = {kind: ropes[kind] for kind in LAYER_TYPES if kind in types}
        if self.layer_types is None:
            del self.layer_types
        for key in unknown:
            if hasattr(self, key):
                logger.warning(f"PeriLlamaConfig keeps the unknown field {key!r}, which it does not read")
            else:  # Transformers silently drops what steers generation
                logger.warning(f"PeriLlamaConfig drops {key!r}: it belongs to the model's generation_config")
        self.validate_rotary()

    def __eq__(self, other: object) -> bool:
        """As a dataclass's, which expects every field as an attribute; without types there is no `layer_types`."""
        if other.__class__ is not self.__class__:
            return NotImplemented
        return all(getattr(self, f.name, None) == getattr(other, f.name, None) for f in fields(self))

    # Plans name the modules that exist now: properties, since `from_pretrained` sets fields after `__post_init__`.
    def _ends(self) -> dict[str, bool]:
        plan = self.stream_plan()
        return {"embed_norm": plan.embedding_norm is not None, "final_norm": plan.final_norm is not None}

    @property
    def base_model_pp_plan(self) -> dict[str, tuple[list[str], list[str]]]:
        ends, stage = self._ends(), (["hidden_states"], ["hidden_states"])
        return {
            "embed_tokens": (["input_ids"], ["inputs_embeds"]),
            **({"embed_norm": stage} if ends["embed_norm"] else {}),
            "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
            **({"final_norm": stage} if ends["final_norm"] else {}),
        }

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:
        final = {"final_norm": "keep_full_weight"} if self._ends()["final_norm"] else {}
        return {"embed_tokens": "free_full_weight", "layers.*": "free_full_weight", **final}

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        attention = "layers.*.self_attn."
        tied = {"embed_tokens": "embedding_rowwise"} if self.tie_word_embeddings else {}  # split as the head is
        plan = {**TP_PLAN, **tied}
        layers = self.stream_plan().layers
        spans = {(slot, norm.over) for layer in layers for slot, norm in layer.projections.items()}
        # A norm over all heads, or over the whole width of the MLP, needs them all: only the weights are split there
        # (as OLMo 2 does).
        if any(over == "full" for _, over in spans) or any(layer.attn.inner_norm for layer in layers):
            gathered = dict.fromkeys((f"{attention}{x}_proj" for x in "qkv"), "colwise_gather_output")
            plan |= {**gathered, f"{attention}o_proj": "rowwise_split_input"}
        else:
            plan |= dict.fromkeys((f"{attention}{slot}" for slot, _ in sorted(spans)), "replicated_with_grad_allreduce")
        if any(layer.mlp.inner_norm for layer in layers):
            gathered = dict.fromkeys((f"layers.*.mlp.{x}_proj" for x in ("gate", "up")), "colwise_gather_output")
            plan |= {**gathered, "layers.*.mlp.down_proj": "rowwise_split_input"}
        return plan

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str]) -> None:
        """Some releases (5.19) add a tied embedding's entry to the plan of every configuration; it is there already."""
        if plan != self.base_model_tp_plan:
            raise AttributeError(f"base_model_tp_plan={plan!r}: the plan follows from the other fields")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As Transformers' own, which drops a misspelt override and does not check those that it sets."""
        cls._unknown(kwargs)
        whole = {key: kwargs.pop(key) for key in ("layer_types", "rope_parameters") if key in kwargs}
        loaded = super().from_dict(config_dict | whole, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.validate_sizes()
        config.validate_norms()
        config.validate_attention()
        return loaded

    @classmethod
    def _unknown(cls, kwargs: dict[str, Any]) -> list[str]:
        """The names that are not fields; a misspelt field, or one that this family cannot have, is refused."""
        known, unknown = [f.name for f in fields(cls)], []
        for key in kwargs:
            if key in _REFUSED:
                raise ValueError(
                    f"{key}={kwargs[key]!r}: attention of this family is causal, full or in a sliding window"
                )
            if key in known or key in _PASSED_THROUGH or key in cls.attribute_map:
                continue
            if key.startswith("_") or key.endswith("_token_id"):
                continue
            close = get_close_matches(key, known, n=1, cutoff=0.8)
            if close:
                raise ValueError(f"unknown field {key!r} (value {kwargs[key]!r}): did you mean {close[0]!r}?")
            unknown.append(key)
        return unknown

    def validate_sizes(self) -> None:
        """Sizes are positive and divide."""
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.head_dim is not None and (self.head_dim < 2 or self.head_dim % 2):
            raise ValueError(f"head_dim={self.head_dim} must be even and at least 2 (rotary pairs)")
        if self.num_attention_heads % cast(int, self.num_key_value_heads):  # filled in when it was made
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.hidden_act not in ACT2FN:
            close = get_close_matches(self.hidden_act, ACT2FN, n=1, cutoff=0.6)
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown: use one of {close or sorted(ACT2FN)}")
        if not 0 < self.initializer_range <= 1:
            raise ValueError(f"initializer_range={self.initializer_range} must be above 0 and at most 1")
        for name in ("attention_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")

    def validate_norms(self) -> None:
        """The placement exists, every list has the right length, and every switch has something to switch."""
        plan = self.stream_plan()
        if not self.output_norm_learnable and not any(s.output_norm for layer in plan.layers for s in layer.sublayers):
            field = "norm_placement" if self.layer_placements is None else "layer_placements"
            raise ValueError(
                f"output_norm_learnable=False freezes the output norms, but {field}={getattr(self, field)!r} has none"
            )
        outputs = [norm for layer in plan.layers for s in layer.sublayers if (norm := s.output_norm)]
        if not self.output_norm_learnable and all((norm.gain or self.norm_gain) == "none" for norm in outputs):
            raise ValueError("output_norm_learnable=False freezes the output norms' gains, but they have none")
        kinds = sorted({norm.kind or self.norm_type for norm in plan.norms()})
        if self.norm_eps != type(self).norm_eps and kinds and set(kinds) <= set(NO_EPSILON):
            raise ValueError(f"norm_eps={self.norm_eps!r}: the model's norms ({', '.join(kinds)}) have no epsilon")
        for norm in plan.norms():
            if norm.eps is not None and norm.kind is None and self.norm_type in NO_EPSILON:
                raise ValueError(f"a slot of the placement has eps={norm.eps!r}: {self.norm_type} has no epsilon")
        slots = (*LAYER_NORM_SLOTS, *STREAM_NORM_SLOTS)
        eps = self.norm_eps if isinstance(self.norm_eps, dict) else {None: self.norm_eps}
        for slot, value in eps.items():
            name = "norm_eps" if slot is None else f"norm_eps[{slot!r}]"
            if slot is not None and slot not in slots:
                close = get_close_matches(str(slot), slots, n=1, cutoff=0.5)
                raise ValueError(f"{name} is not a norm: use one of {close or list(slots)}")
            by_layer = value if isinstance(value, list) and slot in LAYER_NORM_SLOTS else None
            if by_layer is not None and len(by_layer) != self.num_hidden_layers:
                raise ValueError(f"{name} has {len(by_layer)} entries for num_hidden_layers={self.num_hidden_layers}")
            for number in [value] if by_layer is None else by_layer:
                if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < float("inf"):
                    raise ValueError(f"{name}={value!r} must be a number of at least 0 (a list of them per layer)")

    def validate_attention(self) -> None:
        """Layer types, window, ropes and scales fit each other and the number of layers."""
        validate_layers(self)
        for name in ("query_pre_attn_scalar", "embedding_multiplier"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value!r} must be a number above 0")

    def validate_rotary(self) -> None:
        """The rotary parameters: what Transformers would warn of, or fail at when the model is built, is refused."""
        validate_ropes(self)

    def stream_plan(self) -> StreamPlan:
        """The placement with its rules evaluated for every layer."""
        return plan_stream(
            self.norm_placement,
            self.num_hidden_layers,
            self.layer_placements,
            self.residual_scale,
            self.embedding_norm,
            self.final_norm,
            self.qk_norm,
        )

    def eps_of(self, slot: str, layer_idx: int | None = None) -> float:
        """The epsilon of the norm in `slot`, in layer `layer_idx` (0 to L - 1) if it is a layer's."""
        eps = self.norm_eps.get(slot, 1e-6) if isinstance(self.norm_eps, dict) else self.norm_eps
        return float(eps[cast(int, layer_idx)] if isinstance(eps, list) else eps)


# Transformers takes the presence of `layer_types`, whatever its value, for layers of several types: a configuration
# without any has no such attribute, nor has its class.
del PeriLlamaConfig.layer_types

__all__ = ["PeriLlamaConfig"]
