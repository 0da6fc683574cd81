"""PeriLlama: a Hugging Face model family whose norm placement is one config field.

Importing this package registers the family with Transformers' auto classes, and has every `save_pretrained`
write the code beside the weights, so that a checkpoint also loads where this package is not installed.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_periln import PeriLlamaConfig
from .modeling_periln import PeriLlamaForCausalLM, PeriLlamaModel
from .placements import PLACEMENT_NAMES, PLACEMENTS, Placement
from .version import __version__

AutoConfig.register(PeriLlamaConfig.model_type, PeriLlamaConfig, exist_ok=True)
AutoModel.register(PeriLlamaConfig, PeriLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(PeriLlamaConfig, PeriLlamaForCausalLM, exist_ok=True)
PeriLlamaConfig.register_for_auto_class()
PeriLlamaModel.register_for_auto_class("AutoModel")
PeriLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "PLACEMENTS",
    "PLACEMENT_NAMES",
    "PeriLlamaConfig",
    "PeriLlamaForCausalLM",
    "PeriLlamaModel",
    "Placement",
    "__version__",
]
