"""What Transformers asks of every class of a family: its abilities, and how its weights are initialized."""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel


class PeriLlamaFamily(PreTrainedModel):
    """The part of `PeriLlamaPreTrainedModel` that names no module of the model."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True

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
        reset = getattr(module, "reset", None)  # of our norms and learned factors
        if isinstance(module, nn.Linear):
            std = self.config.initializer_range * getattr(module, "init_gain", 1.0)
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif callable(reset):
            reset()
        else:
            super()._init_weights(module)
            reset_scale = getattr(module, "reset_scale", None)  # of our scaled embedding
            if callable(reset_scale):
                reset_scale()
