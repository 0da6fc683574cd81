"""PeriLlama: a Hugging Face model family whose norm placement is one config field.

Importing this package registers the family with Transformers' auto classes, and has every `save_pretrained`
write the code next to the weights, so that a checkpoint also loads where this package is not installed.
"""

import importlib.util

import transformers

from .configuration_periln import AUTO_MAP, PeriLlamaConfig
from .modeling_periln import (
    PeriLlamaForCausalLM,
    PeriLlamaForQuestionAnswering,
    PeriLlamaForSequenceClassification,
    PeriLlamaForTokenClassification,
    PeriLlamaModel,
)
from .placements import PLACEMENT_NAMES, PLACEMENTS, Placement
from .version import __version__

transformers.AutoConfig.register(PeriLlamaConfig.model_type, PeriLlamaConfig, exist_ok=True)
PeriLlamaConfig.register_for_auto_class()
for _auto_class, _reference in AUTO_MAP.items():
    if _auto_class != "AutoConfig":
        _model_class = globals()[_reference.split(".")[-1]]
        getattr(transformers, _auto_class).register(PeriLlamaConfig, _model_class, exist_ok=True)
        _model_class.register_for_auto_class(_auto_class)

# PEFT finds the modules to adapt by `model_type`. Our linear layers have Llama's names; our norms do not.
if importlib.util.find_spec("peft") is not None:
    from peft.utils import constants as _peft

    for _name, _targets in vars(_peft).items():
        if _name.endswith("_MODULES_MAPPING") and "_LNTUNING_" not in _name and "llama" in _targets:
            _targets.setdefault(PeriLlamaConfig.model_type, _targets["llama"])

__all__ = [
    "PLACEMENTS",
    "PLACEMENT_NAMES",
    "PeriLlamaConfig",
    "PeriLlamaForCausalLM",
    "PeriLlamaForQuestionAnswering",
    "PeriLlamaForSequenceClassification",
    "PeriLlamaForTokenClassification",
    "PeriLlamaModel",
    "Placement",
    "__version__",
]
