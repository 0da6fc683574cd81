"""PeriLlama: Llama 3, except that the norms are where `norm_placement` puts them.

Every sublayer `f` (attention, then MLP) does

    x  <-  C( alpha * x  +  s * B( f( c * A(x) ) ) )

with norms or nothing in the places A (`*_input_norm`), B (`*_output_norm`) and C (`*_residual_norm`):

    post    x <- C(x + f(x))        pre     x <- x + f(A(x))
    output  x <- x + B(f(x))        peri    x <- x + B(f(A(x)))

All rows and their factors are in `placements.py`. An empty place is an `nn.Identity`: it has no parameters, and no
layer branches on its placement. Outside the layers a placement says only whether the stream is normed at its two ends,
after the embedding (`embed_norm`) and before the head (`final_norm`).

Shapes: B batch, S sequence, D hidden size, H query heads, K key/value heads, E head size, V vocabulary.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .arguments import CACHE, one_cache, refuse_unknown, update_cache
from .attention_fields import SLIDING, layer_types_of
from .configuration_periln import PeriLlamaConfig
from .embedding import build_embedding
from .loss import IGNORE_INDEX, chunked_losses, shift_labels, softmax_part
from .masks import masks_by_type, positions_of_packed
from .norms import make_norm
from .placements import LayerPlan
from .registration import register_everywhere
from .residual import PeriLlamaResidual, times
from .rotary import build_rotary, rotation_of
from .slots import Norm


def build_norm(
    config: PeriLlamaConfig,
    slot: str,
    norm: Norm | None,
    layer_idx: int | None = None,
    size: int | None = None,
    learnable: bool = True,
) -> nn.Module:
    """The norm of a slot, over `size` channels (the hidden size by default); an identity where there is none."""
    if norm is None:
        return nn.Identity()
    eps = config.eps_of(slot, layer_idx) if norm.eps is None else norm.eps
    kind, gain = norm.kind or config.norm_type, norm.gain or config.norm_gain
    return make_norm(kind, gain, size or config.hidden_size, eps, learnable, config.num_attention_heads)


class PeriLlamaMLP(nn.Module):
    """Llama's gated MLP (SwiGLU), with a norm before the last projection where the placement has one."""

    def __init__(self, config: PeriLlamaConfig, layer_idx: int, plan: LayerPlan):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        size = config.intermediate_size
        self.inner_norm = build_norm(config, "mlp_inner_norm", plan.mlp.inner_norm, layer_idx, size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gated = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(self.inner_norm(gated))


class PeriLlamaAttention(nn.Module):
    """Llama's attention, rotary and grouped-query; queries, keys, values and the heads' outputs may be normed."""

    def __init__(self, config: PeriLlamaConfig, layer_idx: int, plan: LayerPlan):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = cast(int, config.head_dim)
        kv_heads = cast(int, config.num_key_value_heads)
        self.num_key_value_groups = config.num_attention_heads // kv_heads
        self.scaling = float(config.query_pre_attn_scalar or self.head_dim) ** -0.5
        self.sliding_window = config.sliding_window if layer_types_of(config)[layer_idx] == SLIDING else None
        self.rotate = rotation_of(config, layer_idx)
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        q_size, kv_size = config.num_attention_heads * self.head_dim, kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.attention_bias)

        # Norms on q, k and v: over all heads before they are split, or over each head after it.
        self.spans = {slot: norm.over for slot, norm in plan.projections.items()}
        for slot, norm in plan.projections.items():
            full = q_size if slot == "q_norm" else kv_size
            size = full if norm.over == "full" else self.head_dim
            self.add_module(slot, build_norm(config, slot, norm, layer_idx, size))
        self.inner_norm = build_norm(config, "attn_inner_norm", plan.attn.inner_norm, layer_idx, q_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cache = one_cache(cache, past_key_values, kwargs)
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)

        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        query, key, value = self._normed("full", query, key, value)
        query, key, value = query.view(hidden_shape), key.view(hidden_shape), value.view(hidden_shape)  # B S H|K E
        query, key, value = self._normed("head", query, key, value)
        query, key = self.rotate(query, *position_embeddings), self.rotate(key, *position_embeddings)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # B H|K S E

        if cache is not None:
            key, value = update_cache(cache, key, value, self.layer_idx, kwargs)

        attention_interface: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        attn_output = self.inner_norm(attn_output.reshape(*input_shape, -1).contiguous())
        return self.o_proj(attn_output), attn_weights

    def _normed(self, span: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """q, k and v, each through its norm if that is over `span`."""
        slots = zip(("q_norm", "k_norm", "v_norm"), tensors, strict=True)
        return [getattr(self, slot)(x) if self.spans.get(slot) == span else x for slot, x in slots]


class PeriLlamaDecoderLayer(GradientCheckpointingLayer):
    """The equation twice, with f the attention and then the MLP; `plan` says which norms are there, and the factors."""

    def __init__(self, config: PeriLlamaConfig, layer_idx: int, plan: LayerPlan):
        super().__init__()

        def norm(slot: str, spec: Norm | None, learnable: bool = True) -> nn.Module:
            return build_norm(config, slot, spec, layer_idx, learnable=learnable)

        gamma, attn, mlp = config.output_norm_learnable, plan.attn, plan.mlp

        self.attn_input_norm = norm("attn_input_norm", attn.input_norm)
        self.attn_c = attn.c
        self.self_attn = PeriLlamaAttention(config, layer_idx, plan)
        self.attn_output_norm = norm("attn_output_norm", attn.output_norm, gamma)
        self.attn_residual = PeriLlamaResidual(attn.alpha, attn.s, config.hidden_size)
        self.attn_residual_norm = norm("attn_residual_norm", attn.residual_norm)

        self.mlp_input_norm = norm("mlp_input_norm", mlp.input_norm)
        self.mlp_c = mlp.c
        self.mlp = PeriLlamaMLP(config, layer_idx, plan)
        self.mlp_output_norm = norm("mlp_output_norm", mlp.output_norm, gamma)
        self.mlp_residual = PeriLlamaResidual(mlp.alpha, mlp.s, config.hidden_size)
        self.mlp_residual_norm = norm("mlp_residual_norm", mlp.residual_norm)

        # Read by `_init_weights`, leaf by leaf: outside Transformers' own tree a rule for a container never runs.
        depth = (2 * config.num_hidden_layers) ** -0.5 if config.depth_scaled_init else 1.0
        for linear in (self.self_attn.v_proj, self.mlp.gate_proj, self.mlp.up_proj):
            linear.init_gain = plan.init_gain
        for linear in (self.self_attn.o_proj, self.mlp.down_proj):
            linear.init_gain = plan.init_gain * depth

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        module_dtype: torch.dtype | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        cache = one_cache(cache, past_key_values, kwargs)

        # Attention
        branch = self.attn_input_norm(hidden_states)  # A
        branch = _sublayer_input(self.attn_c, branch, module_dtype)  # c
        branch, _ = self.self_attn(  # f
            branch,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE: cache},
            **kwargs,
        )
        branch = self.attn_output_norm(branch)  # B
        hidden_states = self.attn_residual(hidden_states, branch)  # alpha * stream + s * branch
        hidden_states = self.attn_residual_norm(hidden_states)  # C

        # MLP
        branch = self.mlp_input_norm(hidden_states)  # A
        branch = _sublayer_input(self.mlp_c, branch, module_dtype)  # c
        branch = self.mlp(branch)  # f
        branch = self.mlp_output_norm(branch)  # B
        hidden_states = self.mlp_residual(hidden_states, branch)  # alpha * stream + s * branch
        return self.mlp_residual_norm(hidden_states)  # C


def _sublayer_input(c: float, x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """c * x, in `dtype` if the stream's dtype differs from the module's."""
    x = times(c, x)
    return x if dtype is None else x.to(dtype)


class PeriLlamaPreTrainedModel(PreTrainedModel):
    """What Transformers asks of every class of a family: its abilities, and how its weights are initialized."""

    config: PeriLlamaConfig
    config_class = PeriLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PeriLlamaDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": PeriLlamaDecoderLayer,
        "attentions": PeriLlamaAttention,
    }

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """As Transformers', whose pipeline knows only a final norm called `norm`, and no embedding norm: a stage that
        does not hold an end of the stream has no norm there.
        """
        model = super().maybe_distribute_model(model, distributed_config, mesh_manager)
        stage = getattr(model, "_pp_stage", None)
        if stage is not None:
            if not stage.pp_is_first_stage:
                model.base_model.embed_norm = nn.Identity()
            if not stage.pp_is_last_stage:
                model.base_model.final_norm = nn.Identity()
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            std = self.config.initializer_range * getattr(module, "init_gain", 1.0)
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif hasattr(module, "reset"):  # our norms and learned factors
            module.reset()
        else:
            super()._init_weights(module)
            if hasattr(module, "reset_scale"):  # our scaled embedding
                module.reset_scale()


class PeriLlamaModel(PeriLlamaPreTrainedModel):
    """Everything up to the head: embedding, its norm, the layers, the final norm."""

    def __init__(self, config: PeriLlamaConfig):
        config.validate_sizes()  # a field may have been set since the configuration was made
        config.validate_norms()
        config.validate_attention()
        super().__init__(config)
        plan = config.stream_plan()
        self.embed_tokens = build_embedding(config.vocab_size, config.hidden_size, config.embedding_multiplier)
        self.embed_norm = build_norm(config, "embed_norm", plan.embedding_norm)
        self.layers = nn.ModuleList(PeriLlamaDecoderLayer(config, i, row) for i, row in enumerate(plan.layers))
        self.final_norm = build_norm(config, "final_norm", plan.final_norm)
        self.rotary_emb = build_rotary(config)
        self.layer_types = layer_types_of(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Token ids (B, S), or embeddings (B, S, D), to the last hidden state (B, S, D).

        Documents packed into one row are told apart by `position_ids` that restart, or by `cu_seq_lens_q` (0, the
        documents' ends), whatever the positions; both need `use_cache=False` and no mask.

        The cache is `cache`, or `past_key_values` as it was called before Transformers 5.24; both names work with
        every version, and the output has the name of the version installed.

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds`; `cu_seq_lens_q` without `position_ids` for
                more than one row, or with a cache or a mask; two caches.
            TypeError: an unknown argument that carries a cache, a mask or positions.
        """
        refuse_unknown(kwargs)
        cache = one_cache(cache, past_key_values, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        mask_positions, cu_seq_lens = None, kwargs.get("cu_seq_lens_q")
        if cu_seq_lens is not None:
            # Flash attention alone reads `cu_seq_lens_*`; the masks of the others are made from positions.
            if not use_cache and cache is None and attention_mask is None and inputs_embeds.shape[0] == 1:
                mask_positions = positions_of_packed(cu_seq_lens.to(inputs_embeds.device), inputs_embeds.shape[1])
                position_ids = mask_positions if position_ids is None else position_ids
            elif position_ids is None:
                raise ValueError(
                    "cu_seq_lens_q packs documents into one row: it needs a batch of 1, use_cache=False and no "
                    "attention_mask, or position_ids of your own"
                )
        if mask_positions is None:
            mask_positions = position_ids  # given: they may restart, which the mask must know
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            offset = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0) + offset

        # The one cast of the stream. Where it differs from the weights' dtype and no autocast corrects that, each
        # sublayer's input is cast back (`module_dtype`).
        hidden_states, module_dtype = self.embed_norm(inputs_embeds), None
        if self.config.residual_dtype is not None:
            device = inputs_embeds.device.type
            if device == "meta" or not torch.is_autocast_enabled(device):
                module_dtype = inputs_embeds.dtype
            hidden_states = hidden_states.to(getattr(torch, self.config.residual_dtype))

        types = dict.fromkeys(self.layer_types)
        masks = masks_by_type(
            types,
            attention_mask,
            config=self.config,
            inputs_embeds=inputs_embeds if module_dtype is not None else hidden_states,
            position_ids=mask_positions,
            **{CACHE: cache},
        )
        ropes = self.rotary_emb.by_type(types, inputs_embeds, position_ids)

        layers = self.layers[: self.config.num_hidden_layers]
        for layer_type, decoder_layer in zip(self.layer_types, layers, strict=False):
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=masks[layer_type],
                position_embeddings=ropes[layer_type],
                position_ids=position_ids,
                use_cache=use_cache,
                module_dtype=module_dtype,
                **{CACHE: cache},
                **kwargs,
            )
        hidden_states = self.final_norm(hidden_states)
        if module_dtype is not None:
            hidden_states = hidden_states.to(module_dtype)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE: cache})


def _slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions (B, S, D) that get logits: the last n, a 1-D index or a 2-D index or mask (flattened)."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return hidden_states.gather(1, logits_to_keep[..., None].expand(-1, -1, hidden_states.shape[-1]))


@dataclass
class PeriLlamaCausalLMOutput(CausalLMOutputWithPast):
    """As for every causal LM; with a z term, `loss` is the sum of `cross_entropy` and `z_loss`."""

    z_loss: torch.Tensor | None = None
    cross_entropy: torch.Tensor | None = None


class PeriLlamaForCausalLM(PeriLlamaPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    loss_softmax = staticmethod(softmax_part)  # a trainer may replace it by a compiled one

    def __init__(self, config: PeriLlamaConfig):
        super().__init__(config)
        self.model = PeriLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        z_loss: float = 0.0,
        loss_scale: torch.Tensor | float | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PeriLlamaCausalLMOutput:
        """Logits (B, S, V), and with `labels` (B, S; -100 does not count) the mean next-token cross entropy.

        `skip_logits=True` computes the loss chunk by chunk and returns `logits=None`: no logits of the whole
        batch ever exist. `shift_labels` (already shifted) and `num_items_in_batch` travel in `kwargs`, as in
        every Transformers model. `z_loss` is the coefficient of a term that is added to the loss, and `loss_scale`
        what the caller multiplies the loss by before backward, so that its gradient can be made at once (`loss.py`).

        Raises:
            ValueError: `skip_logits=True` without labels, or `z_loss` or `loss_scale` without `skip_logits`.
        """
        cache = one_cache(cache, past_key_values, kwargs)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: cache},
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state

        logits, loss, z_term, cross_entropy = None, None, None, None
        if z_loss and not skip_logits:
            raise ValueError(f"z_loss={z_loss} is part of the chunked loss: give skip_logits=True as well")
        if loss_scale is not None and not skip_logits:
            raise ValueError(f"loss_scale={loss_scale} is for the chunked loss: give skip_logits=True as well")
        if skip_logits:
            targets = kwargs.get("shift_labels")
            if targets is None and labels is None:
                raise ValueError("skip_logits=True needs labels: without them there is nothing to return")
            ignored = kwargs.get("ignore_index", IGNORE_INDEX)
            targets = shift_labels(labels, ignored) if targets is None else targets
            items = kwargs.get("num_items_in_batch")
            more: dict[str, Any] = {"z_loss": z_loss, "loss_scale": loss_scale, "softmax": self.loss_softmax}
            loss, z_term = chunked_losses(hidden_states, self.lm_head, targets, items, ignore_index=ignored, **more)
            if z_term is not None:
                cross_entropy, loss = loss, loss + z_term
        else:
            logits = self.lm_head(_slice_logits_to_keep(hidden_states, logits_to_keep))
            if labels is not None or kwargs.get("shift_labels") is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return PeriLlamaCausalLMOutput(
            loss=loss,
            z_loss=z_term,
            cross_entropy=cross_entropy,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    # For remote code generate() asks for the signature at every token: it is computed here, once, and set on the
    # function below the decorators, where no wrapper copies it (a hook's copy would count `self` among the arguments).
    inspect.unwrap(forward).__signature__ = inspect.signature(forward)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        # The cache under its old name too: PEFT 0.21's prompt learning looks for it there, and where it finds none it
        # puts the prompt before every token that is generated.
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if "cache" in inputs:
            inputs.setdefault("past_key_values", inputs["cache"])
        return inputs


# Transformers' generic heads. Their own `__init__` asks AutoModel for the base model, and AutoModel does not know a
# family that was loaded as remote code: hence ours, which builds the same modules under the same names.


class PeriLlamaForSequenceClassification(GenericForSequenceClassification, PeriLlamaPreTrainedModel):
    """One label a sequence, read at its last token that is not padding; logits (B, num_labels)."""

    def __init__(self, config: PeriLlamaConfig):
        PeriLlamaPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = PeriLlamaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class PeriLlamaForTokenClassification(GenericForTokenClassification, PeriLlamaPreTrainedModel):
    """One label a token; logits (B, S, num_labels)."""

    def __init__(self, config: PeriLlamaConfig):
        PeriLlamaPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = PeriLlamaModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class PeriLlamaForQuestionAnswering(GenericForQuestionAnswering, PeriLlamaPreTrainedModel):
    """The span that answers: two logits a token, for its start and its end, each (B, S)."""

    def __init__(self, config: PeriLlamaConfig):
        PeriLlamaPreTrainedModel.__init__(self, config)
        self.model = PeriLlamaModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


register_everywhere()

__all__ = [
    "PeriLlamaForCausalLM",
    "PeriLlamaForQuestionAnswering",
    "PeriLlamaForSequenceClassification",
    "PeriLlamaForTokenClassification",
    "PeriLlamaModel",
    "PeriLlamaPreTrainedModel",
]
