"""PeriLlama: Llama 3, except that the norms are where `norm_placement` puts them.

Every sublayer `f` (attention, then MLP) does

    x  <-  C( alpha * x  +  s * B( f( c * A(x) ) ) )

with norms or nothing in the places A (`*_input_norm`), B (`*_output_norm`) and C (`*_residual_norm`):

    post    x <- C(x + f(x))        pre     x <- x + f(A(x))
    output  x <- x + B(f(x))        peri    x <- x + B(f(A(x)))

All rows and their factors are in `placements.py`. An empty place is an `nn.Identity`: it has no parameters, and no
layer branches on its placement. Outside the layers a placement says only whether the stream is normed at its two ends,
after the embedding (`embed_norm`) and before the head (`final_norm`).

| beside this file | is |
|---|---|
| `norms.py`, `residual.py` | the norms; the add with alpha and s |
| `sublayers.py` | `f`: attention and MLP, with the norms inside them |
| `rotary.py`, `masks.py`, `embedding.py`, `loss.py`, `outputs.py`, `heads.py` | what has nothing to do with norms |
| `pretrained.py`, `generation.py`, `arguments.py`, `registration.py` | what Transformers and its neighbours ask for |

Shapes: B batch, S sequence, D hidden size, V vocabulary.
"""

import inspect

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .arguments import CACHE, one_cache, refuse_unknown
from .attention_fields import layer_types_of
from .configuration_periln import PeriLlamaConfig
from .embedding import build_embedding
from .generation import CacheUnderBothNames
from .heads import QuestionAnswering, SequenceClassification, TokenClassification
from .loss import softmax_part
from .masks import masks_by_type, positions_of
from .norms import build_norm
from .outputs import PeriLlamaCausalLMOutput, losses_without_logits, positions_with_logits, refuse_chunked_options
from .placements import LayerPlan
from .pretrained import PeriLlamaFamily
from .registration import register_everywhere
from .residual import PeriLlamaResidual, begin_stream, sublayer_input
from .rotary import build_rotary
from .slots import Norm
from .sublayers import PeriLlamaAttention, PeriLlamaMLP


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
        branch = sublayer_input(self.attn_c, branch, module_dtype)  # c
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
        branch = sublayer_input(self.mlp_c, branch, module_dtype)  # c
        branch = self.mlp(branch)  # f
        branch = self.mlp_output_norm(branch)  # B
        hidden_states = self.mlp_residual(hidden_states, branch)  # alpha * stream + s * branch
        hidden_states = self.mlp_residual_norm(hidden_states)  # C
        return hidden_states


class PeriLlamaPreTrainedModel(PeriLlamaFamily):
    config: PeriLlamaConfig
    config_class = PeriLlamaConfig
    _no_split_modules = ["PeriLlamaDecoderLayer"]
    _can_record_outputs = {
        "hidden_states": PeriLlamaDecoderLayer,
        "attentions": PeriLlamaAttention,
    }


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
        given = (kwargs.get("cu_seq_lens_q"), attention_mask, cache, use_cache)
        position_ids, mask_positions = positions_of(inputs_embeds, position_ids, *given)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        normed = self.embed_norm(inputs_embeds)
        hidden_states, module_dtype = begin_stream(normed, self.config.residual_dtype, inputs_embeds.dtype)

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


class PeriLlamaForCausalLM(PeriLlamaPreTrainedModel, CacheUnderBothNames, GenerationMixin):
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
        if not skip_logits:
            refuse_chunked_options(z_loss, loss_scale)
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

        logits, losses = None, {}
        if skip_logits:
            given = (labels, kwargs, z_loss, loss_scale, self.loss_softmax)
            losses = losses_without_logits(hidden_states, self.lm_head, *given)
        else:
            logits = self.lm_head(positions_with_logits(hidden_states, logits_to_keep))
            if labels is not None or kwargs.get("shift_labels") is not None:
                vocab_size = self.config.vocab_size
                losses["loss"] = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return PeriLlamaCausalLMOutput(
            **losses,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    # For remote code generate() asks for the signature at every token: it is computed here, once, and set on the
    # function below the decorators, where no wrapper copies it (a hook's copy would count `self` among the arguments).
    inspect.unwrap(forward).__signature__ = inspect.signature(forward)


class PeriLlamaForSequenceClassification(SequenceClassification, PeriLlamaPreTrainedModel):
    """One label a sequence, read at its last token that is not padding; logits (B, num_labels)."""

    base = PeriLlamaModel


class PeriLlamaForTokenClassification(TokenClassification, PeriLlamaPreTrainedModel):
    """One label a token; logits (B, S, num_labels)."""

    base = PeriLlamaModel


class PeriLlamaForQuestionAnswering(QuestionAnswering, PeriLlamaPreTrainedModel):
    """The span that answers: two logits a token, for its start and its end, each (B, S)."""

    base = PeriLlamaModel


register_everywhere()

__all__ = [
    "PeriLlamaForCausalLM",
    "PeriLlamaForQuestionAnswering",
    "PeriLlamaForSequenceClassification",
    "PeriLlamaForTokenClassification",
    "PeriLlamaModel",
    "PeriLlamaPreTrainedModel",
]
